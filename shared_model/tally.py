"""What a site counted on its test patients, and its form on the wire: named integer arrays, checked on
arrival."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared_model.bootstrap import BootstrapHistograms
from shared_model.errors import HemoFedError
from shared_model.histograms import (
    PROBABILITY_UNIT,
    Counts,
    ScoreHistogram,
    cells,
    checked_edges,
    clean_edges,
    from_cells,
)
from shared_model.moments import RegressionMoments
from shared_model.score_grid import FINE_BINS, edge_probability
from shared_model.subgroups import ALL, MOST_GROUPS, group_levels, partition_of

LARGEST_COUNT = 10**9
LARGEST_REPLICATES = 10_000
MOMENTS = 8
BOOTSTRAP = "bootstrap"
_FINE_EDGES = np.arange(FINE_BINS + 1, dtype=np.int64)

Arrays = dict[str, NDArray[Any]]
Summand = TypeVar("Summand", ScoreHistogram, RegressionMoments, int)


@dataclass(frozen=True, eq=False)
class SiteTally:
    """Counts by group name; `a + b` is the tally of both sites.

    `histograms`, `moments`: index ECGs, one a patient (empty where the task has none). `bootstrap`: all ECGs
    of group "all", None where it was not released. `withheld`: at how many of the `sites` the group was
    suppressed: its figures then lack these sites.
    """

    histograms: Mapping[str, ScoreHistogram] = field(default_factory=dict)
    moments: Mapping[str, RegressionMoments] = field(default_factory=dict)
    bootstrap: BootstrapHistograms | None = None
    withheld: Mapping[str, int] = field(default_factory=dict)
    sites: int = 1

    def __add__(self, other: "SiteTally") -> "SiteTally":
        both = self.bootstrap is not None and other.bootstrap is not None
        return SiteTally(
            _added(self.histograms, other.histograms),
            _added(self.moments, other.moments),
            self.bootstrap + other.bootstrap if both else None,  # type: ignore[operator]
            _added(self.withheld, other.withheld),
            self.sites + other.sites,
        )


def to_arrays(tally: SiteTally, fine: bool = False) -> Arrays:
    """A tally as arrays; the inverse of `from_arrays`. Nothing is protected here: see
    `client.evaluation.release`.

    Keys: "sites" `(1,)`; "GROUP|edges" `(cells + 1,)`, absent when `fine`; "GROUP|cells" `(cells, 4)` as in
    `histograms.cells`; "GROUP|moments" `(8,)`; "GROUP|withheld" `(1,)`; "bootstrap|positives",
    "bootstrap|negatives" `(1 + replicates, FINE_BINS) int32`. All others int64. When `fine`, arrays have the
    same shape at all sites and may be summed entry by entry.
    """
    arrays: Arrays = {"sites": np.array([tally.sites], np.int64)}
    for name, histogram in tally.histograms.items():
        edges = _FINE_EDGES if fine else _compact_edges(histogram)
        arrays[f"{name}|cells"] = cells(histogram, edges)
        if not fine:
            arrays[f"{name}|edges"] = edges
    for name, moments in tally.moments.items():
        arrays[f"{name}|moments"] = np.array(astuple(moments), np.int64)
    for name, sites in tally.withheld.items():
        arrays[f"{name}|withheld"] = np.array([sites], np.int64)
    if tally.bootstrap is not None:
        arrays["bootstrap|positives"] = tally.bootstrap.positives
        arrays["bootstrap|negatives"] = tally.bootstrap.negatives
    return arrays


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> SiteTally:
    """A tally from arrays that may come from anybody: names, shapes, types, signs, ranges and totals are
    checked.

    Raises HemoFedError at the first array that cannot be a site's count.
    """
    _checked_names(arrays)
    histograms, moments, withheld = {}, {}, {}
    for key, array in arrays.items():
        name, _, kind = key.partition("|")
        if kind == "cells":
            histograms[name] = _histogram(name, array, arrays.get(f"{name}|edges"))
        elif kind == "moments":
            moments[name] = _moments(name, array)
        elif kind == "withheld":
            withheld[name] = _single(key, array)
        elif kind == "edges" and f"{name}|cells" not in arrays:
            raise HemoFedError(f"{key}: cell edges without cells")
    tally = SiteTally(histograms, moments, _bootstrap(arrays), withheld, _single("sites", arrays["sites"]))
    _check_totals(tally)
    return tally


def merge(payloads: Sequence[Mapping[str, NDArray[Any]]]) -> SiteTally:
    """The tally of all sites, one payload each. Raises HemoFedError for a payload that cannot be true, or for
    none."""
    if not payloads:
        raise HemoFedError("no site sent counts: there is nothing to evaluate")
    return reduce(add, (from_arrays(payload) for payload in payloads))


def _added(first: Mapping[str, Summand], second: Mapping[str, Summand]) -> dict[str, Summand]:
    merged = dict(first)
    for name, value in second.items():
        merged[name] = merged[name] + value if name in merged else value
    return merged


def _compact_edges(histogram: ScoreHistogram) -> Counts:
    """Clean edges without those that only part two empty cells."""
    edges = clean_edges(histogram)
    filled = cells(histogram, edges)[:, :2].sum(axis=1) > 0
    kept: Counts = edges[np.concatenate([[True], filled[1:] | filled[:-1], [True]])]
    return kept


def _checked_names(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Every key is one this module writes, and there are not absurdly many."""
    if "sites" not in arrays:
        raise HemoFedError("a site's counts lack 'sites'")
    for key, array in arrays.items():
        name, _, kind = key.partition("|")
        if name == BOOTSTRAP and kind in ("positives", "negatives"):
            continue
        if key != "sites":
            if kind not in ("cells", "edges", "moments", "withheld"):
                raise HemoFedError(f"unknown array {key[:80]!r} in a site's counts")
            group_levels(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.int64:
            raise HemoFedError(f"{key[:80]}: counts must be int64 arrays")
    if len({key.partition("|")[0] for key in arrays}) > MOST_GROUPS + 2:
        raise HemoFedError(f"a site sent counts of more than {MOST_GROUPS} groups")


def _single(key: str, array: NDArray[Any]) -> int:
    if array.shape != (1,) or not 1 <= int(array[0]) <= LARGEST_COUNT:
        raise HemoFedError(f"{key}: must be one positive number")
    return int(array[0])


def _histogram(name: str, totals: NDArray[Any], edges: NDArray[Any] | None) -> ScoreHistogram:
    """Cells whose counts are non-negative and whose sums are possible for probabilities of their bins."""
    limits = _FINE_EDGES if edges is None else checked_edges(edges)
    if totals.shape != (len(limits) - 1, 4):
        raise HemoFedError(f"{name}: cells must have shape ({len(limits) - 1}, 4), not {totals.shape}")
    counts = totals[:, :2]
    if (totals < 0).any() or (counts > LARGEST_COUNT).any() or counts.sum() > LARGEST_COUNT:
        raise HemoFedError(f"{name}: a count is negative or beyond {LARGEST_COUNT}")
    size = counts.sum(axis=1).astype(np.float64)
    probabilities = np.array([edge_probability(int(edge)) for edge in limits])
    mean = np.divide(totals[:, 2] * PROBABILITY_UNIT, size, out=np.zeros_like(size), where=size > 0)
    slack = 1e-8
    outside = (mean < probabilities[:-1] - slack) | (mean > probabilities[1:] + slack)
    if (totals[size == 0, 2:] != 0).any() or (outside & (size > 0)).any():
        raise HemoFedError(f"{name}: a sum of probabilities does not fit its bin and count")
    if (totals[:, 3] * PROBABILITY_UNIT > size * (1 + slack)).any():
        raise HemoFedError(f"{name}: a sum of squared errors exceeds its count")
    return from_cells(limits, totals)


def _moments(name: str, array: NDArray[Any]) -> RegressionMoments:
    """Sums that some set of real pressures can have (non-negative squares, Cauchy-Schwarz)."""
    if array.shape != (MOMENTS,):
        raise HemoFedError(f"{name}: moments must have shape ({MOMENTS},), not {array.shape}")
    moments = RegressionMoments(*(int(value) for value in array))
    n, slack = moments.count, 2 * moments.count + 2  # each rounded sum may be off by half a unit a patient
    squares = (moments.measured_squared, moments.predicted_squared, moments.squared_error)
    if not 0 <= n <= LARGEST_COUNT or min(*squares, moments.absolute_error) < 0 or (n == 0 and any(array)):
        raise HemoFedError(f"{name}: a count or a sum of squares is negative, or sums of nobody are not zero")
    sums = (moments.measured, moments.predicted, moments.absolute_error)
    unit = 2**24  # moments.UNIT_MMHG
    for total, square in zip(sums, squares, strict=True):
        if max(abs(total) - slack, 0) ** 2 > n * (square + slack) * unit:
            raise HemoFedError(f"{name}: a sum does not fit its sum of squares")
    return moments


def _bootstrap(arrays: Mapping[str, NDArray[Any]]) -> BootstrapHistograms | None:
    positives, negatives = arrays.get("bootstrap|positives"), arrays.get("bootstrap|negatives")
    if positives is None and negatives is None:
        return None
    if positives is None or negatives is None:
        raise HemoFedError("bootstrap histograms came for one class only")
    for array in (positives, negatives):
        plausible = array.dtype == np.int32 and array.ndim == 2 and array.shape[1] == FINE_BINS
        if not plausible or not 1 <= len(array) <= LARGEST_REPLICATES + 1 or (array < 0).any():
            raise HemoFedError("bootstrap histograms must be non-negative int32 of shape (1 + replicates, bins)")
        if (array > 16 * array[0].astype(np.int64)).any():  # a Poisson(1) weight above 16 is not drawn
            raise HemoFedError("a bootstrap replicate counts ECGs that the sample does not have")
    return BootstrapHistograms(positives, negatives)


def _check_totals(tally: SiteTally) -> None:
    """The groups of a partition must sum to "all", or to less where some are withheld."""
    for name in set(tally.histograms) & set(tally.moments):
        if tally.histograms[name].size != tally.moments[name].count:
            raise HemoFedError(f"{name}: histogram and moments count different numbers of patients")
    if tally.sites == 1 and (clash := set(tally.withheld) & (set(tally.histograms) | set(tally.moments))):
        raise HemoFedError(f"{min(clash)}: both sent and withheld")
    sizes = {n: (h.positives, h.negatives) for n, h in tally.histograms.items()}
    _check_partition_sums(sizes, tally)
    _check_partition_sums({n: (m.count, 0) for n, m in tally.moments.items()}, tally)
    if tally.bootstrap is not None and ALL in sizes:
        ecgs = (int(tally.bootstrap.positives[0].sum()), int(tally.bootstrap.negatives[0].sum()))
        if ecgs[0] < sizes[ALL][0] or ecgs[1] < sizes[ALL][1]:
            raise HemoFedError("the bootstrap counts fewer ECGs than there are index ECGs")


def _check_partition_sums(sizes: Mapping[str, tuple[int, int]], tally: SiteTally) -> None:
    if not sizes:
        return
    if ALL not in sizes:
        raise HemoFedError("counts of subgroups came without those of all patients")
    partial = {partition_of(name) for name in tally.withheld}
    for partition in {partition_of(name) for name in sizes} - {ALL}:
        members = [size for name, size in sizes.items() if partition_of(name) == partition]
        total = tuple(sum(column) for column in zip(*members, strict=True))
        fits = total[0] <= sizes[ALL][0] and total[1] <= sizes[ALL][1]
        if not fits or (partition not in partial and total != sizes[ALL]):
            raise HemoFedError(f"the groups of '{partition}' do not sum to all patients")
