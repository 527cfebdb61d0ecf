"""What a training step computes in bfloat16.

Matrix products do, as autocast has it. Attention that learns does not on a CPU: its backward pass in bfloat16 takes two
to eight times as long there as in float32, which is much of what a pressed layer costs.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gatepress.config import Precision


@contextlib.contextmanager
def computing(precision: Precision, device: str) -> Iterator[None]:
    """Compute what stands in the context in `precision` on a kind of `device`, trained numbers staying in float32."""
    if precision == "fp32":
        yield
        return
    with torch.autocast(device, torch.bfloat16), _WholeAttention() if device == "cpu" else contextlib.nullcontext():
        yield


class _WholeAttention(TorchFunctionMode):
    """Attention in float32 where it will be differentiated, whichever module asks for it.

    Not under dropout, for which torch has no kernel of one piece on a CPU: there bfloat16 is no slower.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or not _learns(*args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})


def _learns(*arguments: Any, dropout_p: float = 0.0, **named: Any) -> bool:
    """Say so of a call of `scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)`."""
    dropout = arguments[4] if len(arguments) > 4 else dropout_p  # noqa: PLR2004
    tensors = (value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
    return torch.is_grad_enabled() and not dropout and any(value.requires_grad for value in tensors)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
