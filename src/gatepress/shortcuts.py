"""What a graph need not compute: shorter ways to the same logits, while it is written.

None of them changes the model. What torch gains from too, the model leaves out itself (`modeling_gatepress`).
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gatepress.modeling_gatepress import PrunedLinear, factors_of
from gatepress.resolve import Layer, centres, is_norm, resolve


@contextlib.contextmanager
def all_of_them(model: PreTrainedModel) -> Iterator[None]:
    """Take every shortcut while the block runs; of a model that is not pruned, those of norms and angles."""
    with _fewer_biases(model), _rows_of_zeros(model), _norms_as_one(model), _angles_of_its_positions(model):
        yield


@contextlib.contextmanager
def _fewer_biases(model: PreTrainedModel) -> Iterator[None]:
    """Add no biases to keys and values: if matrices are narrow, an addition takes a good part of the time.

    A key's bias moves all scores of a query alike, which softmax ignores, unless keys are multiplied with more than
    queries. Softmax sums to 1, so what is added to all values comes out of attention unchanged, and the matrix after it
    adds its image instead.
    """
    base: Any = model.base_model
    layers = _pruned_layers(model)
    parts: list[list[Any]] = [
        [base.get_submodule(layer.paths[role]) if layer.shapes[role][0] else None for role in ("k", "v", "o")]
        for layer in layers
    ]
    with _restored(part for one in parts for part in one if part is not None):
        for layer, (key, value, out) in zip(layers, parts, strict=True):
            if value.bias is not None:
                width = base.get_submodule(layer.attention).gatepress["vo_width"]
                of_each = value.spread(value.bias).view(-1, width).repeat_interleave(layer.group, dim=0)
                added = out.read(of_each.flatten())
                out.bias = nn.Parameter(functional.linear(added, out.weight, out.bias).detach())
            value.bias = None
            if key is not None and not base.get_submodule(layer.attention).key_bias_counts:
                key.bias = None
        yield


@contextlib.contextmanager
def _rows_of_zeros(model: PreTrainedModel) -> Iterator[None]:
    """Let matrices compute the zeros of closed outputs: ONNX Runtime takes longer to append zeros to a result."""
    scattered = [part for part in model.modules() if isinstance(part, PrunedLinear) and part.out_index is not None]
    with _restored(scattered):
        for part in scattered:
            part.weight = nn.Parameter(functional.pad(part.weight.detach(), (0, 0, 0, 1)))
            part.bias = None if part.bias is None else nn.Parameter(functional.pad(part.bias.detach(), (0, 1)))
        yield


@contextlib.contextmanager
def _norms_as_one(model: PreTrainedModel) -> Iterator[None]:
    """Divide by the root of mean squares: ONNX Runtime makes one operator of that, but not of its reciprocal.

    A norm that was given a forward of its own, say by a library of hooks, does more than its class and keeps it.
    """
    own = (part for part in model.modules() if "forward" not in vars(part))
    norms: list[Any] = [part for part in own if is_norm(part) and not centres(part)]
    for norm in norms:
        norm.forward = partial(_normed, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@contextlib.contextmanager
def _angles_of_its_positions(model: PreTrainedModel) -> Iterator[None]:
    """Turn queries and keys by the angles for as many tokens as a model has positions; texts are cut to these.

    Some take other angles in longer texts, which a graph cannot decide.
    """
    turning: list[Any] = [part for part in model.modules() if getattr(part, "rope_type", None) == "dynamic"]
    for part in turning:
        part.rope_type = "default"
    try:
        yield
    finally:
        for part in turning:
            part.rope_type = "dynamic"


def _normed(norm: Any, x: Tensor) -> Tensor:
    """Map x [..., hidden] to the same shape, as the norm does."""
    factors, epsilon = factors_of(norm)
    return factors * (x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt())


def _pruned_layers(model: PreTrainedModel) -> list[Layer]:
    """Return the layers of a pruned model, and none for any other."""
    return resolve(model) if any(isinstance(part, PrunedLinear) for part in model.modules()) else []


@contextlib.contextmanager
def _restored(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Give linears back their weights and biases when the block ends."""
    before = [(part, part.weight, part.bias) for part in linears]
    try:
        yield
    finally:
        for part, weight, bias in before:
            part.weight, part.bias = weight, bias
