"""`--match-shares`: each class is named as often as it occurs, by the least that does it, in every form of a model."""

import errno
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from datasets import Dataset

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress import load_pruned, preparing, runwriter, training
from gatepress.batches import make_loader, tokenize
from gatepress.checkpoint import load_run, read_run
from gatepress.config import DataSettings, Metric, TrainSettings
from gatepress.errors import ModelError, UsageError
from gatepress.evaluation import evaluate, outputs_of
from gatepress.models import open_tokenizer
from gatepress.recovery import prune_each
from gatepress.shares import MARGIN, ROWS, drawn, last_bias, match_, move_, offsets
from gatepress.tasks.sources import load_rows
from gatepress.training import resume, train

RARE = 5  # rows of one class, for one of the other


def named(logits: Any, classes: int) -> list[int]:
    return np.bincount(logits.argmax(1), minlength=classes).tolist()


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_named_as_often_as_it_is_counted(classes: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(400, classes)) * draw.uniform(0.5, 4) + draw.normal(size=classes)
    counts = draw.multinomial(400, draw.dirichlet(np.ones(classes)))
    found = offsets(logits, counts)
    assert named(logits + found, classes) == counts.tolist()
    assert found.sum() == pytest.approx(0)
    np.testing.assert_array_equal(offsets(logits, np.array(named(logits, classes))), 0)  # nothing is moved for nothing


def test_of_two_classes_a_decision_moves_no_farther_than_it_must() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 2)) + np.array([0, 1])
    wanted = np.array([60, 40])
    found = offsets(logits, wanted)
    assert named(logits + found, 2) == wanted.tolist()
    less = np.sign(found) * (np.abs(found) - MARGIN)
    assert named(logits + less, 2) != wanted.tolist()


@pytest.mark.parametrize("counts", [[4, 0], [0, 4]])
def test_a_class_that_does_not_occur_is_not_named(counts: list[int]) -> None:
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    found = offsets(logits, np.array(counts))
    assert np.isfinite(found).all()
    assert named(logits + found, 2) == counts


def test_rows_that_are_alike_move_together() -> None:
    assert named(np.ones((10, 2)) + offsets(np.ones((10, 2)), np.array([5, 5])), 2) in ([10, 0], [0, 10])


def test_of_many_rows_some_are_counted_of_every_class() -> None:
    alternating = Dataset.from_dict({"label": [0, 1] * ROWS})
    for rows in (drawn(alternating), drawn(alternating, 2 * ROWS - 1)):
        assert len(rows) == len(set(rows["label"])) * ROWS / 2
        assert sum(rows["label"]) == pytest.approx(ROWS / 2, rel=0.1)
    assert drawn(alternating)["label"][:] == drawn(alternating)["label"][:]
    assert drawn(alternating, 7)["label"][:] == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - {*tiny.DECODERS}))
def test_the_head_of_each_family_gives_logits_that_are_moved(family: str, outputs: int) -> None:
    model = tiny.build_classifier(family, outputs).eval()
    inputs = tiny.random_batch(family)
    with torch.no_grad():
        before = model(**inputs).logits
    rows = before.numpy()
    labels = np.arange(len(rows)) % max(outputs, 2)
    moved = torch.tensor(match_(model, rows, labels), dtype=torch.float32)
    with torch.no_grad():
        after = model(**inputs).logits
    torch.testing.assert_close(after, before + (moved if outputs > 1 else moved[1:] - moved[:1]))
    assert bool((after > 0).sum() == (labels == 1).sum()) if outputs == 1 else after.argmax(1).unique().numel() > 1


def test_a_head_without_a_bias_is_told() -> None:
    model: Any = tiny.build_classifier("bert", 2)
    model.classifier.bias = None
    with pytest.raises(ModelError, match="ends without a bias to move; train with --no-match-shares"):
        match_(model, np.zeros((2, 2)), np.array([0, 1]))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    """Return rows of which one class is the rarer one, in texts that hardly say which."""
    root, header = tmp_path_factory.mktemp("uneven"), ("text", "label")
    draw = np.random.default_rng(0)
    rows = [(text, "no" if draw.integers(RARE + 1) == 0 else "yes") for text, _ in tiny.made_up_rows(240, seed=3)]
    return TaskFiles(
        tiny.write_table(root / "train.csv", header, rows), tiny.write_table(root / "validation.csv", header, rows[:60])
    )


def shares_of(model: Any, directory: Path, files: TaskFiles) -> tuple[list[int], list[int]]:
    """Return how often each class is named among the training rows, and how often it occurs."""
    tokenizer = open_tokenizer(directory)
    rows = load_rows(DataSettings(train_file=str(files.train), validation_file=str(files.validation))).train
    assert rows is not None
    logits, labels = outputs_of(
        model, make_loader(tokenize(rows, tokenizer, 128), tokenizer, 32, shuffle=False, seed=0)
    )
    return named(logits, 2), np.bincount(labels).tolist()


@pytest.mark.parametrize("method", ["gates+lora", "full", "lora"])
def test_a_run_names_classes_as_often_as_they_occur(
    method: Any, tiny_model_dir: Callable[[str], Path], uneven: TaskFiles, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), uneven, method=method, epochs=1)
    plain = train(settings, tmp_path / "plain")
    matched = train(replace(settings, match_shares=True), tmp_path / "matched")
    assert "class_offsets" not in plain
    assert any(matched["class_offsets"])
    counted, occur = shares_of(load_run(tmp_path / "matched")[0], tmp_path / "matched", uneven)
    assert counted == occur
    assert shares_of(load_run(tmp_path / "plain")[0], tmp_path / "plain", uneven)[0] != occur
    assert evaluate(tmp_path / "matched")["metric_value"] == matched["metric_value"]
    assert matched["curve"][-1]["metric_value"] == matched["metric_value"]


def test_it_is_the_default_of_matthews_correlation_alone() -> None:
    settings = TrainSettings(data=DataSettings(task="demo"))
    metrics = get_args(Metric)
    assert [metric for metric in metrics if settings.matches(metric)] == ["matthews"]
    for metric, asked in itertools.product(metrics, (True, False)):
        given = replace(settings, match_shares=asked)
        assert given.matches(metric) is given.resolved(metric, finetuned=False).match_shares is asked
    old = settings.resolved("matthews", finetuned=False).to_json()
    assert TrainSettings.from_json(old).match_shares is True
    del old["match_shares"]  # what a release of before began goes on without
    assert TrainSettings.from_json(old).match_shares is False


@pytest.mark.parametrize(("asked", "moved"), [(None, True), (False, False)])
def test_a_run_says_whether_its_head_was_moved(
    *, asked: bool | None, moved: bool, tiny_model_dir: Callable[[str], Path], uneven: TaskFiles, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), uneven, method="full", epochs=1, match_shares=asked)
    settings = replace(settings, data=replace(settings.data, metric="matthews"))
    report = train(settings, tmp_path / "run")
    assert ("class_offsets" in report) is moved
    assert read_run(tmp_path / "run").settings.match_shares is moved


def test_what_cannot_be_moved_is_told_before_the_first_step(
    tiny_model_dir: Callable[[str], Path], uneven: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(_: Any) -> Any:
        raise ModelError("the head ends without a bias")

    monkeypatch.setattr("gatepress.preparing.last_bias", without)
    monkeypatch.setattr("gatepress.training._step", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ModelError, match="ends without a bias"):
        train(settings_for(tiny_model_dir("bert"), uneven, match_shares=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sizes_that_recover_are_matched_anew(
    tiny_model_dir: Callable[[str], Path], uneven: TaskFiles, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), uneven, match_shares=True, epochs=1)
    train(settings, tmp_path / "run")
    prune_each(tmp_path / "run", {0.6: tmp_path / "small"}, recover_epochs=1)
    counted, occur = shares_of(load_pruned(tmp_path / "small"), tmp_path / "small", uneven)
    assert counted == occur


@pytest.fixture
def settings(tiny_model_dir: Callable[[str], Path], uneven: TaskFiles) -> TrainSettings:
    return settings_for(tiny_model_dir("bert"), uneven, match_shares=True, epochs=2)


@pytest.mark.parametrize("where", ["match_", "evaluate_model"])  # before the head is moved, and behind it
def test_a_run_that_is_stopped_comes_to_the_same(
    where: str, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings, tmp_path / "whole")
    assert any(whole["class_offsets"])
    stop(settings, tmp_path / "stopped", where, monkeypatch)
    assert read_run(tmp_path / "stopped").status == "interrupted"
    gone_on = resume(tmp_path / "stopped")
    assert gone_on["class_offsets"] == whole["class_offsets"]
    assert gone_on["metric_value"] == whole["metric_value"]


def stop(settings: TrainSettings, run: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a training behind its last step, at its last call of what is named."""
    told, calls = getattr(training, where), []

    def stopped(*given: Any, **options: Any) -> Any:
        calls.append(where)
        if where == "match_" or len(calls) == settings.epochs:
            raise KeyboardInterrupt
        return told(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, where, stopped)
        with pytest.raises(KeyboardInterrupt):
            train(settings, run)


def test_a_checkpoint_is_whole_until_the_next_one_is(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are of the last step, and the later one has another head."""
    stop(settings, tmp_path / "run", "match_", monkeypatch)
    written = runwriter.replace_file

    def full(path: Path, content: bytes, **told: Any) -> None:
        if path.name == "gatepress_run.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, content, **told)

    with monkeypatch.context() as patch:
        patch.setattr(runwriter, "replace_file", full)
        with pytest.raises(OSError, match="No space"):
            resume(tmp_path / "run")
    assert resume(tmp_path / "run")["metric_value"] == train(settings, tmp_path / "whole")["metric_value"]
    assert len(list((tmp_path / "run").glob("gates-*"))) == 1


@pytest.mark.parametrize("classes", [20, 150])
def test_of_many_classes_few_rows_are_missed(classes: int) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, ROWS)
    logits = draw.normal(size=(ROWS, classes)) + draw.normal(size=classes) / 2
    logits[np.arange(ROWS), labels] += 1.5
    counts = np.bincount(labels, minlength=classes)
    named = np.bincount((logits + offsets(logits, counts)).argmax(1), minlength=classes)
    assert np.abs(named - counts).sum() <= 2


@pytest.mark.parametrize("changes", [{}, {"embed": True}])
def test_where_there_are_no_classes_it_is_refused(
    changes: dict[str, Any], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    numbers = [(text, text, 1.5 * row) for row, (text, _) in enumerate(tiny.made_up_rows(20, seed=1))]
    file = str(tiny.write_table(tmp_path / "rows.csv", ("text", "text_pair", "label"), numbers))
    data = DataSettings(train_file=file, validation_file=file)
    settings = TrainSettings(data=data, model=str(tiny_model_dir("bert")), match_shares=True, **changes)
    with pytest.raises(UsageError, match=r"--match-shares is about classes, and .* has none; leave it out"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_are_matched_on_rows_that_have_labels(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tiny.write_table(tmp_path / "more.csv", ("text",), [(text,) for text, _ in tiny.made_up_rows(64, seed=9)])
    full = settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", lora_rank=None, epochs=1)
    train(full, tmp_path / "full")
    settings = settings_for(tmp_path / "full", tiny_task_files, epochs=1, distill=True, match_shares=True)
    settings = replace(settings, data=replace(settings.data, unlabelled_file=str(texts)))
    matched, seen = training.match_, []
    monkeypatch.setattr(training, "match_", lambda *given: (seen.append(given[2]), matched(*given))[1])
    report = train(settings, tmp_path / "run")
    assert report["unlabelled_examples"] == 64
    assert [len(labels) for labels in seen] == [256]


@pytest.mark.parametrize(("asked", "taken_back"), [(True, True), (False, False)])
@pytest.mark.parametrize("again", ["model", "start"])
def test_what_was_matched_is_gone_on_from_as_it_was_trained(  # noqa: PLR0913 - what varies, and fixtures
    again: str,
    *,
    asked: bool,
    taken_back: bool,
    tiny_model_dir: Callable[[str], Path],
    uneven: TaskFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes on leaves its decisions where they are unless it moves them itself, and then on top of nothing."""
    method = {"method": "full", "lora_rank": None} if again == "model" else {}
    settings = settings_for(tiny_model_dir("bert"), uneven, epochs=1, match_shares=True, **method)
    moved = np.array(train(settings, tmp_path / "first")["class_offsets"])
    head = last_bias(load_run(tmp_path / "first")[0]).detach().numpy()
    began: list[Any] = []

    def first_step(job: Any, _: Any) -> None:
        began.append(last_bias(job.gated).detach().numpy().copy())
        raise ModelError("seen")

    monkeypatch.setattr(training, "_step", first_step)
    on = {"start": str(tmp_path / "first"), "sparsity": 0.5} if again == "start" else {}
    on_model = tmp_path / "first" if again == "model" else tiny_model_dir("bert")
    with pytest.raises(ModelError, match="seen"):
        train(settings_for(on_model, uneven, epochs=1, match_shares=asked, **on), tmp_path / "second")
    np.testing.assert_allclose(began[0], head - moved if taken_back else head, atol=1e-6)


def test_a_teacher_says_what_it_was_trained_to_say(
    tiny_model_dir: Callable[[str], Path], uneven: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = settings_for(tiny_model_dir("bert"), uneven, method="full", lora_rank=None, epochs=1, match_shares=True)
    moved = np.array(train(full, tmp_path / "full")["class_offsets"])
    head = last_bias(load_run(tmp_path / "full")[0]).detach().numpy()
    settings = settings_for(tmp_path / "full", uneven, epochs=1, distill=True, match_shares=True)
    made, teachers = training.Teacher, []
    for module in (training, preparing):
        monkeypatch.setattr(module, "Teacher", lambda *given: (teachers.append(made(*given)), teachers[-1])[1])
    train(settings, tmp_path / "run")
    train(replace(settings, start=str(tmp_path / "run")), tmp_path / "more")  # as sizes that recover do
    for teacher in teachers:
        np.testing.assert_allclose(last_bias(teacher.model).numpy(), head - moved, atol=1e-6)
    assert len(teachers) == 2


@pytest.mark.parametrize("outputs", [1, 2])
def test_offsets_of_other_classes_are_refused(outputs: int) -> None:
    with pytest.raises(ModelError, match="has 2 classes, offsets are of 3"):
        move_(tiny.build_classifier("bert", outputs), np.zeros(3))
