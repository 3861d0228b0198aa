"""Figures of merit for many bootstrap replicates at once: each patient counts by a weight, row by row.

All take `weights` (1 + replicates, patients), whose first row is the sample itself (all ones), and return (1 +
replicates,), NaN where a replicate has no figure. One index ECG a patient, so that the patient is the unit."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SMALLEST_VARIANCE = 1e-12  # below it is rounding: a constant score has no correlation


def auroc(score: Floats, outcome: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve: the weighted share of pairs ranked right, ties counting half."""
    positive, negative = _by_score(score, outcome, weights)
    below = np.cumsum(negative, axis=1) - negative
    return _over((positive * (below + negative / 2)).sum(1), positive.sum(1) * negative.sum(1))


def auprc(score: Floats, outcome: Floats, weights: Floats) -> Floats:
    """Average precision: sum over thresholds of the gain in recall times the precision there."""
    positive, negative = (part[:, ::-1] for part in _by_score(score, outcome, weights))  # the highest score first
    hits, called = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
    precision = _over(hits, called)
    return _over(np.nansum(positive * precision, axis=1), positive.sum(1))


def rmse(score: Floats, measured: Floats, weights: Floats) -> Floats:
    """Root mean squared error, in the target's units."""
    return np.sqrt(_over(weights @ (score - measured) ** 2, weights.sum(1)))


def pearson(score: Floats, measured: Floats, weights: Floats) -> Floats:
    """Pearson's correlation."""
    total = weights.sum(1)
    one, other = score - score.mean(), measured - measured.mean()  # near 0, so that squares keep their digits
    mean_1, mean_2 = _over(weights @ one, total), _over(weights @ other, total)
    covariance = _over(weights @ (one * other), total) - mean_1 * mean_2
    variances = (_over(weights @ x**2, total) - mean**2 for x, mean in ((one, mean_1), (other, mean_2)))
    first, second = (np.where(variance > SMALLEST_VARIANCE, variance, 0.0) for variance in variances)
    return _over(covariance, np.sqrt(first * second))


def _by_score(score: Floats, outcome: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct score, ascending: (1 + replicates, scores) each."""
    order = np.argsort(score, kind="stable")
    _, starts = np.unique(score[order], return_index=True)
    sorted_weights, positive = weights[:, order], outcome[order] > 0
    sums = [np.add.reduceat(sorted_weights * chosen, starts, axis=1) for chosen in (positive, ~positive)]
    return sums[0], sums[1]


def _over(top: Floats, bottom: Floats) -> Floats:
    ratio: Floats = np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)
    return ratio


Figure = Callable[[Floats, Floats, Floats], Floats]
FIGURES: dict[str, dict[str, Figure]] = {
    "classification": {"auroc": auroc, "auprc": auprc},
    "regression": {"rmse": rmse, "r": pearson},
}
PRIMARY = {"classification": "auroc", "regression": "rmse"}
