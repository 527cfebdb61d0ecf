"""One row per task: its columns, its labels, its metric, its validation splits."""

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from gatepress.config import Metric
from gatepress.errors import ArtifactError, UsageError

_OF_CLASSES, _OF_TWO, _OF_SETS, _OF_NUMBERS = ("two classes", "classes"), ("two classes",), ("sets",), ("numbers",)
METRICS: dict[Metric, tuple[str, ...]] = {  # each with the labels that it can be computed for
    "accuracy": (*_OF_CLASSES, *_OF_SETS),
    "matthews": _OF_CLASSES,
    "f1": (*_OF_CLASSES, *_OF_SETS),
    "f1_micro": _OF_SETS,
    "average_precision": (*_OF_TWO, *_OF_SETS),
    "mrr@10": _OF_TWO,
    "ndcg@10": (*_OF_TWO, *_OF_NUMBERS),
    **dict.fromkeys(("pearson", "spearman"), _OF_NUMBERS),
}
CORRELATIONS = ("matthews", "pearson", "spearman")
OF_SECOND = ("average_precision", "f1_micro")  # of the second of two classes, or of each of any number
RANKS = ("mrr@10", "ndcg@10")  # of pairs alone: rows with the same first text belong to one query
ONE_TEXT, PAIR = 1, 2  # text columns a row can have
MIN_CLASSES = 2
NO_CLASS = -100


@dataclass(frozen=True)
class TaskSpec:
    """What a classification or regression task looks like, whatever its rows are."""

    name: str
    text_columns: tuple[str, ...]  # one, or two for a task over pairs of texts
    label_names: tuple[str, ...] | None  # in the order of the label ids; None: regression
    metric: Metric
    validation_splits: tuple[str, ...] = ("validation",)
    label_column: str = "label"
    embeds: bool = False  # each text is read on its own, and the similarity of a pair's vectors is measured
    multi_label: bool = False  # a row has any number of the classes, and each class an output of its own

    @property
    def num_labels(self) -> int:
        """Width of the task head: the number of classes, or 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def names_classes(self) -> bool:
        """Whether a model of this task names a class for each row; others name sets, or give a number or a vector."""
        return not (self.embeds or self.multi_label or self.label_names is None)

    @property
    def labels(self) -> tuple[tuple[str, ...] | None, bool]:
        """What two tasks must have in common so that the head of one fits the other."""
        return self.label_names, self.multi_label

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that the head of a finetuned model may have: one output can stand for two classes, as in rerankers."""
        return (self.num_labels, 1) if self.second_fits else (self.num_labels,)

    @property
    def second_fits(self) -> bool:
        """Whether scores and cosines are high for the second of two classes; in entailment it is the first."""
        return self.num_labels == MIN_CLASSES and self.label_names != _ENTAILMENT and not self.multi_label

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that rows of this kind can be measured by.

        The similarity of vectors names no class, so an embedder has none of those that work with any number of classes.
        """
        pairs = len(self.text_columns) == PAIR
        return tuple(
            name
            for name, kinds in METRICS.items()
            if self._kind in kinds and (pairs or name not in RANKS) and not (self.embeds and "classes" in kinds)
        )

    @property
    def _kind(self) -> str:
        """What labels are, in the words of `METRICS`."""
        if self.label_names is None:
            return "numbers"
        if self.multi_label:
            return "sets"
        return "two classes" if self.num_labels == MIN_CLASSES else "classes"

    @property
    def no_label(self) -> int | float | list[float]:
        """The label of a row that has none: the id that torch ignores, NaN, or a NaN for each class."""
        if self.multi_label:
            return [math.nan] * self.num_labels
        return math.nan if self.label_names is None else NO_CLASS

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Any) -> "TaskSpec":
        """Read a row back from a manifest; `ArtifactError` if a field is missing, unknown or malformed."""
        if not isinstance(value, dict):
            raise ArtifactError(f"task in the manifest is {type(value).__name__}, expected an object")
        value = {"embeds": False, "multi_label": False, **value}  # before 0.27 and 0.38 nothing was either
        known = [field.name for field in fields(cls)]
        if set(value) != set(known):
            got = ", ".join(map(str, value)) or "nothing"
            raise ArtifactError(f"task in the manifest has {got}; expected {', '.join(known)}")
        for name, sound in _CHECKS.items():
            if not sound(value[name]):
                raise ArtifactError(f"task in the manifest: {name} is malformed ({str(value[name])[:80]!r})")
        row: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        spec = cls(**row)
        if spec.multi_label and (spec.label_names is None or spec.embeds):
            raise ArtifactError("task in the manifest: multi_label is true without classes of a head")
        if spec.metric not in spec.metrics:
            fit = ", ".join(spec.metrics)
            raise ArtifactError(f"task in the manifest: metric is {spec.metric}, expected one of {fit} for its labels")
        return spec


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: object) -> bool:
    """Return whether this is a list of texts that are all different."""
    return isinstance(value, list) and value != [] and all(map(_is_text, value)) and len(set(value)) == len(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "text_columns": lambda v: _are_texts(v) and len(v) in (ONE_TEXT, PAIR),
    "label_names": lambda v: v is None or (_are_texts(v) and len(v) >= MIN_CLASSES),
    "metric": lambda v: _is_text(v) and v in get_args(Metric),
    "validation_splits": _are_texts,
    "label_column": _is_text,
    **dict.fromkeys(("embeds", "multi_label"), lambda v: isinstance(v, bool)),
}


_ENTAILMENT = ("entailment", "not_entailment")

# Columns, names and ids are those of the `nyu-mll/glue` data set; the metrics are those of the paper.
_ROWS = (
    TaskSpec("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews"),
    TaskSpec("stsb", ("sentence1", "sentence2"), None, "pearson"),
    TaskSpec("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
    TaskSpec("rte", ("sentence1", "sentence2"), _ENTAILMENT, "accuracy"),
    TaskSpec("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
    TaskSpec(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        ("validation_matched", "validation_mismatched"),
    ),
    TaskSpec("qnli", ("question", "sentence"), _ENTAILMENT, "accuracy"),
    TaskSpec("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    TaskSpec("demo", ("text",), ("negative", "neutral", "positive"), "accuracy", label_column="sentiment"),
)
TASKS: dict[str, TaskSpec] = {row.name: row for row in _ROWS}


def task_named(name: str) -> TaskSpec:
    """Return the row of a task; `UsageError` with the names that exist, and the nearest one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"--task is {name!r}, no task of that name; {meant}known: {', '.join(TASKS)}, "
        "or your own rows with --train-file and --validation-file"
    )
