"""Score histograms that add over sites, and stay true when each site blurs its own.

A histogram knows of every patient only a range of fine bins in which the score lies: one bin where the site
counted finely, several where it merged bins to protect small counts. It keeps, for each class, how many
ranges begin in each bin (`low`) and how many end there (`high`). Both add over sites, whatever cells each
site used.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_model.errors import HemoFedError
from shared_model.score_grid import FINE_BINS, bin_of

PROBABILITY_UNIT = 2.0**-30  # sums of probabilities are integers in this unit, so that they add exactly in any order
ROWS = (
    "positives_low",
    "positives_high",
    "negatives_low",
    "negatives_high",
    "sum_probability",
    "sum_squared_error",
)

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Counts and sums over the fine bins; `a + b` is the histogram of both sets of patients.

    `table` is `(6, FINE_BINS) int64`, its rows named in `ROWS`: the four range counts described above, then
    the sum of the probability and the sum of (probability - outcome)^2, both in `PROBABILITY_UNIT` and kept
    in the lowest bin of the range. Patients must be disjoint between the histograms that are added.
    """

    table: Counts

    def __post_init__(self) -> None:
        if self.table.shape != (len(ROWS), FINE_BINS) or self.table.dtype != np.int64:
            raise HemoFedError(f"a score histogram must be int64 of shape ({len(ROWS)}, {FINE_BINS})")

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        return ScoreHistogram(self.table + other.table)

    def _row(self, number: int) -> Counts:
        row: Counts = self.table[number]
        return row

    @property
    def positives_low(self) -> Counts:
        return self._row(0)

    @property
    def positives_high(self) -> Counts:
        return self._row(1)

    @property
    def negatives_low(self) -> Counts:
        return self._row(2)

    @property
    def negatives_high(self) -> Counts:
        return self._row(3)

    @property
    def positives(self) -> int:
        """Number of patients with the condition."""
        return int(self.table[0].sum())

    @property
    def negatives(self) -> int:
        """Number of patients without it."""
        return int(self.table[2].sum())

    @property
    def size(self) -> int:
        return self.positives + self.negatives


def empty_histogram() -> ScoreHistogram:
    """The histogram of nobody."""
    return ScoreHistogram(np.zeros((len(ROWS), FINE_BINS), np.int64))


def histogram_of(probabilities: ArrayLike, outcomes: ArrayLike) -> ScoreHistogram:
    """Fine histogram of probabilities `(n,)` and outcomes `(n,)`, 0 or 1 (or bool).

    Raises HemoFedError where a score is no probability, an outcome is not 0 or 1, or the lengths differ.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    labels = np.asarray(outcomes, dtype=np.float64)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise HemoFedError(f"scores {scores.shape} and outcomes {labels.shape} must be two rows of equal length")
    if not np.isin(labels, (0.0, 1.0)).all():
        raise HemoFedError("an outcome is neither 0 nor 1: drop unlabelled records before counting")
    bins, positive = bin_of(scores), labels == 1.0
    table = np.zeros((len(ROWS), FINE_BINS), np.int64)
    table[0] = table[1] = np.bincount(bins[positive], minlength=FINE_BINS)
    table[2] = table[3] = np.bincount(bins[~positive], minlength=FINE_BINS)
    np.add.at(table[4], bins, np.rint(scores / PROBABILITY_UNIT).astype(np.int64))
    np.add.at(table[5], bins, np.rint((scores - labels) ** 2 / PROBABILITY_UNIT).astype(np.int64))
    return ScoreHistogram(table)


def straddling(histogram: ScoreHistogram) -> Counts:
    """`(FINE_BINS + 1,)`: how many patients' ranges straddle each edge, that is begin below it and end at or
    above it.

    An edge that nobody straddles is a clean edge: every count and sum on either side of it is known exactly.
    """
    begun = histogram.positives_low + histogram.negatives_low
    ended = histogram.positives_high + histogram.negatives_high
    return np.concatenate([[0], np.cumsum(begun - ended)])


def clean_edges(histogram: ScoreHistogram) -> Counts:
    """The edges nobody straddles, ascending, 0 and FINE_BINS among them."""
    return np.flatnonzero(straddling(histogram) == 0).astype(np.int64)


def cells(histogram: ScoreHistogram, edges: ArrayLike) -> Counts:
    """Exact totals between clean edges: `(len(edges) - 1, 4)`, columns positives, negatives, sum of
    probability, sum of squared error (both in `PROBABILITY_UNIT`). Raises HemoFedError if an edge is not
    clean."""
    starts = checked_edges(edges)
    if straddling(histogram)[starts].any():
        raise HemoFedError("a cell of the histogram would cut through a range that a site had merged")
    return np.add.reduceat(histogram.table[[0, 2, 4, 5]], starts[:-1], axis=1).T


def from_cells(edges: ArrayLike, totals: Counts) -> ScoreHistogram:
    """The inverse of `cells`: each patient of a cell may lie in any bin of it."""
    starts = checked_edges(edges)
    if totals.shape != (len(starts) - 1, 4):
        raise HemoFedError(f"{len(starts) - 1} cells need totals of shape ({len(starts) - 1}, 4)")
    table = np.zeros((len(ROWS), FINE_BINS), np.int64)
    table[[0, 2, 4, 5], starts[:-1, None]] = totals
    table[[1, 3], starts[1:, None] - 1] = totals[:, :2]
    return ScoreHistogram(table)


def coarsen(histogram: ScoreHistogram, edges: ArrayLike) -> ScoreHistogram:
    """Blur a histogram to the cells between `edges`; what is computed from it then carries wider, still true,
    bounds."""
    return from_cells(edges, cells(histogram, edges))


def checked_edges(edges: ArrayLike) -> Counts:
    """Edges as int64 after checking that they run from 0 to FINE_BINS, strictly upwards; else
    HemoFedError."""
    values = np.asarray(edges)
    valid = values.ndim == 1 and len(values) >= 2 and values.dtype.kind in "iu"
    if not valid or values[0] != 0 or values[-1] != FINE_BINS or (np.diff(values.astype(np.int64)) <= 0).any():
        raise HemoFedError(f"cell edges must be integers rising from 0 to {FINE_BINS}")
    return values.astype(np.int64)
