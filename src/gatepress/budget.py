"""From an asked sparsity to gates closed: what is asked is what is closed, counted.

Two controllers over the same gates.

`importance` (the default): closing is gradual and by rank. Every gate keeps a moving average of its
squared gradient (dL/dz)^2, the diagonal of the Fisher information of the gates; every few steps all
gates of the encoder are ranked by average / multiply-accumulates saved, and the best stay open. The
number that may stay open falls on a cubic schedule to the exact budget; closed gates still receive
gradients, so a gate closed too early comes back. Layers share the loss where it hurts least.

`penalty` (the paper): the loss gets lambda * mean over gate vectors of |mean(P) - (1 - s)|, eq. (9).
The penalty alone does not close gates (all settle near the target value, hardly any at 0), so at the
end of the schedule each vector is projected onto its exact budget by rank of mu, and the rest of the
training recovers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatepress.config import Controller, Granularity
from gatepress.gates import Gate, counted
from gatepress.inject import SITES, gated_linear
from gatepress.resolve import Layer

CLOSING_STARTS = 0.08  # fractions of all steps
CLOSING_ENDS = 0.60
RERANK_EVERY = 10  # steps
ROUNDING = 1e-6  # of a gate: what a product of a fraction and a whole number may be off
AVERAGE_KEEPS = 0.98  # of the moving average, per step


Unit = tuple[float, int, Tensor]  # importance, vector, the elements that close together


@dataclass(frozen=True)
class GateVector:
    """One gate vector and what its elements cost."""

    gate: Gate
    macs: float  # linear multiply-accumulates per token that one closed element saves
    heads: int  # > 1: the elements belong to heads, whose kept widths should be equal


def gate_vectors(model: nn.Module, layers: list[Layer], granularity: Granularity) -> list[GateVector]:
    """Return the model's gate vectors with costs.

    A structured gate removes a row and a column (two matrices), a matrix gate one row or column, a head
    as much as all of its dimensions.
    """
    vectors = []
    alone = granularity == "matrix"
    for layer in layers:
        for role, axis in SITES[granularity]:
            linear = gated_linear(model, layer, role)
            gate = _present(linear.gate_in if axis == "in" else linear.gate_out)
            rows, columns = layer.shapes[role]
            across = rows if axis == "in" else columns
            of_heads = granularity == "structured" and role in ("q", "o")
            vectors.append(
                GateVector(
                    gate=gate,
                    macs=float(across * (1 if alone else 2) * gate.counts),
                    heads=layer.heads if of_heads else 1,
                )
            )
    return vectors


def _present(gate: Gate | None) -> Gate:
    if gate is None:
        raise TypeError("a site of the granularity has no gate")
    return gate


def gates_to_close(total: int, sparsity: float) -> int:
    """Return how many of `total` gates the asked sparsity closes (rounded up: never less than asked)."""
    return min(total, math.ceil(sparsity * total - ROUNDING))


def choose_closed(
    scores: list[Tensor], macs: list[float], heads: list[int], count: int, counts: list[int] | None = None
) -> list[Tensor]:
    """Return masks (1 open, 0 closed) that close `count` dimensions, the least important first.

    `scores` holds one vector per gate vector; each element stands for `counts` dimensions (None: one).
    Vectors that belong to heads are closed in slots: the r-th best element of every head together, so
    that each head of a layer keeps the same width and nothing is lost to padding. Importance is the
    score per multiply-accumulate saved. What is left too small for whole heads is taken from single
    dimensions; where none is open any more, one head more goes and single dimensions open again.
    """
    counts = counts or [1] * len(scores)
    units: list[Unit] = []
    for index, (score, cost, n_heads) in enumerate(zip(scores, macs, heads, strict=True)):
        ranked, order = score.detach().float().cpu().view(n_heads, -1).sort(dim=1, descending=True)
        offsets = torch.arange(n_heads)[:, None] * order.shape[1]
        members = (order + offsets).T  # [slots, heads]
        for value, slot in zip((ranked.mean(0) / cost).tolist(), members, strict=True):
            units.append((value, index, slot))
    units.sort(key=lambda unit: unit[0])
    masks = [torch.ones_like(score, dtype=torch.float32, device="cpu") for score in scores]
    left = count
    for _, index, slot in units:
        if left == 0:
            break
        if len(slot) * counts[index] <= left:
            masks[index][slot] = 0
            left -= len(slot) * counts[index]
    if left:  # slots of several heads leave a remainder, and so do whole heads
        _close_single_(masks, units, counts, left)
    return masks


def _close_single_(masks: list[Tensor], units: list[Unit], counts: list[int], left: int) -> None:
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
    """Closes `sparsity` of the gates over a training of `steps` steps.

    Call `penalty()` for the loss term, `after_backward(step)` between backward and optimizer step.
    """

    def __init__(
        self,
        vectors: list[GateVector],
        *,
        sparsity: float,
        controller: Controller,
        steps: int,
        penalty_weight: float,
    ) -> None:
        self.vectors = vectors
        self.sparsity = sparsity
        self.controller: Controller = controller
        self.penalty_weight = penalty_weight
        self.starts = int(CLOSING_STARTS * steps)
        self.ends = max(self.starts, int(CLOSING_ENDS * steps))
        self.scores = [torch.zeros_like(vector.gate.mu) for vector in vectors]
        self.fixed = sparsity == 0

    @property
    def total_gates(self) -> int:
        """Dimensions that the encoder's gates stand for."""
        return counted(vector.gate for vector in self.vectors)[0]

    @property
    def closed_gates(self) -> int:
        """Those of them whose mask is 0, counted."""
        return counted(vector.gate for vector in self.vectors)[1]

    def target(self, step: int) -> int:
        """Return how many gates should be closed after `step` (cubic schedule)."""
        if step >= self.ends:
            return gates_to_close(self.total_gates, self.sparsity)
        left = 1 - max(0.0, (step - self.starts) / max(1, self.ends - self.starts))
        return int(self.sparsity * self.total_gates * (1 - left**3))

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
        if self.fixed:
            return
        if self.controller == "importance":
            for score, vector in zip(self.scores, self.vectors, strict=True):
                gradient = vector.gate.mu.grad
                if gradient is not None:
                    score.mul_(AVERAGE_KEEPS).addcmul_(gradient, gradient, value=1 - AVERAGE_KEEPS)
            if step >= self.starts and (step % RERANK_EVERY == 0 or step >= self.ends):
                self._close_by_importance(self.target(step))
            # The straight-through gradient of a closed gate ranks it; it must not move its value.
            for vector in self.vectors:
                if vector.gate.mu.grad is not None:
                    vector.gate.mu.grad.mul_(vector.gate.mask)
        elif step >= self.ends:
            self._project_each_vector()
        if step >= self.ends:
            self.fixed = True

    def _close_by_importance(self, count: int) -> None:
        vectors = self.vectors
        counts = [vector.gate.counts for vector in vectors]
        masks = choose_closed(self.scores, [v.macs for v in vectors], [v.heads for v in vectors], count, counts)
        for mask, vector in zip(masks, self.vectors, strict=True):
            vector.gate.mask.copy_(mask)

    def _project_each_vector(self) -> None:
        whole = [vector for vector in self.vectors if vector.gate.counts > 1]
        single = [vector for vector in self.vectors if vector.gate.counts == 1]
        carried = 0.0  # dimensions that rounding left to the vectors that follow; single ones come last
        for vector in whole:
            exact = self.sparsity * vector.gate.size + carried / vector.gate.counts
            count = math.floor(exact + ROUNDING)
            carried = (exact - count) * vector.gate.counts
            _close_lowest(vector, count)
        open_heads = [vector.gate for vector in whole if vector.gate.mask.any()]
        if open_heads and carried > (1 - self.sparsity) * sum(vector.gate.size for vector in single) + ROUNDING:
            last = min(open_heads, key=lambda gate: float(gate.mu[gate.mask == 1].min()))
            last.mask[last.mu.masked_fill(last.mask == 0, math.inf).argmin()] = 0
            carried -= last.counts
        for vector in single:
            exact = self.sparsity * vector.gate.size + carried
            count = min(vector.gate.size, max(0, math.ceil(exact - ROUNDING)))
            carried = exact - count
            _close_lowest(vector, count)


def _close_lowest(vector: GateVector, count: int) -> None:
    """Close `count` gates of a vector, by rank of mu, and open its others."""
    vector.gate.mask.copy_(choose_closed([vector.gate.mu], [1.0], [vector.heads], count)[0])
