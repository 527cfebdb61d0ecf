"""The metrics of the tasks, by scikit-learn and scipy, as fractions and coefficients: of all, more is better."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, matthews_corrcoef

from gatepress.config import Metric
from gatepress.errors import ModelError

Numbers = npt.NDArray[Any]


def compute_metric(name: Metric, logits: Numbers, labels: Numbers) -> float:
    """Return accuracy, F1 or average precision (0 to 1), or a correlation (-1 to 1): Matthews, Pearson or Spearman.

    `logits` are `[rows, classes]`, of two classes also `[rows, 1]`, how far the second is likelier; `[rows, 1]` of
    numbers. `labels` are `[rows]`, ids or numbers. F1 is that of the second of two classes, the mean over more. A
    correlation with constant predictions or labels is 0.0, and so is the average precision where no row is of the
    second class. Raises `ModelError` on logits that are not finite: a diverged model has no metric.
    """
    if not np.isfinite(logits).all():
        raise ModelError(
            "the model's outputs are not finite numbers; a smaller --learning-rate, or --precision fp32, may help"
        )
    if name in CORRELATIONS:
        scores, wanted = logits.reshape(len(labels)).astype(np.float64), labels.astype(np.float64)
        return 0.0 if _constant(scores) or _constant(wanted) else float(CORRELATIONS[name](scores, wanted).statistic)
    if logits.shape[1] == 1:
        logits = np.pad(logits, ((0, 0), (1, 0)))  # the first class's is what the second's is counted from
    if name == "average_precision":
        return float(average_precision_score(labels, logits[:, 1] - logits[:, 0])) if labels.any() else 0.0
    return float(OF_CLASSES[name](labels, logits.argmax(axis=-1), logits.shape[1]))


def _matthews(labels: Numbers, predicted: Numbers, _: int) -> float:
    return 0.0 if _constant(predicted) or _constant(labels) else float(matthews_corrcoef(labels, predicted))


def _f1(labels: Numbers, predicted: Numbers, classes: int) -> float:
    two = classes == 2  # noqa: PLR2004 - of which one is what is looked for
    return float(f1_score(labels, predicted, average="binary" if two else "macro", zero_division=0.0))


def _constant(values: Numbers) -> bool:
    return bool((values == values[0]).all())


CORRELATIONS: dict[str, Callable[[Numbers, Numbers], Any]] = {"pearson": pearsonr, "spearman": spearmanr}
OF_CLASSES: dict[str, Callable[[Numbers, Numbers, int], float]] = {
    "accuracy": lambda labels, predicted, _: accuracy_score(labels, predicted),
    "matthews": _matthews,
    "f1": _f1,
}
