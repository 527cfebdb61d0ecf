"""Which rows and columns survive: closure over the folded matrices, then a layout.

Gates are folded first (gates.py), so a closed gate is a row or column of exact zeros, and closure is
a statement about matrices alone. With activation(0) = 0:

- neuron j is needed only if row j of up and column j of down are not zero;
- value/output dimension j only if row j of v and column j of o are not zero;
- query/key dimension j only if row j of q and row j of k are not zero;
- a head without value/output dimensions goes; one without query/key dimensions stays: its scores are
  all 0, which is uniform attention, not none.

Layouts: `inner` removes inner dimensions only and needs no index; `index` also drops zero columns and
rows on the residual side, by gather and scatter (the paper's formula); `stock` narrows the
intermediate size alone, alike in all layers, so that plain transformers loads the result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatepress.config import Layout
from gatepress.families import ROLES
from gatepress.resolve import Layer

ZERO_ROW = -1  # in a list of source rows or columns: a padded one, all zeros

Folded = dict[str, tuple[Tensor, Tensor | None]]  # role -> weight [out, in], bias [out]


@dataclass(frozen=True)
class MatrixPlan:
    """What becomes of one matrix: new row i is the dense row `rows[i]`, likewise columns."""

    rows: list[int]
    columns: list[int]
    dense_shape: tuple[int, int]
    biased: bool
    gathered: bool = False  # columns are picked from the dense input
    scattered: bool = False  # rows are spread over the dense output

    @property
    def weights(self) -> int:
        """Elements kept; also the linear multiply-accumulates per token."""
        return len(self.rows) * len(self.columns)

    @property
    def removed_parameters(self) -> int:
        """Weights and biases that go."""
        rows, columns = self.dense_shape
        return rows * columns - self.weights + (rows - len(self.rows)) * self.biased


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer."""

    heads: list[int]
    qk_width: int
    vo_width: int
    matrices: dict[str, MatrixPlan]


@dataclass(frozen=True)
class PrunePlan:
    """What becomes of the encoder."""

    layout: Layout
    layers: list[LayerPlan]
    dense_weights: int

    @property
    def kept_weights(self) -> int:
        """Elements of the encoder's matrices that are left; also their MACs per token."""
        return sum(matrix.weights for layer in self.layers for matrix in layer.matrices.values())

    @property
    def removed_fraction(self) -> float:
        """Fraction of the encoder's matrix elements, and so of its linear MACs, that are gone."""
        return 1 - self.kept_weights / self.dense_weights

    @property
    def removed_parameters(self) -> int:
        """Weights and biases of the encoder's matrices that go."""
        return sum(matrix.removed_parameters for layer in self.layers for matrix in layer.matrices.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a person reads it: widths and shapes per layer."""
        return {
            "layout": self.layout,
            "encoder_weights_removed": self.removed_fraction,
            "layers": [
                {
                    "heads": layer.heads,
                    "qk_width": layer.qk_width,
                    "vo_width": layer.vo_width,
                    "neurons": len(layer.matrices["up"].rows),
                    "matrices": {
                        role: {
                            "dense": list(matrix.dense_shape),
                            "kept": [len(matrix.rows), len(matrix.columns)],
                        }
                        for role, matrix in layer.matrices.items()
                    },
                }
                for layer in self.layers
            ],
        }


def make_plan(layers: list[Layer], folded: list[Folded], layout: Layout) -> PrunePlan:
    """Plan every layer from its folded matrices (activation(0) = 0 is the caller's to know)."""
    neurons = [_needed(parts["up"], parts["down"]) for parts in folded]
    widest = max(1, *(len(kept) for kept in neurons))
    plans = []
    for layer, parts, kept in zip(layers, folded, neurons, strict=True):
        width = widest if layout == "stock" else max(1, len(kept))
        inner = kept + [ZERO_ROW] * (width - len(kept))
        if layout == "stock":
            heads, qk, vo = list(range(layer.heads)), *2 * [_all_dimensions(layer)]
        else:
            heads, qk, vo = _attention(layer, parts)
        qk_rows, vo_rows = (_padded(dimensions) for dimensions in (qk, vo))
        axes = {
            "q": (qk_rows, None),
            "k": (qk_rows, None),
            "v": (vo_rows, None),
            "o": (None, vo_rows),
            "up": (inner, None),
            "down": (None, inner),
        }
        plans.append(
            LayerPlan(
                heads=heads,
                qk_width=len(qk_rows) // len(heads),
                vo_width=len(vo_rows) // len(heads),
                matrices={
                    role: _matrix(layer.shapes[role], parts[role], *axes[role], indexed=layout == "index")
                    for role in ROLES
                },
            )
        )
    return PrunePlan(layout=layout, layers=plans, dense_weights=sum(layer.weights for layer in layers))


def _matrix(
    shape: tuple[int, int],
    part: tuple[Tensor, Tensor | None],
    rows: list[int] | None,
    columns: list[int] | None,
    *,
    indexed: bool,
) -> MatrixPlan:
    """Plan one matrix; None marks the residual side, whose zeros go only where `indexed`."""
    weight, bias = part
    gathered = scattered = False
    if columns is None:
        columns = list(range(shape[1]))
        if indexed:
            nonzero = _indices((weight != 0).any(0)) or [0]
            gathered, columns = len(nonzero) < len(columns), nonzero
    if rows is None:
        rows = list(range(shape[0]))
        if indexed:
            nonzero = _indices(_live_rows(part)) or [0]
            scattered, rows = len(nonzero) < len(rows), nonzero
    return MatrixPlan(rows, columns, shape, bias is not None, gathered, scattered)


def _attention(layer: Layer, parts: Folded) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Return the heads kept, and the query/key and value/output dimensions kept in each of them."""
    width = layer.head_width
    qk = (_live_rows(parts["q"]) & _live_rows(parts["k"])).view(layer.heads, width)
    vo = (_live_rows(parts["v"]) & (parts["o"][0] != 0).any(0)).view(layer.heads, width)
    heads = _indices(vo.any(1)) or [0]
    return (
        heads,
        [[head * width + j for j in _indices(qk[head])] for head in heads],
        [[head * width + j for j in _indices(vo[head])] for head in heads],
    )


def _all_dimensions(layer: Layer) -> list[list[int]]:
    width = layer.head_width
    return [list(range(head * width, (head + 1) * width)) for head in range(layer.heads)]


def _padded(dimensions: list[list[int]]) -> list[int]:
    """Concatenate heads, each padded with zero rows to the widest."""
    width = max(1, *(len(head) for head in dimensions))
    return [row for head in dimensions for row in head + [ZERO_ROW] * (width - len(head))]


def _needed(up: tuple[Tensor, Tensor | None], down: tuple[Tensor, Tensor | None]) -> list[int]:
    return _indices(_live_rows(up) & (down[0] != 0).any(0))


def _live_rows(part: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return [out]: rows whose output is not exactly 0 for every input."""
    weight, bias = part
    live = (weight != 0).any(1)
    return live if bias is None else live | (bias != 0)


def _indices(live: Tensor) -> list[int]:
    return [int(index) for index in torch.nonzero(live).flatten()]
