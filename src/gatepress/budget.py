"""From a requested sparsity to closed gates: what is asked for is what is removed, counted.

`sparsity` is a fraction of one of these, over the whole encoder unless stated otherwise:

    gates     closed gates
    weights   weights and biases of the matrices that closure removes
    macs      multiply-accumulates at the longest input, including those of attention itself
    latency   time of the matrices and index operations, as predicted by the analytic costs of the default target
    vectors   closed gates, in each vector on its own (the paper)

Two controllers over the same gates decide which of them close.

`importance` (the default): gates close gradually and by rank. Every gate keeps a moving average of its
squared gradient (dL/dz)^2, the diagonal of the Fisher information of the gates. Every few steps all open
gates of the encoder are ranked by average / multiply-accumulates saved, and the last of them close. The
number that may stay open falls on a cubic schedule to the exact budget. A closed gate stays closed, so
the following steps need not compute it (narrowing.py). Layers share the loss where it hurts least. All
heads of a layer keep the same width. An embedder starts as its own teacher: as long as all of its gates are
open, nothing is any distance away and no gate has a gradient. So the first step closes a few at random.

`penalty` (the paper): the loss gets lambda * mean over gate vectors of |mean(P) - (1 - s)|, eq. (9).
The penalty alone does not close gates (all settle near the target value, hardly any at 0). So at the end of
the schedule they are closed by rank of mu, and the rest of the training recovers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gatepress.config import BudgetUnit, Controller, Granularity, Layout, MethodSpec, TrainSettings
from gatepress.errors import ArtifactError, UsageError
from gatepress.families import ROLES
from gatepress.gates import Gate, SharedGate, counted
from gatepress.inject import gated_linear
from gatepress.plan import Live, make_plan
from gatepress.resolve import Layer

CLOSING_STARTS = 0.08  # fraction of the steps
RERANK_EVERY = 10  # steps
ROUNDING = 1e-6  # of a gate: the rounding error allowed in a product of a fraction and a whole number
AT_RANDOM = 0.01  # share of the closing that an embedder begins with
AVERAGE_KEEPS = 0.98  # share of the moving average that a step keeps
TOLERANCE = 5e-4  # of a budget that is not counted in gates: the search ends within it

INSIDE_HEADS = (("q", "out"), ("k", "out"), ("v", "out"), ("o", "in"))  # sites of the dimensions of heads

Masks = list[Tensor]  # one per gate vector, 1 open, 0 closed


@dataclass(frozen=True)
class GateVector:
    """A gate vector, its place in the model, and what its elements cost."""

    gate: Gate
    macs: float  # linear multiply-accumulates per token that one closed element saves
    heads: int  # > 1: the elements belong to heads, whose kept widths should be equal
    layer: int = 0
    role: str = ""
    axis: str = ""
    shared: dict[str, int] = field(default_factory=dict)  # other roles that it closes, and its repetitions there


def gate_vectors(model: nn.Module, layers: list[Layer], granularity: Granularity) -> list[GateVector]:
    """Return the model's gate vectors with their costs.

    A structured gate removes a row and a column (two matrices), a matrix gate one row or column, a head
    as much as all of its dimensions. Gates of single dimensions close alike in every head.
    """
    alone = granularity == "matrix"
    of_heads = INSIDE_HEADS if granularity != "heads" else ()
    vectors: list[GateVector] = []
    for number, layer in enumerate(layers):
        for role in ROLES:
            linear = gated_linear(model, layer, role)
            for axis, gate in (("in", linear.gate_in), ("out", linear.gate_out)):
                if gate is None:
                    continue
                if isinstance(gate, SharedGate):
                    next(vector for vector in vectors if vector.gate is gate.gate).shared[role] = gate.repeat
                    continue
                rows, columns = layer.shapes[role]
                across = rows if axis == "in" else columns
                vectors.append(
                    GateVector(
                        gate=gate,
                        macs=float(across * (1 if alone else gate.counts * layer.unit)),
                        heads=layer.kv_heads * (layer.sharing(role) if alone else 1) if (role, axis) in of_heads else 1,
                        layer=number,
                        role=role,
                        axis=axis,
                    )
                )
    return vectors


def removed_by(
    model: nn.Module, layers: list[Layer], vectors: list[GateVector], unit: BudgetUnit, *, tokens: int
) -> Callable[[Masks], float]:
    """Return the measure of a budget that is not counted in gates: masks, one per vector -> fraction of `unit` removed.

    `tokens` is the input length at which `macs` counts attention. What counts is what the plan that closure makes of
    the masks leaves out: without index operations (layout `inner`), so it holds on every machine. Only `latency`
    includes the index operations that pay (`auto`), because they take time.
    """
    biased = biases_of(model, layers)
    layout: Layout = "auto" if unit == "latency" else "inner"

    def planned(masks: Masks) -> float:
        live = open_parts(layers, biased, vectors, masks)
        return make_plan(layers, live, layout).removed(unit, tokens)

    return planned


def biases_of(model: nn.Module, layers: list[Layer]) -> list[dict[str, bool]]:
    """Return which matrices have a bias: role -> bool, per layer."""
    return [{role: gated_linear(model, layer, role).base.bias is not None for role in ROLES} for layer in layers]


def open_parts(
    layers: list[Layer], biased: list[dict[str, bool]], vectors: list[GateVector], masks: Masks
) -> list[dict[str, Live]]:
    """Return what `masks`, one per vector, leave open of each matrix: role -> `Live`, per layer.

    A row without an open column is zero but for its bias, and so is a column without an open row.
    """
    open_sides = [
        {role: tuple(torch.ones(size, dtype=torch.bool) for size in layer.shapes[role]) for role in ROLES}
        for layer in layers
    ]
    for mask, vector in zip(masks, vectors, strict=True):
        for role, repeat in {vector.role: vector.gate.repeat, **vector.shared}.items():
            side = open_sides[vector.layer][role][vector.axis == "in"]
            side &= vector.gate.repeated(mask.cpu().bool(), repeat)
    return [
        {
            role: Live(rows & (columns.any() | biases[role]), columns & rows.any(), biases[role])
            for role, (rows, columns) in sides.items()
        }
        for sides, biases in zip(open_sides, biased, strict=True)
    ]


def gates_to_close(total: int, sparsity: float) -> int:
    """Return how many of `total` gates the requested sparsity closes (rounded up: never less than asked)."""
    return min(total, math.ceil(sparsity * total - ROUNDING))


@dataclass(frozen=True)
class Ranking:
    """All gates of an encoder, in the order in which they close.

    Vectors that belong to heads close in slots: the r-th best element of every head together. So every head
    of a layer keeps the same width, and nothing is lost to padding.
    """

    elements: Tensor  # [n] the least important first, as indices into all masks concatenated
    slots: Tensor  # [slots] how many of `elements` each slot has; they close together
    dims: Tensor  # [slots] dimensions that each slot stands for
    counts: Tensor  # [all] dimensions that each element of all masks stands for
    masks: Masks  # current masks; those of elements that are not ranked do not change
    closed: int  # dimensions that are already closed

    @classmethod
    def of(cls, vectors: list[GateVector], among: list[Tensor], *, per_mac: bool) -> "Ranking":
        """Rank the elements of `among` (bool, one per vector; all of them open) by score.

        With `per_mac`, by the score per multiply-accumulate saved.
        """
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        first = 0
        for vector, taking in zip(vectors, among, strict=True):
            standing = vector.gate.score.detach().float().masked_fill(~taking, -math.inf).cpu()
            ranked, order = standing.view(vector.heads, -1).sort(dim=1, descending=True)  # what is not ranked is last
            members = (first + order + torch.arange(vector.heads)[:, None] * order.shape[1]).T  # [slots, heads]
            there = ~ranked.T.isneginf()
            width = there.sum(1)
            values = ranked.T.where(there, 0).sum(1) / width / (vector.macs if per_mac else 1.0)
            some = width > 0
            # Worst slots first, and none above a better one: the last may have only the elements of the widest heads.
            values, width = values[some].cummin(0).values.flip(0), width[some].flip(0)
            members, there = members.flip(0), there.flip(0)
            found.append((values, members[there], width, width * vector.gate.counts))
            first += vector.gate.size
        values, elements, slots, dims = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = values.argsort(stable=True)
        place = order.argsort().repeat_interleave(slots)  # place of the slot of each element
        masks = [vector.gate.mask.detach().float().cpu() for vector in vectors]
        counts = torch.cat([torch.full((vector.gate.size,), vector.gate.counts) for vector in vectors])
        _, closed = counted(vector.gate for vector in vectors)
        return cls(elements[place.argsort(stable=True)], slots[order], dims[order], counts, masks, closed)

    def closing(self, count: int) -> Masks:
        """Return masks that close `count` dimensions in total, the least important first.

        A remainder too small for whole heads is taken from single dimensions. If none of those is open any more,
        one more head closes and single dimensions open again.
        """
        mask, left = torch.cat(self.masks), count - self.closed
        taken = self.dims.cumsum(0) <= left
        left -= int(self.dims[taken].sum())
        for slot, size in enumerate(self.dims.tolist()):  # smaller slots may follow one that is too large
            if size <= left and not taken[slot]:
                taken[slot] = True
                left -= size
        mask[self.elements[taken.repeat_interleave(self.slots)]] = 0
        if left > 0:  # slots of several heads leave a remainder, and so do whole heads
            mask = self._close_single(mask, left)
        return list(mask.split([len(one) for one in self.masks]))

    def _close_single(self, mask: Tensor, left: int) -> Tensor:
        """Close elements worth `left` more dimensions, still the least important first.

        If only larger elements are open, one of the smallest of them closes (a whole head for one dimension would be
        far too much) and smaller ones open again for the excess: those that closed last or, if these do not fit, any.
        """
        values, counts, elements = mask.tolist(), self.counts.tolist(), self.elements.tolist()
        for larger in (False, True):
            for element in sorted(elements, key=counts.__getitem__) if larger else elements:
                if left > 0 and values[element] and (larger or counts[element] <= left):
                    values[element] = 0.0
                    left -= counts[element]
        before = (torch.cat(self.masks) == 0).nonzero().flatten().tolist()
        for element in [*reversed(elements), *before]:
            if counts[element] <= -left and not values[element]:
                values[element] = 1.0
                left += counts[element]
        return torch.tensor(values)


class Budget:
    """Closes gates over a training of `steps` steps until `sparsity` of `unit` is gone.

    Call `penalty()` for the loss term and `after_backward(step)` between backward and optimizer step.
    Raises `UsageError` if all gates together cannot reach the budget.
    """

    def __init__(  # noqa: PLR0913 - each is a dial of the training
        self,
        vectors: list[GateVector],
        *,
        sparsity: float,
        controller: Controller,
        steps: int,
        closing: float = MethodSpec.closing,  # fraction of the steps after which all gates have closed
        penalty_weight: float = 0.0,
        unit: BudgetUnit = "gates",
        removed: Callable[[Masks], float] | None = None,  # from `removed_by`, for units that are not counted in gates
        own_teacher: bool = False,  # whether the loss is 0 as long as all gates are open
    ) -> None:
        self.vectors = vectors
        self.sparsity = sparsity
        self.controller: Controller = controller
        self.penalty_weight = penalty_weight
        self.unit: BudgetUnit = unit
        self.starts = int(CLOSING_STARTS * steps)
        self.ends = max(self.starts, int(closing * steps))
        self.fixed = sparsity == 0
        self.moved = True  # whether masks may have changed since they were last read (training.py)
        self._removed = removed
        self._own_teacher = own_teacher
        self._most = 1.0  # fraction of the unit that all gates together reach
        if removed is not None:
            self._most = removed([torch.zeros_like(vector.gate.mask) for vector in vectors])
            if self._most < sparsity:
                raise UsageError(
                    f"--sparsity is {sparsity:g} of the {unit}, but all gates together reach only {self._most:.3f}; "
                    "ask for less, or let more matrices take part"
                )

    @property
    def total_gates(self) -> int:
        """Number of dimensions that the encoder's gates stand for."""
        return counted(vector.gate for vector in self.vectors)[0]

    @property
    def closed_gates(self) -> int:
        """Number of these dimensions whose mask is 0, counted."""
        return counted(vector.gate for vector in self.vectors)[1]

    @property
    def removed(self) -> float:
        """Fraction of the budget's unit that is removed, counted."""
        if self._removed is None:
            return self.closed_gates / self.total_gates
        return self._removed([vector.gate.mask for vector in self.vectors])

    def target(self, step: int) -> float:
        """Return the fraction that should be removed after `step` (cubic schedule)."""
        if step >= self.ends:
            return self.sparsity
        left = 1 - max(0.0, (step - self.starts) / max(1, self.ends - self.starts))
        return self.sparsity * (1 - left**3)

    def penalty(self, step: int) -> Tensor | None:
        """Return lambda * mean |mean(P) - (1 - s)|, eq. (9), or None if there is no penalty."""
        if self.controller != "penalty" or self.fixed:
            return None
        asked = self.sparsity * min(1.0, step / max(1, self.ends // 2))  # ramped: no shock at the start
        terms = [(vector.gate.probability_open().mean() - (1 - asked)).abs() for vector in self.vectors]
        return self.penalty_weight * torch.stack(terms).mean()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Update importances from the gradients and close what the schedule requires at `step`."""
        if self.controller == "importance":
            self._rank()
            if self._own_teacher and step == 1 and not self.fixed:
                self._close_at_random()
            if not self.fixed and step >= self.starts and (step % RERANK_EVERY == 0 or step >= self.ends):
                self.close(self.target(step))
        elif not self.fixed and step >= self.ends:
            for vector in self.vectors:
                vector.gate.score.copy_(vector.gate.mu)
            self.close(self.sparsity)
        if step >= self.ends:
            self.fixed = True

    def _rank(self) -> None:
        """Add the last gradient to the moving averages; a closed gate keeps the average that closed it."""
        for vector in self.vectors:
            gradient, score = vector.gate.mu.grad, vector.gate.score
            if gradient is not None:
                score.add_((gradient.square() - score) * vector.gate.mask, alpha=1 - AVERAGE_KEEPS)

    def _close_at_random(self) -> None:
        """Close a few gates, the same in all processes, and forget what they were drawn by."""
        drawn = torch.Generator().manual_seed(0)
        for vector in self.vectors:
            vector.gate.score.copy_(torch.rand(vector.gate.size, generator=drawn))
        self.close(AT_RANDOM * self.sparsity)
        for vector in self.vectors:
            vector.gate.score.zero_()

    @torch.no_grad()
    def close(self, fraction: float) -> None:
        """Close the open gates with the lowest scores until `fraction` of the unit is gone.

        A closed gate opens again only where gates stand for several dimensions, as a remainder of less than one.
        """
        self._close(fraction, [vector.gate.mask.bool() for vector in self.vectors])

    @torch.no_grad()
    def close_anew(self, fraction: float, *, run: Path) -> None:
        """Close more gates until `fraction` of the unit is gone, or open those with the best scores until no more is.

        Raises `ArtifactError`, naming the `run` that the gates belong to, if it keeps no scores to choose by.
        """
        if fraction and not any(vector.gate.score.any() for vector in self.vectors):
            raise ArtifactError(
                f"{run}: keeps no scores that its gates could be ranked by (it was written by an older release, or "
                "stopped or fixed before any gate closed); train again with the --sparsity that is wanted"
            )
        if self.removed < fraction:
            self.close(fraction)
            return
        closed = [vector.gate.mask == 0 for vector in self.vectors]
        for vector in self.vectors:
            vector.gate.mask.fill_(1)
        self._close(fraction, closed)

    def _close(self, fraction: float, among: list[Tensor]) -> None:
        """Close gates of `among` (bool, one per vector), all of which are open."""
        self.moved = True
        if self.unit == "vectors":
            self._close_in_each_vector(fraction, among)
            return
        for mask, vector in zip(self._masks(self._ranking(self.vectors, among), fraction), self.vectors, strict=True):
            vector.gate.mask.copy_(mask)

    def _ranking(self, vectors: list[GateVector], among: list[Tensor]) -> Ranking:
        # With the penalty, a score is mu, a value: not a loss that could be divided by a saving.
        return Ranking.of(vectors, among, per_mac=self.controller == "importance")

    def _masks(self, ranking: Ranking, fraction: float) -> Masks:
        """Return masks that remove `fraction`, never less, and as little more as whole gates allow."""
        if self._removed is None:
            return ranking.closing(gates_to_close(self.total_gates, fraction))
        few, gone_of_few = ranking.closed, self._removed(ranking.masks)
        if gone_of_few >= fraction:  # closed gates stay closed, and are enough
            return ranking.masks
        many, gone_of_many = self.total_gates, self._most
        best, halve = None, False
        while many - few > 1:
            # What is removed grows almost evenly with the gates that close; every second try halves the range for sure.
            part = 0.5 if halve else (fraction + TOLERANCE / 2 - gone_of_few) / (gone_of_many - gone_of_few)
            count = min(max(few + round((many - few) * part), few + 1), many - 1)
            halve = not halve
            masks = ranking.closing(count)
            gone = self._removed(masks)
            if gone < fraction:
                few, gone_of_few = count, gone
                continue
            many, gone_of_many, best = count, gone, masks
            if gone - fraction < TOLERANCE:
                break
        return ranking.closing(many) if best is None else best

    def _close_in_each_vector(self, fraction: float, among: list[Tensor]) -> None:
        pairs = list(zip(self.vectors, among, strict=True))
        whole = [(vector, own) for vector, own in pairs if vector.gate.counts > 1]
        single = [(vector, own) for vector, own in pairs if vector.gate.counts == 1]
        carried = 0.0  # dimensions left over for the vectors that follow; single ones come last
        for vector, own in whole:
            exact = fraction * vector.gate.size + carried / vector.gate.counts
            count = math.floor(exact + ROUNDING)
            carried = exact * vector.gate.counts - self._close_lowest(vector, own, count * vector.gate.counts)
        open_still = [(_of_widest(vector), vector.gate) for vector, _ in whole if vector.gate.mask.any()]
        if open_still and carried > (1 - fraction) * sum(vector.gate.size for vector, _ in single) + ROUNDING:
            scores, last = min(open_still, key=lambda pair: float(pair[0].min()))
            last.mask[scores.argmin()] = 0
            carried -= last.counts
        for vector, own in single:
            exact = fraction * vector.gate.size + carried
            count = min(vector.gate.size, max(0, math.ceil(exact - ROUNDING)))
            carried = exact - self._close_lowest(vector, own, count)

    def _close_lowest(self, vector: GateVector, among: Tensor, count: int) -> int:
        """Close gates of `among` until `count` dimensions of a vector are closed, or all; return how many are."""
        vector.gate.mask.copy_(self._ranking([vector], [among]).closing(count)[0])
        return counted([vector.gate])[1]


def _of_widest(vector: GateVector) -> Tensor:
    """Return the scores of open elements in those heads that have the most of them; infinite for all others."""
    there = vector.gate.mask.view(vector.heads, -1) > 0
    width = there.sum(1, keepdim=True)
    return vector.gate.score.masked_fill(~(there & (width == width.max())).view(-1), math.inf)


def budget_of(model: nn.Module, layers: list[Layer], settings: TrainSettings, *, steps: int, tokens: int) -> Budget:
    """Return the budget that `settings` ask for in a prepared model; `macs` count attention at `tokens` tokens."""
    vectors = gate_vectors(model, layers, settings.granularity)
    removed = None
    if settings.unit not in ("gates", "vectors"):
        removed = removed_by(model, layers, vectors, settings.unit, tokens=tokens)
    return Budget(
        vectors,
        sparsity=settings.sparsity,
        controller=settings.controller,
        steps=steps,
        closing=settings.closing or MethodSpec.closing,
        penalty_weight=settings.penalty_weight,
        unit=settings.unit,
        removed=removed,
        own_teacher=settings.embed,
    )
