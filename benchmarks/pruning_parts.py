"""What baselines of pruning cut a transformer layer into, heads and neurons, and how these are cut out."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatepress.errors import UsageError
from gatepress.modeling_gatepress import shrink_
from gatepress.resolve import Layer, resolve


@dataclass(frozen=True)
class Units:
    """What one layer keeps, by number in the full model."""

    heads: list[int]
    neurons: list[int]


def macs_of(model: Any) -> int:
    """Return the linear multiply-accumulates of the encoder per token, counted on the matrices that are there."""
    return sum(layer.weights for layer in resolve(model))


def head_macs(layer: Layer) -> int:
    """Return the MACs per token that go with one head."""
    return layer.head_width * (sum(layer.shapes[role][1] for role in "qkv") + layer.shapes["o"][0])


def neuron_macs(layer: Layer) -> int:
    """Return the MACs per token that go with one neuron."""
    return layer.shapes["up"][1] + layer.shapes["down"][0]


def refuse_too_small(model: Any, fractions: Iterable[float]) -> None:
    """Raise `UsageError` where one head and one neuron a layer are more than what is asked."""
    least = sum(head_macs(layer) + neuron_macs(layer) for layer in resolve(model)) / macs_of(model)
    for kept in fractions:
        if kept < least:
            raise UsageError(f"--kept is {kept}, expected {least:.4f} or more: a layer keeps one head and one neuron")


def prunable(model: Any, layers: list[Layer]) -> Any:
    """Return a copy whose attention follows the heads that its matrices have, and that computes the same."""
    attentions = {one.attention: one.whole_attention for one in layers}
    smaller = copy.deepcopy(model)
    shrink_(smaller, {"version": 1, "linears": {}, "attentions": attentions})
    return smaller


def parts_of(model: Any, layer: Layer) -> dict[str, nn.Linear]:
    """Return the matrices of one layer by role."""
    return {role: model.base_model.get_submodule(path) for role, path in layer.paths.items()}


def name_heads_(model: Any, layers: list[Layer], units: list[Units]) -> None:
    """Tell each attention module which heads are left; those of its position biases go by it."""
    for layer, kept in zip(layers, units, strict=True):
        model.base_model.get_submodule(layer.attention).gatepress["heads"] = kept.heads


def columns_of(heads: list[int], width: int) -> Tensor:
    """Return the dimensions that belong to heads of `width` dimensions each."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


@torch.no_grad()
def slice_(parts: dict[str, nn.Linear], dimensions: Tensor, neurons: Tensor) -> None:
    """Keep these head dimensions and neurons of one layer, in place."""
    for role in ("q", "k", "v"):
        keep_outputs_(parts[role], dimensions)
    keep_inputs_(parts["o"], dimensions)
    keep_outputs_(parts["up"], neurons)
    keep_inputs_(parts["down"], neurons)


def keep_outputs_(linear: nn.Linear, index: Tensor) -> None:
    """Keep these rows of a matrix and its bias."""
    linear.weight = nn.Parameter(linear.weight[index])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index])
    linear.out_features = len(index)


def keep_inputs_(linear: nn.Linear, index: Tensor) -> None:
    """Keep these columns of a matrix."""
    linear.weight = nn.Parameter(linear.weight[:, index])
    linear.in_features = len(index)


@torch.no_grad()
def zeroed(full: Any, layers: list[Layer], units: list[Units]) -> Any:
    """Return a copy of the full model in which nothing is read from removed heads and neurons."""
    model = copy.deepcopy(full)
    for layer, kept in zip(layers, units, strict=True):
        parts = parts_of(model, layer)
        for role, columns in (("o", columns_of(kept.heads, layer.head_width)), ("down", torch.tensor(kept.neurons))):
            weight = parts[role].weight
            mask = torch.zeros(weight.shape[1]).index_fill_(0, columns, 1)
            weight.mul_(mask)
    return model


def magnitude_(model: Any, layers: list[Layer], wanted: float, *_others: object) -> list[Units]:
    """Remove what has the smallest norm per parameter until `wanted` MACs are left, in place."""
    left = macs_of(model)
    gone: set[tuple[int, str, int]] = set()
    ranked = sorted(row for layer in layers for row in by_magnitude(layer, parts_of(model, layer)))
    for _, cost, unit in ranked:
        if left - cost >= wanted:  # a head too many is passed over, neurons fill the rest
            gone.add(unit)
            left -= cost
    units = [
        Units(
            [head for head in range(layer.heads) if (layer.index, "head", head) not in gone],
            [neuron for neuron in range(layer.shapes["up"][0]) if (layer.index, "neuron", neuron) not in gone],
        )
        for layer in layers
    ]
    for layer, kept in zip(layers, units, strict=True):
        slice_(parts_of(model, layer), columns_of(kept.heads, layer.head_width), torch.tensor(kept.neurons))
    return units


@torch.no_grad()
def by_magnitude(layer: Layer, parts: dict[str, nn.Linear]) -> Iterable[tuple[float, int, tuple[int, str, int]]]:
    """Yield (norm per parameter, MACs, (layer, kind, number)) of all units but the best of each kind."""
    rows = {role: parts[role].weight.square().sum(1) for role in ("q", "k", "v", "up")}
    columns = {role: parts[role].weight.square().sum(0) for role in ("o", "down")}
    by_dimension = rows["q"] + rows["k"] + rows["v"] + columns["o"]
    kinds = (
        ("head", by_dimension.view(layer.heads, -1).sum(1), head_macs(layer)),
        ("neuron", rows["up"] + columns["down"], neuron_macs(layer)),
    )
    for kind, squares, cost in kinds:
        best = int(squares.argmax())
        for number, score in enumerate((squares / cost).sqrt().tolist()):  # as many MACs per token as parameters
            if number != best:
                yield score, cost, (layer.index, kind, number)
