"""What is asked is what is closed, counted, whatever the controller and the granularity."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import tiny
from gatepress import plan
from gatepress.budget import (
    INSIDE_HEADS,
    TOLERANCE,
    Budget,
    GateVector,
    Masks,
    Ranking,
    budget_of,
    gate_vectors,
    gates_to_close,
)
from gatepress.collapse import plan_model
from gatepress.config import BudgetUnit, Controller, DataSettings, Granularity, Layout, TrainSettings
from gatepress.gates import Gate
from gatepress.inject import attach_gates_, mark_trainable_, trainable

GRANULARITIES: list[Granularity] = ["structured", "matrix", "heads"]
CONTROLLERS: list[Controller] = ["importance", "penalty"]
UNITS: dict[Controller, BudgetUnit] = {"importance": "gates", "penalty": "vectors"}
STEPS = 30
RUN = Path("run")


def choose_closed(
    scores: list[Tensor], macs: list[float], heads: list[int], count: int, counts: list[int] | None = None
) -> Masks:
    vectors = []
    for score, cost, n_heads, each in zip(scores, macs, heads, counts or [1] * len(scores), strict=True):
        gate = Gate(len(score), counts=each)
        gate.score.copy_(score)
        vectors.append(GateVector(gate, cost, n_heads))
    among = [torch.ones(len(score), dtype=torch.bool) for score in scores]
    return Ranking.of(vectors, among, per_mac=True).closing(count)


def run_budget(granularity: Granularity, controller: Controller, sparsity: float, steps: int = STEPS) -> Budget:
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity=granularity, controller=controller)
    kinds = trainable(model, biases=True, layer_norms=True)
    mark_trainable_(kinds)
    budget = Budget(
        gate_vectors(model, layers, granularity),
        sparsity=sparsity,
        controller=controller,
        steps=steps,
        penalty_weight=10.0,
        unit=UNITS[controller],
    )
    optimizer = torch.optim.AdamW(list(kinds["gates"].values()), lr=1e-2)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**tiny.random_batch("bert", seed=step), labels=torch.tensor([0, 1, 0, 1])).loss
        penalty = budget.penalty(step)
        (loss if penalty is None else loss + penalty).backward()
        budget.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
    return budget


@pytest.mark.parametrize(
    ("granularity", "controller", "sparsity"),
    list(itertools.product(GRANULARITIES, CONTROLLERS, [0.0, 0.1, 0.3, 0.5, 0.75, 0.97])),
)
def test_the_asked_sparsity_is_delivered(granularity: Granularity, controller: Controller, sparsity: float) -> None:
    budget = run_budget(granularity, controller, sparsity)
    assert budget.closed_gates == gates_to_close(budget.total_gates, sparsity)
    assert abs(budget.closed_gates / budget.total_gates - sparsity) <= 0.005


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gates_are_fixed_for_the_recovery(controller: Controller) -> None:
    budget = run_budget("structured", controller, 0.4)
    assert budget.penalty(STEPS + 1) is None
    masks = [vector.gate.mask.clone() for vector in budget.vectors]
    budget.sparsity = 0.8  # what would close more, were anything closed again
    for vector in budget.vectors:
        vector.gate.mu.grad = torch.randn_like(vector.gate.mu)
    budget.after_backward(STEPS + 1)
    assert all(torch.equal(mask, v.gate.mask) for mask, v in zip(masks, budget.vectors, strict=True))


@pytest.mark.parametrize(("granularity", "sites"), [("structured", 2), ("matrix", 4)])
def test_each_head_of_a_layer_keeps_the_same_width(granularity: Granularity, sites: int) -> None:
    """Closure pads every head to the widest: a dimension more in one head is one more in all of them."""
    inside = [vector for vector in run_budget(granularity, "importance", 0.4).vectors if vector.heads > 1]
    assert len(inside) == tiny.LAYERS * sites
    for vector in inside:
        widths = vector.gate.mask.view(vector.heads, -1).sum(1)
        assert widths.max() - widths.min() <= 1  # one more where slots leave a remainder


@pytest.mark.parametrize("unit", ["vectors", "gates"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert", "llama"])
def test_heads_stay_equally_wide_however_often_they_are_ranked_anew(family: str, unit: BudgetUnit) -> None:
    """In these families a gate may stand for two dimensions, so that what is left over closes one at a time."""
    for asked in (0.12, 0.19, 0.33, 0.54, 0.82):
        torch.manual_seed(int(asked * 100))
        model = tiny.build_classifier(family)
        layers = attach_gates_(model, granularity="structured", controller="importance")
        vectors = gate_vectors(model, layers, "structured")
        budget = Budget(vectors, sparsity=asked, controller="importance", steps=300, penalty_weight=1.0, unit=unit)
        importance = [torch.rand_like(vector.gate.mu) for vector in vectors]
        for step in range(1, 301):
            for vector, one in zip(vectors, importance, strict=True):
                vector.gate.mu.grad = one * torch.randn_like(one)
            budget.after_backward(step)
        assert budget.removed >= asked
        widths = [vector.gate.mask.view(vector.heads, -1).sum(1) for vector in vectors if vector.heads > 1]
        assert max(int(one.max() - one.min()) for one in widths) <= 1


def test_the_paper_s_projection_closes_the_same_share_of_each_vector() -> None:
    budget = run_budget("matrix", "penalty", 0.3)
    for vector in budget.vectors:
        assert abs(float((vector.gate.mask == 0).sum()) - 0.3 * vector.gate.size) <= 1


def test_closing_is_gradual_and_never_goes_back() -> None:
    budget = run_budget("structured", "importance", 0.5)
    targets = [budget.target(step) for step in range(STEPS + 1)]
    assert targets == sorted(targets)
    assert targets[0] == 0
    assert targets[-1] == 0.5


def test_the_least_important_go_first_per_multiply_accumulate_saved() -> None:
    cheap, dear = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    masks = choose_closed([cheap, dear], macs=[1.0, 10.0], heads=[1, 1], count=3)
    assert masks[0].tolist() == [1, 1, 1]
    assert masks[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", range(13))
def test_any_number_of_gates_can_be_closed_exactly(count: int) -> None:
    torch.manual_seed(count)
    masks = choose_closed([torch.rand(8), torch.rand(4)], macs=[1.0, 1.0], heads=[4, 2], count=count)
    assert sum(int((mask == 0).sum()) for mask in masks) == count


@pytest.mark.parametrize("asked", [0.1, 0.5, 0.875])
def test_a_budget_of_many_gates_is_met_to_a_twentieth_of_a_percent(asked: float) -> None:
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 2.0, 3.0, 5.0])
    gates = [Gate(3072) for _ in weights]
    for gate in gates:
        gate.score.uniform_()

    def removed(masks: Masks) -> float:
        closed = torch.stack([(mask == 0).float().mean() for mask in masks])
        return float((closed * weights).sum() / weights.sum())

    vectors = [GateVector(gate, float(weight), 1) for gate, weight in zip(gates, weights, strict=True)]
    budget = Budget(
        vectors, sparsity=asked, controller="importance", steps=10, penalty_weight=0.0, unit="macs", removed=removed
    )
    budget.close(asked)
    assert 0 <= budget.removed - asked < 5e-4


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("unit", ["gates", "macs"])
def test_what_is_closed_stays_closed_and_keeps_its_score(granularity: Granularity, unit: BudgetUnit) -> None:
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity=granularity, controller="importance")
    settings = TrainSettings(
        data=DataSettings(task="sst2"), model="any", granularity=granularity, sparsity=0.6, budget=unit
    )
    budget = budget_of(model, layers, settings, steps=STEPS, tokens=8)
    draw = torch.Generator().manual_seed(0)
    last = [(vector.gate.mask.clone(), vector.gate.score.clone()) for vector in budget.vectors]
    for step in range(1, STEPS + 1):
        for vector in budget.vectors:
            vector.gate.mu.grad = torch.rand(vector.gate.size, generator=draw) * 10.0 ** (step % 5)
        budget.after_backward(step)
        for (mask, score), vector in zip(last, budget.vectors, strict=True):
            closed = mask == 0
            assert not vector.gate.mask[closed].any()
            assert torch.equal(vector.gate.score[closed], score[closed])
        last = [(vector.gate.mask.clone(), vector.gate.score.clone()) for vector in budget.vectors]
    assert budget.closed_gates
    assert 0 <= budget.removed - 0.6 <= 0.06  # whole heads of a tiny encoder are coarse


@pytest.mark.parametrize("unit", ["weights", "macs", "latency"])
def test_ranking_often_closes_no_more_than_asked(unit: BudgetUnit) -> None:
    """Near the end the schedule hardly moves: most of the rankings there have nothing to close."""
    steps = 1_500
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity="structured", controller="importance")
    settings = TrainSettings(data=DataSettings(task="sst2"), model="any", sparsity=0.3, budget=unit)
    budget = budget_of(model, layers, settings, steps=steps, tokens=8)
    draw = torch.Generator().manual_seed(0)
    for step in range(10, steps + 1, 10):
        for vector in budget.vectors:
            vector.gate.mu.grad = torch.rand(vector.gate.size, generator=draw)
        budget.after_backward(step)
    assert 0.3 <= budget.removed < 0.31  # a gate is less than half a percent here


@pytest.mark.parametrize(
    ("gone", "tries"),
    [
        (lambda closed: closed, 3),  # of the gates that close, in a budget's unit
        (lambda closed: 0.9 * closed, 3),
        (lambda closed: closed**4, 12),
        (lambda closed: closed**0.25, 12),
        (lambda closed: round(5 * closed) / 5, 26),  # whole heads, say
        (lambda closed: float(closed > 0.999), 26),
    ],
)
def test_what_is_asked_is_found_in_few_tries(gone: Callable[[float], float], tries: int) -> None:
    tried = []

    def removed(masks: Masks) -> float:
        tried.append(float((masks[0] == 0).float().mean()))
        return gone(tried[-1])

    gate = Gate(4_096)
    gate.score.copy_(torch.rand(gate.size, generator=torch.Generator().manual_seed(0)))
    vectors = [GateVector(gate, macs=1.0, heads=1)]
    budget = Budget(vectors, sparsity=0.5, controller="importance", steps=10, unit="macs", removed=removed)
    tried.clear()
    budget.close(0.5)
    assert len(tried) <= tries
    fewest = next(count for count in range(gate.size + 1) if gone(count / gate.size) >= 0.5)
    assert budget.closed_gates >= fewest
    assert budget.closed_gates == fewest or budget.removed < 0.5 + TOLERANCE


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("unit", "layout"), [("weights", "inner"), ("macs", "inner"), ("latency", "inner"), ("latency", "auto")]
)
def test_a_budget_is_met_by_the_plan_that_it_names(granularity: Granularity, unit: BudgetUnit, layout: Layout) -> None:
    """Of matrix gates the layouts differ, and time is that of the one which has index operations."""
    torch.manual_seed(0)
    wide = BertConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=64
    )  # where an index pays
    model = BertForSequenceClassification(wide)
    layers = attach_gates_(model, granularity=granularity, controller="importance")
    settings = TrainSettings(data=DataSettings(task="sst2"), model="any", granularity=granularity, budget=unit)
    budget = budget_of(model, layers, replace(settings, sparsity=0.4), steps=10, tokens=8)
    for vector in budget.vectors:
        vector.gate.score.uniform_()
    budget.close(0.4)
    planned = plan_model(model, layout).removed(unit, 8)
    differ = granularity == "matrix" and (unit, layout) == ("latency", "inner")
    assert (planned < budget.removed - 0.01) if differ else (planned == pytest.approx(budget.removed))


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2", "eurobert"])
@pytest.mark.parametrize("unit", ["weights", "macs"])
@pytest.mark.parametrize("asked", [0.75, 0.97])
def test_what_closes_with_others_counts_too(family: str, unit: BudgetUnit, asked: float) -> None:
    """A matrix that has lost all inputs gives nothing, whichever of its rows are open: closure removes them."""
    model = tiny.build_classifier(family)
    layers = attach_gates_(model, granularity="matrix", controller="importance")
    settings = TrainSettings(data=DataSettings(task="sst2"), model="any", granularity="matrix", budget=unit)
    budget = budget_of(model, layers, replace(settings, sparsity=asked), steps=10, tokens=8)
    draw = torch.Generator().manual_seed(0)
    for vector in budget.vectors:  # inputs go first, and all of some matrices
        vector.gate.score.copy_(torch.rand(vector.gate.size, generator=draw) * (0.1 if vector.axis == "in" else 1))
    budget.close(asked)
    assert asked <= budget.removed
    assert plan_model(model, "inner").removed(unit, 8) == pytest.approx(budget.removed)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("asked", [0.0, 0.2, 0.4, 0.41, 0.9])
def test_closing_anew_meets_any_fraction_and_keeps_to_what_is_closed(
    granularity: Granularity, controller: Controller, asked: float
) -> None:
    """Fewer are a part of what was closed, more hold all of it; the same again is the same."""
    budget = run_budget(granularity, controller, 0.4)
    before = [vector.gate.mask.clone() for vector in budget.vectors]
    budget.close_anew(asked, run=RUN)
    assert budget.closed_gates == gates_to_close(budget.total_gates, asked)
    for mask, vector in zip(before, budget.vectors, strict=True):
        assert (vector.gate.mask >= mask).all() if asked <= 0.4 else (vector.gate.mask <= mask).all()
        assert asked != 0.4 or torch.equal(vector.gate.mask, mask)


@pytest.mark.parametrize("asked", [0.28, 0.29, 0.295, 0.3, 0.31])
def test_what_a_vector_cannot_close_is_closed_in_others(asked: float) -> None:
    """Of gates that open again some stay closed: not every vector has as many as are asked of it."""
    torch.manual_seed(0)
    sizes = [(12, 128), (3072, 1)] * 12
    vectors = [GateVector(Gate(size, counts=counts), 1.0, 1, number) for number, (size, counts) in enumerate(sizes)]
    budget = Budget(vectors, sparsity=0.3, controller="penalty", steps=1, unit="vectors")
    for vector in vectors:
        vector.gate.score.uniform_()
    for fraction in (0.3, asked):
        budget.close_anew(fraction, run=RUN)
        assert budget.closed_gates == gates_to_close(budget.total_gates, fraction)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_single_dimensions_close_alike_in_every_head(controller: Controller) -> None:
    """Whoever closes them: the heads of a layer are as wide as its widest, so others that close more save nothing."""
    torch.manual_seed(0)
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity="matrix", controller=controller)
    settings = TrainSettings(
        data=DataSettings(task="sst2"), model="any", granularity="matrix", controller=controller, sparsity=0.5
    )
    budget = budget_of(model, layers, settings, steps=10, tokens=8)
    for vector in budget.vectors:
        vector.gate.score.uniform_()
    budget.close_anew(0.5, run=RUN)
    inside = [vector for vector in budget.vectors if (vector.role, vector.axis) in INSIDE_HEADS]
    assert len(inside) == len(INSIDE_HEADS) * tiny.LAYERS
    for vector in inside:
        left = vector.gate.mask.view(tiny.HEADS, -1).sum(1)
        assert left.max() - left.min() <= 1  # a remainder


def test_heads_go_whole_and_neurons_make_up_the_rest() -> None:
    budget = run_budget("heads", "importance", 0.37)
    assert budget.closed_gates == math.ceil(0.37 * budget.total_gates)
    width = tiny.HIDDEN // tiny.HEADS
    sizes = [(vector.gate.size, vector.gate.repeat, vector.gate.counts) for vector in budget.vectors]
    assert sizes == [(tiny.HEADS, width, 2 * width), (tiny.INTERMEDIATE, 1, 1)] * tiny.LAYERS
    structured = run_budget("structured", "importance", 0.37)
    assert budget.total_gates == structured.total_gates  # both count inner dimensions


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_whole_heads_meet_any_budget_exactly(controller: Controller) -> None:
    """Twelve heads of width 4 and 20 neurons in each of three layers: 196 sparsities, no training."""
    torch.manual_seed(0)
    for asked in [i / 196 for i in range(196)]:
        vectors = []
        for _ in range(3):
            heads, neurons = Gate(12, repeat=4, counts=8), Gate(20)
            vectors += [GateVector(heads, 8.0, 1), GateVector(neurons, 1.0, 1)]
        budget = Budget(vectors, sparsity=asked, controller=controller, steps=10, unit=UNITS[controller])
        for vector in vectors:
            vector.gate.mu.data.uniform_(-0.5, 0.5)
            vector.gate.mu.grad = torch.rand_like(vector.gate.mu)
        budget.after_backward(10)
        assert budget.closed_gates == math.ceil(round(asked * budget.total_gates, 6))


@pytest.mark.parametrize("count", range(35))
def test_a_head_that_does_not_fit_is_left_and_neurons_fill_the_rest(count: int) -> None:
    torch.manual_seed(count)
    masks = choose_closed([torch.rand(4), torch.rand(10)], [6.0, 1.0], [1, 1], count, [6, 1])
    assert 6 * int((masks[0] == 0).sum()) + int((masks[1] == 0).sum()) == count


def test_a_budget_that_neurons_cannot_fill_takes_one_head_more_and_opens_neurons() -> None:
    heads, neurons = torch.arange(4.0), torch.zeros(3)
    masks = choose_closed([heads, neurons], [40.0, 1.0], [1, 1], 25, [20, 1])
    assert [mask.tolist() for mask in masks] == [[0, 0, 1, 1], [1, 1, 1]]  # 40: less than one head too many
    masks = choose_closed([heads, torch.arange(30.0) / 100], [20.0, 1.0], [1, 1], 65, [20, 1])
    assert [int((mask == 0).sum()) for mask in masks] == [2, 25]


def test_a_slot_of_few_heads_is_worth_the_mean_of_them() -> None:
    """Whose neighbours are closed already must not go first for being fewer."""
    few, whole = Gate(4), Gate(4)
    few.score.copy_(torch.tensor([5.0, 4.0, 5.0, 4.0]))  # two heads of two; of the second slot one is closed
    whole.score.copy_(torch.tensor([3.5, 3.0, 3.5, 3.0]))
    few.mask[3] = 0
    vectors = [GateVector(gate, 1.0, heads=2) for gate in (few, whole)]
    ranking = Ranking.of(vectors, [gate.mask.bool() for gate in (few, whole)], per_mac=True)
    first = ranking.elements[ranking.slots.cumsum(0) - ranking.slots]  # of each slot
    assert (first // 4).tolist() == [1, 1, 0, 0]  # of which vector


def closed_of(scores: list[torch.Tensor], counts: list[int], count: int) -> list[list[float]]:
    vectors = []
    for score, each in zip(scores, counts, strict=True):
        gate = Gate(len(score), counts=each)
        gate.score.copy_(score)
        vectors.append(GateVector(gate, float(each), heads=1))
    among = [torch.ones(len(score), dtype=torch.bool) for score in scores]
    return [mask.tolist() for mask in Ranking.of(vectors, among, per_mac=True).closing(count)]


def test_a_head_that_just_fits_goes_before_neurons_that_matter_more() -> None:
    heads, neurons = closed_of([torch.tensor([0.0, 900.0]), torch.arange(10.0, 40.0)], [20, 1], 20)
    assert heads == [0, 1]
    assert neurons == [1] * 30


def test_of_what_closed_for_a_head_the_most_important_opens_again() -> None:
    heads, neurons = closed_of([torch.tensor([800.0, 900.0]), torch.arange(30.0)], [20, 1], 45)
    assert heads == [0, 1]
    assert neurons == [0] * 25 + [1] * 5


def test_ranking_and_planning_never_go_gate_by_gate() -> None:
    """They are done every few steps: one operation of torch for each gate would take longer than the steps."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    size, among = 4_096, 24
    gates = [Gate(size) for _ in range(among)]
    for gate in gates:
        gate.score.copy_(torch.rand(size))
    vectors = [GateVector(gate, 1.0, heads=1) for gate in gates]
    with Counting() as counting:
        masks = Ranking.of(vectors, [gate.mask.bool() for gate in gates], per_mac=True).closing(size * among // 2)
        assert len(plan._indices(masks[0].bool())) == int(masks[0].sum())
    assert counting.count < size * among / 100
    assert sum(int(mask.sum()) for mask in masks) == size * among // 2
