"""What is computed in bfloat16, and what is kept in float32 (precision.py)."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attention

import tiny
from forms import collapse
from gatepress import precision
from gatepress.gates import Gate, GatedLinear
from gatepress.inject import attach_gates_
from gatepress.modeling_gatepress import PrunedAttention
from gatepress.precision import computing


def heads(*, learn: bool) -> list[Tensor]:
    """Return queries, keys and values [batch, heads, length, width]."""
    return [torch.randn(2, 3, 5, 4, requires_grad=learn) for _ in range(3)]


@pytest.mark.parametrize(
    ("learn", "dropout", "dtype"),
    [(True, 0.0, torch.float32), (True, 0.5, torch.bfloat16), (False, 0.0, torch.bfloat16)],
)
def test_attention_that_learns_is_float32(*, learn: bool, dropout: float, dtype: torch.dtype) -> None:
    with computing("bf16", "cpu"):
        assert attention(*heads(learn=learn), dropout_p=dropout).dtype is dtype


def test_dropout_by_its_place_is_dropout_too() -> None:
    with computing("bf16", "cpu"):
        assert attention(*heads(learn=True), None, 0.5).dtype is torch.bfloat16


def test_attention_in_bf16_is_that_of_float32_with_a_mask_of_the_product() -> None:
    q, k, v = heads(learn=True)
    mask = torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, torch.finfo(torch.float32).min)
    with computing("bf16", "cpu"):
        rounded = (mask.bfloat16(), *(x.bfloat16() for x in (q, k, v)))
        mixed = attention(*rounded[1:], attn_mask=rounded[0], scale=0.3)
    assert torch.equal(mixed, attention(*(x.float() for x in rounded[1:]), attn_mask=mask, scale=0.3))


def test_no_gradients_asked_for_leave_attention_alone() -> None:
    with computing("bf16", "cpu"), torch.no_grad():
        assert attention(*heads(learn=True)).dtype is torch.bfloat16


def test_float32_stays_float32() -> None:
    with computing("fp32", "cpu"):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype is torch.float32
        assert attention(*heads(learn=False)).dtype is torch.float32


def test_gates_keep_products_in_bf16_and_learn_in_float32() -> None:
    layer = GatedLinear(nn.Linear(8, 6), gate_in=Gate(8), gate_out=Gate(6), lora_rank=2)
    x = torch.randn(3, 8)
    with computing("bf16", "cpu"):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.05)
    for gate in (layer.gate_in, layer.gate_out):
        assert gate is not None
        assert gate.mu.grad is not None
        assert gate.mu.grad.dtype is torch.float32


def test_a_frozen_weight_is_cast_once_to_what_autocast_makes_of_it() -> None:
    layer, x = nn.Linear(8, 6).requires_grad_(requires_grad=False), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    with computing("bf16", "cpu"):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert precision._cast_once(layer.weight) is precision._cast_once(layer.weight)


def test_a_frozen_weight_that_was_written_into_is_cast_anew() -> None:
    layer, x = nn.Linear(8, 6, bias=False).requires_grad_(requires_grad=False), torch.randn(3, 8)
    with computing("bf16", "cpu"):
        layer(x)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), functional.linear(x.bfloat16(), layer.weight.bfloat16()))


def test_a_weight_that_learns_gets_its_gradient_and_no_second_form() -> None:
    layer = nn.Linear(8, 6)
    known = len(precision._CASTS)
    with computing("bf16", "cpu"):
        layer(torch.randn(3, 8)).float().sum().backward()
    assert layer.weight.grad is not None
    assert len(precision._CASTS) == known


def test_forms_of_weights_go_with_them() -> None:
    gc.collect()
    known = len(precision._CASTS)
    layer = nn.Linear(8, 6).requires_grad_(requires_grad=False)
    with computing("bf16", "cpu"):
        layer(torch.randn(3, 8))
    assert len(precision._CASTS) == known + 1
    del layer
    gc.collect()
    assert len(precision._CASTS) == known


def test_pruned_attention_drops_out_in_training_alone(family: str) -> None:
    model = tiny.build_classifier(family).eval()
    attach_gates_(model, granularity="structured", controller="importance")
    pruned, _ = collapse(model, "inner")
    attentions = [one for one in pruned.modules() if isinstance(one, PrunedAttention)]
    inputs = tiny.random_batch(family)

    def answers() -> list[torch.Tensor]:
        return [pruned(**inputs).logits for seed in (0, 1) if torch.manual_seed(seed)]

    rates_apart = all(hasattr(one, "attention_dropout") for one in attentions)  # the others hold a module
    for one in attentions:
        if rates_apart:
            one.attention_dropout = 0.5
        else:
            one.dropout.p = 0.5
    assert torch.equal(*answers())
    for one in attentions:
        one.training = True  # but nothing else in the model
        if not rates_apart:
            one.dropout.training = False
    assert not torch.allclose(*answers(), atol=1e-3)
