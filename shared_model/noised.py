"""Counts with noise, the disclosure tier `noised`: the grid they are made on, their form on the wire, and their sum.

Each test patient is counted with one index ECG, in one cell of each table. A table is a partition of the patients
("all", "sex", ...): (group of the partition) x (without or with the condition) x (score bin). Groups and bins follow
from the study alone, never from who was seen. Every cell has discrete Laplace noise, empty ones too, so a count may
be negative, and groups need not add up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_model.errors import HemoFedError
from shared_model.histograms import Counts
from shared_model.score_grid import FINE_BINS, bin_of, snap_threshold
from shared_model.study import Study
from shared_model.subgroups import ALL, partition_of
from shared_model.tally import LARGEST_COUNT, Arrays
from shared_model.wire import Split

# Logits -2, -1, -0.5, 0, 0.5, 1, 2: edges of the coarse grid too. Every further bin brings its own noise into each sum,
# and 8 still show a curve. They are narrow in the middle, where the scores of a weak model pile up, and wide outside,
# where those of an over-confident one lie; even bins of 2 logits would lose up to 0.1 of the AUROC.
NOISED_EDGES: Counts = np.array([0, 384, 448, 480, 512, 544, 576, 640, FINE_BINS], np.int64)
NOISED_BINS = len(NOISED_EDGES) - 1
CLASSES = 2  # row 0: without the condition, row 1: with it
TABLE_SHAPE = (CLASSES, NOISED_BINS)
KIND = "noised"
# A margin of 1e-12 keeps the scale at or above the quotient whatever way the division is rounded.
ROUNDING_MARGIN = 1 + 1e-12
SHOWN_DEVIATIONS = 4  # a total is used where it is at least this many SD of its own noise
IMPLAUSIBLE_DEVIATIONS = 15  # and 10 patients: honest noise passes that less than once in a million releases
IMPLAUSIBLE_PATIENTS = 10


@dataclass(frozen=True, eq=False)
class NoisedTally:
    """Noisy counts `(2, NOISED_BINS) int64` of every group of the study; `a + b` is the sum over the sites of both.

    Rows: without the condition, with it. `scale` is that of the discrete Laplace noise in each cell of one site, in
    patients. Counts may be negative. Noise variances add over sites.
    """

    tables: Mapping[str, Counts]
    scale: float
    sites: int = 1

    def __add__(self, other: "NoisedTally") -> "NoisedTally":
        if set(self.tables) != set(other.tables) or self.scale != other.scale:
            raise HemoFedError("noisy counts of different groups or of different noise cannot be added")
        summed = {name: table + other.tables[name] for name, table in self.tables.items()}
        return NoisedTally(summed, self.scale, self.sites + other.sites)

    @property
    def variance(self) -> float:
        """Variance of the noise in one cell, in patients squared."""
        return self.sites * noise_variance(self.scale)


def judged_groups(study: Study, split: Split) -> tuple[str, ...]:
    """The groups that are counted on a split: of validation patients "all" alone."""
    return study.evaluation.groups if split == "test" else (ALL,)


def tables_of(groups: Sequence[str]) -> int:
    """How many tables these groups make: the number of their partitions, "all" included.

    This is the L1 sensitivity of the counts: a patient is in one group of each partition, and in one cell of it.
    """
    return len({partition_of(name) for name in groups})


def noise_scale(tables: int, epsilon: float) -> float:
    """Scale of the discrete Laplace noise in each cell, in patients, for which `tables` tables together cost
    `epsilon`."""
    return tables / epsilon * ROUNDING_MARGIN


def noise_variance(scale: float) -> float:
    """Variance of discrete Laplace noise: P(k) = (1 - a) / (1 + a) * a^|k| with a = exp(-1 / scale)."""
    return 2 * math.exp(-1 / scale) / math.expm1(-1 / scale) ** 2


def smallest_total(variance: float, minimum_cell: int, cells: int = NOISED_BINS) -> float:
    """The least noisy total over `cells` cells that a figure is made from: `minimum_cell`, or 4 SD of its own noise.

    A ratio over a total that is mostly noise has no interval that could be trusted.
    """
    return max(float(minimum_cell), SHOWN_DEVIATIONS * math.sqrt(cells * variance))


def noised_bins(probabilities: ArrayLike) -> NDArray[np.int64]:
    """Bin, 0 to NOISED_BINS - 1, of each probability; NaN and anything below 0 count as 0, above 1 as 1.

    Nothing is refused: a failure would say something of a patient that no noise covers.
    """
    values = np.asarray(probabilities, np.float64)
    kept = np.clip(np.where(np.isnan(values), 0.0, values), 0.0, 1.0)
    return np.searchsorted(NOISED_EDGES[1:-1], bin_of(kept), side="right").astype(np.int64)


def middle_edge() -> int:
    """The edge at probability 0.5, where a regression's threshold lies."""
    return snap_threshold(0.5)


def to_noised_arrays(tables: Mapping[str, Counts]) -> Arrays:
    """Noisy counts for the wire: "GROUP|noised" `(2, NOISED_BINS) int64`. Adds no noise: see `client.noised`."""
    return {f"{name}|{KIND}": table for name, table in tables.items()}


def from_noised_arrays(arrays: Mapping[str, NDArray[Any]], groups: Sequence[str], scale: float) -> NoisedTally:
    """One site's noisy counts from arrays that may come from anybody.

    Raises HemoFedError where the groups are not exactly those of the study, for another shape or type, a count beyond
    10^9 either way, or groups of a partition whose sum is further from "all" than noise could bring it.
    """
    expected = {f"{name}|{KIND}": name for name in groups}
    if strange := set(arrays) ^ set(expected):
        raise HemoFedError(f"noisy counts must be of the study's own groups: {min(strange)[:80]!r} is odd or lacking")
    tables = {}
    for key, name in expected.items():
        array = arrays[key]
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.shape != TABLE_SHAPE:
            raise HemoFedError(f"{key}: noisy counts must be int64 of shape {TABLE_SHAPE}")
        if (array > LARGEST_COUNT).any() or (array < -LARGEST_COUNT).any():
            raise HemoFedError(f"{key}: a noisy count is beyond {LARGEST_COUNT}")
        tables[name] = array
    _check_sums(tables, scale)
    return NoisedTally(tables, scale)


def _check_sums(tables: Mapping[str, Counts], scale: float) -> None:
    """Every partition counts the same patients in each bin and class; what is left is the noise of its cells."""
    for partition in {partition_of(name) for name in tables} - {ALL}:
        members = [table for name, table in tables.items() if partition_of(name) == partition]
        difference = np.sum(members, axis=0) - tables[ALL]
        deviation = math.sqrt((len(members) + 1) * noise_variance(scale))
        if np.abs(difference).max() > IMPLAUSIBLE_PATIENTS + IMPLAUSIBLE_DEVIATIONS * deviation:
            raise HemoFedError(f"the groups of '{partition}' are further from all patients than noise can bring them")
