"""What is computed, against the same worked out apart: by hand, or by the equation as it is written down.

Other tests compare forms of a model with each other, which a wrong constant on both sides would pass.
"""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tiny
from gatepress import losses
from gatepress.agreement import agree, compare, random_rows
from gatepress.bench import timing
from gatepress.budget import CLOSING_STARTS, Budget, GateVector, gate_vectors
from gatepress.collapse import plan_model
from gatepress.config import MAX_LOGIT_DIFF, Controller, DataSettings, TrainSettings
from gatepress.distill import Lesson, learn_from_teacher_, logit_distances
from gatepress.errors import ParityError
from gatepress.gates import Gate, GatedLinear, gates_of
from gatepress.inject import attach_gates_
from gatepress.methods import LoraXsLinear
from gatepress.metrics import compute_metric
from gatepress.resume import _rate, make_optimizer
from gatepress.tasks import task_named
from test_collapse import gated_model

SST2 = task_named("sst2")


def vectors_of(*gates: Gate, macs: tuple[float, ...] = ()) -> list[GateVector]:
    return [GateVector(gate, cost, 1) for gate, cost in zip(gates, macs or [1.0] * len(gates), strict=True)]


# --- gates and low rank -----------------------------------------------------------------------------


def test_the_low_rank_update_counts_twice() -> None:
    layer = GatedLinear(nn.Linear(7, 5), lora_rank=2)
    assert layer.lora_a is not None
    assert layer.lora_b is not None
    nn.init.normal_(layer.lora_b)
    torch.testing.assert_close(layer.folded()[0], layer.base.weight + 2 * layer.lora_b @ layer.lora_a)


def test_gates_without_noise_are_clipped_to_0_and_1() -> None:
    gate = Gate(3, noise=0.25).eval()
    gate.mu.data = torch.tensor([-0.9, 0.1, 0.9])
    for values in (gate(), gate.values()):
        torch.testing.assert_close(values.detach(), torch.tensor([0.0, 0.6, 1.0]))


def test_lora_xs_starts_from_the_largest_singular_values() -> None:
    base = nn.Linear(6, 5)
    layer = LoraXsLinear(base, 2)
    u, s, v = torch.linalg.svd(base.weight.detach())
    torch.testing.assert_close(layer.b @ layer.a, u[:, :2] * s[:2] @ v[:2])


@pytest.mark.parametrize(
    ("task", "logits", "labels", "wanted"),
    [
        ("stsb", [[1.0], [3.0]], [2.0, 6.0], [1.0, 9.0]),  # squared error
        ("sst2", [[0.0, 0.0], [math.log(3), 0.0]], [1, 0], [math.log(2), math.log(4 / 3)]),  # -log of its probability
    ],
)
def test_the_loss_of_a_row(task: str, logits: list[list[float]], labels: list[float], wanted: list[float]) -> None:
    got = losses.task_losses(torch.tensor(logits), torch.tensor(labels), task_named(task))
    torch.testing.assert_close(got, torch.tensor(wanted))


# --- what closes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0.3, 0.8])
def test_the_penalty_is_the_distance_of_open_probabilities_from_what_is_asked(asked: float) -> None:
    """Equation 9: over the vectors the mean of |mean(P) - (1 - s)|, times lambda; s rises at the start."""
    gates = Gate(4, noise=0.25), Gate(2, noise=0.25)
    for gate, mu in zip(gates, (-0.5, 0.5), strict=True):
        gate.mu.data.fill_(mu)
    open_probabilities = 0.5, 0.9999683  # Phi(0), Phi(4): open where 1/2 + mu + noise > 0
    budget = Budget(
        vectors_of(*gates), sparsity=asked, controller="penalty", steps=100, penalty_weight=7.0, unit="vectors"
    )
    for step, part in ((100, asked), (budget.ends // 4, asked / 2)):
        wanted = 7.0 * sum(abs(one - (1 - part)) for one in open_probabilities) / 2
        assert budget.penalty(step).item() == pytest.approx(wanted, rel=1e-4)


def test_the_penalty_closes_the_gates_of_the_least_mu() -> None:
    gate = Gate(10, noise=0.25)
    gate.mu.data = torch.linspace(-0.4, 0.5, 10)
    budget = Budget(vectors_of(gate), sparsity=0.3, controller="penalty", steps=10, unit="vectors")
    budget.after_backward(10)
    assert gate.mask.tolist() == [0] * 3 + [1] * 7


def test_importance_is_a_moving_average_of_squared_gradients() -> None:
    gate, wanted = Gate(3), torch.zeros(3)
    budget = Budget(vectors_of(gate), sparsity=0.5, controller="importance", steps=1000)
    for gradient in torch.tensor([[0.1, 2.0, -3.0], [1.0, 0.0, 4.0]]):
        gate.mu.grad = gradient
        budget.after_backward(1)
        wanted = 0.98 * wanted + 0.02 * gradient**2
    torch.testing.assert_close(gate.score, wanted)


@pytest.mark.parametrize(("controller", "closed"), [("importance", [0, 4]), ("penalty", [4, 0])])
def test_importance_is_reckoned_by_what_a_gate_costs(controller: Controller, closed: list[int]) -> None:
    """Twice as important at ten times the cost goes first; the penalty asks for no cost."""
    gates = Gate(4), Gate(4)
    for score, gate in enumerate(gates, start=1):
        gate.score.fill_(score)
    Budget(vectors_of(*gates, macs=(1.0, 10.0)), sparsity=0.5, controller=controller, steps=1).close(0.5)
    assert [int((gate.mask == 0).sum()) for gate in gates] == closed


def test_a_gate_costs_the_weights_behind_it() -> None:
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity="matrix", controller="importance")
    for vector in gate_vectors(model, layers, "matrix"):
        weight = model.base_model.get_submodule(layers[vector.layer].paths[vector.role]).base.weight
        assert vector.macs == weight.numel() / vector.gate.size
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity="structured", controller="importance")
    assert {vector.macs for vector in gate_vectors(model, layers, "structured")} == {2.0 * tiny.HIDDEN}


def test_what_is_removed_is_counted_by_hand() -> None:
    """Multiply-accumulates of a token: all matrices, and scores and sums over its row's tokens; weights with biases."""
    plan, tokens = plan_model(gated_model("bert", "structured"), "inner"), 11

    def shapes(which: str) -> list[dict[str, tuple[int, int]]]:
        return [{role: getattr(part, which) for role, part in layer.matrices.items()} for layer in plan.layers]

    def macs(layers: list[dict[str, tuple[int, int]]]) -> int:
        return sum(sum(map(math.prod, one.values())) + tokens * (one["q"][0] + one["v"][0]) for one in layers)

    def weights(layers: list[dict[str, tuple[int, int]]]) -> int:
        return sum(rows * columns + rows for one in layers for rows, columns in one.values())

    for unit, counted in (("macs", macs), ("weights", weights)):
        wanted = 1 - counted(shapes("shape")) / counted(shapes("dense_shape"))
        assert plan.removed(unit, tokens) == pytest.approx(wanted)


# --- what is learnt ---------------------------------------------------------------------------------


def outputs(ids: Tensor) -> Any:
    """Return what a model might answer: anything that hangs on its tokens."""
    total = ids.sum(1)
    states = torch.zeros(*ids.shape, 2), ids[..., None].expand(*ids.shape, 2).float()
    return SimpleNamespace(logits=torch.stack([total.sin(), total.cos()], 1), hidden_states=states)


def test_labels_count_where_words_are_as_they_were_and_the_teacher_reads_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, labels = torch.arange(48).reshape(8, 6) % 45 + 5, torch.arange(8) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    same, seen = torch.tensor([True] * 3 + [False] * 5), []

    def model(input_ids: Tensor, **_: Any) -> Any:
        seen.append(input_ids)
        return outputs(input_ids)

    lesson = Lesson(torch.tensor([0]), torch.tensor([0.5, 0.5]), hidden_weight=3.0)

    def loss() -> float:
        value: Tensor = losses.batch_loss(model, batch, SST2, lambda inputs: model(**inputs), lesson)
        return float(value)

    monkeypatch.setattr(losses, "varied", lambda inputs, _: ({**inputs, "input_ids": ids + 1}, same))
    plain = loss()
    assert len(seen) == 2
    assert all(torch.equal(one, ids + 1) for one in seen)
    each = functional.cross_entropy(outputs(ids + 1).logits, labels, reduction="none")
    assert plain == pytest.approx(float(each[same].sum() / 8))  # equals have no distance
    monkeypatch.setattr(losses, "logit_distances", lambda *_: torch.full((8,), 100.0))
    monkeypatch.setattr(losses, "hidden_distances", lambda *_, **__: torch.tensor([10.0, 30.0]))
    assert loss() == pytest.approx(plain + 100 + 3 * 20)


def test_the_distance_of_classes_is_the_divergence_of_the_teacher_at_a_temperature_of_2() -> None:
    torch.manual_seed(0)
    states = torch.zeros(3, 2, 4), torch.randn(3, 2, 4)
    student, teacher = (SimpleNamespace(logits=torch.randn(3, 2), hidden_states=states) for _ in range(2))
    p, q = ((one.logits / 2).softmax(-1) for one in (teacher, student))
    wanted = 4 * (p * (p / q).log()).sum(-1)
    found = logit_distances(student, teacher, SST2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_student_has_no_dropout_and_its_gates_have_noise() -> None:
    model = tiny.build_classifier("bert")
    attach_gates_(model, granularity="matrix", controller="penalty")
    learn_from_teacher_(model)
    gates = {gate for _, gate in gates_of(model)}
    assert not [module for module in model.modules() if module.training and module not in gates]
    assert all(not torch.equal(gate(), gate()) for gate in gates)


def test_each_kind_has_its_rate_and_whole_matrices_decay() -> None:
    kinds = {
        kind: {kind: nn.Parameter(torch.ones(1))}
        for kind in ("gates", "biases", "layer_norms", "low_rank", "head", "base")
    }
    settings = TrainSettings(
        data=DataSettings(task="sst2"), weight_decay=0.5, learning_rate=1e-3, gate_learning_rate=7e-3
    )
    optimizer, _ = make_optimizer(kinds, settings, stages=[0, 10])
    for (kind, group), found in zip(kinds.items(), optimizer.param_groups, strict=True):
        assert found["params"] == list(group.values())
        assert found["initial_lr"] == (7e-3 if kind == "gates" else 1e-3)
        assert found["weight_decay"] == (0.5 if kind in ("head", "base") else 0)


def test_each_stage_has_a_schedule_of_its_own() -> None:
    alone = [_rate([0, 20], 0.2, step) for step in range(21)]
    assert alone[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert alone[-1] == 0
    assert [_rate([10, 20], 0.2, 10 + step) for step in range(21)] == alone
    assert [_rate([10, 20], 0.2, step) for step in range(10)] == [_rate([0, 10], 0.2, step) for step in range(10)]


# --- what is told -----------------------------------------------------------------------------------


def test_metrics_of_answers_that_are_neither_all_right_nor_all_wrong() -> None:
    labels, logits = np.array([0, 0, 0, 0, 1]), np.eye(2)[[0, 0, 0, 1, 0]]
    assert compute_metric("accuracy", logits, labels) == 3 / 5
    assert compute_metric("matthews", logits, labels) == pytest.approx(-0.25)
    x, y = np.array([0.0, 1.0, 2.0, 10.0]), np.array([0.0, 1.0, 3.0, 2.0])
    assert compute_metric("pearson", x[:, None], y) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_times_are_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 100_000_000, 3_000_000))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(ticks))
    assert timing.wall_clock(lambda: None, 2) == [3.0, 3.0]


def test_forms_are_compared_on_padded_rows_too() -> None:
    model = tiny.build_classifier("bert")
    batch = random_rows(model, 5, 33, padded=True)
    lengths = batch["attention_mask"].sum(1)
    assert lengths[0] == 33
    assert (lengths[1:] < 33).all()
    assert ((batch["input_ids"] == model.config.pad_token_id) == (batch["attention_mask"] == 0)).all()


def test_the_difference_that_is_told_is_the_largest_of_all_batches() -> None:
    far = iter([0.3, 0.1])
    there: Any = SimpleNamespace(logits=lambda _: np.zeros((1, 2)))
    here: Any = SimpleNamespace(logits=lambda _: np.full((1, 2), next(far)))
    assert compare(there, here, [{"input_ids": np.zeros((1, 2), dtype=int)}] * 2, 1.0).difference == 0.3


# --- what two forms may differ by -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "apart", "agrees"),
    [
        (0.5, 0.9e-4, True),
        (0.5, 1.1e-4, False),
        (3000.0, 0.29, True),  # 1e-4 of the largest, where that is above 1
        (3000.0, 0.31, False),
        (0.5, math.nan, False),
    ],
)
def test_forms_agree_within_a_ten_thousandth(largest: float, apart: float, *, agrees: bool) -> None:
    wanted = torch.tensor([[largest, 0.0]], dtype=torch.float64)
    got = wanted + torch.tensor([[0.0, apart]], dtype=torch.float64)
    batch = {"input_ids": np.ones((1, 2), dtype=np.int64)}
    torch_runner, onnx_runner = (SimpleNamespace(logits=lambda _, one=one: one.numpy()) for one in (wanted, got))
    for check in (
        lambda: agree(wanted, got, "logits", "report it"),
        lambda: compare(torch_runner, onnx_runner, [batch], MAX_LOGIT_DIFF).difference,  # type: ignore[arg-type]
    ):
        if agrees:
            assert check() == pytest.approx(apart)
        else:
            with pytest.raises(ParityError, match="differ by"):
                check()


def budget_of_one(controller: Controller, sparsity: float = 0.5, size: int = 1_000, steps: int = 100) -> Budget:
    gate = Gate(size, noise=0.25 if controller == "penalty" else 0.0)
    vectors = [GateVector(gate, macs=1.0, heads=1)]
    return Budget(vectors, sparsity=sparsity, controller=controller, steps=steps, closing=0.5, penalty_weight=1.0)


def test_closing_begins_late_and_follows_a_cubic_schedule() -> None:
    """Half of the way there seven eighths are to be closed; before the start none is."""
    budget = budget_of_one("importance")
    first, last = int(CLOSING_STARTS * 100), 50
    assert budget.target(first) == 0 < budget.target(first + 1)
    assert budget.target((first + last) // 2) == pytest.approx(0.5 * 7 / 8)
    assert budget.target(last) == budget.target(99) == 0.5


def test_gates_close_step_by_step_along_the_schedule() -> None:
    budget, closed = budget_of_one("importance"), []
    gate = budget.vectors[0].gate
    for step in range(1, 61):
        gate.mu.grad = torch.randn(gate.size, generator=torch.Generator().manual_seed(step))
        budget.after_backward(step)
        closed.append(budget.closed_gates)
    assert max(b - a for a, b in itertools.pairwise(closed)) < 300  # of 500: none at one stroke
    for step in (10, 20, 30, 40, 50):
        assert closed[step - 1] == math.ceil(budget.target(step) * gate.size - 1e-6)


def test_the_penalty_asks_for_all_when_half_of_the_closing_is_through() -> None:
    """What it adds to the loss no longer changes then; before it grows with the steps."""
    budget = budget_of_one("penalty")  # all open: the penalty is what is asked to be closed
    asked = [budget.penalty(step).item() for step in (0, 10, 25, 40)]  # type: ignore[union-attr]
    assert asked == pytest.approx([0, 0.2, 0.5, 0.5], abs=1e-3)
