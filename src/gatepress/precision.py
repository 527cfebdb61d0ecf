"""What a training step computes in bfloat16.

Matrix products, as with autocast. Two things differ on a CPU. Attention that learns stays in float32: its backward pass
in bfloat16 takes two to eight times as long there, which is much of the cost of a pressed layer. And frozen weights are
cast once, while autocast casts them anew in every step: those of a student and its teacher are most of what a step of
few tokens reads.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gatepress.config import Precision


@contextlib.contextmanager
def computing(precision: Precision, device: str) -> Iterator[None]:
    """Compute the block in `precision` on a kind of `device`; trained numbers stay in float32."""
    if precision == "fp32":
        yield
        return
    with torch.autocast(device, torch.bfloat16), _OnCpu() if device == "cpu" else contextlib.nullcontext():
        yield


class _OnCpu(TorchFunctionMode):
    """Attention and matrix products in their fast forms on a CPU, whichever module asks for them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Attend in float32 if the result will be differentiated.

    Not with dropout, for which torch has no fused kernel on a CPU: there bfloat16 is no slower.
    """
    if not _learns(*args, **kwargs):
        return functional.scaled_dot_product_attention(*args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return functional.scaled_dot_product_attention(
            *map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()}
        )


def _learns(*arguments: Any, dropout_p: float = 0.0, **named: Any) -> bool:
    """Return whether a call of `scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)` learns."""
    dropout = arguments[4] if len(arguments) > 4 else dropout_p  # noqa: PLR2004 - the fifth
    tensors = (value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
    return torch.is_grad_enabled() and not dropout and any(value.requires_grad for value in tensors)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., in] by weight [out, in], in bfloat16; a frozen weight is cast only once."""
    return functional.linear(x, weight if weight.requires_grad else _cast_once(weight), bias)


def _cast_once(weight: Tensor) -> Tensor:
    """Return a frozen float32 weight in bfloat16: the same tensor until something is written into the weight."""
    if weight.dtype is not torch.float32:
        return weight
    version, cast = _CASTS.get(weight, (None, weight))
    if version != weight._version:  # noqa: SLF001 - how torch tells that a tensor was written into
        cast = weight.detach().bfloat16()
        _CASTS[weight] = (weight._version, cast)  # noqa: SLF001 - as above
    return cast


# Frozen weight -> its version and its form in bfloat16; removed with the weight.
_CASTS: MutableMapping[Tensor, tuple[int | None, Tensor]] = WeakTensorKeyDictionary()
_INSTEAD: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.linear: _linear,
}
