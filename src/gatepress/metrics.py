"""The metrics of the tasks, by scikit-learn and scipy, as fractions and coefficients."""

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from gatepress.errors import ModelError
from gatepress.tasks import Metric


def compute_metric(name: Metric, logits: npt.NDArray[np.floating], labels: npt.NDArray[np.generic]) -> float:
    """Return accuracy (0 to 1), or Matthews or Pearson correlation (-1 to 1).

    `logits` are `[rows, classes]`, or `[rows, 1]` for pearson; `labels` are `[rows]`, ids or numbers.
    A correlation with constant predictions or labels is 0.0. Raises `ModelError` on logits that are
    not finite: a diverged model has no metric.
    """
    if not np.isfinite(logits).all():
        raise ModelError(
            "the model's outputs are not finite numbers; a smaller --learning-rate, or --precision fp32, may help"
        )
    if name == "pearson":
        scores = logits.reshape(len(labels)).astype(np.float64)
        wanted = labels.astype(np.float64)
        if len(wanted) == 1 or np.ptp(scores) == 0 or np.ptp(wanted) == 0:
            return 0.0
        return float(pearsonr(scores, wanted).statistic)
    predicted = logits.argmax(axis=-1)
    if name == "matthews":
        if np.ptp(predicted) == 0 or np.ptp(labels.astype(np.int64)) == 0:
            return 0.0
        return float(matthews_corrcoef(labels, predicted))
    return float(accuracy_score(labels, predicted))
