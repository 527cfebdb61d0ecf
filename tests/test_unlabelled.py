"""Texts without labels: who answers for them, what they count, and where nobody would answer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress import losses
from gatepress.checkpoint import read_run
from gatepress.config import DataSettings, TrainSettings
from gatepress.distill import Lesson
from gatepress.errors import DataError, UsageError
from gatepress.evaluation import evaluate
from gatepress.losses import batch_loss
from gatepress.recovery import prune_each
from gatepress.sweep import _cells
from gatepress.tasks import task_named
from gatepress.tasks.sources import load_rows
from gatepress.training import train

MORE = 40


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(text,) for text, _ in tiny.made_up_rows(MORE, seed=5)]
    return tiny.write_table(tmp_path_factory.mktemp("texts") / "texts.csv", ("text",), rows)


@pytest.fixture(scope="module")
def finetuned(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("finetuned") / "full"
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", lora_rank=None, epochs=2), directory)
    return directory


def with_texts(settings: TrainSettings, texts: Path) -> TrainSettings:
    return replace(settings, data=replace(settings.data, unlabelled_file=str(texts)))


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_row_without_a_label_counts_by_the_answer_of_the_teacher_alone(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = task_named(task)
    model, other = (tiny.build_classifier("bert", spec.num_labels, seed) for seed in (0, 1))
    inputs = tiny.random_batch("bert")
    rows = len(inputs["input_ids"])
    known = torch.tensor([1, 0, 1, 0]) if spec.label_names else torch.rand(rows)
    shares = torch.tensor([0.5, 0.5]) if spec.label_names else None
    lesson = Lesson(torch.unique(inputs["input_ids"]), shares, hidden_weight=1.0)  # there are no words to exchange
    first, none = known.where(torch.arange(rows) == 0, spec.no_label), torch.full_like(known, spec.no_label)

    def loss(labels: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        batch = {**inputs, "labels": labels}
        value = batch_loss(model, batch, spec, lambda asked: other(**asked, output_hidden_states=True), lesson)  # type: ignore[arg-type]
        value.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        return value.detach()

    assert loss(none) > 0
    for name in ("logit_distances", "hidden_distances"):
        monkeypatch.setattr(losses, name, lambda student, *_, **__: 0 * student.logits.sum(-1))
    each = losses.task_losses(model(**inputs).logits.detach(), known, spec)
    torch.testing.assert_close(loss(known), each.mean())
    torch.testing.assert_close(loss(first), each[0] / rows)
    assert loss(none) == 0


def test_texts_are_read_beside_the_training_rows_only(tiny_task_files: TaskFiles, texts: Path) -> None:
    plain = DataSettings(train_file=str(tiny_task_files.train), validation_file=str(tiny_task_files.validation))
    more = replace(plain, unlabelled_file=str(texts))
    rows = load_rows(more)
    assert rows.unlabelled is not None
    assert set(rows.unlabelled["label"]) == {rows.spec.no_label}
    assert len(rows.unlabelled) == MORE
    assert rows.fingerprint != load_rows(plain).fingerprint
    assert load_rows(plain).unlabelled is None
    gone = replace(plain, unlabelled_file="/nowhere/texts.csv")
    assert load_rows(gone, splits="validation", spec=rows.spec).unlabelled is None
    with pytest.raises(DataError, match=r"/nowhere/texts\.csv: no such file"):
        load_rows(gone)


def test_texts_in_other_columns_are_refused(tiny_task_files: TaskFiles, tmp_path: Path) -> None:
    other = tiny.write_table(tmp_path / "texts.csv", ("body",), [("a",)])
    settings = DataSettings(train_file=str(tiny_task_files.train), validation_file=str(tiny_task_files.validation))
    with pytest.raises(DataError, match=r"texts\.csv: no column 'text' \(--text-column\); it has body"):
        load_rows(replace(settings, unlabelled_file=str(other)))


def test_a_finetuned_model_is_pressed_with_texts_of_which_no_label_is_known(
    finetuned: Path, tiny_task_files: TaskFiles, texts: Path, tmp_path: Path
) -> None:
    settings = with_texts(settings_for(finetuned, tiny_task_files, sparsity=0.4, epochs=2), texts)
    report = train(settings, tmp_path / "run")
    assert (report["train_examples"], report["unlabelled_examples"]) == (256, MORE)
    assert report["steps"] == 2 * -(-(256 + MORE) // 16)
    assert read_run(tmp_path / "run").settings.data.unlabelled_file == str(texts)
    (recovered,) = prune_each(tmp_path / "run", {0.6: tmp_path / "small"}, recover_epochs=1)
    assert recovered["recovery"]["steps"] == report["steps"] / 2
    assert evaluate(tmp_path / "small")["metric_value"] == recovered["recovery"]["metric_value"]


@pytest.mark.parametrize("changes", [{"distill": False}, {"method": "lora"}, {"method": "gates"}, {"open_epochs": 1}])
def test_texts_that_nobody_answers_for_are_refused(
    changes: dict[str, Any], finetuned: Path, tiny_task_files: TaskFiles, texts: Path, tmp_path: Path
) -> None:
    settings = with_texts(settings_for(finetuned, tiny_task_files, **changes), texts)
    with pytest.raises(UsageError, match="--unlabelled-file holds texts that a teacher must answer for"):
        train(settings, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_know_the_task_answers_for_no_text(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, texts: Path, tmp_path: Path
) -> None:
    settings = with_texts(settings_for(tiny_model_dir("bert"), tiny_task_files, distill=True), texts)
    with pytest.raises(UsageError, match="give a --model that was finetuned for the task"):
        train(settings, tmp_path / "run")


def test_methods_of_a_sweep_that_no_teacher_has_train_on_labels(
    finetuned: Path, tiny_task_files: TaskFiles, texts: Path
) -> None:
    settings = with_texts(settings_for(finetuned, tiny_task_files), texts)
    cells = _cells(settings, ["gates+lora", "lora"], [0.5], 1)
    found = {cell.method: wanted.data.unlabelled_file for cell, wanted in cells.items()}
    assert found == {"gates+lora": str(texts), "lora": None}
