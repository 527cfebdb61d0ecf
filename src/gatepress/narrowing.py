"""Train on at the remaining size: from the next step on, what gates have closed is no longer computed.

A closed inner dimension gives exact zeros and receives no gradient. So leaving it out changes neither the function nor
what is learnt, only the time of a step. Masks, trained numbers and their names stay as they are: a checkpoint is the
same, and a resumed run narrows again by its masks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gatepress.budget import GateVector, biases_of, open_parts
from gatepress.collapse import describe, pairs_of
from gatepress.inject import gated_linear
from gatepress.modeling_gatepress import narrow_attention_, narrow_layer_
from gatepress.plan import ZERO_ROW, Axis, make_plan
from gatepress.resolve import Layer


@torch.no_grad()
def narrow_(model: nn.Module, layers: list[Layer], vectors: list[GateVector]) -> None:
    """Leave out of the gated `model` the inner dimensions that its masks have closed, in place.

    For training only; call it again whenever masks have changed. The model cannot be pruned in memory afterwards, but a
    run that is written from it can.
    """
    masks = [vector.gate.mask for vector in vectors]
    live = open_parts(layers, biases_of(model, layers), vectors, masks)
    plan = make_plan(layers, live, "inner")
    attentions = describe(layers, plan)["attentions"]
    base: Any = model.base_model
    for layer, part in zip(layers, plan.layers, strict=True):
        for role, matrix in part.matrices.items():
            linear, shape = gated_linear(model, layer, role), layer.shapes[role]
            blocks = _blocks(layer, role, part.heads)
            indices = [
                None if axis == list(range(size)) else _index(axis, *blocks).to(linear.base.weight.device)
                for axis, size in zip((matrix.rows, matrix.columns), shape, strict=True)  # the residual side is whole
            ]
            linear.narrow_(*indices)
        attention = base.get_submodule(layer.attention)
        narrow_attention_(attention, attentions[layer.attention])
        pairs = pairs_of(layer, part)
        if pairs is not None:
            attention.pairs.copy_(pairs)


def quicken_(model: Any, layers: list[Layer], *, first_token: bool) -> None:
    """Prepare the gated `model`, in place, for faster steps; what it computes stays the same.

    If scores depend on positions, layers attend as pruned ones do. With `first_token`, the last layer can compute the
    first token alone, which it does within `modeling_gatepress.first_token_alone`: a head reads no other.
    """
    base, last = model.base_model, layers[-1]
    for layer in layers:
        if layer.scores > 1 or (first_token and layer is last):
            narrow_attention_(base.get_submodule(layer.attention), layer.whole_attention)
    if first_token:
        narrow_layer_(base.get_submodule(last.path))


def _blocks(layer: Layer, role: str, heads: list[int]) -> tuple[list[int], int]:
    """Return the blocks of dense inner dimensions of which a role keeps a part each, and their width.

    They are heads or all neurons, or halves of these if rows come in pairs.
    """
    inner = {"up": layer.shapes["up"][0], "down": layer.shapes["down"][1]}
    own = heads if layer.sharing(role) > 1 else [head // layer.group for head in heads[:: layer.group]]
    blocks, width = ([0], inner[role]) if role in inner else (own, layer.head_width)
    count = layer.at_once(role)
    return [block * count + number for block in blocks for number in range(count)], width // count


def _index(axis: Axis, blocks: list[int], width: int) -> Tensor:
    """Return the positions of `axis`, which has a part for each of `blocks`, each of `width` dense dimensions.

    If a plan pads a narrow block with zeros, one of its closed dimensions stands in, which gives zeros too.
    """
    positions = []
    share = len(axis) // len(blocks)
    for number, block in enumerate(blocks):
        part = axis[number * share : (number + 1) * share]
        closed = iter(sorted(set(range(block * width, (block + 1) * width)) - set(part)))
        positions += [next(closed) if position == ZERO_ROW else position for position in part]
    return torch.tensor(positions, dtype=torch.long)
