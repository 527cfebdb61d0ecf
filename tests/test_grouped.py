"""Heads of queries that share a head of keys and values: what one gate stands for, and what leaves with it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import tiny
from forms import collapse, gated_model
from gatepress.budget import budget_of
from gatepress.config import DataSettings, TrainSettings
from gatepress.gates import counted, gates_of
from gatepress.inject import gated_linear
from gatepress.resolve import resolve
from gatepress.rotation import bases_of, turn_
from gatepress.tracing import write_onnx

FAMILY = "eurobert"
FAMILIES = [
    name for name in (FAMILY, "qwen3") if name in tiny.FAMILIES
]  # with keys that are normed in heads, and without
GROUP, WIDTH = 2, tiny.HIDDEN // tiny.HEADS
SCALED = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}
VARIANTS: list[dict[str, Any]] = [
    {"attention_bias": True, "mlp_bias": True},
    {"classifier_pooling": "mean"},
    {"classifier_pooling": "late"},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": tiny.HEADS},
    {"rope_parameters": SCALED},
    {"head_dim": 2 * WIDTH},
]

pytestmark = pytest.mark.skipif(FAMILY not in tiny.FAMILIES, reason="this release of transformers has no such family")


def logits(model: Any, length: int = 12) -> torch.Tensor:
    with torch.inference_mode():
        return model(**tiny.random_batch(FAMILY, length=length)).logits


def shapes(plan: Any) -> list[dict[str, tuple[int, int]]]:
    return [{role: matrix.shape for role, matrix in layer.matrices.items()} for layer in plan.layers]


def test_a_dimension_of_values_goes_from_all_that_share_it() -> None:
    model = gated_model(FAMILY, closed=0)
    for layer in resolve(model):
        gated_linear(model, layer, "o").gate_in.mask[[1, WIDTH + 3]] = 0  # one of each head of values
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=0)
    kept = tiny.HEADS * (WIDTH - 1)
    for one in shapes(plan):
        assert one["v"] == (kept // GROUP, tiny.HIDDEN)
        assert one["o"] == (tiny.HIDDEN, kept)
        assert one["q"] == (tiny.HIDDEN, tiny.HIDDEN)
    removed = 2 * (1 + GROUP) * tiny.HIDDEN
    assert plan.dense_weights - plan.kept_weights == tiny.LAYERS * removed


def test_a_pair_of_a_key_goes_with_those_of_its_queries() -> None:
    model = gated_model(FAMILY, closed=0)
    for layer in resolve(model):
        gate = gated_linear(model, layer, "q").gate_out
        assert gate.mask.shape == (tiny.HEADS // GROUP * WIDTH // 2,)
        gate.mask[[0, WIDTH // 2 + 2]] = 0
    pruned, plan = collapse(model, "inner")
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=0)
    for one in shapes(plan):
        assert one["q"] == (tiny.HEADS * (WIDTH - 2), tiny.HIDDEN)
        assert one["k"] == (tiny.HEADS * (WIDTH - 2) // GROUP, tiny.HIDDEN)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["structured", "heads"])
def test_what_a_gate_counts_is_what_leaves(granularity: Any, family: str) -> None:
    """So the sparsity that is asked for is the part of the encoder's matrices that goes."""
    model = gated_model(family, granularity, closed=0)
    total, _ = counted(gate for _, gate in gates_of(model))
    assert total * tiny.HIDDEN == sum(layer.weights for layer in resolve(model))
    for layer in resolve(model):  # as much of each head, so that no width is padded
        if granularity == "structured":
            gated_linear(model, layer, "q").gate_out.mask.view(-1, WIDTH // 2)[:, 1] = 0
        heads = gated_linear(model, layer, "o").gate_in
        heads.mask.view(-1, WIDTH if granularity == "structured" else heads.size)[:, 0] = 0
        gated_linear(model, layer, "down").gate_in.mask[::5] = 0
    _, closed = counted(gate for _, gate in gates_of(model))
    _, plan = collapse(model, "inner")
    assert plan.removed_fraction == pytest.approx(closed / total)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["gates", "macs", "weights"])
def test_budgets_are_met(unit: Any, family: str) -> None:
    model = gated_model(family, closed=0)
    settings = TrainSettings(data=DataSettings(task="sst2"), model="m", sparsity=0.5, budget=unit)
    budget = budget_of(model, resolve(model), settings, steps=10, tokens=16)
    torch.manual_seed(1)
    for vector in budget.vectors:
        vector.gate.score.copy_(torch.rand_like(vector.gate.score))
    budget.close(0.5)
    assert budget.removed == pytest.approx(0.5, abs=0.02)
    pruned, plan = collapse(model, "inner")
    if unit != "gates":
        assert plan.removed(unit, 16) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS, ids="-".join)
@pytest.mark.parametrize("granularity", ["structured", "matrix"])
def test_pruned_models_compute_what_gated_ones_do(granularity: Any, changes: dict[str, Any]) -> None:
    model = gated_model(FAMILY, granularity, **changes)
    pruned, plan = collapse(model, "paper" if granularity == "matrix" else "inner")
    assert plan.removed_fraction > 0.2
    for length in (1, 2, 12, 40):
        torch.testing.assert_close(logits(pruned, length), logits(model, length), atol=1e-5, rtol=1e-5)


def test_biases_of_shared_values_are_those_of_each_head_in_a_graph(tmp_path: Path) -> None:
    pruned, _ = collapse(gated_model(FAMILY, attention_bias=True), "inner")
    write_onnx(pruned, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    batch = {name: value.numpy() for name, value in tiny.random_batch(FAMILY, batch=3, length=9).items()}
    with torch.inference_mode():
        wanted = pruned(**tiny.random_batch(FAMILY, batch=3, length=9)).logits
    np.testing.assert_allclose(session.run(["logits"], batch)[0], wanted.numpy(), atol=1e-4, rtol=0)


def test_heads_that_share_values_are_turned_alike() -> None:
    model = gated_model(FAMILY, closed=0)
    before = logits(model)
    bases = bases_of(model, [tiny.random_batch(FAMILY, batch=8, length=16, seed=seed) for seed in range(3)])
    assert {tuple(basis.shape) for basis in bases.values()} == {(tiny.HEADS // GROUP, WIDTH, WIDTH)}
    turn_(model, bases)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    for layer in resolve(model):  # what is worth most comes first: in values, and in what reads them
        lengths = gated_linear(model, layer, "o").base.weight.norm(dim=0).view(-1, GROUP, WIDTH).square().sum(1)
        assert (lengths[:, :-1] >= lengths[:, 1:] * (1 - 1e-4)).all()
