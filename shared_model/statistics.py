"""Discrimination and operating points of a score histogram. Counts add over sites, ratios do not.

Every figure of a blurred histogram carries `bound`, half the width of the interval that surely holds the
figure of the raw pooled scores. An empty class gives an `Estimate` without value and with a reason.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from shared_model.errors import HemoFedError
from shared_model.histograms import Counts, ScoreHistogram, clean_edges
from shared_model.intervals import Estimate, absent, logit_interval, newcombe_limits, wilson
from shared_model.score_grid import edge_probability

Floats = NDArray[np.float64]


def auroc_range(histogram: ScoreHistogram) -> tuple[float, float]:
    """Lowest and highest AUROC that the raw scores behind the histogram can have; both classes must be
    present.

    A pair (positive, negative) is surely in order when the positive's lowest bin lies above the negative's
    highest bin, and surely out of order when its highest bin lies below the negative's lowest. Such pairs
    need only the four counts, since the number of the former is sum_b positives_low[b] * (negatives_high
    below b), and of the latter sum_b positives_high[b] * (negatives_low above b). All other pairs are worth
    between 0 and 1. Hence

        in order / (P N)  <=  AUROC of the raw scores  <=  1 - out of order / (P N)

    whatever cells each site used, and both ends are reached (all positives at the bottom of their ranges and
    all negatives at the top, or the reverse), so no narrower interval holds. For a fine histogram the middle
    is the AUROC of the binned scores and half the width is sum_b h+ h- / (2 P N).
    """
    pairs = float(histogram.positives) * float(histogram.negatives)
    below = np.cumsum(histogram.negatives_high) - histogram.negatives_high
    above = histogram.negatives - np.cumsum(histogram.negatives_low)
    in_order = float(histogram.positives_low.astype(np.float64) @ below)
    out_of_order = float(histogram.positives_high.astype(np.float64) @ above)
    return in_order / pairs, 1.0 - out_of_order / pairs


def delong_error(histogram: ScoreHistogram) -> float | None:
    """Standard error of the AUROC (DeLong 1988, Biometrics 44:837), None below two patients in a class.

    Placements are equal within a bin, so the fine histogram gives DeLong's value for the binned scores. Where
    a range spans several bins, half of each count stands at either end: the most spread that its middle
    allows, so the error is not understated.
    """
    positives, negatives = histogram.positives, histogram.negatives
    if positives < 2 or negatives < 2:
        return None
    cases = (histogram.positives_low + histogram.positives_high) / 2
    controls = (histogram.negatives_low + histogram.negatives_high) / 2
    case_placement = (np.cumsum(controls) - controls / 2) / negatives
    control_placement = (positives - np.cumsum(cases) + cases / 2) / positives
    area = cases @ case_placement / positives
    case_variance = cases @ (case_placement - area) ** 2 / (positives - 1)
    control_variance = controls @ (control_placement - area) ** 2 / (negatives - 1)
    return float(np.sqrt(case_variance / positives + control_variance / negatives))


def auroc(histogram: ScoreHistogram) -> Estimate:
    """AUROC with its binning bound and the logit-transformed 95 % DeLong interval, widened by the bound.

    Valid for one ECG a patient. Where the DeLong variance is zero, Newcombe's score interval stands in.
    """
    missing = _missing_class(histogram)
    if missing:
        return absent(missing)
    lowest, highest = auroc_range(histogram)
    value, bound = (lowest + highest) / 2, (highest - lowest) / 2
    error = delong_error(histogram)
    if error is None:
        return Estimate(value, bound=bound, reason="an interval needs at least two patients in each class")
    if error > 0 and 0 < value < 1:
        low, high = logit_interval(lowest, highest, value, error)
    else:
        low = newcombe_limits(lowest, histogram.positives, histogram.negatives)[0]
        high = newcombe_limits(highest, histogram.positives, histogram.negatives)[1]
    return Estimate(value, low, high, bound, error)


def auprc_range(histogram: ScoreHistogram) -> tuple[float, float]:
    """Lowest and highest average precision (sklearn's definition, ties included) of the raw scores.

    The i-th positive from the top lies in a bin between the i-th of the sorted lowest and of the sorted
    highest bins. Lowest: it has at most F_i = (negatives whose highest bin is at or above its lowest bin)
    ahead of it, so its precision is at least i / (i + F_i). Highest: a positive that lies in bin x has a
    precision of at most c_x = (positives_high at or above x) / (the same + negatives_low above x); take the
    largest c_x of its range.
    """
    ahead = np.cumsum(histogram.negatives_high[::-1])[::-1]  # at or above the bin
    counted = histogram.positives_low
    before = np.cumsum(counted[::-1])[::-1] - counted
    # sum over the bin's positives of i / (i + F), in closed form
    lowest = np.sum(counted - ahead * (digamma(before + counted + ahead + 1) - digamma(before + ahead + 1)))
    at_or_above = np.cumsum(histogram.positives_high[::-1])[::-1]
    surely_above = np.cumsum(histogram.negatives_low[::-1])[::-1] - histogram.negatives_low
    ceiling = at_or_above / np.maximum(at_or_above + surely_above, 1)
    highest = sum(
        count * ceiling[low : high + 1].max()
        for count, low, high in _ranked_ranges(histogram.positives_low, histogram.positives_high)
    )
    return max(0.0, float(lowest) / histogram.positives), min(1.0, float(highest) / histogram.positives)


def auprc(histogram: ScoreHistogram) -> Estimate:
    """Area under the precision-recall curve (average precision, never the trapezoid): middle of
    `auprc_range`, its half width as bound, and Boyd's logit interval for the number of positives (Boyd 2013,
    ECML PKDD, eq. 9)."""
    missing = _missing_class(histogram)
    if missing:
        return absent(missing)
    lowest, highest = auprc_range(histogram)
    value, bound = (lowest + highest) / 2, (highest - lowest) / 2
    if not 0 < value < 1:
        low, high = wilson(value * histogram.positives, histogram.positives)
        return Estimate(value, low, high, bound)
    error = float(np.sqrt(value * (1 - value) / histogram.positives))
    low, high = logit_interval(lowest, highest, value, error)
    return Estimate(value, low, high, bound, error)


@dataclass(frozen=True)
class OperatingPoint:
    """The 2x2 table at a threshold and its rates with Wilson intervals.

    `exact` is False where a merged cell straddles the threshold; the counts are then (fewest, most) pairs
    that differ and the rates carry a bound.
    """

    edge: int
    threshold: float
    true_positives: tuple[int, int]
    false_negatives: tuple[int, int]
    false_positives: tuple[int, int]
    true_negatives: tuple[int, int]
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate

    @property
    def exact(self) -> bool:
        return all(
            fewest == most
            for fewest, most in (
                self.true_positives,
                self.false_negatives,
                self.false_positives,
                self.true_negatives,
            )
        )


def operating_point(histogram: ScoreHistogram, edge: int) -> OperatingPoint:
    """Everything at the threshold `edge_probability(edge)`; a score at the threshold counts as
    test-positive."""
    threshold = edge_probability(edge)
    positives, negatives = histogram.positives, histogram.negatives
    tp = (int(histogram.positives_low[edge:].sum()), int(histogram.positives_high[edge:].sum()))
    fp = (int(histogram.negatives_low[edge:].sum()), int(histogram.negatives_high[edge:].sum()))
    fn, tn = (positives - tp[1], positives - tp[0]), (negatives - fp[1], negatives - fp[0])
    return OperatingPoint(
        edge,
        threshold,
        tp,
        fn,
        fp,
        tn,
        sensitivity=_rate(tp, fn, "no positive patients"),
        specificity=_rate(tn, fp, "no negative patients"),
        ppv=_rate(tp, fp, "nobody is at or above the threshold"),
        npv=_rate(tn, fn, "nobody is below the threshold"),
    )


def roc_points(histogram: ScoreHistogram) -> tuple[Floats, Floats]:
    """False and true positive rates at the clean edges, from (0, 0) to (1, 1): points of the raw ROC, all
    exact.

    Both arrays are empty where a class is empty. Blur a histogram before its curve is shown (`disclosure`).
    """
    if _missing_class(histogram):
        return np.empty(0), np.empty(0)
    edges = clean_edges(histogram)[::-1]
    fpr = _at_or_above(histogram.negatives_low)[edges] / histogram.negatives
    tpr = _at_or_above(histogram.positives_low)[edges] / histogram.positives
    return fpr, tpr


@dataclass(frozen=True)
class Threshold:
    """A chosen threshold as an edge of the grid and as a probability, or the reason why none was chosen."""

    edge: int | None
    probability: float | None
    reason: str | None = None


def choose_threshold(histogram: ScoreHistogram, sensitivity: float | None = None) -> Threshold:
    """The threshold of largest sensitivity + specificity (Youden 1950, Cancer 3:32), or, with `sensitivity`
    given, the highest one that reaches it. Use a histogram of validation patients. Only clean edges are
    candidates; of several best edges, the middle one.
    """
    missing = _missing_class(histogram)
    if missing:
        return Threshold(None, None, missing)
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise HemoFedError(f"the wanted sensitivity {sensitivity} is not above 0 and at most 1")
    edges = clean_edges(histogram)[1:-1]
    if not len(edges):
        return Threshold(None, None, "no edge of the score grid is common to the merged cells of all sites")
    sensitivities = _at_or_above(histogram.positives_low)[edges] / histogram.positives
    false_alarms = _at_or_above(histogram.negatives_low)[edges] / histogram.negatives
    if sensitivity is None:
        youden = sensitivities - false_alarms
        best = edges[youden >= youden.max() - 1e-12]
        edge = int(best[len(best) // 2])
    elif (reached := edges[sensitivities >= sensitivity]).size:
        edge = int(reached[-1])
    else:
        return Threshold(None, None, f"no threshold on the score grid reaches a sensitivity of {sensitivity}")
    return Threshold(edge, edge_probability(edge))


def _missing_class(histogram: ScoreHistogram) -> str | None:
    if not histogram.positives:
        return "no positive patients" if histogram.negatives else "no patients"
    return None if histogram.negatives else "no negative patients"


def _at_or_above(counts: Counts) -> Counts:
    """`(FINE_BINS + 1,)`: the total at or above each edge."""
    return np.concatenate([np.cumsum(counts[::-1])[::-1], [0]])


def _rate(part: tuple[int, int], rest: tuple[int, int], reason: str) -> Estimate:
    """part / (part + rest), each known as (fewest, most)."""
    if part[1] + rest[1] == 0:
        return absent(reason)
    lowest = part[0] / (part[0] + rest[1]) if part[0] + rest[1] else 0.0
    highest = part[1] / (part[1] + rest[0]) if part[1] + rest[0] else 1.0
    low = wilson(part[0], part[0] + rest[1])[0] if part[0] + rest[1] else 0.0
    high = wilson(part[1], part[1] + rest[0])[1] if part[1] + rest[0] else 1.0
    return Estimate((lowest + highest) / 2, low, high, (highest - lowest) / 2)


def _ranked_ranges(low: Counts, high: Counts) -> list[tuple[int, int, int]]:
    """(count, lowest bin, highest bin) of the patients in rank order: the i-th low goes with the i-th
    high."""
    ends_low, ends_high = np.cumsum(low), np.cumsum(high)
    stops = np.unique(np.concatenate([ends_low, ends_high]))
    stops = stops[stops > 0]
    counts = np.diff(np.concatenate([[0], stops]))
    lows = np.searchsorted(ends_low, stops, side="left")
    highs = np.searchsorted(ends_high, stops, side="left")
    return list(zip(counts.tolist(), lows.tolist(), highs.tolist(), strict=True))
