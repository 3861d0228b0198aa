"""Are the probabilities right? Brier score, reliability cells, expected against observed, slope and
intercept."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from shared_model.histograms import PROBABILITY_UNIT, Counts, ScoreHistogram, cells, clean_edges
from shared_model.intervals import Z95, Estimate, absent, wilson
from shared_model.score_grid import edge_probability

Floats = NDArray[np.float64]
EXTREME = 2.0**-20  # cell means nearer to 0 or 1 than this are held here when their logit is taken


@dataclass(frozen=True)
class ReliabilityCell:
    """Patients whose probability lies from `from_probability` to `to_probability`; interval of `observed` by
    Wilson."""

    from_probability: float
    to_probability: float
    count: int
    mean_predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """`expected_over_observed` is 1, `slope` 1 and `intercept` 0 when calibrated; `expected_error` is the ECE
    of `cells`.

    `slope` and `intercept` come from one logistic regression of the outcome on the logit of the probability.
    They are fitted to cell means: as good as exact on fine bins, approximate where sites merged bins
    (`cells_fitted` says how many were left).
    """

    cells: tuple[ReliabilityCell, ...]
    expected_error: float | None
    expected_over_observed: float | None
    slope: Estimate
    intercept: Estimate
    cells_fitted: int
    reason: str | None = None


def brier(histogram: ScoreHistogram) -> Estimate:
    """Brier score of the pooled patients: mean squared error of the probability, free of binning error."""
    if not histogram.size:
        return absent("no patients")
    return Estimate(float(histogram.table[5].sum()) * PROBABILITY_UNIT / histogram.size, bound=0.0)


def calibration(histogram: ScoreHistogram, most_cells: int = 10, smallest_cell: int = 1) -> Calibration:
    """Calibration over at most `most_cells` cells of about equal size, each of at least `smallest_cell`
    patients.

    Counts and means are exact: cells are cut only at edges that no site's merged cell straddles.
    """
    if not histogram.size:
        none = absent("no patients")
        return Calibration((), None, None, none, none, 0, "no patients")
    edges = _reliability_edges(histogram, most_cells, smallest_cell)
    totals = cells(histogram, edges)
    shown = tuple(
        _reliability_cell(int(low), int(high), row)
        for low, high, row in zip(edges[:-1], edges[1:], totals, strict=True)
        if row[:2].sum()
    )
    error = sum(c.count * abs(c.mean_predicted - c.observed) for c in shown) / histogram.size
    expected = float(histogram.table[4].sum()) * PROBABILITY_UNIT
    ratio = expected / histogram.positives if histogram.positives else None
    fine = cells(histogram, clean_edges(histogram))
    intercept, slope = recalibration(fine)
    fitted = int((fine[:, :2].sum(axis=1) > 0).sum())
    reason = None if ratio is not None else "no positive patients: expected over observed is undefined"
    return Calibration(shown, error, ratio, slope, intercept, fitted, reason)


def recalibration(totals: Counts) -> tuple[Estimate, Estimate]:
    """(intercept, slope) of the logistic regression of outcome on logit of probability, by Newton's method
    (IRLS).

    `totals` are rows of `histograms.cells`; a cell enters with its counts at the logit of its mean
    probability.
    """
    counts, positives = totals[:, :2].sum(axis=1).astype(np.float64), totals[:, 0].astype(np.float64)
    used = counts > 0
    counts, positives = counts[used], positives[used]
    mean = np.clip(totals[used, 2] * PROBABILITY_UNIT / counts, EXTREME, 1 - EXTREME)
    design = np.stack([np.ones_like(mean), logit(mean)], axis=1)  # (cell, 2)
    reason = _unfit(design[:, 1], counts, positives)
    if reason:
        return absent(reason), absent(reason)
    weights = np.array([0.0, 1.0])
    for _ in range(100):
        fitted = expit(design @ weights)
        information = (design.T * (counts * fitted * (1 - fitted))) @ design
        gradient = design.T @ (positives - counts * fitted)
        # halve long steps: Newton alone may overshoot from a badly calibrated start
        step = np.linalg.lstsq(information, gradient, rcond=None)[0]
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    else:
        failed = absent("the logistic recalibration did not converge")
        return failed, failed
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    intercept, slope = (
        Estimate(float(w), float(w - Z95 * e), float(w + Z95 * e), standard_error=float(e))
        for w, e in zip(weights, errors, strict=True)
    )
    return intercept, slope


def _unfit(logits: Floats, counts: Floats, positives: Floats) -> str | None:
    """Why no logistic regression exists for these cells, or None."""
    with_positive, with_negative = logits[positives > 0], logits[positives < counts]
    if not with_positive.size or not with_negative.size:
        return "one class is empty"
    if np.ptp(logits) < 1e-9:
        return "all patients fall into one cell"
    if with_positive.min() >= with_negative.max() or with_positive.max() <= with_negative.min():
        return "the scores separate the classes: the slope has no finite value"
    return None


def _reliability_edges(histogram: ScoreHistogram, most_cells: int, smallest_cell: int) -> Counts:
    """Clean edges that cut the patients into about equal cells."""
    edges = clean_edges(histogram)
    sizes = cells(histogram, edges)[:, :2].sum(axis=1)
    target = max(histogram.size / most_cells, smallest_cell)
    kept, held = [0], 0
    for end, size in zip(edges[1:], sizes, strict=True):
        held += int(size)
        if held >= target - 1e-9:
            kept.append(int(end))
            held = 0
    if 0 < held < smallest_cell and len(kept) > 1:
        kept.pop()
    if kept[-1] != edges[-1]:
        kept.append(int(edges[-1]))
    return np.asarray(kept, dtype=np.int64)


def _reliability_cell(low_edge: int, high_edge: int, row: Counts) -> ReliabilityCell:
    count, positives = int(row[0] + row[1]), int(row[0])
    low, high = wilson(positives, count)
    return ReliabilityCell(
        edge_probability(low_edge),
        edge_probability(high_edge),
        count,
        float(row[2]) * PROBABILITY_UNIT / count,
        positives / count,
        low,
        high,
    )
