"""Rows on which a metric means nothing are refused: it would be 0 whatever a model says, and any limit would be met."""

import csv
from pathlib import Path
from typing import Any

import pytest

from gatepress.config import DataSettings
from gatepress.errors import DataError
from gatepress.tasks.sources import load_rows


def rows(file: Path, values: list[Any]) -> str:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label"), *((f"text {n}", value) for n, value in enumerate(values))])
    return str(file)


@pytest.mark.parametrize(
    ("train", "validation", "metric", "words"),
    [
        ([0.5, 1.5, 2.5], [1.5, 1.5], None, "every row used has the same label, .* no pearson"),
        ([0.5, 1.5, 2.5], [1.5], "spearman", "every row used has the same label, .* no spearman"),
        (["no", "yes"], ["yes", "yes"], "matthews", "every row used has the same label, .* no matthews"),
        (["no", "yes"], ["no", "no"], "average_precision", "lacks the class that is looked for"),
        (["no", "yes"], ["no", "no"], "f1", "lacks the class that is looked for"),
    ],
)
def test_they_are_refused(tmp_path: Path, train: Any, validation: Any, metric: Any, words: str) -> None:
    files = {"train_file": rows(tmp_path / "train.csv", train), "validation_file": rows(tmp_path / "d.csv", validation)}
    with pytest.raises(DataError, match=words):
        load_rows(DataSettings(**files, metric=metric))


def test_those_that_are_left_count(tmp_path: Path) -> None:
    validation = [1.5, 1.5, 2.0]
    files = {"train_file": rows(tmp_path / "t.csv", [0.5, 1]), "validation_file": rows(tmp_path / "d.csv", validation)}
    assert load_rows(DataSettings(**files)).spec.metric == "pearson"
    with pytest.raises(DataError, match=r"d\.csv: every row used .*; raise --max-validation-samples, or give"):
        load_rows(DataSettings(**files, max_validation_samples=2))


@pytest.mark.parametrize(("values", "metric"), [(["yes", "yes"], "accuracy"), (["yes", "yes"], "average_precision")])
def test_what_still_has_a_metric_is_measured(tmp_path: Path, values: Any, metric: Any) -> None:
    files = {"train_file": rows(tmp_path / "t.csv", ["no", "yes"]), "validation_file": rows(tmp_path / "d.csv", values)}
    assert load_rows(DataSettings(**files, metric=metric)).spec.metric == metric
    three = {**files, "train_file": rows(tmp_path / "t.csv", ["a", "b", "yes"])}
    assert load_rows(DataSettings(**three, metric="f1")).spec.metric == "f1"
