"""What a run adds to a model, trains and keeps: gates, or the alternatives that can be trained on the same model.

Adapters are peft's, as its users know them: LoRA, LoRA-FA (LoRA whose A stays as it was drawn) and VeRA.
LoRA-XS is in no release of peft, so `LoraXsLinear` stands in: a trained r x r matrix between the frozen
singular vectors of the weight (Balazy et al., 2024, arXiv:2405.17604). Adapters are merged into the weights
when a run is opened, so what they trained is an ordinary dense model.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gatepress.config import Method, TrainSettings
from gatepress.errors import UsageError
from gatepress.families import ROLES
from gatepress.gates import GatedLinear, gates_of
from gatepress.inject import attach_gates_, in_head, replace_module_, trainable
from gatepress.resolve import Layer, resolve

Kinds = dict[str, dict[str, nn.Parameter]]

XS_START = 1e-5  # standard deviation of the trained matrix: training starts at the pretrained model


class LoraXsLinear(nn.Module):
    """y = (W + B R A) x + b with W, A [r, in] and B [out, r] frozen, R [r, r] trained; B A is the best rank r of W."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        u, s, vh = torch.linalg.svd(base.weight.detach().float(), full_matrices=False)
        self.a = nn.Parameter(vh[:rank].contiguous(), requires_grad=False)
        self.b = nn.Parameter((u[:, :rank] * s[:rank]).contiguous(), requires_grad=False)
        self.r = nn.Parameter(torch.empty(self.a.shape[0], self.b.shape[1]).normal_(std=XS_START))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to y [..., out]."""
        low = functional.linear(functional.linear(x, self.a), self.r)
        return functional.linear(x, self.base.weight, self.base.bias) + functional.linear(low, self.b)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight."""
        self.base.weight += self.b @ self.r @ self.a

    def get_base_layer(self) -> nn.Linear:
        """Return the dense matrix, under the name that peft uses."""
        return self.base


ADAPTERS = (BaseTunerLayer, LoraXsLinear)


def prepare_(model: PreTrainedModel, settings: TrainSettings) -> list[Layer]:
    """Add what the method of `settings` trains, in place; return the layers. Everything else is frozen."""
    if settings.gated:
        return attach_gates_(
            model,
            granularity=settings.granularity,
            controller=settings.controller,
            lora_rank=settings.rank,
            lora_matrices=settings.low_rank_in,
            axes=settings.gate_axes,
            matrices=settings.matrices,
            rotate_heads=bool(settings.rotate_heads),
        )
    layers = resolve(model)
    model.requires_grad_(False)
    if attach_ := ATTACH[settings.method]:
        attach_(model, _paths(layers, settings), settings)
    return layers


def _paths(layers: list[Layer], settings: TrainSettings) -> list[str]:
    """Return the paths of the matrices that take part; `UsageError` if one of them holds others too."""
    roles = {
        path: [other for other in ROLES if path in layer.held_in(other)]
        for layer in layers
        for role in settings.matrices
        for path in layer.held_in(role)
    }
    for path, held in roles.items():
        if not set(held) <= set(settings.matrices):
            raise UsageError(
                f"--matrices is {','.join(settings.matrices)}, but with --method {settings.method} {path} is one "
                f"matrix of {', '.join(held)}; name all of these or none"
            )
    return list(roles)


def refuse_rank(model: PreTrainedModel, settings: TrainSettings) -> None:
    """Raise `UsageError` if LoRA-XS is asked for more singular values than a matrix has."""
    if settings.method != "lora-xs":
        return
    sides = [min(layer.shapes[role]) for layer in resolve(model) for role in settings.matrices]
    if settings.rank > min(sides):
        most = f"{min(sides)}, the singular values of a matrix"
        raise UsageError(f"--lora-rank is {settings.rank}, expected at most {most}")


def trained(model: PreTrainedModel, settings: TrainSettings) -> Kinds:
    """Return what a run trains: kind -> name -> parameter."""
    if settings.gated:
        return trainable(
            model,
            biases=settings.train_biases,
            layer_norms=settings.train_layer_norms,
            matrices=settings.matrices,
        )
    adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = dict(model.named_parameters())
    head = {name: parameter for name, parameter in named.items() if in_head(model, name)}
    if settings.method == "full":
        return {"base": {name: value for name, value in named.items() if name not in head}, "head": head}
    return {"low_rank": {name: value for name, value in adapted.items() if name not in head}, "head": head}


def kept(model: PreTrainedModel, settings: TrainSettings) -> dict[str, Tensor]:
    """Return everything that a run directory holds of a prepared model, by name: what the base model does not know."""
    if settings.gated:
        kinds = trainable(model, biases=True, layer_norms=True)
        state = {name: value.detach() for group in kinds.values() for name, value in group.items()}
        for name, gate in gates_of(model):
            state |= {f"{name}.{part}": value for part, value in gate.named_buffers()}
    else:
        state = {name: value.detach() for group in trained(model, settings).values() for name, value in group.items()}
        state |= dict(_adapter_tensors(model))
    return {name: value.cpu().contiguous() for name, value in _once(state)}


def merge_(model: PreTrainedModel) -> None:
    """Add every adapter to its weight and remove it, in place, which leaves an ordinary dense model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ADAPTERS):
            module.merge()
            replace_module_(model, path, module.get_base_layer())


def _lora_(model: PreTrainedModel, paths: list[str], settings: TrainSettings) -> None:
    alpha = int(GatedLinear.LORA_SCALE * settings.rank)
    _attach_peft_(model, LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=_whole(model, paths)))


def _lora_fa_(model: PreTrainedModel, paths: list[str], settings: TrainSettings) -> None:
    _lora_(model, paths, settings)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def _vera_(model: PreTrainedModel, paths: list[str], settings: TrainSettings) -> None:
    config = VeraConfig(r=settings.rank, target_modules=_whole(model, paths), projection_prng_key=settings.seed)
    _attach_peft_(model, config)


def _lora_xs_(model: PreTrainedModel, paths: list[str], settings: TrainSettings) -> None:
    base: Any = model.base_model
    for path in paths:
        replace_module_(base, path, LoraXsLinear(base.get_submodule(path), settings.rank))


# Method -> what puts its adapters on the matrices at the paths below the encoder; None: the weights themselves train.
ATTACH: dict[Method, Callable[[PreTrainedModel, list[str], TrainSettings], None] | None] = {
    "full": None,
    "lora": _lora_,
    "lora-fa": _lora_fa_,
    "vera": _vera_,
    "lora-xs": _lora_xs_,
}


def _whole(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """Return the paths as they are seen from the whole model."""
    return [f"{model.base_model_prefix}.{path}" for path in paths]


def _attach_peft_(model: PreTrainedModel, config: PeftConfig) -> None:
    """Let peft put its adapters into `model`; its wrapper is not needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what peft asks transformers, not about anything asked here
        get_peft_model(model, config)


def _adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of what adapters hold besides the weights they adapt, frozen projections included."""
    for path, module in model.named_modules():
        if isinstance(module, ADAPTERS) and isinstance(module, nn.Module):
            for name, value in module.state_dict(prefix=f"{path}.").items():
                if not name.startswith((f"{path}.base.", f"{path}.base_layer.")):
                    yield name, value


def _once(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under their first name only: VeRA's projections are shared by all matrices."""
    seen = set()
    for name, value in state.items():
        place = (value.data_ptr(), value.shape)
        if place not in seen or not value.numel():
            seen.add(place)
            yield name, value
