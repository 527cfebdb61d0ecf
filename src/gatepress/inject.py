"""Put gates into a model. The granularities are lists of sites over one mechanism.

`matrix` (the paper): an in and an out vector on each of the six matrices of a layer.
`structured`: one vector per inner dimension, at the one place where it multiplies: query/key
dimensions at the rows of q, value/output dimensions at the columns of o, neurons at the columns of
down. Closure (plan.py) then removes the matching rows of k, v and up as well, so the whole
sparsity is spent where it pays.
`heads`: the same, with one gate for a whole head, at its columns of o; all of its q, k and v go with it.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gatepress.config import Controller, GateAxes, Granularity
from gatepress.errors import UsageError
from gatepress.families import ROLES
from gatepress.gates import Gate, GatedLinear, SharedGate
from gatepress.modeling_gatepress import join_, narrow_attention_, split_
from gatepress.projections import PROJECTIONS
from gatepress.resolve import Layer, family_of, is_norm, resolve

Site = tuple[str, str]  # (role, "in" or "out")

SITES: dict[Granularity, tuple[Site, ...]] = {
    "structured": (("q", "out"), ("o", "in"), ("down", "in")),
    "matrix": tuple((role, axis) for role in ROLES for axis in ("in", "out")),
    "heads": (("o", "in"), ("down", "in")),
}
WHOLE_HEADS: set[tuple[Granularity, Site]] = {("heads", ("o", "in"))}  # sites with one gate per head
GO_TOGETHER: dict[Site, tuple[str, ...]] = {  # roles whose rows or columns one inner dimension is
    ("q", "out"): ("q", "k"),
    ("o", "in"): ("v", "o"),
    ("down", "in"): ("up", "down"),
}
# Sites whose dimensions belong to a basis that can be chosen, and the role whose rows share it.
TURNED: dict[Site, str] = {("q", "out"): "k", ("o", "in"): "v"}

# Sigma of eq. (5) by controller: 0 makes the gate deterministic. With 0.25 the penalty of eq. (6)
# still has a gradient at an open gate; with 0.1 it has none.
NOISE: dict[Controller, float] = {"importance": 0.0, "penalty": 0.25}


def sites_of(granularity: Granularity, axes: GateAxes = "both", matrices: Sequence[str] = ROLES) -> tuple[Site, ...]:
    """Return the sites of the gates; `UsageError` if there are none."""
    sites = tuple((role, axis) for role, axis in SITES[granularity] if role in matrices and axes in (axis, "both"))
    if not sites:
        possible = ", ".join(dict.fromkeys(role for role, _ in SITES[granularity]))
        raise UsageError(
            f"--matrices is {','.join(matrices)!r}, but {granularity} gates stand on {possible}; give one of these"
        )
    return sites


def attach_gates_(  # noqa: PLR0913 - each is a dial of the gates
    model: nn.Module,
    *,
    granularity: Granularity,
    controller: Controller,
    lora_rank: int = 0,
    lora_matrices: Sequence[str] = ROLES,
    axes: GateAxes = "both",
    matrices: Sequence[str] = ROLES,
    rotate_heads: bool = False,
) -> list[Layer]:
    """Replace each encoder matrix of `model` by a `GatedLinear`, in place; return the layers.

    `matrices` names the roles that get gates, and those of them in `lora_matrices` get low rank too; `axes` are the
    sides of matrix gates. With `rotate_heads`, gates of heads keep a basis for `rotation.turn_`. A joint matrix of
    queries, keys and values is split first, and `up` in two halves is joined. Everything is frozen afterwards;
    `mark_trainable_` then opens what a run trains.
    """
    base: Any = model.base_model
    layers = _brought_into_form(model)
    model.requires_grad_(False)
    sites = sites_of(granularity, axes, matrices)

    def gate(layer: Layer, site: Site) -> Gate | None:
        return _gate(layer, site, granularity, NOISE[controller], rotate_heads=rotate_heads) if site in sites else None

    for layer in layers:
        of_queries = None
        for role in ROLES:
            gate_out: Gate | SharedGate | None = gate(layer, (role, "out"))
            if role == "q":
                of_queries = gate_out
            elif role == "k" and layer.normed and granularity == "structured" and isinstance(of_queries, Gate):
                gate_out = SharedGate(of_queries, of_queries.repeat // layer.group)
            gated = GatedLinear(
                base.get_submodule(layer.paths[role]),
                gate_in=gate(layer, (role, "in")),
                gate_out=gate_out,
                lora_rank=lora_rank if role in matrices and role in lora_matrices else 0,
            )
            replace_module_(base, layer.paths[role], gated.to(base.device))
    return layers


def _brought_into_form(model: Any) -> list[Layer]:
    """Return the layers with one matrix for each role: splits and joins those that are otherwise, in place."""
    family, base = family_of(model.config), model.base_model
    if family.qkv and "flash" in model.config._attn_implementation:  # noqa: SLF001 - transformers has no public reader
        model.config._attn_implementation = "sdpa"  # noqa: SLF001 - flash attention gives layers all rows as one
    for layer in resolve(model):
        if layer.halves:
            join_(base, layer.halves[0].rpartition(".")[0])
        split_(base.get_submodule(layer.attention))
    layers = resolve(model)
    for layer in layers if family.qkv else ():
        narrow_attention_(base.get_submodule(layer.attention), layer.whole_attention)
    return layers


def _gate(layer: Layer, site: Site, granularity: Granularity, noise: float, *, rotate_heads: bool) -> Gate:
    """Return the gate vector for a site of a layer."""
    role, axis = site
    size = layer.shapes[role][1 if axis == "in" else 0]
    sharing = layer.sharing(role)
    if (granularity, site) in WHOLE_HEADS:
        width = layer.head_width  # query/key and value/output dimensions go together
        of_each = sum(map(layer.sharing, ("q", "k", "v", "o"))) * width
        return Gate(size // (width * sharing), noise=noise, repeat=width * sharing, counts=of_each // layer.unit)
    apart = layer.apart(role)  # positions turn two dimensions together: neither can go alone, and no basis is free
    heads = layer.kv_heads if rotate_heads and site in TURNED and not apart else 0
    if granularity == "matrix":  # a basis that heads share is not one that each of them can leave a dimension of
        return Gate(size, noise=noise, heads=heads if sharing == 1 else 0)
    counts = sum(layer.at_once(one) * layer.sharing(one) for one in GO_TOGETHER[site]) // layer.unit
    repeat = layer.at_once(role) * sharing
    distance = 1 if repeat == 1 else apart or layer.head_width
    return Gate(size // repeat, noise=noise, repeat=repeat, apart=distance, counts=counts, heads=heads)


def gated_linear(model: nn.Module, layer: Layer, role: str) -> GatedLinear:
    """Return a layer's gated matrix by role."""
    base: Any = model.base_model
    module = base.get_submodule(layer.paths[role])
    if not isinstance(module, GatedLinear):
        raise TypeError(f"{layer.paths[role]} is not gated")
    return module


def replace_module_(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at the dotted `path`, in place."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def trainable(
    model: PreTrainedModel, *, biases: bool, layer_norms: bool, matrices: Sequence[str] = ROLES
) -> dict[str, dict[str, nn.Parameter]]:
    """Return what a gated run trains: kind -> name -> parameter (gates, biases, layer_norms, low_rank, head).

    Biases are those of the `matrices` that take part (a matrix without one gets none); layer norms are
    those of the encoder; the head is everything outside the base model, and the pooler before it.
    """
    out = {
        f"{model.base_model_prefix}.{layer.paths[role]}.base.bias"
        for layer in resolve(model)
        for role in ROLES
        if role not in matrices
    }
    kinds: dict[str, dict[str, nn.Parameter]] = {
        kind: {} for kind in ("gates", "biases", "layer_norms", "low_rank", "head")
    }
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            kind = "head" if in_head(model, name) else _kind(name, module)
            wanted = {"biases": biases and name not in out, "layer_norms": layer_norms}
            if kind and wanted.get(kind, True):
                kinds[kind][name] = parameter
    return kinds


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter belongs to the head: outside the base model, or in its pooler.

    What projects the vectors of an embedder is no head, because it stays as it is.
    """
    return not name.startswith((f"{model.base_model_prefix}.", f"{PROJECTIONS}.")) or ".pooler." in name


def _kind(name: str, module: nn.Module) -> str | None:
    if isinstance(module, Gate):
        return "gates"
    if isinstance(module, GatedLinear):
        return "low_rank"
    if name.endswith(".base.bias"):
        return "biases"
    if is_norm(module) and ".embeddings." not in name:
        return "layer_norms"
    return None


def mark_trainable_(kinds: dict[str, dict[str, nn.Parameter]]) -> None:
    """Let the listed parameters receive gradients, in place; the rest of the model stays frozen."""
    for parameters in kinds.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
