"""Figures from noisy counts against simulated truth: bias, error and coverage of the intervals."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from shared_model import noised_statistics as statistics
from shared_model.histograms import coarsen, histogram_of
from shared_model.intervals import Estimate, wilson
from shared_model.noised import NOISED_EDGES, noise_scale, noise_variance, noised_bins
from shared_model.statistics import auroc as exact_auroc
from shared_model.statistics import operating_point
from tests.noised_fixtures import binormal_scores, table_of, two_geometrics

EDGE = 480  # logit -0.5
LEAST = 11
Table = NDArray[np.int64]


def noisy_tables(
    seed: int, count: int, patients: int, scale: float, auroc: float = 0.8, prevalence: float = 0.35, sites: int = 1
) -> Iterator[Table]:
    """Noisy tables of fresh samples of patients."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        exact = table_of(*binormal_scores(generator, patients, auroc, prevalence))
        yield exact + two_geometrics(generator, scale, exact.shape, sites)


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def consistent(hits: int, trials: int, low: float = 0.93, high: float = 0.97) -> bool:
    """Whether so many hits may come of a coverage from `low` to `high` (wrongly denied once in 10,000)."""
    return bool(binom.ppf(1e-4, trials, low) <= hits <= binom.ppf(1 - 1e-4, trials, high))


# --- without noise, the figures are those of the exact counts


def test_without_noise_the_trapezoid_and_the_rates_are_those_of_the_exact_histogram() -> None:
    probabilities, outcomes = binormal_scores(np.random.default_rng(0), 3000, 0.8, 0.35)
    table = table_of(probabilities, outcomes)
    coarse = coarsen(histogram_of(probabilities, outcomes), NOISED_EDGES)
    assert statistics.trapezoid_area(table[None].astype(float))[0] == pytest.approx(exact_auroc(coarse).value)
    point = operating_point(coarse, EDGE)
    for ours, exact in zip(
        statistics.operating_rates(table, EDGE, 0.0, LEAST),
        (point.sensitivity, point.specificity, point.ppv, point.npv),
        strict=True,
    ):
        assert (ours.value, ours.low, ours.high) == pytest.approx((exact.value, exact.low, exact.high))


SHAPES = {
    "calibrated": lambda x, y: 1.2 * x + 1.44 * (y - 0.5) - 0.6,
    "over-confident": lambda x, y: 2 * (1.2 * x + 1.44 * (y - 0.5) - 0.6),
    "under-confident": lambda x, y: 0.5 * (1.2 * x + 1.44 * (y - 0.5) - 0.6),
    "shifted": lambda x, y: 1.2 * x + 1.44 * (y - 0.5) - 2.1,
    "unequal": lambda x, y: x * (1 + 0.6 * y) + 1.3 * y - 0.5,
    "exponential": lambda x, y: -np.log(norm.sf(x)) * (1 + 1.8 * y) - 1.5,
    "two peaks": lambda x, y: 0.8 * x + np.where(np.arange(len(x)) % 2, 2.0, -0.5) * y - 0.5,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_correction_for_binning_finds_the_auroc_of_the_scores(shape: str) -> None:
    """Scores far from binormal leave 0.006; the trapezoid alone would be up to 0.05 off."""
    generator = np.random.default_rng(1)
    outcomes = generator.random(400_000) < 0.35
    probabilities = expit(SHAPES[shape](generator.normal(size=len(outcomes)), outcomes))
    table = table_of(probabilities, outcomes).astype(float)
    truth = roc_auc_score(outcomes, probabilities)
    binormal = shape not in ("unequal", "exponential", "two peaks")
    error = abs(statistics.corrected_area(table[None])[0] - truth)
    assert error < (0.0015 if binormal else 0.0065)
    if binormal:  # negative control: what the correction is for
        assert abs(statistics.trapezoid_area(table[None])[0] - truth) > 5 * error


def test_wilsons_interval_is_what_the_noisy_one_is_without_noise() -> None:
    table = np.zeros((2, 8), np.int64)
    table[1, 2], table[0, 2] = 30, 70
    ((number, share),) = statistics.reliability(table, 0.0, LEAST)
    assert (number, share.value) == (2, 0.3)
    assert (share.low, share.high) == pytest.approx(wilson(30, 100))
    ((_, noisy),) = statistics.reliability(table, 50.0, LEAST)
    assert noisy.low is not None
    assert share.low is not None
    assert noisy.low < share.low


def test_expected_error_and_prevalence_of_a_calibrated_table_are_small() -> None:
    table = table_of(*binormal_scores(np.random.default_rng(2), 100_000, 0.8, 0.35))
    found = statistics.reliability(table, 0.0, LEAST)
    assert len(found) == 8
    error = statistics.expected_error(table, found)
    assert error is not None
    assert error < 0.02
    assert statistics.expected_error(table, []) is None


# --- bias and error of the noise


@pytest.mark.parametrize(
    ("patients", "epsilon", "least", "most"),
    [(500, 1.0, 0.008, 0.03), (500, 0.5, 0.015, 0.06), (2000, 1.0, 0.002, 0.008)],
)
def test_noise_leaves_the_auroc_unbiased_and_its_error_is_the_known_one(
    patients: int, epsilon: float, least: float, most: float
) -> None:
    """One table; a prototype found RMSE .014, .029 and .004 at these settings with clamped counts."""
    generator = np.random.default_rng(3)
    scale, differences, clamped = noise_scale(1, epsilon), [], []
    for _ in range(500):
        exact = table_of(*binormal_scores(generator, patients, 0.8, 0.35)).astype(float)
        noisy = exact + two_geometrics(generator, scale, exact.shape)
        areas = statistics.trapezoid_area(np.stack([exact, noisy, np.maximum(noisy, 0)]))
        differences.append(areas[1] - areas[0])
        clamped.append(areas[2] - areas[0])
    error = float(np.sqrt(np.mean(np.square(differences))))
    assert least < error < most
    assert abs(np.mean(differences)) < 4 * error / math.sqrt(500) + 0.001


def test_counts_set_to_zero_where_negative_would_draw_the_auroc_towards_a_half() -> None:
    """Why negative counts are kept: the control of the test above, where noise is large beside the counts."""
    generator = np.random.default_rng(3)
    exact = table_of(*binormal_scores(generator, 500, 0.9, 0.35)).astype(float)
    noisy = exact + two_geometrics(generator, 10.0, (2000, 2, 8))
    noisy = noisy[(noisy.sum(axis=2) > 0).all(axis=1)]
    kept, clamped = statistics.trapezoid_area(noisy), statistics.trapezoid_area(np.maximum(noisy, 0))
    truth = statistics.trapezoid_area(exact[None])[0]
    assert abs(np.median(kept) - truth) < 0.005
    assert np.median(clamped) - truth < -0.01


# --- coverage


def auroc_hits(
    seed: int, count: int, patients: int, scale: float, noise: float | None = None, **more: float
) -> tuple[int, int]:
    """(intervals that hold the AUROC of the scores, intervals given)."""
    truth = more.get("auroc", 0.8)
    variance = noise_variance(scale) if noise is None else noise
    estimates = [
        statistics.auroc(table, variance, LEAST)
        for table in noisy_tables(seed, count, patients, scale, **more)  # type: ignore[arg-type]
    ]
    given = [each for each in estimates if each.value is not None]
    return sum(holds(each, truth) for each in given), len(given)


@pytest.mark.parametrize(("patients", "epsilon"), product((500, 2000), (0.5, 1.0)))
def test_the_interval_holds_the_auroc_of_the_scores_as_often_as_it_says(patients: int, epsilon: float) -> None:
    hits, given = auroc_hits(4, 400, patients, noise_scale(1, epsilon))
    assert given == 400
    assert consistent(hits, given)


def test_an_interval_that_leaves_out_the_noise_fails_the_test_of_coverage() -> None:
    """Negative control, at five tables and epsilon 1."""
    hits, given = auroc_hits(4, 400, 500, noise_scale(5, 1.0), noise=1e-9)
    assert not consistent(hits, given)
    assert consistent(*auroc_hits(4, 400, 500, noise_scale(5, 1.0)), 0.93, 0.98)


@pytest.mark.long
@pytest.mark.parametrize(("patients", "epsilon"), product((500, 2000), (0.5, 1.0)))
@pytest.mark.parametrize(("prevalence", "auroc"), product((0.15, 0.35), (0.65, 0.8, 0.9)))
def test_coverage_at_length(patients: int, epsilon: float, prevalence: float, auroc: float) -> None:
    hits, given = auroc_hits(5, 2000, patients, noise_scale(1, epsilon), auroc=auroc, prevalence=prevalence)
    assert given == 2000
    assert consistent(hits, given)


@pytest.mark.parametrize(("patients", "epsilon"), [(500, 0.5), (2000, 1.0)])
def test_the_intervals_of_the_rates_hold_as_often_as_they_say(patients: int, epsilon: float) -> None:
    """Against the rates of the population, five tables."""
    separation, cut = float(norm.ppf(0.8)) * math.sqrt(2), -0.5
    at = (cut - math.log(0.35 / 0.65)) / separation
    sensitivity, specificity = norm.sf(at - separation / 2), norm.cdf(at + separation / 2)
    yes, no = 0.35 * sensitivity + 0.65 * (1 - specificity), 0.35 * (1 - sensitivity) + 0.65 * specificity
    truths = (sensitivity, specificity, 0.35 * sensitivity / yes, 0.65 * specificity / no)
    scale = noise_scale(5, epsilon)
    found = [
        statistics.operating_rates(table, EDGE, noise_variance(scale), LEAST)
        for table in noisy_tables(6, 400, patients, scale)
    ]
    for truth, estimates in zip(truths, zip(*found, strict=True), strict=True):
        given = [each for each in estimates if each.value is not None]
        assert len(given) > 200
        assert consistent(sum(holds(each, truth) for each in given), len(given), 0.92, 0.98)


def test_noise_of_several_sites_adds_to_the_interval() -> None:
    scale, sites = noise_scale(1, 1.0), 4
    tables = list(noisy_tables(7, 400, 1000, scale, sites=sites))
    estimates = [statistics.auroc(table, sites * noise_variance(scale), LEAST) for table in tables]
    assert consistent(sum(holds(each, 0.8) for each in estimates), len(estimates))


# --- what is not shown


def test_suppression_looks_at_noisy_counts_alone() -> None:
    """The same noisy table is judged alike, whatever exact counts are behind it; the limit grows with the noise."""
    table = np.full((2, 8), 5, np.int64)  # 40 of each class
    assert statistics.too_small(table, 0.0, LEAST) is None
    assert statistics.too_small(table, 2.0, LEAST) is None  # 4 SD of the total are 16
    assert statistics.too_small(table, 20.0, LEAST) is not None  # and here 51
    assert "fewer than 51 patients" in str(statistics.auroc(table, 20.0, LEAST).reason)
    assert statistics.auroc(-table, 2.0, LEAST).value is None
    assert all(each.value is None for each in statistics.operating_rates(np.zeros((2, 8), np.int64), EDGE, 2.0, LEAST))


def test_no_auroc_where_nearly_all_scores_are_in_one_bin() -> None:
    generator = np.random.default_rng(8)
    table = np.zeros((2, 8), np.int64)
    table[:, 2] = 650, 350
    for scale in (0.05, 1.0, 5.0):
        noisy = table + two_geometrics(generator, scale, table.shape)
        assert "one bin" in str(statistics.auroc(noisy, noise_variance(scale), LEAST).reason)
    spread = table.copy()
    spread[:, 3] = 100, 300
    assert statistics.auroc(spread, noise_variance(1.0), LEAST).value is not None


def test_perfect_and_reversed_scores_stay_within_bounds() -> None:
    table = np.zeros((2, 8), np.int64)
    table[0, 0] = table[1, 7] = 300
    for each in (table, table[::-1]):
        estimate = statistics.auroc(each, noise_variance(2.0), LEAST)
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.high - estimate.low > 0.01  # 300 patients of each class are not certainty


# --- the curve and the threshold


def test_roc_points_rise_from_corner_to_corner_whatever_the_noise() -> None:
    for table in noisy_tables(9, 50, 500, 5.0):
        false_positive, true_positive = statistics.roc_points(table)
        for rates in (false_positive, true_positive):
            assert (rates[0], rates[-1]) == (0, 1)
            assert (np.diff(rates) >= 0).all()


def test_the_threshold_is_the_edge_of_largest_youden_index() -> None:
    probabilities, outcomes = binormal_scores(np.random.default_rng(10), 5000, 0.8, 0.35)
    table = table_of(probabilities, outcomes)
    chosen = statistics.choose_threshold(table, noise_variance(1.0), LEAST)
    youden = {
        int(edge): (probabilities[outcomes] >= p).mean() - (probabilities[~outcomes] >= p).mean()
        for edge, p in zip(NOISED_EDGES[1:-1], statistics.BIN_LIMITS[1:-1], strict=True)
    }
    assert chosen.edge == max(youden, key=youden.__getitem__)
    assert chosen.probability == statistics.BIN_LIMITS[NOISED_EDGES.tolist().index(chosen.edge)]
    assert noised_bins([chosen.probability]).tolist() == [NOISED_EDGES.tolist().index(chosen.edge)]
    nobody = statistics.choose_threshold(np.zeros((2, 8), np.int64), 1.0, LEAST)
    assert nobody.edge is None
    assert nobody.reason
