"""A head of one output for two classes, as rerankers have, is kept; `--metric` measures what it is called."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import tiny
from conftest import TaskFiles
from forms import data_settings, settings_for
from gatepress import load_pruned
from gatepress.checkpoint import load_run
from gatepress.cli.app import app
from gatepress.config import DataSettings, Metric
from gatepress.distill import Lesson, balanced, logit_distances
from gatepress.errors import ArtifactError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.families import FAMILIES
from gatepress.heads import is_finetuned
from gatepress.losses import task_losses
from gatepress.metrics import compute_metric
from gatepress.pruning import prune
from gatepress.tasks import TaskSpec, task_named
from gatepress.tasks.sources import load_rows
from gatepress.training import train

OF_TWO: tuple[Metric, ...] = ("accuracy", "matthews", "f1", "average_precision")


class Outputs:
    """What a model returns, as far as a teacher is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def told_by_gatepress(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("gatepress")]


@torch.no_grad()
def with_one_output(model: Any, family: str, directory: Path) -> Path:
    """Write a classifier of two classes as the reranker that it is: one output, how far the second is likelier."""
    state = model.state_dict()
    last = [name for name in state if name.startswith("classifier")][-2:]
    assert [name.rpartition(".")[2] for name in last] == ["weight", "bias"]
    one = tiny.build_classifier(family, num_labels=1)
    one.load_state_dict({**state, **{name: state[name][1:] - state[name][:1] for name in last}})
    return tiny.save_model(one, family, directory)


@pytest.fixture(scope="module")
def full(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run of full finetuning, with two outputs."""
    run = tmp_path_factory.mktemp("full") / "run"
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, method="full", lora_rank=None, epochs=4), run)
    return run


@pytest.fixture(scope="module")
def reranker(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_one_output(load_run(full)[0], "bert", tmp_path_factory.mktemp("reranker") / "model")


def test_one_output_loses_and_learns_as_the_two_that_it_stands_for() -> None:
    spec = task_named("sst2")
    torch.manual_seed(0)
    ours, theirs, labels = torch.randn(64, 2), torch.randn(64, 2), torch.randint(2, (64,))
    known, same = torch.rand(64) < 0.8, torch.rand(64) < 0.5
    lesson = Lesson(torch.tensor([0]), torch.tensor([0.3, 0.7]), hidden_weight=1.0)
    one, its = (value[:, 1:] - value[:, :1] for value in (ours, theirs))
    torch.testing.assert_close(task_losses(one, labels, spec), task_losses(ours, labels, spec))
    sigmoid = torch.nn.functional.binary_cross_entropy_with_logits(one[:, 0], labels.float(), reduction="none")
    torch.testing.assert_close(task_losses(one, labels, spec), sigmoid)
    distances = [logit_distances(Outputs(a), Outputs(b), spec) for a, b in ((one, its), (ours, theirs))]
    torch.testing.assert_close(*distances)
    weights = [balanced(Outputs(value), labels, known, same, lesson) for value in (its, theirs)]
    assert torch.equal(*weights)
    assert len(set(weights[0].tolist())) > 1
    for name in OF_TWO:
        of_one, of_two = (compute_metric(name, value.numpy(), labels.numpy()) for value in (one, ours))
        assert of_one == pytest.approx(of_two)


def test_a_finetuned_model_with_one_output_is_measured_as_that_with_two(
    full: Path, reranker: Path, tiny_task_files: TaskFiles
) -> None:
    for name in OF_TWO:
        data = replace(data_settings(tiny_task_files), metric=name)
        of_one, of_two = (evaluate(place, data=data) for place in (reranker, full))
        assert of_one["metric_name"] == name
        assert of_one["metric_value"] == pytest.approx(of_two["metric_value"])
        assert of_one["metric_value"] > (0.2 if name == "matthews" else 0.6)  # it learned something


@pytest.mark.parametrize("family", tiny.DISTINCT)
def test_a_reranker_keeps_its_head_in_all_forms(
    family: str, tiny_task_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.save_model(tiny.build_classifier(family, num_labels=1), family, tmp_path / "base")
    before = json.loads((base / "config.json").read_text())
    run, pruned, onnx = tmp_path / "run", tmp_path / "pruned", tmp_path / "onnx"
    settings = settings_for(base, tiny_task_files, sparsity=0.5, epochs=1)
    settings = replace(settings, data=replace(settings.data, metric="average_precision"))
    report = train(settings, run)
    assert not told_by_gatepress(caplog)
    trained = load_run(run)[1].settings
    assert trained.distill  # it knew the task, and teaches
    prune(run, pruned)
    export(pruned, onnx)
    values = [evaluate(place)["metric_value"] for place in (run, pruned, onnx)]
    assert values == pytest.approx([report["metric_value"]] * 3)
    config = json.loads((pruned / "config.json").read_text())
    assert config["id2label"] == before["id2label"] == {"0": "LABEL_0"}
    assert config.get("problem_type") is None
    assert (
        "One output, whose sigmoid is the probability of `wild` against `calm`." in (pruned / "README.md").read_text()
    )
    model = load_pruned(pruned)
    assert model(**tiny.random_batch(family)).logits.shape == (4, 1)
    shipped = AutoModelForSequenceClassification.from_pretrained(pruned, trust_remote_code=True)
    assert torch.equal(shipped(**tiny.random_batch(family)).logits, model(**tiny.random_batch(family)).logits)
    heads = {
        name: value for name, value in load_file(pruned / "model.safetensors").items() if FAMILIES[family].head in name
    }
    assert {len(value) for name, value in heads.items() if name.rpartition(".")[0] in _last(heads)} == {1}


def _last(heads: dict[str, Any]) -> set[str]:
    names = {name.rpartition(".")[0] for name in heads}
    return {name for name in names if name in ("classifier", "score") or name.endswith("out_proj")}


def test_full_finetuning_keeps_one_output_too_and_what_stands_on_it_does(
    reranker: Path, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    train(settings_for(reranker, tiny_task_files, method="full", lora_rank=None, epochs=1), tmp_path / "full")
    report = train(settings_for(tmp_path / "full", tiny_task_files, epochs=1, sparsity=0.5), tmp_path / "pressed")
    model, manifest = load_run(tmp_path / "pressed")
    assert model.config.num_labels == 1
    assert manifest.task.label_names == ("calm", "wild")
    assert report["metric_value"] == pytest.approx(evaluate(tmp_path / "pressed")["metric_value"])


@pytest.mark.parametrize(("outputs", "problem"), [(1, "regression"), (3, None)])
def test_a_head_that_does_not_fit_is_left_behind_with_a_word(
    outputs: int, problem: str | None, tiny_task_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.build_classifier("bert", num_labels=outputs, problem_type=problem)
    base = tiny.save_model(model, "bert", tmp_path / "base")
    train(settings_for(base, tiny_task_files, sparsity=0.5, epochs=1), tmp_path / "run")
    [warning] = told_by_gatepress(caplog)
    assert f"outputs of its head: {outputs}," in warning
    assert "the rows have 2 classes; a new head is trained" in warning
    opened, manifest = load_run(tmp_path / "run")
    assert opened.config.num_labels == 2
    assert not manifest.settings.distill
    assert not is_finetuned(base, manifest.task)


def test_an_encoder_without_a_head_is_told_nothing_of_one(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(settings_for(tiny_model_dir("roberta"), tiny_task_files, sparsity=0.5, epochs=1), tmp_path / "run")
    assert not told_by_gatepress(caplog)


# ---------------------------------------------------------------- --metric


def test_metrics_are_what_they_are_called() -> None:
    labels = np.array([1, 0, 1, 0, 0])
    logits = np.array([[0, 4.0], [0, 3.0], [0, 2.0], [0, -1.0], [0, -2.0]])
    assert compute_metric("average_precision", logits, labels) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert compute_metric("average_precision", logits, 0 * labels) == 0.0
    # found: 3, of them right: 2, to be found: 2
    assert compute_metric("f1", logits, labels) == pytest.approx(2 * 2 / (3 + 2))
    assert compute_metric("f1", logits[3:], labels[3:]) == 0.0
    three = np.eye(3)[[0, 0, 1, 2]]
    assert compute_metric("f1", three, np.array([0, 1, 1, 2])) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    curved = np.array([[1.0], [10.0], [1000.0]])
    assert compute_metric("spearman", curved, np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert compute_metric("pearson", curved, np.array([0.1, 0.2, 0.3])) < 0.9
    assert compute_metric("spearman", np.ones((3, 1)), np.array([0.1, 0.2, 0.3])) == 0.0


@pytest.mark.parametrize(
    ("task", "metric", "fit"),
    [
        ("sst2", "pearson", "accuracy, matthews, f1, average_precision"),
        ("mnli", "average_precision", "accuracy, matthews, f1"),
        ("stsb", "f1", "ndcg@10, pearson, spearman"),
        ("rte", "pearson", "accuracy, matthews, f1, average_precision, mrr@10, ndcg@10"),
        ("cola", "mrr@10", "accuracy, matthews, f1, average_precision"),
    ],
)
def test_a_metric_of_other_labels_is_refused(task: str, metric: Metric, fit: str, tiny_glue_dir: Path) -> None:
    data = DataSettings(task=task, data_dir=str(tiny_glue_dir), metric=metric)
    with pytest.raises(UsageError, match=f"--metric is {metric}, expected one of {fit}: labels are"):
        load_rows(data)
    row = {**task_named(task).to_json(), "metric": metric}
    with pytest.raises(ArtifactError, match=f"metric is {metric}, expected one of {fit}"):
        TaskSpec.from_json(row)


@pytest.mark.parametrize("task", ["rte", "qnli"])
@pytest.mark.parametrize(("metric", "embeds"), [("average_precision", False), ("mrr@10", False), (None, True)])
def test_scores_are_high_for_the_second_class_and_of_entailment_the_first_fits(
    *, task: str, metric: Metric | None, embeds: bool, tmp_path: Path
) -> None:
    spec = task_named(task)
    for split in ("train", "validation"):
        rows = [("a text", "another", number % 2) for number in range(4)]
        tiny.write_table(tmp_path / task / f"{split}.tsv", (*spec.text_columns, "label"), rows)
    data = DataSettings(task=task, data_dir=str(tmp_path), metric=metric)
    named = metric or "average_precision"
    with pytest.raises(UsageError, match=rf"^{task} would be measured by {named}, .* 'not_entailment', and the first"):
        load_rows(data, embeds=embeds)
    assert load_rows(replace(data, metric="f1")).spec.widths == (2,)  # one output, as rerankers have, says the second
    assert task_named("mrpc").widths == (2, 1)


def test_a_metric_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="--metric is 'recall', expected one of accuracy, matthews, f1"):
        DataSettings(task="sst2", metric="recall")  # type: ignore[arg-type]


def test_a_run_is_measured_by_the_metric_asked_and_evaluated_by_another(full: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["evaluate", str(full), "--metric", "f1", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["metric_name"] == "f1"
    assert json.loads(runner.invoke(app, ["evaluate", str(full), "--json"]).stdout)["metric_name"] == "accuracy"
    refused = runner.invoke(app, ["evaluate", str(full), "--metric", "spearman", "--json"])
    assert refused.exit_code == 2
    assert "expected one of accuracy" in refused.stdout


@pytest.mark.parametrize(
    ("name", "kind"), [("torch.nn.modules.linear.Identity", torch.nn.Identity), ("evil.Function", torch.nn.Sigmoid)]
)
def test_who_serves_it_gets_the_scores_that_it_gave(
    name: str, kind: Any, reranker: Path, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """sentence-transformers computes a sigmoid of them unless a model says otherwise."""
    base = Path(shutil.copytree(reranker, tmp_path / "base"))
    (base / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": name}))
    train(settings_for(base, tiny_task_files, epochs=1, method="gates", lora_rank=None), tmp_path / "run")
    for layout in ("inner", "stock"):
        prune(tmp_path / "run", tmp_path / layout, layout=layout)
        assert type(CrossEncoder(str(tmp_path / layout), trust_remote_code=True).activation_fn) is kind
