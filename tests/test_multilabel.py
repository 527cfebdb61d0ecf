"""Rows that have any number of the classes: from files to losses, metrics and every form of a model."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.nn import functional

import tiny
from gatepress.checkpoint import open_base
from gatepress.config import DataSettings, TrainSettings
from gatepress.distill import logit_distances
from gatepress.errors import ArtifactError, DataError, ModelError, UsageError
from gatepress.evaluation import evaluate, evaluate_runner
from gatepress.export import export
from gatepress.heads import is_finetuned, tell_of_head
from gatepress.losses import task_losses
from gatepress.metrics import compute_metric
from gatepress.models import open_tokenizer
from gatepress.preparing import prepared
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.runtime import open_runner
from gatepress.tasks.sources import load_rows
from gatepress.tasks.spec import TaskSpec
from gatepress.training import train

CLASSES = tuple(sorted(tiny.MARKERS))
COLUMNS = ",".join(CLASSES)
SPEC = TaskSpec("own", ("text",), CLASSES, "f1_micro", multi_label=True)


def made_up(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (text, its classes): a few filler words, and two markers of each class that the row has."""
    draw = random.Random(seed)
    for _ in range(count):
        held = [name for name in tiny.MARKERS if draw.random() < 0.4]
        words = draw.choices(tiny.FILLERS, k=draw.randint(1, 3))
        words += [word for name in held for word in draw.choices(tiny.MARKERS[name], k=2)]
        draw.shuffle(words)
        yield " ".join(words), held


def as_lists(path: Path, rows: list[tuple[str, Any]]) -> Path:
    records = [{"text": text, "labels": held} for text, held in rows]
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def as_columns(path: Path, rows: list[tuple[str, list[str]]], *, yes: str = "1", no: str = "0") -> Path:
    body = [(text, *(yes if name in held else no for name in tiny.MARKERS)) for text, held in rows]
    return tiny.write_table(path, ("text", *tiny.MARKERS), body)


def own(train_file: Path, validation_file: Path, **options: Any) -> DataSettings:
    return DataSettings(train_file=str(train_file), validation_file=str(validation_file), **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("sets")
    rows, few = list(made_up(384, 1)), list(made_up(96, 2))
    texts = tiny.write_table(root / "texts.csv", ("text",), [(text,) for text, _ in made_up(64, 3)])
    listed = own(as_lists(root / "train.jsonl", rows), as_lists(root / "validation.jsonl", few))
    apart = own(as_columns(root / "train.csv", rows), as_columns(root / "validation.csv", few), label_column=COLUMNS)
    return SimpleNamespace(listed=listed, apart=apart, texts=texts, rows=rows, few=few)


def settings(data: DataSettings, model: Path, **changes: Any) -> TrainSettings:
    options: dict[str, Any] = {"epochs": 6, "batch_size": 16, "max_length": 32, "device": "cpu", "learning_rate": 3e-3}
    return TrainSettings(data=data, model=str(model), **{**options, **changes})


@pytest.fixture(scope="module")
def finetuned(files: SimpleNamespace, tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finetuned") / "run"
    asked = settings(files.listed, tiny_model_dir("bert"), method="full", epochs=12)
    assert train(asked, run)["metric_value"] > 0.7  # it learned something: all classes everywhere have 0.57
    return run


# ---------------------------------------------------------------- rows


def test_lists_and_columns_are_the_same_rows(files: SimpleNamespace, tmp_path: Path) -> None:
    listed, apart = load_rows(files.listed), load_rows(files.apart)
    assert (listed.spec.multi_label, listed.spec.label_names, listed.spec.metric) == (True, CLASSES, "f1_micro")
    assert apart.spec.labels == listed.spec.labels
    assert apart.spec.label_column == COLUMNS
    assert apart.fingerprint == listed.fingerprint
    assert listed.train is not None
    for (_, held), label in zip(files.rows, listed.train["label"], strict=True):
        assert label == [float(name in held) for name in CLASSES]
    many = as_lists(tmp_path / "t.parquet", files.rows), as_columns(tmp_path / "v.csv", files.few, yes="true", no="0.0")
    for data, splits in ((own(many[0], many[0]), "all"), (own(many[1], many[1], label_column=COLUMNS), "all")):
        assert load_rows(data, splits=splits).spec.labels == listed.spec.labels


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    file = as_lists(tmp_path / "t.jsonl", [("one", [10, 2]), ("two", [2]), ("three", [])])
    rows = load_rows(own(file, file))
    assert rows.spec.label_names == ("2", "10")
    assert rows.train is not None
    assert list(rows.train["label"]) == [[1, 1], [1, 0], [0, 0]]


def test_a_column_with_a_comma_in_its_name_is_one_column(tmp_path: Path) -> None:
    file = tiny.write_table(tmp_path / "t.csv", ("text", "a,b"), [("one", "x"), ("two", "y")])
    assert load_rows(own(file, file, label_column="a,b")).spec.labels == (("x", "y"), False)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("one", ["x"]), ("two", "y")], "row 2: the labels are str, expected a list of the row's classes"),
        ([("one", ["x", "y"]), ("two", None)], "row 2: the labels are missing, expected a list"),
        ([("one", [0, 1, 0]), ("two", [1, 0, 0])], "row 1: a class is twice in 0, 1, 0; a list names the classes"),
        ([("one", [0, 1]), ("two", [1, 0])], "every list is of 0 and 1; a list names the classes"),
        ([("one", ["x", ["y"]])], "row 1: the label is list"),
        ([("one", ["x"]), ("two", [])], "the lists hold 1 classes, expected two or more"),
        ([("one", []), ("two", [])], "the lists hold 0 classes, expected two or more"),
        ([("one", ["x", "y"]), ("two", ["y", "x"])], "every row used has the same classes"),
    ],
)
def test_what_is_no_list_of_classes_is_told(rows: list[Any], told: str, tmp_path: Path) -> None:
    file = as_lists(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_rows(own(file, file))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_column_of_classes_is_told(files: SimpleNamespace, tmp_path: Path) -> None:
    odd = as_columns(tmp_path / "odd.csv", files.few, no="-1")
    with pytest.raises(DataError, match=r"column 'calm', row \d+: is '-1', expected 1 or 0 for each class"):
        load_rows(own(odd, odd, label_column=COLUMNS))
    with pytest.raises(DataError, match="no column 'mild' \\(--label-column\\)"):
        load_rows(own(odd, odd, label_column="calm,mild"))
    with pytest.raises(UsageError, match="expected another one for each text and for the label"):
        load_rows(replace(files.apart, label_column="calm,wild,calm"))
    lists = tiny.write_table(tmp_path / "lists.csv", ("text", "label"), [("one", "['x', 'y']"), ("two", "[]")])
    with pytest.raises(DataError, match=r"every label is a list as text, as \['x', 'y'\]; several classes in a row"):
        load_rows(own(lists, lists))
    named = tiny.write_table(tmp_path / "named.csv", ("text", "label"), [("one", "[A]"), ("two", "[B]")])
    assert load_rows(own(named, named)).spec.labels == (("[A]", "[B]"), False)


def test_columns_are_classes_in_the_order_in_which_they_are_named(files: SimpleNamespace) -> None:
    rows = load_rows(replace(files.apart, label_column="wild, calm,odd"))
    assert rows.spec.label_names == ("wild", "calm", "odd")
    assert rows.train is not None
    assert rows.train["label"][0] == [float(name in files.rows[0][1]) for name in ("wild", "calm", "odd")]


def test_every_class_of_a_model_has_a_column(files: SimpleNamespace) -> None:
    """One that is not named is not one that no row has."""
    few = replace(files.apart, label_column="calm,wild")
    assert load_rows(few).spec.label_names == ("calm", "wild")
    with pytest.raises(DataError, match="--label-column leaves out odd; name a column for each class"):
        load_rows(few, splits="validation", spec=SPEC)
    with pytest.raises(DataError, match="--label-column leaves out odd"):
        load_rows(replace(few, train_file=None), splits="validation", classes=CLASSES)
    of_one = replace(SPEC, multi_label=False, metric="accuracy")
    with pytest.raises(DataError, match="--label-column names 2 columns, and a row of own has one label; name one"):
        load_rows(few, splits="validation", spec=of_one)


def test_validation_rows_have_no_classes_that_training_rows_have_not(tmp_path: Path) -> None:
    rows = as_lists(tmp_path / "t.jsonl", [("one", ["x"]), ("two", ["y", "x"])])
    other = as_lists(tmp_path / "v.jsonl", [("one", ["x"]), ("two", ["z"])])
    with pytest.raises(DataError, match="row 2: label 'z' is not one of x, y, the labels of training"):
        load_rows(own(rows, other))
    single = as_lists(tmp_path / "s.jsonl", [("one", "x"), ("two", "y")])
    with pytest.raises(DataError, match="row 1: the label is list"):
        load_rows(own(single, rows))


def test_options_that_are_about_one_class_are_refused(files: SimpleNamespace, tiny_model_dir: Any) -> None:
    with pytest.raises(UsageError, match="expected one of accuracy, f1, f1_micro, average_precision: labels are any"):
        load_rows(own(Path(files.listed.train_file), Path(files.listed.validation_file), metric="matthews"))
    with pytest.raises(UsageError, match="--match-shares is about classes, and train has any number of them in a row"):
        prepared(settings(files.listed, tiny_model_dir("bert"), match_shares=True))


def test_a_manifest_of_before_has_one_label_a_row() -> None:
    value = SPEC.to_json()
    assert TaskSpec.from_json(json.loads(json.dumps(value))) == SPEC
    value |= {"metric": "accuracy"}
    assert not TaskSpec.from_json({key: one for key, one in value.items() if key != "multi_label"}).multi_label
    for wrong in ({"multi_label": 1}, {"label_names": None}, {"embeds": True}, {"metric": "matthews"}):
        with pytest.raises(ArtifactError):
            TaskSpec.from_json(value | wrong)


# ---------------------------------------------------------------- losses and metrics


def test_each_class_is_there_or_not() -> None:
    """By the formulas: the mean over classes of binary cross entropies, and of the divergences of a teacher."""
    torch.manual_seed(0)
    logits, taught = torch.randn(5, 3), torch.randn(5, 3)
    labels = (torch.rand(5, 3) < 0.5).float()
    p = logits.sigmoid()
    wanted = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)
    torch.testing.assert_close(task_losses(logits, labels, SPEC), wanted)
    q, p = ((one / 2).sigmoid() for one in (taught, logits))
    apart = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean(1)
    student, teacher = SimpleNamespace(logits=logits), SimpleNamespace(logits=taught)
    torch.testing.assert_close(logit_distances(student, teacher, SPEC), apart)
    torch.testing.assert_close(logit_distances(student, student, SPEC), torch.zeros(5))
    of_one = TaskSpec("own", ("text",), ("no", "yes"), "accuracy")
    single = [SimpleNamespace(logits=one[:, :1]) for one in (logits, taught)]
    torch.testing.assert_close(logit_distances(*single, of_one), logit_distances(*single, SPEC))
    torch.testing.assert_close(
        task_losses(logits[:, :1], labels[:, 0].long(), of_one),
        functional.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], reduction="none"),
    )


def test_metrics_count_every_class_of_every_row() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.float32)
    logits = np.array([[2, -1, -1], [1, -1, -1], [-1, -1, 1], [-1, 3, -1]], dtype=np.float32)
    assert compute_metric("accuracy", logits, labels) == 0.5  # the first row and the last
    assert compute_metric("f1_micro", logits, labels) == pytest.approx(2 * 3 / (4 + 4))  # 3 right, 4 named, 4 there
    assert compute_metric("f1", logits, labels) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert compute_metric("average_precision", logits, labels) == 0.875  # 1, 0.75, and none there
    none = np.zeros_like(labels)
    assert [compute_metric(name, logits, none) for name in ("f1_micro", "average_precision")] == [0, 0]


# ---------------------------------------------------------------- models


def test_every_form_has_one_metric(files: SimpleNamespace, finetuned: Path, tmp_path: Path) -> None:
    """With a teacher, texts without labels and a recovery; rows are given as columns where they were lists before."""
    data = DataSettings(
        train_file=files.apart.train_file,
        validation_file=files.apart.validation_file,
        label_column=COLUMNS,
        unlabelled_file=str(files.texts),
    )
    run, pruned, onnx = tmp_path / "run", tmp_path / "pruned", tmp_path / "onnx"
    report = train(settings(data, finetuned, sparsity=0.4, epochs=2), run)
    assert report["removed_of_budget"] == pytest.approx(0.4, abs=0.005)
    assert report["metric_value"] > 0.7
    prune(run, pruned)
    config = json.loads((pruned / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == list(CLASSES)
    card = (pruned / "README.md").read_text()
    assert "A text has any number of the classes `calm`, `odd`, `wild`: those" in card
    assert "- f1\n" in card
    export(pruned, onnx)
    values = {evaluate(form)["metric_value"] for form in (run, pruned, onnx)}
    assert values == {report["metric_value"]}
    listed = evaluate(pruned, data={"validation_file": files.listed.validation_file, "label_column": "labels"})
    assert listed["metric_value"] == report["metric_value"]
    (again,) = prune_each(run, {0.5: tmp_path / "half"}, recover_epochs=1)
    assert again["recovery"]["metric_value"] == evaluate(tmp_path / "half")["metric_value"] > 0.6


def test_a_head_that_was_trained_for_sets_goes_on_and_no_other(
    files: SimpleNamespace, finetuned: Path, tiny_classifier_dir: Any, tmp_path: Path, caplog: Any
) -> None:
    spec = load_rows(files.listed).spec
    assert is_finetuned(finetuned, spec)
    with pytest.raises(ModelError, match="trained for the labels any number of calm, odd, wild, these rows have calm,"):
        open_base(finetuned, replace(spec, multi_label=False, metric="accuracy"))
    single = tiny_classifier_dir("bert", 3)
    one_each = TaskSpec("own", ("text",), CLASSES, "accuracy")
    assert is_finetuned(single, one_each)
    assert not is_finetuned(single, spec)
    config = json.loads((single / "config.json").read_text())
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((single / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    assert is_finetuned(tmp_path, spec)
    assert not is_finetuned(tmp_path, one_each)
    tell_of_head(tmp_path, spec)
    assert not caplog.messages
    tell_of_head(single, spec)
    assert "its configuration says no problem_type, and the rows are of multi_label_classification" in caplog.text
    assert "its head is only a start" in caplog.text
    tell_of_head(tmp_path, one_each)
    assert "says multi_label_classification, and the rows are of single_label_classification" in caplog.text


@pytest.mark.parametrize("form", ["run", "onnx"])
def test_a_model_of_the_other_kind_is_told(
    form: str, files: SimpleNamespace, finetuned: Path, tmp_path: Path, caplog: Any
) -> None:
    rows = tiny.write_table(tmp_path / "v.csv", ("text", "label"), [(text, CLASSES[0]) for text, _ in files.few])
    model = finetuned
    if form == "onnx":
        model = tmp_path / "onnx"
        export(finetuned, model)
    given = {"validation_file": str(rows), "train_file": None, "label_column": "label"}
    runner = open_runner(model)
    spec = TaskSpec("own", ("text",), CLASSES, "accuracy")
    loaded = load_rows(DataSettings(**given), splits="validation", spec=spec)
    evaluate_runner(runner, loaded, open_tokenizer(runner.tokenizer_dir))
    assert "says multi_label_classification, and the rows are of single_label_classification" in caplog.text
