"""Each class named as often as it occurs: where the decisions of a trained model lie.

What knows little of a task names the larger class too often: that costs the fewest errors, while Matthews correlation
and the rarer class pay for it, and the less is left of a model the less it knows. So the biases of the head are moved
by as little as lets each class be named among training rows as often as among their labels:

    find b near 0 with   #{rows : argmax_c (z_c + b_c) = k} = #{rows : label = k}   for every class k

z are the logits. A model that knows its training rows by heart does so already, and stays as it is.
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

ROWS = 4_096  # of training rows, at most: of as many a share is known to a hundredth
PASSES = 100  # over the classes; of two classes the first pass is the last
MARGIN = 1e-3  # of a logit, to the row next to where a decision lies
SETTLED = 1e-5  # of a logit, in a pass
DIGITS = 4  # of what is added to a bias: a run that was stopped computes logits with other last digits

Floats = npt.NDArray[np.float64]


def offsets(logits: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> Floats:
    """Return what to add to the logits of each class [classes], to name class k in `counts[k]` of the rows.

    `logits` is [rows, classes], and `counts` sum to its rows. Offsets sum to 0. Rows with the same logits cannot be
    told apart: by so many it may miss. Of two classes they are the least that do it, but for `MARGIN`; of more, one
    class after the other goes no farther than it must, and where `PASSES` do not settle it some rows are missed.
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
            named[mine], highest[mine] = others.argmax(0), others.max(0)  # so of all rows, what k is not
            found[k] = np.clip(found[k], *_between(highest - own, counts[k]))
            moved[k] = own + found[k]
            ahead = moved[k] > highest
            named[ahead], highest[ahead] = k, moved[k, ahead]
        if np.abs(found - before).max() < SETTLED:
            break
    found -= found.mean()
    return found


def _between(missing: Floats, count: int) -> tuple[float, float]:
    """Return from which offset to which one a class is named in `count` of the rows, whose logits lack `missing`."""
    places = np.concatenate([[-np.inf], np.sort(missing), [np.inf]])
    low, high = places[count : count + 2]
    apart = min((high - low) / 2, MARGIN)
    return float(low + apart), float(high - apart)


def drawn(rows: Any, count: int | None = None) -> Any:
    """Return at most `ROWS` of a table, the same at every call: of its first `count` rows, or of all."""
    count = len(rows) if count is None else count
    return rows.select(np.sort(np.random.default_rng(0).permutation(count)[:ROWS]))


def match_(model: PreTrainedModel, logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> list[float]:
    """Move the biases of a model's head, in place; return by how much, one number a class.

    `logits` [rows, outputs] are what it gives on rows with these `labels` [rows]; one output is that of the second of
    two classes, counted from 0. Raises `ModelError` where the head ends without a bias.
    """
    classes = of_classes(torch.from_numpy(logits)).numpy()
    counts = np.bincount(labels.astype(np.int64), minlength=classes.shape[1])
    moved = np.round(offsets(classes, counts), DIGITS)
    move_(model, moved)
    return [float(one) for one in moved]


@torch.no_grad()
def move_(model: PreTrainedModel, by: Floats) -> None:
    """Add to the logits of each class [classes], by the biases of a model's head, in place.

    Raises `ModelError` where the head ends without a bias or has other classes.
    """
    bias = last_bias(model)
    if len(by) != max(len(bias), 2):
        raise ModelError(f"the head of this model has {max(len(bias), 2)} classes, offsets are of {len(by)}")
    bias.add_(torch.from_numpy(by if len(bias) > 1 else by[1:] - by[:1]).to(bias))


def last_bias(model: PreTrainedModel) -> nn.Parameter:
    """Return what is added to the logits [outputs]; `ModelError` where the head ends without it."""
    outputs = model.config.num_labels
    last = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and in_head(model, f"{path}.weight")
    ]
    if not (last and isinstance(last[-1].bias, nn.Parameter)):
        raise ModelError("the head of this model ends without a bias to move; train with --no-match-shares")
    return last[-1].bias
