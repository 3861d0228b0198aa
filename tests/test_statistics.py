"""The figures of merged histograms against the same figures of the pooled rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    roc_auc_score,
    roc_curve,
)

from shared_model.calibration import brier, calibration
from shared_model.errors import HemoFedError
from shared_model.histograms import cells, clean_edges, coarsen, empty_histogram, from_cells, histogram_of
from shared_model.intervals import absent, newcombe_limits, wilson
from shared_model.score_grid import (
    COARSE_EDGES,
    EDGE_PROBABILITIES,
    FINE_BINS,
    bin_of,
    edge_probability,
    snap_threshold,
)
from shared_model.statistics import (
    auprc,
    auprc_range,
    auroc,
    auroc_range,
    choose_threshold,
    delong_error,
    operating_point,
    roc_points,
)

ROUNDING = 1e-9


def draw(seed: int, size: int, shift: float = 0.0, effect: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and outcomes of `size` patients, both classes present, some scores tied."""
    rng = np.random.default_rng(seed)
    outcomes = (rng.random(size) < 0.35).astype(float)
    outcomes[:2] = 0, 1
    scores = expit(rng.normal(size=size) + effect * outcomes - 1 + shift)
    tied = rng.random(size) < 0.3
    return np.where(tied, np.round(scores, 1), scores), outcomes


def sites_of(seed: int, size: int, sites: int) -> list[np.ndarray]:
    """A split of the rows into sites, some perhaps empty."""
    where = np.random.default_rng(seed + 1).integers(0, sites, size)
    return [np.flatnonzero(where == site) for site in range(sites)]


def random_edges(seed: int) -> np.ndarray:
    inner = np.random.default_rng(seed).choice(np.arange(400, 640), size=seed % 7, replace=False)
    return np.array(sorted({0, FINE_BINS, *inner.tolist()}))


cohorts = st.tuples(st.integers(0, 10**6), st.integers(4, 300), st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(cohorts, st.booleans(), st.sampled_from([1.0, 6.0]))
def test_merged_figures_bound_those_of_the_pooled_rows(
    cohort: tuple[int, int, int], blurred: bool, stretch: float
) -> None:
    seed, size, sites = cohort
    scores, outcomes = draw(seed, size)
    scores = np.clip(0.5 + stretch * (scores - 0.5), 0, 1)  # saturates, with many scores of exactly 0 or 1
    merged = empty_histogram()
    for number, rows in enumerate(sites_of(seed, size, sites)):
        site = histogram_of(scores[rows], outcomes[rows])
        merged = merged + (coarsen(site, random_edges(seed + number)) if blurred else site)
    area = auroc(merged)
    assert area.value is not None
    assert area.bound is not None
    assert abs(area.value - roc_auc_score(outcomes, scores)) <= area.bound + ROUNDING
    low, high = auprc_range(merged)
    assert low - ROUNDING <= average_precision_score(outcomes, scores) <= high + ROUNDING
    assert brier(merged).value == pytest.approx(brier_score_loss(outcomes, scores), abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(cohorts)
def test_merging_is_commutative_associative_and_blind_to_site_order(cohort: tuple[int, int, int]) -> None:
    seed, size, sites = cohort
    scores, outcomes = draw(seed, size)
    parts = [
        coarsen(histogram_of(scores[rows], outcomes[rows]), random_edges(seed + i))
        for i, rows in enumerate(sites_of(seed, size, sites + 2))
    ]
    first, second, third, *_ = parts
    assert np.array_equal((first + second).table, (second + first).table)
    assert np.array_equal(((first + second) + third).table, (first + (second + third)).table)
    forward, backward = empty_histogram(), empty_histogram()
    for part in parts:
        forward = forward + part
    for part in reversed(parts):
        backward = backward + part
    assert auroc(forward) == auroc(backward)


def test_the_mean_of_site_aurocs_is_not_the_pooled_auroc() -> None:
    """The negative control of the whole module: two sites, each perfect at its own level of scores."""
    first = histogram_of([0.1, 0.2], [0, 1])
    second = histogram_of([0.8, 0.9], [0, 1])
    assert [auroc(first).value, auroc(second).value] == [1.0, 1.0]
    assert auroc(first + second).value == pytest.approx(roc_auc_score([0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9]))
    assert auroc(first + second).value == 0.75


def test_the_auroc_range_of_a_blurred_histogram_is_reached() -> None:
    """No narrower bound is true: both ends are the AUROC of some scores within the cells."""
    edges = np.array([0, 500, FINE_BINS])
    worst = histogram_of([0.4, 0.6, 0.45, 0.99], [1, 1, 0, 0])
    best = histogram_of([0.45, 0.99, 0.4, 0.6], [1, 1, 0, 0])
    blurred = coarsen(worst, edges)
    assert np.array_equal(blurred.table[:4], coarsen(best, edges).table[:4])
    assert auroc_range(blurred) == (0.25, 0.75)
    assert roc_auc_score([1, 1, 0, 0], [0.4, 0.6, 0.45, 0.99]) == 0.25
    assert roc_auc_score([1, 1, 0, 0], [0.45, 0.99, 0.4, 0.6]) == 0.75


def test_bounds_are_small_on_fine_bins() -> None:
    outcomes = np.arange(5000) % 3 == 0
    for stretch in (1.0, 2.0):  # 2: an over-confident model
        logits = np.random.default_rng(3).normal(size=5000) + 1.5 * outcomes
        bound = auroc(histogram_of(expit(stretch * logits), outcomes)).bound
        assert bound is not None
        assert bound < 3e-3


def placements(scores: np.ndarray, outcomes: np.ndarray) -> float:
    """DeLong's standard error, written out pair by pair."""
    cases, controls = scores[outcomes == 1], scores[outcomes == 0]
    kernel = (cases[:, None] > controls) + 0.5 * (cases[:, None] == controls)
    return float(np.sqrt(kernel.mean(1).var(ddof=1) / len(cases) + kernel.mean(0).var(ddof=1) / len(controls)))


@pytest.mark.parametrize("size", [10, 100, 2000])
def test_delong_error_equals_the_explicit_placements(size: int) -> None:
    scores, outcomes = draw(size, size)
    on_grid = bin_of(scores)  # the histogram sees bins
    assert delong_error(histogram_of(scores, outcomes)) == pytest.approx(placements(on_grid, outcomes), rel=1e-12)
    assert placements(on_grid, outcomes) == pytest.approx(placements(scores, outcomes), rel=0.01)


@pytest.mark.parametrize(("size", "effect"), [(60, 1.0), (300, 1.5)])
def test_delong_interval_covers(size: int, effect: float) -> None:
    truth = norm.cdf(effect / np.sqrt(2))
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1500):
        outcomes = np.arange(size) < size // 3
        area = auroc(histogram_of(expit(rng.normal(size=size) + effect * outcomes), outcomes))
        assert area.low is not None
        assert area.high is not None
        covered += area.low <= truth <= area.high
    assert 0.93 <= covered / 1500 <= 0.98


def test_perfect_separation_gets_an_interval_that_is_not_a_point() -> None:
    area = auroc(histogram_of([0.1] * 10 + [0.9] * 10, [0] * 10 + [1] * 10))
    assert (area.value, area.high) == (1.0, 1.0)
    assert area.low is not None
    assert 0.7 < area.low < 0.95
    reversed_low, reversed_high = newcombe_limits(0.0, 10, 10)
    assert reversed_low == 0.0
    assert reversed_high == pytest.approx(1 - area.low, abs=1e-9)


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [([], "no patients"), ([1, 1], "no negative patients"), ([0, 0], "no positive patients")],
)
def test_an_empty_class_gives_a_reason_and_no_number(outcomes: list[int], reason: str) -> None:
    histogram = histogram_of([0.3, 0.6][: len(outcomes)], outcomes)
    assert auroc(histogram) == auprc(histogram) == absent(reason)
    assert choose_threshold(histogram).reason == reason
    assert roc_points(histogram)[0].size == 0
    point = operating_point(histogram, 512)
    assert (point.sensitivity.value is None) == (1 not in outcomes)
    assert (point.specificity.value is None) == (0 not in outcomes)
    assert calibration(histogram).slope.value is None
    assert (brier(histogram).value is None) == (not outcomes)


def test_one_patient_in_a_class_gives_a_value_without_interval() -> None:
    area = auroc(histogram_of([0.2, 0.3, 0.8], [0, 0, 1]))
    assert (area.value, area.low, area.high) == (1.0, None, None)
    assert area.reason is not None


def test_scores_that_are_no_probabilities_are_refused() -> None:
    """Fault item 21: a threshold of 0.5 was applied to logits."""
    for bad in ([0.5, -1.2], [0.5, 1.2], [0.5, np.nan]):
        with pytest.raises(HemoFedError, match="probabilities"):
            histogram_of(bad, [0, 1])
    with pytest.raises(HemoFedError, match="neither 0 nor 1"):
        histogram_of([0.5, 0.5], [0, np.nan])


def test_threshold_half_is_half_of_the_probability() -> None:
    """Fault item 21: with logits -0.2 to 0.7, 0.5 on the logits (p > 0.62) would call only one of four
    positive."""
    logits = np.array([-0.2, 0.1, 0.3, 0.7])
    point = operating_point(histogram_of(expit(logits), [0, 0, 1, 1]), snap_threshold(0.5))
    assert point.threshold == 0.5
    assert (point.true_positives, point.false_positives) == ((2, 2), (1, 1))
    assert (logits > 0.5).sum() == 1


@settings(max_examples=40, deadline=None)
@given(cohorts, st.integers(1, FINE_BINS - 1))
def test_the_two_by_two_table_is_oriented_as_in_sklearn(cohort: tuple[int, int, int], edge: int) -> None:
    """Fault item 21: the arguments of the confusion matrix were swapped, which exchanges FP and FN."""
    scores, outcomes = draw(*cohort[:2])
    point = operating_point(histogram_of(scores, outcomes), edge)
    tn, fp, fn, tp = confusion_matrix(outcomes, scores >= edge_probability(edge), labels=[0, 1]).ravel()
    assert point.exact
    assert (point.true_negatives[0], point.false_positives[0]) == (tn, fp)
    assert (point.false_negatives[0], point.true_positives[0]) == (fn, tp)
    assert point.sensitivity.value == pytest.approx(tp / (tp + fn))
    assert point.ppv.value == (pytest.approx(tp / (tp + fp)) if tp + fp else None)


def test_a_straddled_threshold_gives_bounds() -> None:
    scores, outcomes = draw(5, 400)
    fine = histogram_of(scores, outcomes)
    truth = operating_point(fine, 500)
    blurred = operating_point(coarsen(fine, [0, 450, 480, 560, FINE_BINS]), 500)
    assert not blurred.exact
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        exact, wide = getattr(truth, name), getattr(blurred, name)
        assert wide.bound > 0
        assert abs(exact.value - wide.value) <= wide.bound + ROUNDING
        assert wide.low <= exact.low
        assert wide.high >= exact.high


def test_roc_points_lie_on_the_raw_curve() -> None:
    scores, outcomes = draw(11, 300)
    fpr, tpr, _ = roc_curve(outcomes, scores, drop_intermediate=False)
    raw = set(zip(np.round(fpr, 12), np.round(tpr, 12), strict=True))
    for histogram in (
        histogram_of(scores, outcomes),
        coarsen(histogram_of(scores, outcomes), [0, 400, 500, 1024]),
    ):
        ours = roc_points(histogram)
        assert set(zip(np.round(ours[0], 12), np.round(ours[1], 12), strict=True)) <= raw
        assert (ours[0][0], ours[1][0], ours[0][-1], ours[1][-1]) == (0, 0, 1, 1)


def test_choose_threshold_against_a_search_over_all_edges() -> None:
    scores, outcomes = draw(13, 500)
    histogram = histogram_of(scores, outcomes)
    calls = scores[:, None] >= EDGE_PROBABILITIES
    sensitivity, specificity = calls[outcomes == 1].mean(0), 1 - calls[outcomes == 0].mean(0)
    chosen = choose_threshold(histogram)
    assert chosen.edge is not None
    assert (sensitivity + specificity)[chosen.edge - 1] == pytest.approx((sensitivity + specificity).max())
    wanted = choose_threshold(histogram, sensitivity=0.9)
    assert wanted.edge is not None
    assert sensitivity[wanted.edge - 1] >= 0.9 > sensitivity[wanted.edge]
    with pytest.raises(HemoFedError):
        choose_threshold(histogram, sensitivity=1.5)
    assert choose_threshold(coarsen(histogram, [0, FINE_BINS])).edge is None


def test_the_grid_nests_and_its_edges_decide_exactly() -> None:
    assert set(COARSE_EDGES[1:-1]) <= set(range(1, FINE_BINS))
    assert len(COARSE_EDGES) == 33
    assert np.array_equal(bin_of(EDGE_PROBABILITIES), np.arange(1, FINE_BINS))
    assert np.array_equal(bin_of(np.nextafter(EDGE_PROBABILITIES, 0)), np.arange(FINE_BINS - 1))
    assert bin_of([0.0, 1.0]).tolist() == [0, FINE_BINS - 1]
    assert edge_probability(snap_threshold(0.5)) == 0.5
    assert abs(edge_probability(snap_threshold(0.31)) - 0.31) < 0.002


def test_cells_and_their_inverse() -> None:
    scores, outcomes = draw(17, 200)
    fine = histogram_of(scores, outcomes)
    edges = np.array([0, 300, 512, 700, FINE_BINS])
    totals = cells(fine, edges)
    in_cell = np.searchsorted([edge_probability(e) for e in edges[1:-1]], scores, side="right")
    for cell in range(4):
        chosen = in_cell == cell
        assert totals[cell, 0] == outcomes[chosen].sum()
        assert totals[cell, :2].sum() == chosen.sum()
        assert totals[cell, 2] * 2.0**-30 == pytest.approx(scores[chosen].sum(), abs=1e-6)
    blurred = from_cells(edges, totals)
    assert set(edges) <= set(clean_edges(blurred))
    with pytest.raises(HemoFedError, match="merged"):
        cells(blurred, [0, 511, FINE_BINS])
    for bad in ([0, 5], [5, FINE_BINS], [0, 9, 9, FINE_BINS], [0.0, 1024.0]):
        with pytest.raises(HemoFedError, match="edges"):
            cells(fine, bad)


def test_reliability_cells_and_their_error_against_the_rows() -> None:
    scores, outcomes = draw(19, 1000)
    scores = np.clip(scores, 0.01, 0.99)
    result = calibration(histogram_of(scores, outcomes))
    assert sum(cell.count for cell in result.cells) == 1000
    error = 0.0
    for cell in result.cells:
        inside = (scores >= cell.from_probability) & (scores < cell.to_probability)
        assert cell.count == inside.sum() > 0
        assert cell.mean_predicted == pytest.approx(scores[inside].mean(), abs=1e-8)
        assert cell.observed == pytest.approx(outcomes[inside].mean())
        assert (cell.low, cell.high) == wilson(outcomes[inside].sum(), inside.sum())
        error += abs(scores[inside].sum() - outcomes[inside].sum()) / 1000
    assert 5 <= len(result.cells) <= 10
    assert result.expected_error == pytest.approx(error, abs=1e-8)
    assert result.expected_over_observed == pytest.approx(scores.sum() / outcomes.sum(), abs=1e-8)


@pytest.mark.parametrize("stretch", [0.5, 1.0, 3.0])
def test_slope_and_intercept_against_sklearn_on_the_rows(stretch: float) -> None:
    scores, outcomes = draw(23, 3000)
    scores = np.clip(scores, 0.01, 0.99)
    logits = stretch * np.log(scores / (1 - scores)) + 0.4
    fit = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None], outcomes)
    result = calibration(histogram_of(expit(logits), outcomes))
    assert result.slope.value == pytest.approx(fit.coef_[0, 0], rel=0.01)
    assert result.intercept.value == pytest.approx(fit.intercept_[0], abs=0.02)
    assert result.slope.low is not None
    assert result.slope.low < result.slope.value < (result.slope.high or 0)


def test_no_slope_where_there_is_none() -> None:
    separated = calibration(histogram_of([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]))
    assert separated.slope.value is None
    assert "separate" in (separated.slope.reason or "")
    assert calibration(histogram_of([0.4, 0.4], [0, 1])).slope.value is None


def test_wilson_against_scipy() -> None:
    from scipy.stats import binomtest

    for successes, trials in ((0, 5), (3, 7), (50, 50), (20, 400)):
        expected = binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)
