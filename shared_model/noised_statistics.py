"""Figures from noisy counts. All of it is post-processing: it costs no further privacy.

A table is `(2, NOISED_BINS)`: patients without and with the condition, by score bin, as whole numbers or fractions.
Sums of noisy counts are used as they are, negative ones too: to set them to 0 first would draw every AUROC towards
0.5. `variance` is that of the noise in one cell, in patients squared. Intervals (95 %) hold sampling and noise.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from shared_model.intervals import Z95, Estimate, absent, newcombe_limits
from shared_model.noised import NOISED_BINS, NOISED_EDGES, smallest_total
from shared_model.score_grid import edge_probability
from shared_model.statistics import Threshold

Floats = NDArray[np.float64]
Table = NDArray[np.int64] | Floats
STEP = 0.5  # of a cell's SD: how far it is moved either way to see what a figure does
FURTHEST, NEARLY_PERFECT = 0.999, 0.99  # an AUROC is kept within the first; beyond the second bins say little
SMALLEST_RANGE = 0.3  # a perfect and a reversed score must differ by this much in the bins, or noise decides

# Binormal scores: N(-d/2, 1) without and N(d/2, 1) with the condition, for every separation d, and the distribution of
# both together at `_SCORES`.
_SEPARATIONS: Floats = np.linspace(-6.0, 6.0, 121)
_SCORES: Floats = np.linspace(-9.0, 9.0, 721)
_TOGETHER: Floats = (ndtr(_SCORES - _SEPARATIONS[:, None] / 2) + ndtr(_SCORES + _SEPARATIONS[:, None] / 2)) / 2

BIN_LIMITS: Floats = np.array([edge_probability(int(edge)) for edge in NOISED_EDGES])
BIN_MIDDLES: Floats = (BIN_LIMITS[:-1] + BIN_LIMITS[1:]) / 2


def trapezoid_area(tables: Floats) -> Floats:
    """AUROC of the binned scores, ties for a half: `(n, 2, NOISED_BINS)` to `(n,)`.

    Nearly free of bias from noise: the pairs that it counts are products of counts with independent noise.
    """
    without, having = tables[:, 0], tables[:, 1]
    below = np.cumsum(without, axis=1) - without / 2
    area: Floats = (having * below).sum(axis=1) / (having.sum(axis=1) * without.sum(axis=1))
    return area


def corrected_area(tables: Floats) -> Floats:
    """AUROC of the scores behind the bins: `(n, 2, NOISED_BINS)` to `(n,)`.

    The trapezoid takes half of the pairs in one bin as in order, which few wide bins make 0.01 to 0.03 too low. The
    rating method of Dorfman and Alf (1969, J Math Psychol 6:487), with equal variances, corrects it: of all binormal
    scores, cut into bins that hold the same shares of patients, those are taken whose trapezoid is the one found.
    Whatever monotone function the scores went through does not matter.
    """
    curves = binned_binormal_areas(tables)
    found = [np.interp(area, curve, _SEPARATIONS) for area, curve in zip(trapezoid_area(tables), curves, strict=True)]
    areas: Floats = np.clip(ndtr(np.array(found) / np.sqrt(2)), 1 - FURTHEST, FURTHEST)
    return areas


def binned_binormal_areas(tables: Floats) -> Floats:
    """Trapezoid area of binormal scores of each separation, cut where each table's bins are: `(n, separations)`."""
    counts = np.maximum(tables, 0)
    shares = (counts / np.maximum(counts.sum(axis=2, keepdims=True), 1e-9)).mean(axis=1)
    below = np.cumsum(shares, axis=1)[:, :-1]
    cuts = np.stack([np.interp(below, together, _SCORES) for together in _TOGETHER], axis=1)  # (n, separation, cut)
    half = _SEPARATIONS[:, None] / 2
    ends = ((0, 0), (0, 0), (1, 1))
    cumulative = [
        np.pad(ndtr(cuts + shift), ends, constant_values=((0, 0), (0, 0), (0.0, 1.0))) for shift in (half, -half)
    ]
    without, having = (np.diff(each, axis=2) for each in cumulative)
    areas: Floats = (having * (np.cumsum(without, axis=2) - without / 2)).sum(axis=2)
    return areas


def variances(figure: Callable[[Floats], Floats], table: Floats, variance: float) -> tuple[float, float]:
    """(variance by sampling, variance by noise) of a figure from one table, by the delta method.

    Every cell varies by sampling, as a Poisson count, and by noise. (That the total is given does not matter to a
    figure that only looks at shares.) `figure` takes `(n, 2, NOISED_BINS)` to `(n,)`.
    """
    sampling = np.maximum(table, 0)
    steps = STEP * np.diag(np.sqrt(sampling + variance).ravel()).reshape(-1, *table.shape)
    moved = figure(np.concatenate([table + steps, table - steps]))
    change = ((moved[: len(steps)] - moved[len(steps) :]) / (2 * STEP)) ** 2
    share = (sampling / (sampling + variance)).ravel()
    return float(change @ share), float(change @ (1 - share))


def wilson_with_noise(share: float, size: float, noise: float) -> tuple[float, float]:
    """The shares p with |share - p| <= z sqrt(p (1 - p) / size + noise): Wilson's interval, where `noise` is 0."""
    square = Z95**2 / size
    centre = share + square / 2
    reach = np.sqrt(square**2 / 4 + square * share * (1 - share) + (1 + square) * Z95**2 * noise)
    return max(0.0, float((centre - reach) / (1 + square))), min(1.0, float((centre + reach) / (1 + square)))


def auroc(table: Table, variance: float, minimum_cell: int) -> Estimate:
    """AUROC of the scores behind the noisy bins.

    The interval is Wilson's with the noise added, for as many patients as give a share the AUROC's variance by
    sampling. No value where a class has fewer patients, by noisy count, than `smallest_total`. `bound` is None: how
    far binning may have moved the value is not known for certain where the counts are not.
    """
    if reason := too_small(table, variance, minimum_cell):
        return absent(reason)
    counts = table.astype(np.float64)
    if np.ptp(binned_binormal_areas(counts[None])) < SMALLEST_RANGE:
        return absent("nearly all scores lie in one bin of the noisy grid")
    value = float(corrected_area(counts[None])[0])
    sampling, noise = variances(corrected_area, counts, variance)
    most = np.inf
    if not 1 - NEARLY_PERFECT < value < NEARLY_PERFECT:  # there the correction is flat and would hide the noise
        sampling, noise = variances(trapezoid_area, counts, variance)
        perfect = newcombe_limits(1.0, *(round(total) for total in counts.sum(axis=1)))[0]
        most = Z95**2 * perfect / (1 - perfect)  # no surer than perfect separation of as many patients
    size = min(most, value * (1 - value) / max(sampling, 1e-12))
    low, high = wilson_with_noise(value, size, noise)
    return Estimate(value, low, high, None, float(np.sqrt(sampling + noise)))


def too_small(table: Table, variance: float, minimum_cell: int) -> str | None:
    """Why a table gives no figures, judged by its noisy counts alone; None where it does."""
    least = smallest_total(variance, minimum_cell)
    if table.sum(axis=1).min() >= least:
        return None
    return f"fewer than {least:.0f} patients with or without the condition by noisy count, too few beside the noise"


def rate(table: Table, part: NDArray[np.bool_], whole: NDArray[np.bool_], variance: float, least: int) -> Estimate:
    """Share of the patients in the cells `whole` who are in the cells `part` (masks like the table).

    Wilson's interval with the variance added that the noise of the cells gives the share.
    """
    size, cells, inside = float(table[whole].sum()), int(whole.sum()), int(part.sum())
    if size < (limit := smallest_total(variance, least, cells)):
        return absent(f"fewer than {limit:.0f} patients by noisy count, too few beside the noise")
    share = min(1.0, max(0.0, float(table[part].sum()) / size))
    noise = variance * (inside * (1 - share) ** 2 + (cells - inside) * share**2) / size**2
    return Estimate(share, *wilson_with_noise(share, size, noise))


def operating_rates(table: Table, edge: int, variance: float, least: int) -> tuple[Estimate, ...]:
    """Sensitivity, specificity, PPV and NPV at an edge of the grid; a score at it counts as test-positive."""
    above = np.broadcast_to(NOISED_EDGES[:-1] >= edge, table.shape)
    having = np.broadcast_to(np.array([[False], [True]]), table.shape)
    pairs = (
        (having & above, having),
        (~having & ~above, ~having),
        (having & above, above),
        (~having & ~above, ~above),
    )
    return tuple(rate(table, part, whole, variance, least) for part, whole in pairs)


def reliability(table: Table, variance: float, least: int) -> list[tuple[int, Estimate]]:
    """(bin, observed share with the condition) of the bins with enough patients by noisy count."""
    found = []
    for number in range(NOISED_BINS):
        whole = np.zeros(table.shape, np.bool_)
        whole[:, number] = True
        part = whole.copy()
        part[0] = False
        share = rate(table, part, whole, variance, least)
        if share.value is not None:
            found.append((number, share))
    return found


def expected_error(table: Table, found: list[tuple[int, Estimate]]) -> float | None:
    """Expected calibration error over the bins that `reliability` found, None for none: the mean distance of observed
    share and bin middle, weighted by noisy counts. Rough: a bin is up to 0.15 wide, and noise can only add to it."""
    sizes = np.array([table[:, number].sum() for number, _ in found], np.float64)
    distances = np.array([abs(float(share.value or 0.0) - BIN_MIDDLES[number]) for number, share in found])
    return float(sizes @ distances / sizes.sum()) if found else None


def roc_points(table: Table) -> tuple[Floats, Floats]:
    """False and true positive rates at the edges, from (0, 0) to (1, 1), kept within 0 to 1 and from falling."""
    above = np.cumsum(table[:, ::-1], axis=1) / table.sum(axis=1, keepdims=True)
    rising = np.maximum.accumulate(np.clip(above, 0, 1), axis=1)
    rising[:, -1] = 1.0
    points = np.concatenate([np.zeros((2, 1)), rising], axis=1)
    return points[0], points[1]


def choose_threshold(table: Table, variance: float, minimum_cell: int) -> Threshold:
    """The inner edge of the grid with the largest sensitivity + specificity (Youden) by noisy counts of validation
    patients; of several best edges, the middle one."""
    if reason := too_small(table, variance, minimum_cell):
        return Threshold(None, None, reason)
    false_alarms, sensitivities = roc_points(table)
    youden = (sensitivities - false_alarms)[1:-1][::-1]  # by rising edge
    best = NOISED_EDGES[1:-1][youden >= youden.max() - 1e-12]
    edge = int(best[len(best) // 2])
    return Threshold(edge, edge_probability(edge))
