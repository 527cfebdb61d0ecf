"""One metric on one set of rows, whatever form the model has."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from datasets import Dataset

import tiny
from forms import MAX_LENGTH, data_settings, save_run
from gatepress import evaluation
from gatepress.batches import make_loader, tokenize
from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import ArtifactError, ModelError, UsageError
from gatepress.evaluation import evaluate, evaluate_model, evaluate_runner, score
from gatepress.export import export
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.tasks import task_named
from gatepress.tasks.sources import load_rows
from gatepress.training import train


@dataclass
class Recorder:
    """A `Progress` that remembers."""

    calls: list[Any] = field(default_factory=list)
    done: int = 0

    def start(self, total: int, description: str) -> None:
        self.calls.append((total, description))

    def advance(self, steps: int = 1, **_figures: float | str) -> None:
        self.done += steps

    def finish(self) -> None:
        self.calls.append("finish")


def all_forms(root: Path, base: Path, files: Any) -> SimpleNamespace:
    run = save_run(root / "run", base, files)
    prune(run, root / "pruned")
    export(root / "pruned", root / "onnx")
    return SimpleNamespace(run=run, pruned=root / "pruned", onnx=root / "onnx")


@pytest.fixture(scope="module")
def forms(tiny_model_dir, tiny_task_files, tmp_path_factory) -> SimpleNamespace:
    """A classifier in every form."""
    return all_forms(tmp_path_factory.mktemp("forms"), tiny_model_dir("bert"), tiny_task_files)


@pytest.fixture(scope="module")
def regressor(tiny_model_dir, tiny_regression_files, tmp_path_factory) -> SimpleNamespace:
    """A regression over pairs of texts in every form."""
    return all_forms(tmp_path_factory.mktemp("regressor"), tiny_model_dir("mpnet"), tiny_regression_files)


def test_every_form_scores_the_same_on_the_rows_of_its_manifest(forms) -> None:
    results = [evaluate(path) for path in (forms.run, forms.pruned, forms.onnx)]
    assert [one["kind"] for one in results] == ["run", "pruned", "onnx"]
    assert [one["runtime"] for one in results] == ["torch", "torch", "onnxruntime"]
    shared = (
        "task",
        "metric_name",
        "metric_value",
        "metrics_by_split",
        "examples",
        "max_length",
        "data_fingerprint",
    )
    assert all({key: one[key] for key in shared} == {key: results[0][key] for key in shared} for one in results)
    assert (results[0]["metric_name"], results[0]["examples"], results[0]["max_length"]) == (
        "accuracy",
        96,
        MAX_LENGTH,
    )
    assert results[1]["total_params"] == results[2]["total_params"] < results[0]["total_params"]


def test_regression_over_pairs_scores_the_same(regressor) -> None:
    values = [evaluate(path)["metric_value"] for path in (regressor.run, regressor.pruned, regressor.onnx)]
    assert evaluate(regressor.onnx)["metric_name"] == "pearson"
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    assert values[0] != 0


def test_a_form_in_torch_scores_in_another_precision(forms) -> None:
    whole, half = evaluate(forms.pruned), evaluate(forms.pruned, precision="bf16", against=forms.pruned)
    assert (whole["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["metric_value_against"] == whole["metric_value"] == pytest.approx(half["metric_value"], abs=0.05)
    with pytest.raises(UsageError, match=r"--precision is bf16, but .* computes in what it was exported in"):
        evaluate(forms.onnx, precision="bf16")


def test_score_does_not_hang_on_the_batch_size(forms) -> None:
    assert {evaluate(forms.pruned, batch_size=size)["metric_value"] for size in (1, 7, 96)} == {
        evaluate(forms.pruned)["metric_value"]
    }


def test_asked_rows_win_over_the_manifest(forms, tiny_task_files) -> None:
    data = DataSettings(
        validation_file=str(tiny_task_files.train),
        text_column="text",
        label_column="label",
        max_validation_samples=40,
    )
    assert evaluate(forms.onnx, data=data)["examples"] == 40


def test_asked_length_is_cut_to_what_the_model_takes(forms) -> None:
    assert evaluate(forms.onnx, max_length=10_000, batch_size=96)["max_length"] == tiny.MAX_TOKENS
    assert evaluate(forms.run, max_length=5)["max_length"] == 5


def test_both_halves_of_mnli_are_reported(tiny_classifier_dir, tiny_glue_dir) -> None:
    result = evaluate(tiny_classifier_dir("bert", 3), data=DataSettings(task="mnli", data_dir=str(tiny_glue_dir)))
    splits = result["metrics_by_split"]
    assert set(splits) == {"validation_matched", "validation_mismatched"}
    assert len(set(splits.values())) == 2  # their labels differ
    assert result["metric_value"] == pytest.approx(sum(splits.values()) / 2)  # halves of one size here
    assert result["examples"] == 128


def test_the_metric_is_of_all_rows_together_whatever_the_size_of_a_split() -> None:
    spec = task_named("sst2")

    def rows(right: int, wrong: int) -> Any:
        labels = [1] * right + [0] * wrong
        each = [[1]] * len(labels)
        queries = range(len(labels))
        table = Dataset.from_dict({"input_ids": each, "attention_mask": each, "label": labels, "query": queries})
        return make_loader(table, tiny.build_tokenizer(tiny.BY_FAMILY["bert"]), 8, shuffle=False, seed=0)

    def predict(inputs: dict[str, torch.Tensor]) -> Any:
        return np.array([[0.0, 1.0]] * len(inputs["input_ids"]), dtype=np.float32)

    loaders: Any = {"few": rows(10, 0), "many": rows(0, 30)}
    result = score(predict, loaders, spec)
    assert result["metric_value"] == 10 / 40
    assert result["metrics_by_split"] == {"few": 1.0, "many": 0.0}


def test_what_is_compared_with_reads_with_its_own_tokenizer(forms, monkeypatch) -> None:
    seen = []

    def remember(runner: Any, _rows: Any, tokenizer: Any, **_: Any) -> dict[str, Any]:
        seen.append((runner.tokenizer_dir, Path(tokenizer.name_or_path)))
        return {"metric_value": 1.0}

    monkeypatch.setattr(evaluation, "evaluate_runner", remember)
    evaluate(forms.pruned, against=forms.run)
    assert seen == [(forms.pruned, forms.pruned), (forms.run, forms.run)]


def test_labels_are_matched_by_name(tiny_glue_dir, tmp_path: Path) -> None:
    """A model from elsewhere may hold the same classes in another order."""
    data = DataSettings(task="mnli", data_dir=str(tiny_glue_dir))
    model = tiny.build_classifier("distilbert", 3)
    model.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    value = evaluate(tiny.save_model(model, "distilbert", tmp_path / "same"), data=data)["metric_value"]
    order = [2, 0, 1]
    model.config.id2label = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.classifier.bias.data = model.classifier.bias.data[order]
    assert evaluate(tiny.save_model(model, "distilbert", tmp_path / "other"), data=data)["metric_value"] == value


def test_classes_that_are_called_otherwise_are_told(tiny_classifier_dir, tiny_glue_dir, tmp_path, caplog) -> None:
    model = shutil.copytree(tiny_classifier_dir("bert", 2), tmp_path / "named")
    config = json.loads((model / "config.json").read_text())
    for names, told in ((["POSITIVE", "NEGATIVE"], False), (["LABEL_0", "LABEL_1"], False), (["good", "bad"], True)):
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (model / "config.json").write_text(json.dumps(config))
        caplog.clear()
        evaluate(model, data=DataSettings(task="sst2", data_dir=str(tiny_glue_dir)))
        message = "the classes of its head are good, bad; they are taken for negative, positive, in this order"
        assert (message in caplog.text) == told, names


def test_some_of_the_rows_that_a_directory_names(forms, tiny_classifier_dir) -> None:
    whole = evaluate(forms.run)
    some = evaluate(forms.run, data={"max_validation_samples": 10})
    assert (some["examples"], some["task"]) == (10, whole["task"])
    with pytest.raises(UsageError, match="does not say what to measure on"):
        evaluate(tiny_classifier_dir("bert", 2), data={"max_validation_samples": 10})


def test_labels_that_differ_in_case_alone_stay_two(tiny_model_dir, tmp_path: Path) -> None:
    files = {}
    for split, seed in (("train", 1), ("validation", 2)):
        rows = [(text, {"calm": "US", "wild": "us"}[label]) for text, label in tiny.made_up_rows(256, seed=seed)]
        files[f"{split}_file"] = str(tiny.write_table(tmp_path / f"{split}.csv", ("text", "label"), rows))
    settings = TrainSettings(
        data=DataSettings(**files), model=str(tiny_model_dir("bert")), method="full", epochs=8, device="cpu"
    )
    told = train(replace(settings, learning_rate=3e-3), tmp_path / "run")
    assert told["metric_value"] > 0.7  # always one class: half
    assert evaluate(tmp_path / "run")["metric_value"] == told["metric_value"]


def test_progress_is_reported_in_batches(forms) -> None:
    progress = Recorder()
    evaluate(forms.onnx, batch_size=32, progress=progress)
    assert progress.calls == [(3, "evaluating validation rows of train"), "finish"]
    assert progress.done == 3


def test_model_in_training_is_measured_as_its_runner_is_and_stays_in_training(forms, tiny_task_files) -> None:
    runner = open_runner(forms.pruned)
    rows = load_rows(data_settings(tiny_task_files), splits="validation")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runner.tokenizer_dir)
    wanted = evaluate_runner(runner, rows, tokenizer, max_length=MAX_LENGTH)
    model = runner.model.train()
    loaders = {
        name: make_loader(tokenize(split, tokenizer, MAX_LENGTH), tokenizer, 16, shuffle=False, seed=0)
        for name, split in rows.validation.items()
    }
    got = evaluate_model(model, loaders, rows.spec)
    assert model.training
    assert got == {key: wanted[key] for key in got}


def test_other_number_of_classes_is_refused(tiny_classifier_dir, tiny_task_files) -> None:
    with pytest.raises(ModelError, match="has 3 outputs, but train needs 2"):
        evaluate(tiny_classifier_dir("bert", 3), data=data_settings(tiny_task_files))


def test_rows_that_lack_a_class_are_labelled_by_the_names_of_the_head(tiny_classifier_dir, tmp_path) -> None:
    """Numbers could be ids of the head, or the classes of another task."""
    source = tiny_classifier_dir("bert", 3)
    wanted = "label them by name: LABEL_0, LABEL_1, LABEL_2$"
    for labels, told in (
        (("0", "2"), wanted),
        (("LABEL_0", "LABEL_2"), None),
        (("0.5", "1.5"), "model for this task$"),
    ):
        rows = tiny.write_table(tmp_path / "rows.csv", ("text", "label"), [("a", labels[0]), ("b", labels[1])])
        data = DataSettings(validation_file=str(rows))
        if told is None:
            assert evaluate(source, data=data)["examples"] == 2
        else:
            with pytest.raises(ModelError, match=told):
                evaluate(source, data=data)


def test_as_many_outputs_as_a_graph_computes_count_not_as_many_as_it_names(forms, tmp_path) -> None:
    shutil.copytree(forms.onnx, tmp_path / "onnx")
    (tmp_path / "onnx/gatepress_onnx.json").unlink()
    (tmp_path / "onnx/config.json").unlink()
    graph = onnx.load(tmp_path / "onnx/model.onnx")
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "labels"  # as other exporters write it
    onnx.save(graph, tmp_path / "onnx/model.onnx")
    three = tiny.write_table(tmp_path / "three.csv", ("text", "label"), [("a", "x"), ("b", "y"), ("c", "z")])
    with pytest.raises(ModelError, match="has 2 outputs, but three needs 3"):
        evaluate(tmp_path / "onnx/model.onnx", data=DataSettings(validation_file=str(three)))


def test_numbered_classes_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As text LABEL_10 comes before LABEL_2."""
    model = tiny.build_classifier("bert", 12)
    source = tiny.save_model(model, "bert", tmp_path / "twelve")
    runner = open_runner(source)
    rows = [(f"text {number}", f"LABEL_{number}") for number in range(12)]
    data = tiny.write_table(tmp_path / "rows.csv", ("text", "label"), rows)
    basis = evaluation.basis_of(runner, source, data=DataSettings(validation_file=str(data)))
    assert basis.rows.spec.label_names == tuple(f"LABEL_{number}" for number in range(12))


@pytest.mark.parametrize(
    ("own", "names", "columns", "told"),
    [
        (("US", "us"), ("US", "us"), [0, 1], False),
        (("us", "US"), ("US", "us"), [1, 0], False),
        (("LABEL_0", "LABEL_1"), ("US", "us"), [0, 1], False),
        (("a", "b"), ("US", "us"), [0, 1], True),
    ],
)
def test_classes_that_differ_by_case_alone_are_two(own, names, columns, told, caplog) -> None:
    runner: Any = SimpleNamespace(name="x", label_names=own)
    spec = replace(task_named("sst2"), label_names=names)
    assert evaluation._columns(runner, spec) == columns
    assert ("are taken for" in caplog.text) == told


def test_encoder_without_a_head_is_refused(tiny_model_dir, tiny_task_files) -> None:
    with pytest.raises(ModelError, match="no task head of its own"):
        evaluate(tiny_model_dir("bert"), data=data_settings(tiny_task_files))


def test_plain_model_without_data_asks_for_it(tiny_classifier_dir) -> None:
    with pytest.raises(UsageError, match="give --task NAME or --validation-file"):
        evaluate(tiny_classifier_dir("bert"))


def test_onnx_file_without_a_tokenizer_is_refused(forms, tiny_task_files, tmp_path: Path) -> None:
    shutil.copy(forms.onnx / "model.onnx", tmp_path / "alone.onnx")
    with pytest.raises(ModelError, match="no tokenizer beside it"):
        evaluate(tmp_path / "alone.onnx", data=data_settings(tiny_task_files))


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"task": "sst2", "colour": "red"}},
        {"data": {}},
        {"data": 3},
        {"task": {"name": 1}},
        {"max_length": "x"},
    ],
)
def test_malformed_manifest_is_refused(forms, change, tmp_path: Path) -> None:
    shutil.copytree(forms.onnx, tmp_path / "onnx")
    file = tmp_path / "onnx" / "gatepress_onnx.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError, match="manifest"):
        evaluate(tmp_path / "onnx")


def test_the_rows_of_an_export_are_found_from_anywhere(tiny_classifier_dir, tiny_task_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(tiny_task_files.validation, "rows.csv")
    shutil.copytree(tiny_classifier_dir("bert"), "model")
    rows = {"text_column": "text", "label_column": "label"}
    export("~/model", tmp_path / "onnx", quantize="int8", data=DataSettings(validation_file="rows.csv", **rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = evaluate("../onnx")
    assert there == evaluate("~/onnx", data=DataSettings(validation_file="~/rows.csv", **rows))
    assert there["examples"] == 96


def test_real_rows_are_compared_however_a_run_is_named(forms, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(forms.run.parent))
    shapes = export(f"~/{forms.run.name}", tmp_path / "a")["shapes"]
    assert shapes == export(forms.run, tmp_path / "b")["shapes"]


def test_sizes_below_one_are_refused(forms) -> None:
    with pytest.raises(UsageError, match="--batch-size is 0"):
        evaluate(forms.run, batch_size=0)
    with pytest.raises(UsageError, match="--max-length is 0"):
        evaluate(forms.run, max_length=0)


def test_rows_of_another_task_are_refused(forms, tiny_glue_dir) -> None:
    with pytest.raises(UsageError, match="--task is"):
        evaluate(forms.onnx, data=replace(DataSettings(task="sst2"), data_dir=str(tiny_glue_dir)))


def test_what_is_compared_with_is_measured_by_the_same_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SimpleNamespace(kind="run", runtime="torch", dtype="float32", device="cpu", parameters=1)
    rows = SimpleNamespace(spec=SimpleNamespace(name="t"), fingerprint="f")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluation, "open_runner", lambda *_, **__: runner)
    monkeypatch.setattr(evaluation, "_tokenizer_of", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "basis_of", lambda *_, **__: evaluation.Basis(None, rows, None, 17))  # type: ignore[arg-type]
    monkeypatch.setattr(
        evaluation, "evaluate_runner", lambda *_, **options: (asked.append(options), {"metric_value": 0.5})[1]
    )
    evaluation.evaluate("one", against="other", batch_size=7)
    assert asked[0] == asked[1]
    assert (asked[0]["batch_size"], asked[0]["max_length"]) == (7, 17)
