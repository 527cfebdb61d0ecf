"""Fold, slice, swap: from a gated model to the smaller model that computes the same function."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from gatepress import modeling_gatepress
from gatepress.config import Layout
from gatepress.costs import Costs
from gatepress.embedding import embedder_class, embeds
from gatepress.errors import ModelError
from gatepress.families import ROLES
from gatepress.inject import gated_linear
from gatepress.plan import ZERO_ROW, LayerPlan, Live, MatrixPlan, PrunePlan, make_plan
from gatepress.resolve import Layer, family_of, model_class, resolve


def plan_model(model: PreTrainedModel, layout: Layout, costs: Costs | None = None) -> PrunePlan:
    """Return the plan of a gated model, without changing the model; `costs` None: the analytic ones."""
    layers = resolve(model)
    return make_plan(layers, live_parts(model, layers), layout, costs)


def live_parts(model: PreTrainedModel, layers: list[Layer]) -> list[dict[str, Live]]:
    """Return which parts of each folded matrix are not zero: role -> `Live`, per layer. Folds one matrix at a time."""
    return [{role: Live.of(*gated_linear(model, layer, role).folded()) for role in ROLES} for layer in layers]


def cut(model: PreTrainedModel, plan: PrunePlan, *, consume: bool = False) -> PreTrainedModel:
    """Return a new float32 model on the CPU that follows `plan` and equals the gated `model`.

    What is not pruned is shared with the gated model. With `consume`, each gated matrix releases its memory as soon
    as its smaller form exists, so the two models are never in memory together; the gated model cannot be used
    afterwards. Raises `ModelError` if the activation does not map 0 to 0, because a closed neuron would then still
    have an effect.
    """
    refuse_activation(model)
    layers = resolve(model)
    config = _pruned_config(model, layers, plan)
    if embeds(model):
        pruned_class = embedder_class(config.model_type)
    else:
        pruned_class = model_class(family_of(model.config), stock=plan.layout == "stock")
    with _Unfilled():
        pruned: PreTrainedModel = pruned_class(config)
    state = _pruned_state(model, layers, plan, consume=consume)
    if plan.layout == "stock":
        _as_stock_(state, model, layers)
    pruned.load_state_dict(state, strict=True, assign=True)
    pruned.eval()
    return pruned


class _Unfilled(TorchFunctionMode):
    """In this thread, what modules make with `torch.empty` has no memory: their matrices, and no buffer of a family.

    accelerate's `init_empty_weights` changes the class of all modules instead, so those that other threads make
    meanwhile are without values too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


def refuse_activation(model: PreTrainedModel) -> None:
    """Raise `ModelError` if a closed neuron would still have an effect."""
    activation = getattr(model.config, family_of(model.config).activation_attribute, "gelu")
    if float(ACT2FN[activation](torch.zeros(1))) != 0:
        raise ModelError(f"activation {activation!r} does not map 0 to 0, so closed neurons cannot be removed exactly")


def _pruned_config(model: PreTrainedModel, layers: list[Layer], plan: PrunePlan) -> Any:
    """Return the config of the pruned class: the dense one, with the narrower sizes as data."""
    family = family_of(model.config)
    values = {
        k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version", "auto_map")
    }
    values["architectures"] = None
    if plan.layout == "stock":
        values[family.intermediate_attribute] = len(plan.layers[0].matrices["down"].columns)
        return type(model.config)(**values)
    return model_class(family).config_class(**values, gatepress=describe(layers, plan))


def describe(layers: list[Layer], plan: PrunePlan) -> dict[str, Any]:
    """Return `config.gatepress` in the form that `modeling_gatepress.shrink_` reads."""
    linears, attentions = {}, {}
    for layer, part in zip(layers, plan.layers, strict=True):
        for role, matrix in part.matrices.items():
            if matrix.rows:
                linears[layer.paths[role]] = {
                    "rows": len(matrix.rows),
                    "columns": len(matrix.columns),
                    "gathered": matrix.gathered,
                    "scattered": matrix.scattered,
                }
        attentions[layer.attention] = layer.attention_part(part.heads, part.qk_width, part.vo_width)
    asked = all(part["qk_width"] for part in attentions.values())  # version 2 only if needed: older code reads 1
    return {"version": 1 if asked else 2, "linears": linears, "attentions": attentions}


def pairs_of(layer: Layer, plan: LayerPlan) -> Tensor | None:
    """Return which pair of the dense head each pair of a key was [heads of keys * qk_width / 2]; None: no pairs."""
    if layer.apart("k") is None or not plan.qk_width:
        return None
    k = plan.matrices["k"]
    computed = list(range(k.dense_shape[0])) if k.scattered else k.rows
    first = _index(computed).view(len(plan.heads) // layer.group, 2, -1)[:, 0].flatten()
    return first.clamp_min(0) % layer.head_width  # any angle turns zeros into zeros


def _pruned_state(model: PreTrainedModel, layers: list[Layer], plan: PrunePlan, *, consume: bool) -> dict[str, Tensor]:
    """Return the pruned model's state: sliced matrices, everything else unchanged (float32, on the CPU)."""
    base = f"{model.base_model_prefix}."
    paths = {layer.paths[role] for layer in layers for role in ROLES}
    gated = tuple(f"{base}{path}." for path in paths)
    state = {
        name: value.detach().cpu().float() if value.is_floating_point() else value.cpu()
        for name, value in model.state_dict().items()
        if not name.startswith(gated)
    }
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        for role, matrix in layer_plan.matrices.items():
            linear = gated_linear(model, layer, role)
            weight, bias = linear.folded()
            if consume:
                linear.base.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
            if not matrix.rows:
                continue
            prefix = f"{base}{layer.paths[role]}."
            rows = _index(matrix.rows)
            state[f"{prefix}weight"] = _take(_take(weight.cpu(), rows, 0), _index(matrix.columns), 1)
            if bias is not None:
                state[f"{prefix}bias"] = _take(bias.cpu(), rows, 0)
            if matrix.gathered:
                state[f"{prefix}in_index"] = _index(matrix.columns)
            if matrix.scattered:
                state[f"{prefix}out_index"] = _spread(matrix)
        pairs = pairs_of(layer, layer_plan)
        if pairs is not None:
            state[f"{base}{layer.attention}.pairs"] = pairs
    return state


def _as_stock_(state: dict[str, Tensor], model: PreTrainedModel, layers: list[Layer]) -> None:
    """Give the state the matrices of the family's own class again, in place: one of q, k and v, two of `up`."""
    family = family_of(model.config)
    base = f"{model.base_model_prefix}."
    for layer in layers:
        state.pop(f"{base}{layer.attention}.pairs", None)
        for kind in ("weight", "bias"):
            parts = [f"{base}{layer.paths[role]}.{kind}" for role in ("q", "k", "v")]
            if family.qkv and parts[0] in state:
                joined = torch.cat([state.pop(name) for name in parts])
                state[f"{base}{layer.path}.{family.qkv}.{kind}"] = joined
            up = f"{base}{layer.paths['up']}.{kind}"
            if family.halves and up in state:
                halves = state.pop(up).chunk(2)
                for path, half in zip(family.halves, halves, strict=True):
                    state[f"{base}{layer.path}.{path}.{kind}"] = half.clone()


def _index(positions: list[int]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long)


def _take(values: Tensor, index: Tensor, axis: int) -> Tensor:
    """Select along `axis`; `ZERO_ROW` gives zeros."""
    taken = values.index_select(axis, index.clamp_min(0))
    zero = index == ZERO_ROW
    if zero.any():
        taken.index_fill_(axis, torch.nonzero(zero).flatten(), 0)
    return taken.contiguous()


def _spread(matrix: MatrixPlan) -> Tensor:
    """Return [dense out]: for each dense output, the row that computes it, or `rows` for exact zero."""
    index = torch.full((matrix.dense_shape[0],), len(matrix.rows))
    index[_index(matrix.rows)] = torch.arange(len(matrix.rows))
    return index


def ship_code(config: dict[str, Any], directory: Path) -> None:
    """Copy the modeling file beside the weights and name its classes in `config` (config.json), in place.

    With it, plain transformers loads the directory by `trust_remote_code=True`, without gatepress.
    """
    source = Path(modeling_gatepress.__file__)
    shutil.copyfile(source, directory / source.name)
    class_name = str(config["architectures"][0])
    kind = next(kind for kind in ("ForSequenceClassification", "Model") if class_name.endswith(kind))
    family = f"{source.stem}.{class_name.removesuffix(kind)}"
    headed = f"AutoModel{kind.removeprefix('Model')}"  # of an embedder, AutoModel itself
    config["auto_map"] = {
        "AutoConfig": f"{family}Config",
        "AutoModel": f"{family}Model",
        headed: f"{family}{kind}",
    }


def parameters_of(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
