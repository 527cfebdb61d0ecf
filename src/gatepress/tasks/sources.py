"""Rows of a task from where the user has them: a GLUE directory, the hub, the demo, own files."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import datasets

from gatepress.config import DataSettings, Metric
from gatepress.errors import DataError, UsageError
from gatepress.schema import is_sound
from gatepress.tasks.columns import choose_columns, label_columns, require_column
from gatepress.tasks.demo import demo_rows
from gatepress.tasks.glue import glue_columns, hub_columns
from gatepress.tasks.labels import (
    class_ids,
    class_sets,
    infer_names,
    infer_set_names,
    scores,
    sets_of_columns,
    some,
)
from gatepress.tasks.readers import Columns, read_columns
from gatepress.tasks.spec import CORRELATIONS, METRICS, MIN_CLASSES, OF_SECOND, PAIR, RANKS, TASKS, TaskSpec, task_named

logger = logging.getLogger(__name__)

_HALF = re.compile("[\ud800-\udfff]")

Splits = Literal["all", "validation"]


@dataclass(frozen=True)
class Rows:
    """The rows of one task: columns `text`, `text_pair` (pairs only) and `label` (id, number, or 1 and 0 by class).

    For an embedder each text is a row: all first texts of pairs, followed by the second ones.
    """

    spec: TaskSpec
    train: datasets.Dataset | None  # None if only validation was asked for
    validation: dict[str, datasets.Dataset]  # by split name
    unlabelled: datasets.Dataset | None  # with `TaskSpec.no_label`; None if there are none, or only validation
    fingerprint: str  # sha256 over all rows above, in order


@dataclass(frozen=True)
class _Split:
    name: str
    where: str  # its name in errors: a path, or a hub address
    columns: Columns


def load_rows(
    data: DataSettings,
    *,
    splits: Splits = "all",
    spec: TaskSpec | None = None,
    classes: tuple[str, ...] | None = None,
    embeds: bool = False,
) -> Rows:
    """Load, check and cut the rows that `data` asks for; `embeds`: for an embedder, which learns without labels.

    `spec` (from the manifest of a run with a head) fixes columns and label ids; without it, they come from the task's
    row or from the training file. `classes` (of a model from elsewhere) are those of own rows, if these hold no others.
    Raises `UsageError` on an unknown task, `DataError` on unusable rows, `HubError` if a hub is out of reach,
    `MissingExtraError` without the demo package.
    """
    if embeds:
        spec = None  # without a head any labels will do: the rows themselves say what they are
    if data.task is None:
        train, validation = _own_splits(data, splits, classes_known=embeds or spec is not None)
        labelled = validation[0] if embeds or train is None else train
        spec = _as_asked(spec, data) if spec else _infer_spec(data, labelled, classes)
    else:
        named = task_named(data.task)
        train, validation = _named_splits(data, named, splits)
        spec = _as_asked(_trained_for(spec, named), data)
    _refuse_unfit_columns(spec)
    if embeds:
        spec = _embedding(spec, data)
    _refuse_unfit_metric(spec)
    used: Columns | None = None
    tables: list[Columns] = []
    if train is not None and splits == "all":
        if embeds:
            used = _unlabelled(train, spec, data, data.max_train_samples)
        else:
            used = _table(train, spec, data)
            _refuse_one_class(used["label"], spec, train.where, cut=data.max_train_samples is not None)
        tables.append(used)
    checked = {split.name: _table(split, spec, data) for split in validation}
    if spec.metric in RANKS:
        for split in validation:
            _refuse_unrankable(checked[split.name], spec, split.where, cut=data.max_validation_samples is not None)
    _refuse_undefined(checked, spec, validation[0].where, cut=data.max_validation_samples is not None)
    tables += checked.values()
    more = None
    if data.unlabelled_file and splits == "all":
        more = _unlabelled(_file_split("unlabelled", data.unlabelled_file), spec, data, None)
        tables.append(more)
    return Rows(
        spec,
        None if used is None else _dataset(used, spec),
        {name: _dataset(table, spec) for name, table in checked.items()},
        None if more is None else _dataset(more, spec),
        _fingerprint(tables),
    )


def _own_splits(data: DataSettings, splits: Splits, *, classes_known: bool) -> tuple[_Split | None, list[_Split]]:
    if data.data_dir:
        raise UsageError("--data-dir holds named tasks; give --task NAME with it, or own files without it")
    if not data.validation_file:
        raise DataError("own data has no validation rows; give them with --validation-file FILE")
    if splits == "all" and not data.train_file:
        raise DataError("own data has no training rows; give them with --train-file FILE")
    train = None
    if data.train_file and (splits == "all" or not classes_known):  # its labels name the classes
        train = _file_split("train", data.train_file)
    return train, [_file_split("validation", data.validation_file)]


def _file_split(name: str, path: str) -> _Split:
    return _Split(name, path, read_columns(Path(path)))


def _named_splits(data: DataSettings, task: TaskSpec, splits: Splits) -> tuple[_Split | None, list[_Split]]:
    names = [*(["train"] if splits == "all" else []), *task.validation_splits]
    if task.name == "demo":
        if data.data_dir:
            raise UsageError("--task demo brings its own rows; drop --data-dir")
        halves = dict(zip(("train", "validation"), demo_rows(), strict=True))
        found = {name: _Split(name, f"demo {name} rows", _columns(halves[name], task)) for name in names}
    elif data.data_dir:
        found = {name: _Split(name, *glue_columns(Path(data.data_dir), task.name, name)) for name in names}
    else:
        found = {name: _Split(name, *hub_columns(task.name, name)) for name in names}
    return found.pop("train", None), list(found.values())


def _columns(rows: list[tuple[str, str]], task: TaskSpec) -> Columns:
    texts, labels = zip(*rows, strict=True)
    return {task.text_columns[0]: list(texts), task.label_column: list(labels)}


def _infer_spec(data: DataSettings, split: _Split, classes: tuple[str, ...] | None) -> TaskSpec:
    """Return the spec that the user's own rows make; the training rows name the classes."""
    texts, label = choose_columns(data, list(split.columns), split.where)
    values = _labels(split, label)
    apart = label_columns(label, split.columns)
    where = f"{split.where}, column {label!r}"
    multi_label = any(isinstance(value, list) for value in values)
    names = tuple(apart) if len(apart) > 1 else (infer_set_names if multi_label else infer_names)(values, where)
    if names and classes and set(names) <= set(classes):
        names = classes
    if multi_label and len(names or ()) < MIN_CLASSES:
        raise DataError(f"{where}: the lists hold {len(names or ())} classes, expected two or more")
    if names is not None and len(names) < MIN_CLASSES:
        raise DataError(f"{split.where}: every row has the label {names[0]!r}, expected two classes or more")
    if names is None and len(set(map(str, values))) == 1:
        raise DataError(f"{split.where}: every row has the label {values[0]}, expected numbers that differ")
    metric: Metric = data.metric or ("f1_micro" if multi_label else "pearson" if names is None else "accuracy")
    name = Path(data.train_file or data.validation_file or "own").stem
    return TaskSpec(name, texts, names, metric, label_column=label, multi_label=multi_label)


def _labels(split: _Split, column: str) -> list[Any]:
    """Return the values of the label column or, if there is one for each class, the names of those that hold 1."""
    several = label_columns(column, split.columns)
    found = {name: require_column(split.columns, name, "--label-column", split.where) for name in several}
    return sets_of_columns(found, split.where) if len(several) > 1 else found[column]


def _trained_for(spec: TaskSpec | None, task: TaskSpec) -> TaskSpec:
    """Return the row to read `task` by; `UsageError` if a model trained for `spec` has other labels."""
    if spec is None or spec.name == task.name:
        return spec or task
    if spec.labels != task.labels:
        raise UsageError(
            f"--task is {task.name}, but the model was trained for {spec.name}, whose labels are others; "
            "drop --task, or name a task with the same labels"
        )
    return task


def _as_asked(spec: TaskSpec, data: DataSettings) -> TaskSpec:
    """Return `spec` with the columns and the metric that the user named instead of its own."""
    first, second = (*spec.text_columns, None)[:PAIR]
    pair = data.text_pair_column or second
    texts = (data.text_column or first or "", *([pair] if pair else []))
    label, metric = data.label_column or spec.label_column, data.metric or spec.metric
    return replace(spec, text_columns=texts, label_column=label, metric=metric)


def _embedding(spec: TaskSpec, data: DataSettings) -> TaskSpec:
    """Return the spec of an embedder over the same pairs; `UsageError` if there is nothing to compare vectors by.

    Unless a metric is asked for, classes are measured by average precision.
    """
    if len(spec.text_columns) != PAIR:
        raise UsageError(
            f"an embedder is measured by how alike the two texts of a pair are, and {spec.name} has single texts; name "
            "the second with --text-pair-column, or give another --task"
        )
    if spec.label_names is not None and (spec.multi_label or len(spec.label_names) != MIN_CLASSES):
        raise UsageError(
            f"an embedder is measured on pairs with numbers, or of two classes, and {spec.name} has "
            f"{_kind(spec)}; name another --label-column, or give another --task"
        )
    spec = replace(spec, embeds=True)
    return spec if data.metric or spec.metric in spec.metrics else replace(spec, metric=spec.metrics[0])


def _kind(spec: TaskSpec) -> str:
    """Say what labels are."""
    if spec.label_names is None:
        return "numbers"
    return f"{'any number of ' if spec.multi_label else ''}{len(spec.label_names)} classes"


def _refuse_unfit_metric(spec: TaskSpec) -> None:
    if spec.metric not in spec.metrics:
        of = "pairs of texts" if len(spec.text_columns) == PAIR else "single texts"
        raise UsageError(
            f"--metric is {spec.metric}, expected one of {', '.join(spec.metrics)}: labels are {_kind(spec)} of {of}"
        )
    if spec.label_names and not (spec.second_fits or spec.multi_label) and "classes" not in METRICS[spec.metric]:
        raise UsageError(
            f"{spec.name} would be measured by {spec.metric}, which looks for rows of the second class, "
            f"{spec.label_names[1]!r}, and the first is the positive one; give rows whose labels are 0 and 1, the "
            "latter those that fit, or another --metric or --task"
        )


def _refuse_unfit_columns(spec: TaskSpec) -> None:
    apart = label_columns(spec.label_column, ()) if spec.multi_label else [spec.label_column]
    columns = (*spec.text_columns, *apart)
    if len(set(columns)) < len(columns):
        raise UsageError(
            f"the columns are {', '.join(columns)}, expected another one for each text and for the label; "
            "name them with --text-column, --text-pair-column and --label-column"
        )
    odd = [name for name in columns if not is_sound(name)]
    if odd:
        raise DataError(f"the column name {odd[0]!r} holds a line break or control character; rename it in the file")


def _table(split: _Split, spec: TaskSpec, data: DataSettings) -> Columns:
    """Return the checked columns of one split, cut to the requested first rows."""
    limit = data.max_train_samples if split.name == "train" else data.max_validation_samples
    table = _text_columns(split, spec, data, limit)
    apart = label_columns(spec.label_column, split.columns)
    if len(apart) > 1:
        _refuse_other_columns(apart, spec, split.where)
    values = _labels(split, spec.label_column)[:limit]
    where = f"{split.where}, column {spec.label_column!r}"
    if spec.multi_label:
        table["label"] = class_sets(values, spec.label_names or (), where)
    elif spec.label_names is None:
        table["label"] = scores(values, where)
    else:
        known = TASKS.get(spec.name)
        ids_too = known is not None and known.label_names == spec.label_names
        table["label"] = class_ids(values, spec.label_names, where, ids_too=ids_too)
    return table


def _refuse_other_columns(columns: list[str], spec: TaskSpec, where: str) -> None:
    """Raise `DataError` unless there is a column for each class: one that is not named is not one that no row has."""
    if not spec.multi_label:
        raise DataError(
            f"{where}: --label-column names {len(columns)} columns, and a row of {spec.name} has one label; name one"
        )
    missing = [name for name in spec.label_names or () if name not in columns]
    if missing:
        raise DataError(f"{where}: --label-column leaves out {some(missing)}; name a column for each class")


def _unlabelled(split: _Split, spec: TaskSpec, data: DataSettings, limit: int | None) -> dict[str, list[Any]]:
    """Return the checked texts of one split without labels; an embedder takes single texts as well as pairs."""
    if spec.embeds and spec.text_columns[-1] not in split.columns:
        spec = replace(spec, text_columns=spec.text_columns[:1])
    table = _text_columns(split, spec, data, limit)
    return {**table, "label": [spec.no_label] * len(table["text"])}


def _text_columns(split: _Split, spec: TaskSpec, data: DataSettings, limit: int | None) -> dict[str, list[Any]]:
    """Return the checked texts of one split, cut to `limit` rows."""
    table: dict[str, list[Any]] = {}
    options = ("--text-column", "--text-pair-column")
    for key, name, option in zip(("text", "text_pair"), spec.text_columns, options, strict=False):
        values = require_column(split.columns, name, option, split.where)[:limit]
        # GLUE has a few empty texts; in own data, one is more likely a mistake.
        table[key] = _texts(values, f"{split.where}, column {name!r}", empty_allowed=data.task is not None)
    return table


def _texts(values: list[Any], where: str, *, empty_allowed: bool) -> list[str]:
    """Return the values unchanged; `DataError` that names the first row without text."""
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            got = "missing" if value is None else type(value).__name__
            raise DataError(f"{where}, row {row}: the text is {got}, expected text")
        if not value.isascii() and _HALF.search(value):
            raise DataError(f"{where}, row {row}: the text holds half of a character (a lone surrogate); mend the row")
        if not (empty_allowed or value.strip()):
            raise DataError(f"{where}, row {row}: the text is empty; fill it or drop the row")
    return values


def _refuse_one_class(ids: list[Any], spec: TaskSpec, where: str, *, cut: bool) -> None:
    if spec.label_names is None or any(one != ids[0] for one in ids):
        return
    remedy = "; raise --max-train-samples" if cut else ""
    if spec.multi_label:
        raise DataError(f"{where}: every row used has the same classes, expected rows that differ{remedy}")
    only = spec.label_names[ids[0]]
    raise DataError(f"{where}: every row used has the label {only!r}, expected two classes or more{remedy}")


def _refuse_undefined(tables: Mapping[str, Columns], spec: TaskSpec, where: str, *, cut: bool) -> None:
    """Raise `DataError` if no answers to these rows have a metric: whatever a model said, it would be 0."""
    labels = [label for table in tables.values() for label in table["label"]]
    of_second = spec.metric in OF_SECOND or (spec.metric == "f1" and (spec.multi_label or spec.num_labels == 2))  # noqa: PLR2004 - of two classes, one is looked for
    if spec.metric in CORRELATIONS and all(label == labels[0] for label in labels):
        lack = "has the same label, and a correlation is of labels that differ"
    elif of_second and not any(labels):
        lack = f"lacks {'any class' if spec.multi_label else 'the class that is looked for'}"
    else:
        if spec.names_classes and all(label == labels[0] for label in labels):
            logger.warning("%s: every row used has the same label, so naming it always would score highest", where)
        return
    remedy = "raise --max-validation-samples, or " if cut else ""
    raise DataError(
        f"{where}: every row used {lack}, so there is no {spec.metric}; {remedy}give --metric accuracy "
        "if rows have classes, or other rows"
    )


def _refuse_unrankable(table: Columns, spec: TaskSpec, where: str, *, cut: bool) -> None:
    """Raise `DataError` if a metric of ranks has nothing to rank, or labels that are not grades."""
    least = min(table["label"])
    if least < 0:
        raise DataError(f"{where}: a label is {least:g}, expected 0 or more, which --metric {spec.metric} weighs by")
    found: dict[str, set[float]] = {}
    for query, label in zip(table["text"], table["label"], strict=True):
        found.setdefault(query, set()).add(label)
    if all(len(labels) == 1 for labels in found.values()):
        remedy = "raise --max-validation-samples, or " if cut else ""
        raise DataError(
            f"{where}: no query has passages of different labels, so there is nothing to rank for --metric "
            f"{spec.metric}: rows of one query have the same {spec.text_columns[0]!r}; {remedy}measure by another"
        )


def _dataset(table: Columns, spec: TaskSpec) -> datasets.Dataset:
    kinds: dict[str, Any] = {key: datasets.Value("string") for key in table}
    kinds["label"] = datasets.Value("float32" if spec.label_names is None or spec.multi_label else "int64")
    if spec.multi_label:
        kinds["label"] = datasets.List(kinds["label"])
    if spec.embeds:
        texts = [text for key in ("text", "text_pair") for text in table.get(key, [])]
        table = {"text": texts, "label": [*table["label"]] * (len(texts) // len(table["label"]))}
        kinds.pop("text_pair", None)
    return datasets.Dataset.from_dict(table, features=datasets.Features(kinds))


def _fingerprint(tables: list[Columns]) -> str:
    digest = sha256()
    for table in tables:
        digest.update(f"{len(table['label'])} rows\n".encode())
        for row in zip(*table.values(), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
