"""What is left when gates were closed without a training is brought nearer to the model that it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from conftest import TaskFiles
from forms import collapse, save_run, settings_for
from gatepress import pruning, recovery
from gatepress.checkpoint import load_run, read_probe, read_run
from gatepress.config import Granularity, Layout
from gatepress.distill import hidden_distances
from gatepress.errors import ArtifactError, ParityError, UsageError
from gatepress.evaluation import evaluate
from gatepress.gates import gates_of
from gatepress.inject import attach_gates_, gated_linear
from gatepress.models import load_pruned
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.refit import RIDGE, _Fit, _heavier_first, _Seen, first_tokens, refit_
from gatepress.resolve import resolve
from gatepress.tasks.sources import load_rows
from gatepress.training import train


def closed_model(family: str, granularity: Granularity, share: float) -> Any:
    """Return a gated model with so many of its gates closed at random."""
    model = tiny.build_classifier(family).eval()
    attach_gates_(model, granularity=granularity, controller="importance")
    torch.manual_seed(1)
    for _, gate in gates_of(model):
        gate.mask.copy_((torch.rand(gate.size) >= share).float())
    return model


def batches_of(family: str, count: int = 12) -> list[dict[str, torch.Tensor]]:
    return [tiny.random_batch(family, batch=16, length=10, seed=seed) for seed in range(count)]


FORMS: list[tuple[Granularity, Layout]] = [("structured", "inner"), ("matrix", "paper")]


@pytest.mark.parametrize(("granularity", "layout"), FORMS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hidden_states_of_other_rows_come_nearer(family: str, granularity: Granularity, layout: Layout) -> None:
    teacher = tiny.build_classifier(family).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, _ = collapse(closed_model(family, granularity, 0.4), layout)
    student.eval()
    first = {name: value.clone() for name, value in student.state_dict().items()}
    probe = tiny.random_batch(family, batch=16, length=10, seed=99)
    report = refit_(student, teacher, batches_of(family), probe)
    assert report["hidden_distance"] < 0.9 * report["hidden_distance_before"]
    again = refit_(student, teacher, [probe], probe)
    assert again["hidden_distance_before"] == pytest.approx(report["hidden_distance"], rel=1e-4)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, first[name])}
    layers = tiny.LAYERS
    assert len({name.rpartition(".")[0] for name in changed}) == 2 * layers  # of each its two that write


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_what_lost_nothing_stays_as_it_was(family: str) -> None:
    teacher = tiny.build_classifier(family).eval()
    student, _ = collapse(closed_model(family, "structured", 0.0), "inner")
    student.eval()
    probe = tiny.random_batch(family, seed=5)
    wanted = student(**probe).logits
    report = refit_(student, teacher, batches_of(family, 4), probe)
    assert report["hidden_distance"] <= report["hidden_distance_before"] < 1e-6
    torch.testing.assert_close(student(**probe).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("emptied", ["query", "value", "neurons"])
def test_layers_that_were_emptied_are_fitted_too(family: str, emptied: str) -> None:
    model = closed_model(family, "structured", 0.2)
    first, role = resolve(model)[0], {"query": "q", "value": "o", "neurons": "down"}[emptied]
    linear = gated_linear(model, first, role)
    for gate in (linear.gate_in, linear.gate_out):
        if gate is not None:
            gate.mask.zero_()
    student, _ = collapse(model, "inner")
    probe = tiny.random_batch(family, batch=16, length=10, seed=99)
    report = refit_(student.eval(), tiny.build_classifier(family).eval(), batches_of(family, 40), probe)
    assert report["hidden_distance"] < report["hidden_distance_before"]


def test_rows_that_come_no_nearer_leave_all_as_it_was() -> None:
    """What was fitted to the very rows that decide is spoilt for them by one row of three tokens."""
    teacher = tiny.build_classifier("bert").eval()
    student, _ = collapse(closed_model("bert", "structured", 0.4), "inner")
    student.eval()
    probe = tiny.random_batch("bert", batch=16, length=12, seed=3)
    refit_(student, teacher, [probe], probe)
    first = {name: value.clone() for name, value in student.state_dict().items()}
    report = refit_(student, teacher, [tiny.random_batch("bert", batch=1, length=3)], probe)
    assert report["hidden_distance"] == report["hidden_distance_before"]
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, first[name], atol=0, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_is_moved_to_the_least_squares(*, bias: bool) -> None:
    """Of the equation in refit.py, tokens weighed by what the norm divides by, solved here by numpy."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.nn.Linear(5, 4, bias=bias)
    before = torch.cat([matrix.weight.detach(), *([matrix.bias.detach()[:, None]] if bias else [])], dim=1)
    norm = torch.nn.LayerNorm(4)
    inputs, rest, theirs = (torch.randn(30, width, generator=draw) for width in (5, 4, 4))
    with torch.no_grad():
        fit = _Fit(matrix)
        seen = _Seen(inputs, matrix(inputs) + rest, norm, norm(matrix(inputs) + rest))
        fit.add(seen, _Seen(inputs, theirs, norm, norm(theirs)), None)
        fit.solve_()
    weights = (1 / theirs.std(1, unbiased=False))[:, None]
    x = (torch.cat([inputs, *([torch.ones(30, 1)] if bias else [])], dim=1) * weights).double().numpy()
    pull = np.sqrt(RIDGE * np.square(x).sum(0).mean()) * np.eye(x.shape[1])
    wanted = np.concatenate([((theirs - rest) * weights).double().numpy(), pull @ before.T.double().numpy()])
    solved = np.linalg.lstsq(np.concatenate([x, pull]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(matrix.weight.detach(), solved[:, :5], atol=1e-5)
    if bias:
        np.testing.assert_allclose(matrix.bias.detach(), solved[:, 5], atol=1e-5)


def test_batches_are_read_until_there_are_tokens_enough() -> None:
    batches = batches_of("bert", 5)
    sizes = [int(one["attention_mask"].sum()) for one in batches]
    assert len(first_tokens(batches, sizes[0])) == 1
    assert len(first_tokens(batches, sizes[0] + 1)) == 2
    assert len(first_tokens(batches, 10**6)) == 5


@pytest.fixture(scope="module")
def run(tiny_model_dir: Any, tiny_task_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refit") / "run"
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.2, epochs=2), directory)
    return directory


def test_a_run_is_pruned_to_other_sizes_and_each_is_fitted(run: Path, tmp_path: Path) -> None:
    """To the run itself, whose base did not know the task; what is written is what was fitted, twice the same."""
    outputs = {sparsity: tmp_path / f"s{sparsity}" for sparsity in (0.4, 0.7)}
    reports = prune_each(run, outputs, refit=True)
    for report, directory in zip(reports, outputs.values(), strict=True):
        assert report["refit"]["hidden_distance"] < report["refit"]["hidden_distance_before"]
        assert report["max_abs_logit_diff"] <= 1e-4
        manifest = json.loads((directory / "gatepress_pruned.json").read_text())
        assert manifest["asked"]["refit"] is True
        assert manifest["report"]["refit"] == report["refit"]
        assert "least squares" in (directory / "README.md").read_text()
        assert evaluate(directory)["metric_value"] >= 0
    (plain,) = prune_each(run, {0.7: tmp_path / "plain"})
    assert "refit" not in plain
    assert plain["closed_gates"] == reports[1]["closed_gates"]
    prune_each(run, {0.7: tmp_path / "again"}, refit=True)
    fitted, same = (load_pruned(tmp_path / name).state_dict() for name in ("s0.7", "again"))
    for name, value in fitted.items():
        torch.testing.assert_close(same[name], value, atol=0, rtol=0)


def test_who_was_finetuned_is_what_is_fitted_to(tiny_model_dir: Any, tiny_task_files: Any, tmp_path: Path) -> None:
    """Not the run, of which more is gone already; hidden states of rows that nobody was fitted on tell."""
    full = settings_for(tiny_model_dir("mpnet"), tiny_task_files, method="full", lora_rank=None, epochs=1)
    train(full, tmp_path / "full")
    train(settings_for(tmp_path / "full", tiny_task_files, sparsity=0.6, epochs=1), tmp_path / "run")
    whole, _ = load_run(tmp_path / "full")
    probe = read_probe(tmp_path / "run", whole)
    (report,) = prune_each(tmp_path / "run", {0.4: tmp_path / "cut"}, refit=True)
    ours, theirs = (model(**probe, output_hidden_states=True) for model in (load_pruned(tmp_path / "cut"), whole))
    distance = hidden_distances(ours, theirs, probe["attention_mask"]).mean().item()
    assert distance == pytest.approx(report["refit"]["hidden_distance"], rel=1e-3)
    assert distance < report["refit"]["hidden_distance_before"]


def test_rows_must_be_those_of_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = load_rows(read_run(run).settings.data)
    monkeypatch.setattr(recovery, "load_rows", lambda *_, **__: replace(fewer, fingerprint="another"))
    with pytest.raises(ArtifactError, match="the rows have changed since the run began"):
        prune_each(run, {0.5: tmp_path / "x"}, refit=True)
    assert not list(tmp_path.iterdir())


def test_it_is_for_what_is_not_trained_on(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--refit is for what is not trained on"):
        prune_each(run, {0.5: tmp_path / "x"}, refit=True, recover_epochs=1)
    assert not list(tmp_path.iterdir())


def test_what_is_fitted_was_the_gated_model_before(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that changes what the model computes is refused, though weights change behind it anyhow."""
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    cut = pruning.cut

    def wrong(*given: Any, **options: Any) -> Any:
        pruned = cut(*given, **options)
        with torch.no_grad():
            pruned.classifier.bias += 1
        return pruned

    monkeypatch.setattr(pruning, "cut", wrong)
    with pytest.raises(ParityError, match="gated and pruned logits differ"):
        prune(run, tmp_path / "pruned", refit_=lambda *_: {})
    assert not (tmp_path / "pruned").exists()


def test_the_difference_that_is_told_of_what_was_fitted_is_the_larger_one(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files)
    apart = iter([0.25, 0.125])
    monkeypatch.setattr(pruning, "agree", lambda *_: next(apart))
    assert prune(run, tmp_path / "pruned", refit_=lambda *_: {})["max_abs_logit_diff"] == 0.25


def test_the_first_token_counts_as_much_as_all_others() -> None:
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert _heavier_first(real).tolist() == [3, 1, 1, 1, 1, 1, 1]
    draw = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(8, 3, generator=draw), torch.randn(8, 4, generator=draw)
    weights = torch.tensor([3.0, 1, 1, 1, 2, 1, 1, 1])
    fits = []
    for heavier, times in ((weights, torch.ones(8)), (None, weights)):
        matrix = nn.Linear(3, 4)
        with torch.no_grad():
            matrix.weight.zero_(), matrix.bias.zero_()
            rows = torch.arange(8).repeat_interleave(times.long())
            x, t = inputs[rows], wanted[rows]
            fit = _Fit(matrix)
            fit.add(_Seen(x, matrix(x), None, matrix(x)), _Seen(x, t, None, t), heavier)
            fit.solve_()
        fits.append(matrix.weight)
    torch.testing.assert_close(*fits)  # to count three times is to be there three times


def test_a_norm_that_hardly_lets_a_number_through_says_nothing_of_it() -> None:
    from gatepress.refit import _to_be_read

    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 1e-9]))
    read = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    seen = _Seen(read, read, norm, norm(read) + 1e-3)  # what comes out is off by a little
    spread = read.std(-1, keepdim=True, unbiased=False)
    found = _to_be_read(seen, seen, spread)
    torch.testing.assert_close(found[:, 3], read[:, 3], atol=1e-2, rtol=0)
    torch.testing.assert_close(found, read, atol=1e-2, rtol=0)


def test_a_layer_is_fitted_behind_what_the_fitted_ones_below_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not behind what the teacher's give: so an upper layer makes up for what those below still lack."""
    calls, add = [], _Fit.add

    def noted(fit: _Fit, ours: _Seen, *given: Any) -> None:
        calls.append((fit.matrix, ours.inputs))
        add(fit, ours, *given)

    monkeypatch.setattr(_Fit, "add", noted)
    student, _ = collapse(closed_model("bert", "structured", 0.4), "inner")
    batch = tiny.random_batch("bert", batch=16, length=12, seed=3)
    refit_(student.eval(), tiny.build_classifier("bert").eval(), [batch], batch)
    (matrix, read), seen = calls[-1], []
    matrix.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        student(**batch, output_hidden_states=True)
    torch.testing.assert_close(read, seen[0][batch["attention_mask"].bool()], atol=1e-5, rtol=1e-4)
