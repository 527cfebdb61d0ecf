"""Predict each class as often as it occurs: where the decisions of a trained model lie.

A model that knows little of a task predicts the larger class too often. That costs the fewest errors, but Matthews
correlation and the rarer class pay for it; and the less is left of a model, the less it knows. So the biases of the
head are moved, by as little as possible, until each class is predicted on training rows as often as it occurs there:

    find b near 0 with   #{rows : argmax_c (z_c + b_c) = k} = #{rows : label = k}   for every class k

z are the logits. A model that knows its training rows by heart already meets this and stays as it is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from gatepress.distill import of_classes
from gatepress.errors import ModelError
from gatepress.inject import in_head

ROWS = 4_096  # training rows at most: on that many, a share is known to a hundredth
PASSES = 100  # over the classes; for two classes, the first pass is the last
MARGIN = 1e-3  # of a logit, from the decision to the nearest row
SETTLED = 1e-5  # of a logit, per pass
DIGITS = 4  # of what is added to a bias: a run that was stopped computes logits with other last digits

Floats = npt.NDArray[np.float64]


def offsets(logits: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> Floats:
    """Return what to add to the logits of each class [classes] so that class k is predicted in `counts[k]` of the rows.

    `logits` is [rows, classes], and `counts` sum to its rows. Offsets sum to 0. Rows with the same logits cannot be
    told apart, so the counts may be missed by as many rows. For two classes, the offsets are the smallest that do it,
    up to `MARGIN`. For more, one class after the other moves no farther than it must; if that does not settle within
    `PASSES`, some rows are missed.
    """
    values = np.ascontiguousarray(logits.T, dtype=np.float64)
    moved, found = values.copy(), np.zeros(len(values))
    named, highest = moved.argmax(0), moved.max(0)
    for _ in range(PASSES):
        before = found.copy()
        for k, own in enumerate(values):
            mine = named == k
            moved[k] = -np.inf
            others = moved[:, mine]
            named[mine], highest[mine] = others.argmax(0), others.max(0)  # so in all rows: the best but k
            found[k] = np.clip(found[k], *_between(highest - own, counts[k]))
            moved[k] = own + found[k]
            ahead = moved[k] > highest
            named[ahead], highest[ahead] = k, moved[k, ahead]
        if np.abs(found - before).max() < SETTLED:
            break
    found -= found.mean()
    return found


def _between(missing: Floats, count: int) -> tuple[float, float]:
    """Return the range of offsets in which a class is predicted in `count` of the rows, whose logits lack `missing`."""
    places = np.concatenate([[-np.inf], np.sort(missing), [np.inf]])
    low, high = places[count : count + 2]
    apart = min((high - low) / 2, MARGIN)
    return float(low + apart), float(high - apart)


def drawn(rows: Any, count: int | None = None) -> Any:
    """Return at most `ROWS` rows of a table, the same at every call: from its first `count` rows, or from all."""
    count = len(rows) if count is None else count
    return rows.select(np.sort(np.random.default_rng(0).permutation(count)[:ROWS]))


def match_(model: PreTrainedModel, logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> list[float]:
    """Move the biases of a model's head, in place; return by how much, one number per class.

    `logits` [rows, outputs] are what it gives on rows with these `labels` [rows]; a single output is that of the second
    of two classes, the first being 0. Raises `ModelError` if the head does not end with a bias.
    """
    classes = of_classes(torch.from_numpy(logits)).numpy()
    counts = np.bincount(labels.astype(np.int64), minlength=classes.shape[1])
    moved = np.round(offsets(classes, counts), DIGITS)
    move_(model, moved)
    return [float(one) for one in moved]


@torch.no_grad()
def move_(model: PreTrainedModel, by: Floats) -> None:
    """Add to the logits of each class [classes] through the biases of a model's head, in place.

    Raises `ModelError` if the head does not end with a bias or has other classes.
    """
    bias = last_bias(model)
    if len(by) != max(len(bias), 2):
        raise ModelError(f"the head of this model has {max(len(bias), 2)} classes, offsets are of {len(by)}")
    bias.add_(torch.from_numpy(by if len(bias) > 1 else by[1:] - by[:1]).to(bias))


def last_bias(model: PreTrainedModel) -> nn.Parameter:
    """Return the bias that is added to the logits [outputs]; `ModelError` if the head does not end with one."""
    outputs = model.config.num_labels
    last = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and in_head(model, f"{path}.weight")
    ]
    if not (last and isinstance(last[-1].bias, nn.Parameter)):
        raise ModelError("the head of this model ends without a bias to move; train with --no-match-shares")
    return last[-1].bias
