"""Which rows and columns survive: closure over the folded matrices, then a layout.

Gates are folded first (gates.py), so a closed gate is a row or column of exact zeros, and closure is
a statement about zeros alone. With activation(0) = 0:

- neuron j is needed only if row j of up and column j of down are not zero;
- value/output dimension j only if row j of v and column j of o are not zero;
- query/key dimension j only if row j of q and row j of k are not zero;
- a head without value/output dimensions is removed; one without query/key dimensions stays: its scores are
  all 0, which is uniform attention, not none. If no head of a layer has any, q and k are removed.

Where queries and keys are normed within heads (`Layer.normed`), what is left of a key counts in the norm of all of it,
also if the query has lost it: a dimension is removed only if it is zero in both.

Where rows come in pairs (`Layer.apart`), two query/key dimensions that positions turn together stay or go together,
and a neuron is needed only if neither of its rows of up is zero.

Removed inner dimensions leave nothing behind. Zeros on the residual side can only be left out by an index operation:
columns by picking inputs (gather), rows by spreading outputs (scatter). Layouts:

    auto    removes inner dimensions; index operations, and widths that kernels like, where `costs` says so
    inner   removes inner dimensions and nothing else: no index operation
    index   removes inner dimensions, and every zero column and row on the residual side
    paper   each matrix on its own: every zero column and row by index, nothing propagates
    stock   the intermediate size alone, the same in all layers, so that plain transformers loads it
"""

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from gatepress.config import DEFAULT_TARGET, BudgetUnit, Layout
from gatepress.costs import WORTH, Costs, analytic, rounded
from gatepress.families import ROLES
from gatepress.resolve import Layer

READERS = (("q", "k", "v"), ("o",), ("up",), ("down",))  # roles that read the same input
ZERO_ROW = -1  # in a list of source rows or columns: padding, all zeros

Axis = list[int]  # sources of the kept rows or columns


@dataclass(frozen=True)
class Live:
    """Which parts of a folded matrix are not zero."""

    rows: Tensor  # [out] bool: the output is not exactly 0 for every input
    columns: Tensor  # [in] bool
    biased: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Live":
        """Read a weight [out, in] and its bias [out]."""
        rows, columns = (weight != 0).any(1), (weight != 0).any(0)
        return cls((rows if bias is None else rows | (bias != 0)).cpu(), columns.cpu(), bias is not None)


@dataclass(frozen=True)
class MatrixPlan:
    """What becomes of one matrix: new row i is the dense row `rows[i]`, and likewise for columns."""

    rows: Axis
    columns: Axis
    dense_shape: tuple[int, int]
    biased: bool
    live: tuple[int, int]  # rows and columns of the folded matrix that are not zero
    gathered: bool = False  # columns are picked from the dense input
    scattered: bool = False  # rows are spread over the dense output

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns kept."""
        return len(self.rows), len(self.columns)

    @property
    def weights(self) -> int:
        """Number of kept elements; also the linear multiply-accumulates per token."""
        return len(self.rows) * len(self.columns)

    @property
    def removed_parameters(self) -> int:
        """Number of weights and biases that are removed."""
        rows, columns = self.dense_shape
        return rows * columns - self.weights + (rows - len(self.rows)) * self.biased

    def to_json(self) -> dict[str, Any]:
        """Return what was there, what of it is not zero, and what is kept and how."""
        operations = {"gathered": self.gathered, "scattered": self.scattered}
        return {"dense": list(self.dense_shape), "live": list(self.live), "kept": list(self.shape), **operations}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer."""

    heads: list[int]
    qk_width: int
    vo_width: int
    matrices: dict[str, MatrixPlan]
    costs: Costs
    scores: int  # number of products whose sum is a score

    def macs(self, tokens: int, *, dense: bool = False) -> int:
        """Return the multiply-accumulates for each of a row's `tokens`; `dense`: of the layer as it was.

        Counts those of the matrices, of scores, and of the values that scores weigh. Products with positions count for
        the two `tokens` that can lie on either side of one.
        """
        shapes = {role: matrix.dense_shape if dense else matrix.shape for role, matrix in self.matrices.items()}
        keys = tokens + 2 * tokens * (self.scores - 1)
        group = self.matrices["q"].dense_shape[0] // self.matrices["v"].dense_shape[0]
        return sum(map(math.prod, shapes.values())) + keys * shapes["q"][0] + tokens * group * shapes["v"][0]

    @functools.cached_property
    def time_left(self) -> float:
        """Predicted time of the layer's products and index operations, divided by that of the dense layer."""
        return _time(self.matrices, self.costs)

    def to_json(self) -> dict[str, Any]:
        """Return the layer in readable form."""
        return {
            "heads": self.heads,
            "qk_width": self.qk_width,
            "vo_width": self.vo_width,
            "neurons": len(self.matrices["down"].columns),
            "macs_left": sum(m.weights for m in self.matrices.values())
            / sum(m.dense_shape[0] * m.dense_shape[1] for m in self.matrices.values()),
            "time_left": self.time_left,
            "matrices": {role: matrix.to_json() for role, matrix in self.matrices.items()},
        }


@dataclass(frozen=True)
class PrunePlan:
    """What becomes of the encoder."""

    layout: Layout
    layers: list[LayerPlan]
    dense_weights: int
    costs: Costs

    @property
    def kept_weights(self) -> int:
        """Number of elements left in the encoder's matrices; also their MACs per token."""
        return sum(matrix.weights for layer in self.layers for matrix in layer.matrices.values())

    @property
    def removed_fraction(self) -> float:
        """Fraction of the encoder's matrix elements, and so of its linear MACs, that is removed."""
        return 1 - self.kept_weights / self.dense_weights

    @property
    def removed_parameters(self) -> int:
        """Number of weights and biases of the encoder's matrices that are removed."""
        return sum(matrix.removed_parameters for layer in self.layers for matrix in layer.matrices.values())

    def removed(self, unit: BudgetUnit, tokens: int) -> float:
        """Return the removed fraction of `weights`, of `macs` at `tokens` tokens, or of predicted `latency`.

        Weights are those of the encoder's matrices with their biases. Multiply-accumulates are those of the matrices
        and of the products of attention: scores and weighted values.
        """
        if unit == "latency":
            return 1 - self.time_left
        if unit == "weights":
            matrices = [matrix for layer in self.layers for matrix in layer.matrices.values()]
            dense = self.dense_weights + sum(matrix.dense_shape[0] for matrix in matrices if matrix.biased)
            return self.removed_parameters / dense
        dense = sum(layer.macs(tokens, dense=True) for layer in self.layers)
        return 1 - sum(layer.macs(tokens) for layer in self.layers) / dense

    @property
    def time_left(self) -> float:
        """Predicted time of the encoder's products and index operations, divided by that of the dense encoder."""
        return sum(layer.time_left for layer in self.layers) / len(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan in readable form: per layer, what was there, what is left, and what that should gain."""
        return {
            "layout": self.layout,
            "target": self.costs.target,
            "costs": self.costs.source,
            "tokens": self.costs.tokens,
            "encoder_weights_removed": self.removed_fraction,
            "time_left": self.time_left,
            "layers": [layer.to_json() for layer in self.layers],
        }


def make_plan(
    layers: list[Layer], live: list[dict[str, Live]], layout: Layout, costs: Costs | None = None
) -> PrunePlan:
    """Plan every layer from the zeros of its folded matrices (the caller must know that activation(0) = 0).

    `costs` (None: the analytic ones) choose in the layout `auto` and predict in all layouts.
    """
    costs = costs or analytic(DEFAULT_TARGET)
    needed = [
        _indices(_by_two(parts["up"].rows, layer.apart("up")).all(1).flatten() & parts["down"].columns)
        for layer, parts in zip(layers, live, strict=True)
    ]
    widest = max(1, *map(len, needed))
    whole = layout in ("paper", "stock")  # heads stay as they are
    plans = []
    for layer, parts, neurons in zip(layers, live, needed, strict=True):
        heads, qk, vo = (list(range(layer.heads)), *_all_dimensions(layer)) if whole else _attention(layer, parts)
        width = widest if layout == "stock" else max(1, len(neurons))
        if layout == "auto":
            width = rounded(width, layer.shapes["down"][1], multiple=costs.facts.multiple)
        inner = _padded([neurons], width)
        qk_width, vo_width = _head_widths(layer, qk, vo, costs if layout == "auto" else None)
        inside = {
            **{role: _padded(_of_each(layer, role, qk), qk_width, layer.apart(role)) for role in ("q", "k")},
            **{role: _padded(_of_each(layer, role, vo), vo_width) for role in ("v", "o")},
        }
        axes: dict[str, tuple[Axis | None, Axis | None]] = {
            **{role: (inside[role], None) for role in ("q", "k", "v")},
            "o": (None, inside["o"]),
            "up": (_padded([neurons], width * layer.at_once("up"), layer.apart("up")), None),
            "down": (None, inner),
        }
        if layout == "paper":
            axes = dict.fromkeys(ROLES, (None, None))
        matrices: dict[str, MatrixPlan] = {}
        for roles in READERS:
            matrices |= _matrices(layer, parts, {role: axes[role] for role in roles}, layout, costs)
        plans.append(LayerPlan(heads, qk_width, vo_width, matrices, costs, layer.scores))
    return PrunePlan(layout, plans, sum(layer.weights for layer in layers), costs)


def chooses(live: list[dict[str, Live]]) -> bool:
    """Return whether a plan depends on times: whether the residual side has zeros that an index could leave out.

    If nothing of a matrix is left, there is no index either.
    """
    into = ("q", "k", "v", "up")
    sides = (part.columns if role in into else part.rows for parts in live for role, part in parts.items())
    return any(alive.any() and not alive.all() for alive in sides)


def _matrices(
    layer: Layer, parts: dict[str, Live], axes: dict[str, tuple[Axis | None, Axis | None]], layout: Layout, costs: Costs
) -> dict[str, MatrixPlan]:
    """Plan the matrices that read the same input; an axis of None is the residual side (or, for `paper`, any)."""
    options = [_options(layer.shapes[role], parts[role], sides, layout, costs) for role, sides in axes.items()]

    def price(choice: tuple[MatrixPlan, ...]) -> float:
        prices = zip(choice, _prices(choice, costs), strict=True)
        return sum(time * (1 + WORTH * (plan.gathered + plan.scattered)) for plan, time in prices)

    chosen = min(itertools.product(*options), key=price) if layout == "auto" else [each[-1] for each in options]
    return dict(zip(axes, chosen, strict=True))


def _options(
    shape: tuple[int, int], live: Live, axes: tuple[Axis | None, Axis | None], layout: Layout, costs: Costs
) -> list[MatrixPlan]:
    """Return the possible forms of one matrix; the last one leaves out all that it can."""
    every = [list(range(size)) for size in shape]
    options = [[(every[side] if axis is None else axis, False)] for side, axis in enumerate(axes)]
    for side, (axis, alive) in enumerate(zip(axes, (live.rows, live.columns), strict=True)):
        if [] not in axes and axis is None and layout not in ("inner", "stock") and not alive.all():
            multiple = costs.facts.multiple if layout == "auto" else 1
            options[side].append((_some(alive, multiple), True))
    counted = (int(live.rows.sum()), int(live.columns.sum()))
    return [
        MatrixPlan(rows, columns, shape, live.biased, counted, gathered, scattered)
        for (rows, scattered), (columns, gathered) in itertools.product(*options)
    ]


def _prices(plans: Iterable[MatrixPlan], costs: Costs) -> list[float]:
    """Return the times of matrices that read the same input, each divided by that of the dense one.

    The first one that picks from the input pays for what all that pick from it share.
    """
    prices: list[float] = []
    gather: Literal["gather", "again"] = "gather"
    for plan in plans:
        if not plan.weights:
            prices.append(0.0)
            continue
        picks = gather if plan.gathered else None
        gather = "again" if plan.gathered and costs.facts.picks_share else gather
        prices.append(costs.matrix(plan.dense_shape, plan.shape, gathered=picks, scattered=plan.scattered))
    return prices


def _some(alive: Tensor, multiple: int) -> Axis:
    """Return the live positions, with as many others as make a width that kernels like."""
    kept = _indices(alive) or [0]
    width = rounded(len(kept), len(alive), multiple=multiple)
    spare = sorted(set(range(len(alive))) - set(kept))
    return sorted(kept + spare[: width - len(kept)])


def _time(matrices: dict[str, MatrixPlan], costs: Costs) -> float:
    """Return the predicted time of a layer's matrices, divided by that of the dense ones."""
    dense = {role: float(costs.milliseconds("product", m.dense_shape).mean()) for role, m in matrices.items()}
    left = 0.0
    for roles in READERS:
        prices = _prices([matrices[role] for role in roles], costs)
        left += sum(dense[role] * price for role, price in zip(roles, prices, strict=True))
    return left / sum(dense.values())


def _attention(layer: Layer, parts: dict[str, Live]) -> tuple[list[int], list[Axis], list[Axis]]:
    """Return the kept heads, and the query/key and value/output dimensions kept in each head of keys and values.

    Heads of queries that share one of those stay or go together, and so do their dimensions. For dimensions that come
    in pairs, the first one of each.
    """
    width, group = layer.head_width, layer.group

    def alive(rows: Tensor) -> Tensor:  # [heads of keys and values, width]: in any of the heads that share it
        return rows.view(layer.kv_heads, -1, width).any(1)

    q, k = (_by_two(alive(parts[role].rows), layer.apart(role)).any(-2) for role in ("q", "k"))
    qk = (q | k if layer.normed else q & k).flatten(1)
    vo = alive(parts["v"].rows) & alive(parts["o"].columns)
    heads = _indices(vo.any(1))
    if not heads:  # no head gives any output, so one head of zeros stands in
        return list(range(group)), [[]], [[]]
    return (
        [head * group + number for head in heads for number in range(group)],
        [[head * width + j for j in _indices(qk[head])] for head in heads],
        [[head * width + j for j in _indices(vo[head])] for head in heads],
    )


def _of_each(layer: Layer, role: str, dimensions: list[Axis]) -> list[Axis]:
    """Return the rows or columns of a role's own heads from those of the heads of keys and values that they share."""
    width, count = layer.head_width, layer.sharing(role)
    return [
        [(row // width * count + number) * width + row % width for row in head]
        for head in dimensions
        for number in range(count)
    ]


def _head_widths(layer: Layer, qk: list[Axis], vo: list[Axis], costs: Costs | None) -> tuple[int, int]:
    """Return the common width of all heads: that of the widest; with `costs`, one that the target's kernels like."""
    at_once = layer.at_once("q")
    widest = [at_once * max(map(len, qk)), max(1, *map(len, vo))]
    if costs is not None:
        widest = [max(widest)] * 2 if costs.facts.equal_widths and widest[0] else widest
        multiple = costs.facts.multiple
        widest = [rounded(width, layer.head_width, multiple=multiple, copies=len(qk)) for width in widest]
    return widest[0] + widest[0] % at_once, widest[1]


def _all_dimensions(layer: Layer) -> tuple[list[Axis], list[Axis]]:
    """Return all query/key and value/output dimensions of each head of keys and values, as `_attention` does."""
    width = layer.head_width
    starts = range(0, layer.kv_heads * width, width)
    qk, vo = ([list(range(start, start + count)) for start in starts] for count in (layer.apart("q") or width, width))
    return qk, vo


def _padded(dimensions: list[Axis], width: int, apart: int | None = None) -> Axis:
    """Concatenate heads, each padded with zero rows to `width`; with what lies `apart` from each row after them."""
    rows: Axis = []
    for head in dimensions:
        padded = head + [ZERO_ROW] * (width // (2 if apart else 1) - len(head))
        rows += padded
        if apart:
            rows += [row if row == ZERO_ROW else row + apart for row in padded]
    return rows


def _by_two(rows: Tensor, apart: int | None) -> Tensor:
    """Return rows [..., n] as [..., n / 2 apart, 2, apart], or as [..., n, 1, 1] if they do not come in pairs."""
    return rows[..., None, None] if apart is None else rows.unflatten(-1, (-1, 2, apart))


def _indices(live: Tensor) -> Axis:
    positions: Axis = live.nonzero().flatten().tolist()
    return positions
