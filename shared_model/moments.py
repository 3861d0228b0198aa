"""Sums from which the figures of a regression follow exactly: they add over sites, the figures do not."""

from dataclasses import astuple, dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from shared_model.errors import HemoFedError

UNIT_MMHG = 2.0**-24  # sums are integers in this unit (mmHg, and mmHg^2 for squares), so that they add in any order
GRID_MMHG = 2.0**-12  # pressures are rounded to 0.0002 mmHg first
LARGEST_MMHG = 1000.0


@dataclass(frozen=True)
class RegressionMoments:
    """Integer sums over patients of the measured pressure y and the predicted pressure f; `a + b` is that of
    both.

    All but `count` are in `UNIT_MMHG`. Patients must be disjoint between the moments that are added.
    """

    count: int = 0
    measured: int = 0
    predicted: int = 0
    measured_squared: int = 0
    predicted_squared: int = 0
    product: int = 0
    absolute_error: int = 0
    squared_error: int = 0

    def __add__(self, other: "RegressionMoments") -> "RegressionMoments":
        return RegressionMoments(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class RegressionFigures:
    """Figures in mmHg; None where undefined, with `reason`.

    `bias` is the mean of predicted minus measured. `slope` and `intercept` are those of measured on predicted
    (1 and 0 when calibrated). `rmse_of_training_mean` and `rmse_of_cohort_mean` are what a constant
    prediction reaches: the mean of the training patients, and the mean of these very patients (their standard
    deviation; no constant does better).
    """

    count: int
    mae: float | None = None
    rmse: float | None = None
    bias: float | None = None
    r_squared: float | None = None
    pearson_r: float | None = None
    slope: float | None = None
    intercept: float | None = None
    rmse_of_training_mean: float | None = None
    rmse_of_cohort_mean: float | None = None
    reason: str | None = None


def moments_of(measured_mmhg: ArrayLike, predicted_mmhg: ArrayLike) -> RegressionMoments:
    """Sums over patients, `(n,)` each, mmHg. Raises HemoFedError for NaN, unequal lengths or beyond 1000
    mmHg."""
    truth = np.asarray(measured_mmhg, dtype=np.float64)
    guess = np.asarray(predicted_mmhg, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != guess.shape:
        raise HemoFedError(f"measured {truth.shape} and predicted {guess.shape} must be two rows of equal length")
    if not (np.abs(truth) <= LARGEST_MMHG).all() or not (np.abs(guess) <= LARGEST_MMHG).all():
        raise HemoFedError(
            f"a measured or predicted pressure is NaN or beyond {LARGEST_MMHG:.0f} mmHg: mend the labels, "
            "or lower the learning rate if it is the prediction"
        )
    # On a grid of 2^-12 mmHg every square and product is a whole number of units: variances lose nothing to rounding.
    truth, guess = (np.rint(column / GRID_MMHG) * GRID_MMHG for column in (truth, guess))
    error = guess - truth
    columns = (truth, guess, truth**2, guess**2, truth * guess, np.abs(error), error**2)
    return RegressionMoments(len(truth), *(int(np.rint(c / UNIT_MMHG).astype(np.int64).sum()) for c in columns))


def regression_figures(moments: RegressionMoments, training_mean_mmhg: float) -> RegressionFigures:
    """Figures of the pooled patients; the RMSE is that of all of them together, not a mean over batches or
    sites."""
    n = moments.count
    if not n:
        return RegressionFigures(0, reason="no patients")
    mean_measured, mean_predicted = moments.measured * UNIT_MMHG / n, moments.predicted * UNIT_MMHG / n
    variance_measured = _covariance(n, moments.measured_squared, moments.measured, moments.measured)
    variance_predicted = _covariance(n, moments.predicted_squared, moments.predicted, moments.predicted)
    covariance = _covariance(n, moments.product, moments.measured, moments.predicted)
    mean_squared_error = moments.squared_error * UNIT_MMHG / n
    resolvable = 4 * UNIT_MMHG  # below this a variance is only the rounding of the sums
    varied, spread = variance_measured > resolvable, variance_predicted > resolvable
    slope = covariance / variance_predicted if spread else None
    reasons = [] if varied else ["all measured pressures are equal"]
    reasons += [] if spread else ["all predictions are equal"]
    return RegressionFigures(
        count=n,
        mae=moments.absolute_error * UNIT_MMHG / n,
        rmse=sqrt(mean_squared_error),
        bias=mean_predicted - mean_measured,
        r_squared=1 - mean_squared_error / variance_measured if varied else None,
        pearson_r=covariance / sqrt(variance_measured * variance_predicted) if varied and spread else None,
        slope=slope,
        intercept=None if slope is None else mean_measured - slope * mean_predicted,
        rmse_of_training_mean=sqrt(max(0.0, variance_measured) + (mean_measured - training_mean_mmhg) ** 2),
        rmse_of_cohort_mean=sqrt(max(0.0, variance_measured)),
        reason="; ".join(reasons) or None,
    )


def _covariance(n: int, product: int, first: int, second: int) -> float:
    """mean of the product minus product of the means, in mmHg^2: exact integers until the last division."""
    scale = round(1 / UNIT_MMHG)
    return (n * product * scale - first * second) / (n * n * scale * scale)
