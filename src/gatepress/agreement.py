"""Do two runtimes compute the same function? The random rows that they are compared on, and the comparison."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from gatepress.config import MAX_LOGIT_DIFF
from gatepress.errors import ParityError, reason_of
from gatepress.runners import Batch, Runner, TorchRunner, input_names

LONGEST_TRIED = 512  # tokens
SEED = 0
# (batch, length, padded): shapes on which a graph with a frozen axis or a wrong mask fails.
SHAPES = (
    (1, 1, False),
    (1, 3, False),
    (4, 2, False),
    (3, 16, True),
    (5, 33, True),
    (1, LONGEST_TRIED, False),
)


@dataclass(frozen=True)
class Agreement:
    """What was compared, and the largest difference of a logit."""

    shapes: list[dict[str, Any]]
    difference: float


def random_batches(runner: TorchRunner) -> list[Batch]:
    """Return the batches that a form of this model is compared on: `SHAPES`, cut to what the model takes."""
    longest = min(runner.max_tokens or LONGEST_TRIED, LONGEST_TRIED)
    shapes = dict.fromkeys((rows, min(length, longest), padded) for rows, length, padded in SHAPES)
    return [
        random_rows(runner.model, rows, length, padded=padded, seed=SEED + number)
        for number, (rows, length, padded) in enumerate(shapes)
    ]


def random_rows(model: PreTrainedModel, rows: int, length: int, *, padded: bool, seed: int = SEED) -> Batch:
    """Return random token ids [rows, length]; if asked, all rows but the first are padded on the right."""
    random = np.random.default_rng(seed)
    pad = model.config.pad_token_id or 0
    ids = random.integers(0, model.config.vocab_size - 1, (rows, length), dtype=np.int64)
    ids += ids >= pad  # any token except padding
    lengths = np.maximum(1, length - np.arange(rows) * length // rows) if padded else np.full(rows, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    second = (np.arange(length) >= lengths[:, None] // 2).astype(np.int64) * mask
    batch = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": second}
    return {name: batch[name] for name in input_names(model)}


def agree(wanted: Tensor, got: Tensor, what: str, remedy: str) -> float:
    """Return the largest difference of two forms' logits [rows, outputs] on the same rows.

    `ParityError`, naming `what` differs and the `remedy`, if it is too large or not a number.
    """
    difference = float((wanted - got).abs().max())
    limit = allowed(MAX_LOGIT_DIFF, float(wanted.abs().max()))
    if not difference <= limit:
        raise ParityError(
            f"{what} differ by {difference:.2e} on {len(wanted)} rows, expected at most {limit:.0e}; {remedy}"
        )
    return difference


def allowed(limit: float, largest: float) -> float:
    """Return how far logits may differ: `limit` times the `largest` of them, or `limit` if none is above 1.

    Rounding grows with the numbers: scores in the thousands agree in as many digits as logits do.
    """
    return limit * max(1.0, largest)


def compare(torch_runner: Runner, onnx_runner: Runner, batches: list[Batch], max_diff: float) -> Agreement:
    """Run both on every batch; `ParityError` above what `max_diff` allows, or if a number or a shape is wrong."""
    shapes, worst = [], 0.0
    for batch in batches:
        rows, length = batch["input_ids"].shape
        wanted = torch_runner.logits(batch)
        try:
            got = onnx_runner.logits(batch)
        except Exception as error:  # ONNX Runtime's exceptions share no other base class
            raise ParityError(
                f"ONNX Runtime cannot run {rows} x {length} tokens ({reason_of(error)}); nothing was written"
            ) from error
        if got.shape != wanted.shape:
            raise ParityError(
                f"logits of {rows} x {length} tokens are {got.shape} in ONNX Runtime "
                f"and {wanted.shape} in torch; nothing was written"
            )
        difference = float(np.abs(got - wanted).max())
        limit = allowed(max_diff, float(np.abs(wanted).max()))
        if not difference <= limit:
            raise ParityError(
                f"logits of {rows} x {length} tokens differ by {difference:.2e} between ONNX Runtime and "
                f"torch, expected at most {limit:.2g} (--max-diff is {max_diff:g}); nothing was written"
            )
        padding = int((batch["attention_mask"] == 0).sum()) if "attention_mask" in batch else 0
        shapes.append({"rows": rows, "length": length, "padding": padding, "max_abs_logit_diff": difference})
        worst = max(worst, difference)
    return Agreement(shapes, worst)


def quantized_difference(before: Runner, after: Runner, batches: list[Batch]) -> dict[str, Any]:
    """Return how far the logits of an int8 form lie from those before; `ParityError` if they are not numbers."""
    apart = np.concatenate([np.abs(after.logits(batch) - before.logits(batch)).ravel() for batch in batches])
    if not np.isfinite(apart).all():
        raise ParityError("logits in int8 are not finite numbers; nothing was written; export without --quantize")
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return {"rows": rows, "max": float(apart.max()), "mean": float(apart.mean())}
