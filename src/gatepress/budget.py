"""From an asked sparsity to gates closed: what is asked is what is gone, counted.

`sparsity` is a fraction of one of these, over the whole encoder unless said otherwise:

    gates     gates that are closed
    weights   weights and biases of the matrices that closure removes
    macs      multiply-accumulates at the longest input, those of attention itself among them
    latency   time of the matrices on the runtime of `costs`, as it is predicted there
    vectors   gates that are closed, in each vector on its own (the paper)

Two controllers over the same gates say which of them close.

`importance` (the default): closing is gradual and by rank. Every gate keeps a moving average of its
squared gradient (dL/dz)^2, the diagonal of the Fisher information of the gates; every few steps all
gates of the encoder are ranked by average / multiply-accumulates saved, and the best stay open. What
may stay open falls on a cubic schedule to the exact budget; closed gates still receive gradients, so a
gate closed too early comes back. Layers share the loss where it hurts least. All heads of a layer keep the
same width.

`penalty` (the paper): the loss gets lambda * mean over gate vectors of |mean(P) - (1 - s)|, eq. (9).
The penalty alone does not close gates (all settle near the target value, hardly any at 0), so at the
end of the schedule they are closed by rank of mu, and the rest of the training recovers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatepress.config import DEFAULT_TARGET, BudgetUnit, Controller, Granularity, MethodSpec, TrainSettings
from gatepress.costs import Costs, analytic
from gatepress.errors import UsageError
from gatepress.families import ROLES
from gatepress.gates import Gate, counted
from gatepress.inject import gated_linear
from gatepress.plan import Live, make_plan
from gatepress.resolve import Layer

CLOSING_STARTS = 0.08  # of all steps
RERANK_EVERY = 10  # steps
ROUNDING = 1e-6  # of a gate: what a product of a fraction and a whole number may be off
AVERAGE_KEEPS = 0.98  # of the moving average, per step
TOLERANCE = 5e-4  # of a budget that is not counted in gates: how far the search goes on

INSIDE_HEADS = (("q", "out"), ("k", "out"), ("v", "out"), ("o", "in"))  # sites of dimensions of heads

Unit = tuple[float, int, Tensor]  # importance, vector, the elements that close together
Masks = list[Tensor]  # one a gate vector, 1 open, 0 closed


@dataclass(frozen=True)
class GateVector:
    """One gate vector, where it stands, and what its elements cost."""

    gate: Gate
    macs: float  # linear multiply-accumulates per token that one closed element saves
    heads: int  # > 1: the elements belong to heads, whose kept widths should be equal
    layer: int = 0
    role: str = ""
    axis: str = ""


def gate_vectors(
    model: nn.Module, layers: list[Layer], granularity: Granularity, *, equal_heads: bool = True
) -> list[GateVector]:
    """Return the model's gate vectors with costs.

    A structured gate removes a row and a column (two matrices), a matrix gate one row or column, a head
    as much as all of its dimensions. With `equal_heads` the dimensions of heads close alike in every head.
    """
    alone = granularity == "matrix"
    of_heads = INSIDE_HEADS if equal_heads and granularity != "heads" else ()
    vectors = []
    for number, layer in enumerate(layers):
        for role in ROLES:
            linear = gated_linear(model, layer, role)
            for axis, gate in (("in", linear.gate_in), ("out", linear.gate_out)):
                if gate is None:
                    continue
                rows, columns = layer.shapes[role]
                across = rows if axis == "in" else columns
                vectors.append(
                    GateVector(
                        gate=gate,
                        macs=float(across * (1 if alone else 2) * gate.counts),
                        heads=layer.heads if (role, axis) in of_heads else 1,
                        layer=number,
                        role=role,
                        axis=axis,
                    )
                )
    return vectors


def removed_by(  # noqa: PLR0913 - each is a part of the measure
    model: nn.Module, layers: list[Layer], vectors: list[GateVector], unit: BudgetUnit, *, tokens: int, costs: Costs
) -> Callable[[Masks], float]:
    """Return the measure of a budget that is not counted in gates: masks, one a vector -> fraction of `unit` gone.

    `tokens` is the input length that `macs` counts attention at. Counted is what the plan that closure makes of
    the masks (layout `inner`) leaves out.
    """
    biased = biases_of(model, layers)

    def planned(masks: Masks) -> float:
        live = open_parts(layers, biased, vectors, masks)
        return make_plan(layers, live, "inner", costs).removed(unit, tokens)

    return planned


def biases_of(model: nn.Module, layers: list[Layer]) -> list[dict[str, bool]]:
    """Say which matrices have a bias: role -> bool, per layer."""
    return [{role: gated_linear(model, layer, role).base.bias is not None for role in ROLES} for layer in layers]


def open_parts(
    layers: list[Layer], biased: list[dict[str, bool]], vectors: list[GateVector], masks: Masks
) -> list[dict[str, Live]]:
    """Return what `masks`, one a vector, leave open of each matrix: role -> `Live`, per layer."""
    open_sides = [
        {role: tuple(torch.ones(size, dtype=torch.bool) for size in layer.shapes[role]) for role in ROLES}
        for layer in layers
    ]
    for mask, vector in zip(masks, vectors, strict=True):
        side = open_sides[vector.layer][vector.role][vector.axis == "in"]
        side &= mask.cpu().bool().repeat_interleave(vector.gate.repeat)
    return [
        {role: Live(rows, columns, biases[role]) for role, (rows, columns) in sides.items()}
        for sides, biases in zip(open_sides, biased, strict=True)
    ]


def gates_to_close(total: int, sparsity: float) -> int:
    """Return how many of `total` gates the asked sparsity closes (rounded up: never less than asked)."""
    return min(total, math.ceil(sparsity * total - ROUNDING))


@dataclass(frozen=True)
class Ranking:
    """All gates of an encoder in the order in which they close.

    Vectors that belong to heads are closed in slots: the r-th best element of every head together, so
    that each head of a layer keeps the same width and nothing is lost to padding.
    """

    units: list[Unit]  # the least important first
    sizes: list[int]  # elements of each vector
    counts: list[int]  # dimensions that each element of a vector stands for

    @classmethod
    def of(
        cls, scores: list[Tensor], macs: list[float], heads: list[int], counts: list[int] | None = None
    ) -> "Ranking":
        """Rank by score for each multiply-accumulate saved; `scores` holds one vector a gate vector."""
        units: list[Unit] = []
        for index, (score, cost, n_heads) in enumerate(zip(scores, macs, heads, strict=True)):
            ranked, order = score.detach().float().cpu().view(n_heads, -1).sort(dim=1, descending=True)
            offsets = torch.arange(n_heads)[:, None] * order.shape[1]
            members = (order + offsets).T  # [slots, heads]
            for value, slot in zip((ranked.mean(0) / cost).tolist(), members, strict=True):
                units.append((value, index, slot))
        units.sort(key=lambda unit: unit[0])
        return cls(units, [score.numel() for score in scores], counts or [1] * len(scores))

    def closing(self, count: int) -> Masks:
        """Return masks that close `count` dimensions, the least important first.

        What is left too small for whole heads is taken from single dimensions; where none is open any more,
        one head more goes and single dimensions open again.
        """
        masks = [torch.ones(size) for size in self.sizes]
        left = count
        for _, index, slot in self.units:
            if left == 0:
                break
            if len(slot) * self.counts[index] <= left:
                masks[index][slot] = 0
                left -= len(slot) * self.counts[index]
        if left:  # slots of several heads leave a remainder, and so do whole heads
            _close_single_(masks, self.units, self.counts, left)
        return masks


def _close_single_(masks: Masks, units: list[Unit], counts: list[int], left: int) -> None:
    """Close elements for `left` dimensions more, in place, still the least important first.

    Where only larger elements are open, one of them goes, and smaller ones open again for the excess.
    """
    elements = [(index, element) for _, index, slot in units for element in slot.tolist()]
    for larger in (False, True):
        for index, element in elements:
            if left > 0 and masks[index][element] and (larger or counts[index] <= left):
                masks[index][element] = 0
                left -= counts[index]
    for index, element in reversed(elements):
        if counts[index] <= -left and not masks[index][element]:
            masks[index][element] = 1
            left += counts[index]


class Budget:
    """Closes gates over a training of `steps` steps until `sparsity` of `unit` is gone.

    Call `penalty()` for the loss term, `after_backward(step)` between backward and optimizer step. Raises
    `UsageError` where all gates together do not reach the budget.
    """

    def __init__(  # noqa: PLR0913 - each is a dial of the training
        self,
        vectors: list[GateVector],
        *,
        sparsity: float,
        controller: Controller,
        steps: int,
        closing: float = MethodSpec.closing,  # part of the steps by which all is closed
        penalty_weight: float = 0.0,
        unit: BudgetUnit = "gates",
        removed: Callable[[Masks], float] | None = None,  # of `removed_by`, for units that are not counted in gates
    ) -> None:
        self.vectors = vectors
        self.sparsity = sparsity
        self.controller: Controller = controller
        self.penalty_weight = penalty_weight
        self.unit: BudgetUnit = unit
        self.starts = int(CLOSING_STARTS * steps)
        self.ends = max(self.starts, int(closing * steps))
        self.fixed = sparsity == 0
        self._removed = removed
        if removed is not None:
            most = removed([torch.zeros_like(vector.gate.mask) for vector in vectors])
            if most < sparsity:
                raise UsageError(
                    f"--sparsity is {sparsity:g} of the {unit}, but all gates together reach only {most:.3f}; "
                    "ask for less, or let more matrices take part"
                )

    @property
    def total_gates(self) -> int:
        """Dimensions that the encoder's gates stand for."""
        return counted(vector.gate for vector in self.vectors)[0]

    @property
    def closed_gates(self) -> int:
        """Those of them whose mask is 0, counted."""
        return counted(vector.gate for vector in self.vectors)[1]

    @property
    def removed(self) -> float:
        """Fraction of the budget's unit that is gone, counted."""
        if self._removed is None:
            return self.closed_gates / self.total_gates
        return self._removed([vector.gate.mask for vector in self.vectors])

    def target(self, step: int) -> float:
        """Return the fraction that should be gone after `step` (cubic schedule)."""
        if step >= self.ends:
            return self.sparsity
        left = 1 - max(0.0, (step - self.starts) / max(1, self.ends - self.starts))
        return self.sparsity * (1 - left**3)

    def penalty(self, step: int) -> Tensor | None:
        """Return lambda * mean |mean(P) - (1 - s)|, eq. (9), or None where there is no penalty."""
        if self.controller != "penalty" or self.fixed:
            return None
        asked = self.sparsity * min(1.0, step / max(1, self.ends // 2))  # ramped: no shock at the start
        terms = [(vector.gate.probability_open().mean() - (1 - asked)).abs() for vector in self.vectors]
        return self.penalty_weight * torch.stack(terms).mean()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Update importances from the gradients and close what the schedule asks for at `step`."""
        if self.controller == "importance":
            if not (self.fixed and self.sparsity):  # what was closed for good is not even computed (narrowing.py)
                self._rank()
            if not self.fixed and step >= self.starts and (step % RERANK_EVERY == 0 or step >= self.ends):
                self.close(self.target(step))
            # The straight-through gradient of a closed gate ranks it; it must not move its value.
            for vector in self.vectors:
                if vector.gate.mu.grad is not None:
                    vector.gate.mu.grad.mul_(vector.gate.mask)
        elif not self.fixed and step >= self.ends:
            for vector in self.vectors:
                vector.gate.score.copy_(vector.gate.mu)
            self.close(self.sparsity)
        if step >= self.ends:
            self.fixed = True

    def _rank(self) -> None:
        """Let the last gradient count in the moving averages."""
        for vector in self.vectors:
            gradient = vector.gate.mu.grad
            if gradient is not None:
                vector.gate.score.mul_(AVERAGE_KEEPS).addcmul_(gradient, gradient, value=1 - AVERAGE_KEEPS)

    @torch.no_grad()
    def close(self, fraction: float) -> None:
        """Close the gates with the lowest scores until `fraction` of the unit is gone, and open all others."""
        if self.unit == "vectors":
            self._close_in_each_vector(fraction)
            return
        cheap = self.controller == "penalty"  # mu is a value, not a loss that a saving could be weighed against
        ranking = Ranking.of(
            [vector.gate.score for vector in self.vectors],
            [1.0 if cheap else vector.macs for vector in self.vectors],
            [vector.heads for vector in self.vectors],
            [vector.gate.counts for vector in self.vectors],
        )
        for mask, vector in zip(self._masks(ranking, fraction), self.vectors, strict=True):
            vector.gate.mask.copy_(mask)

    def _masks(self, ranking: Ranking, fraction: float) -> Masks:
        """Return masks that remove `fraction`, never less and as little more as whole gates allow."""
        if self._removed is None:
            return ranking.closing(gates_to_close(self.total_gates, fraction))
        few, many = 0, self.total_gates
        best = ranking.closing(many)
        while many - few > 1:
            count = (few + many) // 2
            masks = ranking.closing(count)
            excess = self._removed(masks) - fraction
            if excess < 0:
                few = count
                continue
            many, best = count, masks
            if excess < TOLERANCE:
                break
        return best

    def _close_in_each_vector(self, fraction: float) -> None:
        whole = [vector for vector in self.vectors if vector.gate.counts > 1]
        single = [vector for vector in self.vectors if vector.gate.counts == 1]
        carried = 0.0  # dimensions that rounding left to the vectors that follow; single ones come last
        for vector in whole:
            exact = fraction * vector.gate.size + carried / vector.gate.counts
            count = math.floor(exact + ROUNDING)
            carried = (exact - count) * vector.gate.counts
            _close_lowest(vector, count)
        open_heads = [vector.gate for vector in whole if vector.gate.mask.any()]
        if open_heads and carried > (1 - fraction) * sum(vector.gate.size for vector in single) + ROUNDING:
            last = min(open_heads, key=lambda gate: float(gate.score[gate.mask == 1].min()))
            last.mask[last.score.masked_fill(last.mask == 0, math.inf).argmin()] = 0
            carried -= last.counts
        for vector in single:
            exact = fraction * vector.gate.size + carried
            count = min(vector.gate.size, max(0, math.ceil(exact - ROUNDING)))
            carried = exact - count
            _close_lowest(vector, count)


def budget_of(model: nn.Module, layers: list[Layer], settings: TrainSettings, *, steps: int, tokens: int) -> Budget:
    """Return the budget of a prepared model as `settings` asks for it; `macs` count attention at `tokens` tokens."""
    # The paper's gates know no heads; closure pads each of them to the widest.
    paper = settings.granularity == "matrix" and settings.controller == "penalty"
    vectors = gate_vectors(model, layers, settings.granularity, equal_heads=not paper)
    removed = None
    if settings.unit not in ("gates", "vectors"):
        removed = removed_by(model, layers, vectors, settings.unit, tokens=tokens, costs=analytic(DEFAULT_TARGET))
    return Budget(
        vectors,
        sparsity=settings.sparsity,
        controller=settings.controller,
        steps=steps,
        closing=settings.closing or MethodSpec.closing,
        penalty_weight=settings.penalty_weight,
        unit=settings.unit,
        removed=removed,
    )


def _close_lowest(vector: GateVector, count: int) -> None:
    """Close `count` gates of a vector, by rank of their score, and open its others."""
    vector.gate.mask.copy_(Ranking.of([vector.gate.score], [1.0], [vector.heads]).closing(count)[0])
