"""What a gate is: the equations, and the counts that the paper states."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig

from gatepress.gates import Gate, GatedLinear, counted
from gatepress.inject import attach_gates_, trainable


def gated_linear(rows: int = 5, columns: int = 7, **options: float) -> GatedLinear:
    torch.manual_seed(0)
    gate = GatedLinear(
        nn.Linear(columns, rows),
        gate_in=Gate(columns, **options),
        gate_out=Gate(rows, **options),
        lora_rank=2,
    )
    nn.init.normal_(gate.lora_b)
    return gate


def draw_values_(layer: GatedLinear) -> None:
    with torch.no_grad():
        for gate in (layer.gate_in, layer.gate_out):
            gate.mu.uniform_(-0.3, 0.5)
            gate.mask.copy_(torch.rand_like(gate.mask) > 0.4)


def test_open_gates_change_nothing() -> None:
    dense = nn.Linear(7, 5)
    x = torch.randn(3, 7)
    assert torch.equal(GatedLinear(dense, gate_in=Gate(7), gate_out=Gate(5))(x), dense(x))


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_a_gated_matrix_computes_equation_8(noise: float) -> None:
    layer = gated_linear(noise=noise).eval()
    draw_values_(layer)
    x = torch.randn(3, 7)
    z_in, z_out = layer.gate_in.values(), layer.gate_out.values()
    weight = layer.base.weight + GatedLinear.LORA_SCALE * layer.lora_b @ layer.lora_a
    wanted = z_out * ((z_in * x) @ weight.T + layer.base.bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_a_folded_matrix_needs_no_gates(noise: float) -> None:
    layer = gated_linear(noise=noise).eval()
    draw_values_(layer)
    x = torch.randn(3, 7)
    weight, bias = layer.folded()
    torch.testing.assert_close(x @ weight.T + bias, layer(x))


def test_a_closed_row_is_exactly_zero_bias_included() -> None:
    layer = gated_linear()
    layer.gate_out.mask[2] = 0
    for mode in (True, False):
        assert (layer.train(mode)(torch.randn(4, 7))[:, 2] == 0).all()


def test_a_matrix_without_bias_gets_none() -> None:
    layer = GatedLinear(nn.Linear(3, 2, bias=False), gate_out=Gate(2))
    assert layer.folded()[1] is None
    assert layer(torch.ones(1, 3)).shape == (1, 2)


def test_a_closed_gate_learns_nothing() -> None:
    gate = Gate(3)
    gate.mask[1] = 0
    weights = torch.tensor([1.0, 2.0, 3.0])
    (gate() * weights).sum().backward()
    assert gate.mu.grad.tolist() == [1, 0, 3]


def test_the_share_of_open_gates_is_what_equation_6_says() -> None:
    torch.manual_seed(0)
    gate = Gate(4, noise=0.25)
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([-0.75, -0.5, -0.4, 0.5]))
    drawn = torch.stack([gate() > 0 for _ in range(4000)]).float().mean(0)
    torch.testing.assert_close(drawn, gate.probability_open().detach(), atol=0.03, rtol=0)


def test_evaluation_has_no_noise() -> None:
    gate = Gate(8, noise=0.25).eval()
    assert torch.equal(gate(), gate())
    assert torch.equal(gate(), gate.values())


ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


@pytest.mark.parametrize(
    ("sizes", "gates", "biases", "low_rank"),
    [({}, 165_888, 82_944, 1_327_104), (ROBERTA_LARGE, 442_368, 221_184, 3_538_944)],
    ids=["base", "large"],
)
def test_trained_numbers_are_those_of_the_paper(sizes: dict[str, int], gates: int, biases: int, low_rank: int) -> None:
    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(RobertaConfig(**sizes))
        attach_gates_(model, granularity="matrix", controller="penalty", lora_rank=8)
    kinds = trainable(model, biases=True, layer_norms=True)
    counted = {kind: sum(p.numel() for p in group.values()) for kind, group in kinds.items()}
    assert counted["gates"] == gates
    assert counted["biases"] == biases
    assert counted["low_rank"] == low_rank
    if not sizes:
        assert counted["head"] == 592_130


def test_one_gate_before_a_whole_head_is_its_value_repeated() -> None:
    gate = Gate(2, repeat=3, counts=6)
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([0.25, 0.1]))
        gate.mask[1] = 0
    assert gate.eval()().tolist() == gate.values().tolist() == [0.75] * 3 + [0.0] * 3
    assert gate.train()().tolist() == [0.75] * 3 + [0.0] * 3
    gate().sum().backward()
    assert gate.mu.grad.tolist() == [3.0, 0.0]
    assert counted([gate, Gate(5)]) == (17, 6)
