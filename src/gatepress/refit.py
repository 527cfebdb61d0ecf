"""Fit what is left to what a teacher computes, by least squares, after gates were closed without a training.

Two matrices of a layer write to the residual stream, `o` and `down`, and both have lost inputs. Layer by layer, from
the first to the last, each is changed so that the norm after it gives the teacher's hidden states from the student's:

    min over W, b of   sum over tokens of | (x W^T + b + r - t) / std(t) |^2  +  ridge * | W - W_closed |^2

x are the remaining inputs and r is whatever else the norm reads; t is what the norm would have to read to give what the
teacher's gives, and std(t) what it divides by. Where a norm reads one matrix alone (Gemma 3), t also makes up for what
is lost in what the norm's output is added to. So later layers make up for what is lost in earlier ones. It takes one
pass over a few thousand rows, no labels and no steps.
"""

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatepress.distill import hidden_distances
from gatepress.modeling_gatepress import PrunedLinear, factors_of
from gatepress.progress import NoProgress, Progress
from gatepress.resolve import centres, family_of, is_norm, resolve

WRITERS = ("o", "down")  # matrices whose outputs are added to the residual stream
RIDGE = 1e-3  # of the mean square of an input
FLAT = 0.1  # of a norm's mean scale: what is scaled by less can hardly be recovered from its output

Batch = dict[str, Tensor]


@dataclass
class _Seen:
    """What one matrix received and gave on the real tokens of a batch, and what the norm after it made of that."""

    inputs: Tensor  # [tokens, in]; empty for a teacher, where they would take half of the memory
    total: Tensor  # [tokens, hidden], what the norm reads
    norm: nn.Module | None  # None: the layer ends before one
    after: Tensor  # [tokens, hidden], output of the norm, or of the layer
    beside: Tensor | None = None  # [tokens, hidden], what that is added to, if it is


class _Walk:
    """A model that goes through batches one layer at a time."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], *, teaches: bool = False) -> None:
        self.teaches = teaches
        self.base: Any = model.base_model
        self.layers = resolve(model)
        self.sandwiched = family_of(model.config).sandwiched
        self.modules = [self.base.get_submodule(layer.path) for layer in self.layers]
        self.calls = [self._calls(model, batch) for batch in batches]
        self.states: list[Tensor] = [calls[0][0][0] for calls in self.calls]

    def _calls(self, model: PreTrainedModel, batch: Batch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments that each layer is called with; hidden states are kept only for the first."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(((given[0] if not found else None, *given[1:]), named))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.modules]
        try:
            model(**batch, output_hidden_states=True)  # for this, all tokens of the last layer are computed
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def matrix(self, layer: int, role: str) -> Any:
        """Return the module of a matrix."""
        return self.base.get_submodule(self.layers[layer].paths[role])

    def run(self, layer: int, batch: int) -> Tensor:
        """Return hidden states [rows, length, hidden] after a layer."""
        (_, *given), named = self.calls[batch][layer]
        out: Tensor | tuple[Tensor, ...] = self.modules[layer](self.states[batch], *given, **named)
        return out if isinstance(out, Tensor) else out[0]

    def watch(self, layer: int, batch: int, roles: Sequence[str], real: Tensor) -> tuple[dict[str, _Seen], Tensor]:
        """Return what the layer's matrices see of the `real` tokens [rows, length] of a batch, and what `run` gives."""
        seen: dict[str, dict[str, Any]] = {role: {} for role in roles}

        def wrote(role: str, _: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
            # If attention gives the same result to all tokens, it is computed for one.
            inputs = given[0].expand(*real.shape, -1)
            seen[role]["inputs"] = inputs[:0] if self.teaches else inputs[real]

        def read(norm: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            for one in seen.values():
                if "inputs" in one and "total" not in one:
                    one.update(norm=norm, total=given[0][real], after=out[real])
                elif self.sandwiched and "total" in one and "beside" not in one:
                    one["beside"] = given[0][real] - one["after"]

        hooks = [self.matrix(layer, role).register_forward_hook(partial(wrote, role)) for role in roles]
        norms = (module for module in self.modules[layer].modules() if is_norm(module))
        hooks += [norm.register_forward_hook(read) for norm in norms]
        try:
            out = self.run(layer, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for one in seen.values() if self.sandwiched else ():
            if "beside" not in one:  # no other norm of the layer reads the sum
                one["beside"] = out[real] - one["after"]
        behind = {"norm": None, "total": out[real], "after": out[real]}  # if no norm of the layer reads it
        return {role: _Seen(**behind | one) for role, one in seen.items()}, out


@torch.no_grad()
def refit_(  # noqa: PLR0913 - two models, rows to fit on and rows to judge by
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    probe: Batch,
    *,
    all_tokens: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a pruned `student`, in place, to the hidden states of a dense or gated `teacher` of its base on `batches`.

    In the last layer, the first token counts as much as all others together, unless `all_tokens` of it are read. If the
    hidden states of the rows of `probe` come no nearer to the teacher's, the student stays as it was. Returns the
    distances before and after, how many `tokens` it was fitted on, and the `seconds` that it took.
    """
    began = time.perf_counter()
    before = _distance(student, teacher, probe, all_tokens=all_tokens)
    layers, base = resolve(student), student.base_model
    writers = [base.get_submodule(layer.paths[role]) for layer in layers for role in WRITERS]
    kept = [copy.deepcopy(writer.state_dict()) for writer in writers]
    masks = [batch["attention_mask"].bool() for batch in batches]
    progress = progress or NoProgress()
    progress.start(len(layers), "fitting layers")
    try:
        for _ in _layer_by_layer_(student, teacher, batches, masks, all_tokens=all_tokens):
            progress.advance(1)
    finally:
        progress.finish()
    after = _distance(student, teacher, probe, all_tokens=all_tokens)
    if not after < before:
        for writer, state in zip(writers, kept, strict=True):
            writer.load_state_dict(state)
    return {
        "hidden_distance_before": before,
        "hidden_distance": min(before, after),
        "tokens": int(sum(real.sum() for real in masks)),
        "seconds": time.perf_counter() - began,
    }


def _layer_by_layer_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    masks: Sequence[Tensor],
    *,
    all_tokens: bool,
) -> Iterator[None]:
    """Fit the layers of `student`, in place, from the first to the last; yield after each."""
    ours, theirs = _Walk(student, batches), _Walk(teacher, batches, teaches=True)
    last = len(ours.layers) - 1
    for layer in range(last + 1):
        wanted = [theirs.watch(layer, number, WRITERS, real) for number, real in enumerate(masks)]
        for role in WRITERS:
            fit = _Fit(ours.matrix(layer, role))
            for number, real in enumerate(masks):
                seen, _ = ours.watch(layer, number, (role,), real)
                heavier = _heavier_first(real) if layer == last and not all_tokens else None
                fit.add(seen[role], wanted[number][0][role], heavier)
            fit.solve_()
        ours.states = [ours.run(layer, number) for number in range(len(batches))]
        theirs.states = [out for _, out in wanted]
        yield


class _Fit:
    """The least-squares problem of one matrix, accumulated batch by batch."""

    def __init__(self, matrix: nn.Linear) -> None:
        self.matrix = matrix
        self.rows = _rows(matrix)
        size = matrix.weight.shape[1] + (matrix.bias is not None)
        self.products = matrix.weight.new_zeros(size, size, dtype=torch.float64)
        self.wanted = matrix.weight.new_zeros(size, len(matrix.weight), dtype=torch.float64)

    def add(self, ours: _Seen, theirs: _Seen, heavier: Tensor | None) -> None:
        """Add the tokens of a batch; `heavier` is the weight of each of them [tokens]."""
        spread = (theirs.total - _centre(theirs)).square().mean(-1, keepdim=True).sqrt()
        weights = (spread + torch.finfo(spread.dtype).eps).reciprocal()
        if heavier is not None:
            weights = weights * heavier[:, None].sqrt()
        inputs = self.matrix.read(ours.inputs) if isinstance(self.matrix, PrunedLinear) else ours.inputs
        if self.matrix.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        inputs = inputs * weights
        missing = (_to_be_read(ours, theirs, spread) - ours.total) * weights
        self.products += (inputs.T @ inputs).double()
        self.wanted += (inputs.T @ missing[:, self.rows]).double()

    def solve_(self) -> None:
        """Set the matrix to the solution."""
        diagonal = self.products.diagonal()
        ridge = RIDGE * diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny)
        step = torch.linalg.solve(self.products + ridge * torch.eye(len(diagonal)).to(diagonal), self.wanted)
        columns = self.matrix.weight.shape[1]
        self.matrix.weight.add_(step[:columns].T)
        if self.matrix.bias is not None:
            self.matrix.bias.add_(step[columns])


def _centre(seen: _Seen) -> Tensor:
    """Return what the norm takes away from what it reads [tokens, 1]; before no norm, what a layer norm would."""
    mean = seen.total.mean(-1, keepdim=True)
    return mean if seen.norm is None or centres(seen.norm) else torch.zeros_like(mean)


def _to_be_read(ours: _Seen, theirs: _Seen, spread: Tensor) -> Tensor:
    """Return what the student's norm would have to read to give what the teacher's gives [tokens, hidden].

    `spread` is what the teacher's norm divides by [tokens, 1].
    """
    norm: Any = ours.norm
    if norm is None:
        return theirs.total
    bias, factors = getattr(norm, "bias", None), norm.weight if centres(norm) else factors_of(norm)[0]
    wanted = theirs.after if bias is None else theirs.after - bias
    if ours.beside is not None and theirs.beside is not None:  # what is lost there is made up for, too
        wanted = wanted + theirs.beside - ours.beside
    told = factors.abs() > FLAT * factors.abs().mean()
    return torch.where(told, wanted / factors * spread + _centre(theirs), theirs.total)


def _rows(matrix: nn.Linear) -> Tensor:
    """Return which outputs of the dense matrix its rows compute."""
    index: Tensor | None = getattr(matrix, "out_index", None)
    if index is None:
        return torch.arange(len(matrix.weight), device=matrix.weight.device)
    computed = (index < len(matrix.weight)).nonzero()[:, 0]
    return computed[index[computed].argsort()]


def _heavier_first(real: Tensor) -> Tensor:
    """Return weights of the real tokens [tokens]: the first of a row weighs as much as all others together."""
    weights = torch.ones_like(real, dtype=torch.float32)
    weights[:, 0] = (real.sum(1) - 1).clamp_min(1).to(weights)
    return weights[real]


def _distance(student: PreTrainedModel, teacher: PreTrainedModel, probe: Batch, *, all_tokens: bool) -> float:
    ours, theirs = (model(**probe, output_hidden_states=True) for model in (student, teacher))
    return hidden_distances(ours, theirs, probe["attention_mask"], whole=all_tokens).mean().item()


def first_tokens(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """Return the first batches that together hold so many real tokens, or all batches."""
    found: list[Batch] = []
    for batch in batches:
        found.append(batch)
        tokens -= int(batch["attention_mask"].sum())
        if tokens <= 0:
            break
    return found
