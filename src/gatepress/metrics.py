"""The metrics of the tasks, by scikit-learn and scipy, as fractions and coefficients: for all, more is better."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, matthews_corrcoef, ndcg_score

from gatepress.config import Metric
from gatepress.errors import ModelError

Numbers = npt.NDArray[Any]

RANKED = 10  # passages of a query that count: those with the highest scores


def compute_metric(name: Metric, logits: Numbers, labels: Numbers, queries: Numbers | None = None) -> float:
    """Return a metric of 0 to 1, or a correlation (-1 to 1): Matthews, Pearson or Spearman.

    `logits` are `[rows, classes]`; for two classes also `[rows, 1]`, how much likelier the second is; for numbers
    `[rows, 1]`. `labels` are `[rows]`, ids or numbers. `queries [rows]` number the queries that rows are passages of;
    unless given, each row has its own. F1 is that of the second of two classes; with more, the mean over those that
    labels or predictions name. If a row has any number of classes, `labels` are `[rows, classes]`, 1 or 0; a model
    names those whose logit is above 0, and accuracy is the part of rows whose classes are all right, and average
    precision the mean over classes. A correlation with constant predictions or labels is 0.0, and so is the average
    precision if no row is of the second class. Ranks are means over the queries whose passages do not all have the same
    label, 0.0 if there are none. Raises `ModelError` on logits that are not finite: a diverged model has no metric.
    """
    if not np.isfinite(logits).all():
        raise ModelError(
            "the model's outputs are not finite numbers; a smaller --learning-rate, or --precision fp32, may help"
        )
    if labels.ndim > 1:
        return float(OF_SETS[name](labels > 0, logits))
    single = logits.shape[1] == 1
    if name in OF_CLASSES:
        if single:
            logits = np.pad(logits, ((0, 0), (1, 0)))  # the second logit is relative to the first, so that is 0
        return float(OF_CLASSES[name](labels, logits.argmax(axis=-1), logits.shape[1]))
    exact = logits.astype(np.float64)  # the difference of two float32 may exceed float32
    scores = exact[:, 0] if single else exact[:, 1] - exact[:, 0]
    wanted = labels.astype(np.float64)
    if name in OF_SCORES:
        return float(OF_SCORES[name](wanted, scores))
    of = np.arange(len(labels)) if queries is None else queries
    order = np.argsort(of, kind="stable")
    passages = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)
    ranked = [RANKS[name](wanted[own], scores[own]) for own in passages if not _constant(wanted[own])]
    return float(np.mean(ranked)) if ranked else 0.0


def cosines(vectors: Numbers) -> Numbers:
    """Return how alike the texts of each pair are [pairs, 1], from vectors [2 * pairs, hidden]: first texts first."""
    long = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    first, second = np.split(vectors / np.maximum(long, np.finfo(np.float64).tiny), 2)
    alike: Numbers = (first * second).sum(1, keepdims=True)
    return alike


def _matthews(labels: Numbers, predicted: Numbers, _: int) -> float:
    return 0.0 if _constant(predicted) or _constant(labels) else float(matthews_corrcoef(labels, predicted))


def _f1(labels: Numbers, predicted: Numbers, classes: int) -> float:
    two = classes == 2  # noqa: PLR2004 - one of them is what is looked for
    return float(f1_score(labels, predicted, average="binary" if two else "macro", zero_division=0.0))


def _f1_of_sets(average: str) -> Callable[[Numbers, Numbers], float]:
    return lambda wanted, logits: f1_score(wanted, logits > 0, average=average, zero_division=0.0)


def _precision(wanted: Numbers, scores: Numbers) -> float:
    """Return the average precision; a sum of parts may round to more than 1."""
    return min(average_precision_score(wanted, scores), 1.0) if wanted.any() else 0.0


def _mean_precision(wanted: Numbers, logits: Numbers) -> float:
    """Return the mean over the classes that some row has."""
    there = wanted.any(0)
    value = average_precision_score(wanted[:, there], logits[:, there], average="macro") if there.any() else 0.0
    return min(value, 1.0)


def _constant(values: Numbers) -> bool:
    return bool((values == values[0]).all())


def _correlation(of: Callable[[Numbers, Numbers], Any]) -> Callable[[Numbers, Numbers], float]:
    return lambda wanted, scores: 0.0 if _constant(scores) or _constant(wanted) else of(scores, wanted).statistic


def _reciprocal_rank(wanted: Numbers, scores: Numbers) -> float:
    """Return 1 over the rank of the first relevant passage of a query; in a tie, the irrelevant one wins."""
    rank = 1 + int((scores[wanted == 0] >= scores[wanted > 0].max()).sum())
    return 1 / rank if rank <= RANKED else 0.0


OF_SCORES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "average_precision": _precision,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
RANKS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "mrr@10": _reciprocal_rank,
    "ndcg@10": lambda wanted, scores: min(ndcg_score(wanted[None], scores[None], k=RANKED), 1.0),
}
OF_CLASSES: dict[str, Callable[[Numbers, Numbers, int], float]] = {
    "accuracy": lambda labels, predicted, _: accuracy_score(labels, predicted),
    "matthews": _matthews,
    "f1": _f1,
}
OF_SETS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": lambda wanted, logits: accuracy_score(wanted, logits > 0),
    "f1": _f1_of_sets("macro"),
    "f1_micro": _f1_of_sets("micro"),
    "average_precision": _mean_precision,
}
