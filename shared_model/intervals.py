"""A figure with its uncertainty, and the textbook intervals the figures use."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm

Z95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Estimate:
    """A figure, or the reason why there is none (`value` None). Never NaN.

    `low`, `high`: 95 % interval of sampling, already widened by `bound`; None where it cannot be had (see
    `reason`). `bound`: what binning and merging of cells may add: the figure of the raw scores lies within
    value +- bound. `standard_error`: of sampling alone.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    standard_error: float | None = None
    reason: str | None = None


def absent(reason: str) -> Estimate:
    """No figure, and why."""
    return Estimate(value=None, reason=reason)


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, J Am Stat Assoc 22:209); `trials` > 0."""
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def logit_interval(low: float, high: float, value: float, error: float) -> tuple[float, float]:
    """95 % interval on the logit scale about a value in (0, 1) known to lie between `low` and `high`.

    `error` is the standard error at `value`, carried to the logit scale by the delta method (Pepe 2003,
    section 5.2.5).
    """
    reach = Z95 * error / (value * (1 - value))
    return (
        float(expit(logit(low) - reach)) if low > 0 else 0.0,
        float(expit(logit(high) + reach)) if high < 1 else 1.0,
    )


def newcombe_limits(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Score-type 95 % interval of an AUROC, for the case that DeLong's variance is zero (perfect separation).

    Newcombe 2006, Stat Med 25:559, method 5: the limits t solve |area - t| = z sqrt(V(t)) with Hanley and
    McNeil's variance V, in which both class sizes are replaced by their mean.
    """
    share = (positives + negatives) / 2 - 1

    def variance(t: float) -> float:
        spread = 1 + share * (1 - t) / (2 - t) + share * t / (1 + t)
        return t * (1 - t) * spread / (positives * negatives)

    def excess(t: float) -> float:
        return (area - t) ** 2 - Z95**2 * variance(t)

    tiny = 1e-12
    low = float(brentq(excess, tiny, area - tiny)) if area > 2 * tiny and excess(tiny) > 0 else 0.0
    high = float(brentq(excess, area + tiny, 1 - tiny)) if area < 1 - 2 * tiny and excess(1 - tiny) > 0 else 1.0
    return low, high
