"""Differences between subgroups: the worst group, the largest gap, and how many comparisons stood behind
it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import norm

from shared_model.intervals import Z95, Estimate, absent


@dataclass(frozen=True)
class Gap:
    """`better` minus `worse` with its 95 % interval; `p_value` of no gap, alone and adjusted for all pairs
    (Holm)."""

    better: str
    worse: str
    difference: Estimate
    p_value: float
    p_adjusted: float

    @property
    def holds_after_adjustment(self) -> bool:
        return self.p_adjusted < 0.05


@dataclass(frozen=True)
class PartitionGaps:
    """Worst group and largest gap among the disjoint groups of a partition; None with a `note` where too few
    can be compared. `comparisons` is the number of pairs that `note` warns of."""

    worst: str | None
    largest: Gap | None
    comparisons: int
    note: str


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second for disjoint groups: SE = sqrt(SE1^2 + SE2^2), widened by both binning bounds."""
    if first.value is None or second.value is None:
        return absent(first.reason or second.reason or "no figure")
    value, bound = first.value - second.value, (first.bound or 0.0) + (second.bound or 0.0)
    if not first.standard_error or not second.standard_error:  # None, or 0 by perfect separation
        return Estimate(value, bound=bound, reason="a group is too small or separates perfectly: no interval")
    error = float(np.hypot(first.standard_error, second.standard_error))
    reach = Z95 * error + bound
    return Estimate(value, value - reach, value + reach, bound, error)


def partition_gaps(estimates: Mapping[str, Estimate]) -> PartitionGaps:
    """Compare the groups of one partition, `estimates` by group name (groups without a figure are passed
    over)."""
    known = {name: e.value for name, e in estimates.items() if e.value is not None}
    worst = min(known, key=known.__getitem__) if known else None
    tested = [pair for name, other in combinations(known, 2) if (pair := _pair(name, other, estimates))]
    if not tested:
        return PartitionGaps(worst, None, 0, "fewer than two groups have a figure with an interval")
    adjusted = holm([gap.p_value for gap in tested])
    gaps = [Gap(g.better, g.worse, g.difference, g.p_value, p) for g, p in zip(tested, adjusted, strict=True)]
    largest = max(gaps, key=lambda gap: gap.difference.value or 0.0)
    note = f"largest of {len(gaps)} gaps; the interval is for one comparison, the adjusted p for all"
    return PartitionGaps(worst, largest, len(gaps), note)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979, Scand J Stat 6:65), in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def _pair(name: str, other: str, estimates: Mapping[str, Estimate]) -> Gap | None:
    """The gap of two groups, better first; None where it has no interval."""
    gap = difference(estimates[name], estimates[other])
    if gap.value is None or not gap.standard_error:
        return None
    if gap.value < 0:
        return _pair(other, name, estimates)
    # the gap may be smaller than it looks by the binning bound
    p_value = 2 * float(norm.sf(max(gap.value - (gap.bound or 0.0), 0.0) / gap.standard_error))
    return Gap(name, other, gap, min(p_value, 1.0), min(p_value, 1.0))
