"""Regression figures from sums, and gaps between subgroups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from shared_model.errors import HemoFedError
from shared_model.gaps import difference, holm, partition_gaps
from shared_model.intervals import Estimate, absent
from shared_model.moments import RegressionMoments, moments_of, regression_figures

pressures = st.lists(st.tuples(st.floats(0, 60), st.floats(-20, 80)), min_size=3, max_size=120)


@settings(max_examples=60, deadline=None)
@given(pressures, st.integers(1, 4))
def test_regression_figures_of_any_split_equal_those_of_the_pooled_rows(
    rows: list[tuple[float, float]], sites: int
) -> None:
    """Fault item 21: the RMSE is that of the test set, not an exponentially weighted mean over batches."""
    # Sums are of pressures on the grid of 2^-12 mmHg; of those the figures are exact.
    truth, guess = np.rint(np.array(rows).T * 4096) / 4096
    parts = [moments_of(truth[i::sites], guess[i::sites]) for i in range(sites)]
    figures = regression_figures(sum(parts, RegressionMoments()), training_mean_mmhg=15.7)
    assert figures.count == len(rows)
    assert figures.mae == pytest.approx(mean_absolute_error(truth, guess), abs=1e-6)
    assert figures.rmse == pytest.approx(root_mean_squared_error(truth, guess), abs=5e-4)
    assert figures.bias == pytest.approx((guess - truth).mean(), abs=1e-6)
    assert figures.rmse_of_cohort_mean == pytest.approx(truth.std(), abs=5e-4)
    assert figures.rmse_of_training_mean == pytest.approx(np.sqrt(((truth - 15.7) ** 2).mean()), abs=5e-4)
    if truth.std() > 0.1 and guess.std() > 0.1:
        assert figures.r_squared == pytest.approx(r2_score(truth, guess), rel=1e-4, abs=1e-4)
        assert figures.pearson_r == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-4)
        slope, intercept = np.polyfit(guess, truth, 1)
        assert figures.slope == pytest.approx(slope, abs=1e-3)
        assert figures.intercept == pytest.approx(intercept, abs=1e-2)


def test_the_running_batch_mean_of_the_reference_code_is_caught() -> None:
    """The faulty figure `loss = (loss + batch_rmse) / 2` differs from ours, so the test above can fail."""
    rng = np.random.default_rng(0)
    truth, guess = np.rint(4096 * np.stack([rng.normal(16, 8, 256), rng.normal(16, 3, 256)])) / 4096
    faulty = 0.0
    for batch in range(0, 256, 32):
        faulty = (faulty + root_mean_squared_error(truth[batch : batch + 32], guess[batch : batch + 32])) / 2
    ours = regression_figures(moments_of(truth, guess), 16.0).rmse
    assert ours == pytest.approx(root_mean_squared_error(truth, guess), abs=1e-6)
    assert abs(faulty - root_mean_squared_error(truth, guess)) > 0.05


def test_regression_figures_say_why_they_are_missing() -> None:
    assert regression_figures(RegressionMoments(), 16.0).reason == "no patients"
    flat = regression_figures(moments_of([12.0, 18.0], [15.0, 15.0]), 16.0)
    assert (flat.pearson_r, flat.slope) == (None, None)
    assert flat.reason == "all predictions are equal"
    with pytest.raises(HemoFedError, match="NaN"):
        moments_of([12.0, np.nan], [15.0, 15.0])


def test_gaps_within_a_partition() -> None:
    groups = {
        "sex=female": Estimate(0.80, bound=0.001, standard_error=0.02),
        "sex=male": Estimate(0.70, bound=0.001, standard_error=0.02),
        "sex=unknown": absent("no positive patients"),
    }
    result = partition_gaps(groups)
    assert result.worst == "sex=male"
    assert result.comparisons == 1
    assert result.largest is not None
    assert (result.largest.better, result.largest.worse) == ("sex=female", "sex=male")
    gap = result.largest.difference
    assert gap.standard_error == pytest.approx(np.hypot(0.02, 0.02))
    assert gap.high == pytest.approx(0.1 + 1.959964 * np.hypot(0.02, 0.02) + 0.002, abs=1e-6)
    assert result.largest.p_value == pytest.approx(2 * norm.sf(0.098 / np.hypot(0.02, 0.02)))
    assert partition_gaps({"sex=unknown": absent("x")}).largest is None
    assert difference(groups["sex=female"], groups["sex=unknown"]).value is None


def test_holm_adjusts_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    many = {f"age=g{i}": Estimate(0.8 - 0.05 * (i == 3), bound=0.0, standard_error=0.014) for i in range(5)}
    largest = partition_gaps(many).largest
    assert largest is not None
    assert largest.p_value < 0.05 < largest.p_adjusted
    assert not largest.holds_after_adjustment
