"""Intervals when a patient has several ECGs: a Poisson bootstrap over patients that adds over sites.

Each replicate gives every patient a Poisson(1) weight that all ECGs of the patient share (Hanley and
MacGibbon 2006, Comput Methods Programs Biomed 83:57; Chamandy 2012, Google). Patients are in one site only,
so the sum over sites of replicate r is replicate r of the pooled patients. The weights follow from the
patient's key, so two models that are scored on the same patients are compared on the same replicates.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.stats import poisson

from shared_model.errors import HemoFedError
from shared_model.histograms import ScoreHistogram, histogram_of
from shared_model.intervals import Estimate, absent
from shared_model.score_grid import FINE_BINS, bin_of

FEWEST_USABLE = 0.95  # share of the replicates that must contain both classes for an interval to be given
_POISSON_STEPS: NDArray[np.float64] = poisson.cdf(np.arange(16), 1.0)

Weights = NDArray[np.uint8]
Replicates = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class BootstrapHistograms:
    """Score histograms of all replicates; `a + b` is that of both sets of patients.

    `positives`, `negatives`: `(1 + replicates, FINE_BINS) int32`, ECGs counted by their patient's weight. Row
    0 is the sample itself, where every weight is 1.

    Guarantee: none. Replicates of a few patients come close to naming them, so these tables leave a site only
    inside a secure sum (`client.evaluation.release` refuses anything else). All parties must draw with the
    same seed.
    """

    positives: Replicates
    negatives: Replicates

    def __post_init__(self) -> None:
        shape = self.positives.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] != FINE_BINS or self.negatives.shape != shape:
            raise HemoFedError(f"bootstrap histograms must both be (1 + replicates, {FINE_BINS}), not {shape}")

    def __add__(self, other: "BootstrapHistograms") -> "BootstrapHistograms":
        if self.positives.shape != other.positives.shape:
            raise HemoFedError("bootstrap histograms with different numbers of replicates cannot be added")
        return BootstrapHistograms(self.positives + other.positives, self.negatives + other.negatives)

    @property
    def replicates(self) -> int:
        return len(self.positives) - 1


def bootstrap_weights(patient_keys: Sequence[str], replicates: int, seed: int) -> Weights:
    """`(patients, replicates) uint8` Poisson(1) weights, each row fixed by the patient's key and the seed
    alone.

    The key starts a SplitMix64 stream (Steele 2014, OOPSLA, fig. 17), whose numbers are turned by the inverse
    of the Poisson distribution; so the weights do not depend on the order of patients or on a library's
    generator.
    """
    digests = [hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in patient_keys]
    start = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    step = np.arange(1, replicates + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = start[:, None] + step  # uint64 arithmetic wraps, as SplitMix64 asks
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    weights: Weights = np.searchsorted(_POISSON_STEPS, uniform, side="right").astype(np.uint8)
    return weights


def bootstrap_histograms(
    probabilities: ArrayLike, outcomes: ArrayLike, patients: ArrayLike, weights: Weights
) -> BootstrapHistograms:
    """Histograms of all ECGs. `probabilities`, `outcomes`, `patients` are `(ECG,)`; a patient is a row of
    `weights`.

    Outcomes are 0 or 1, one an ECG. Raises HemoFedError as `histogram_of` does, or for a patient without
    weights.
    """
    scores, codes = np.asarray(probabilities, dtype=np.float64), np.asarray(patients)
    positive = np.asarray(outcomes, dtype=np.float64) == 1.0
    histogram_of(scores, outcomes)  # the same checks
    if codes.shape != scores.shape or (codes.size and (codes.min() < 0 or codes.max() >= len(weights))):
        raise HemoFedError("each ECG needs the code of a patient that has bootstrap weights")
    bins = bin_of(scores)
    with_sample = np.concatenate([np.ones((len(weights), 1), np.int32), weights.astype(np.int32)], axis=1)

    def count(chosen: NDArray[np.bool_]) -> Replicates:
        ones = np.ones(int(chosen.sum()), np.int32)
        ecgs = csr_array((ones, (bins[chosen], codes[chosen])), shape=(FINE_BINS, len(weights)))
        return np.ascontiguousarray((ecgs @ with_sample).T, dtype=np.int32)

    return BootstrapHistograms(count(positive), count(~positive))


def sample_histogram(bootstrap: BootstrapHistograms) -> ScoreHistogram:
    """The all-ECG histogram of the sample itself (row 0); its calibration sums are not kept and are 0."""
    table = np.zeros((6, FINE_BINS), np.int64)
    table[0] = table[1] = bootstrap.positives[0]
    table[2] = table[3] = bootstrap.negatives[0]
    return ScoreHistogram(table)


def replicate_aurocs(bootstrap: BootstrapHistograms) -> NDArray[np.float64]:
    """`(1 + replicates,)` AUROCs, the sample's first; NaN for a replicate that lacks a class."""
    negatives = bootstrap.negatives
    below = np.cumsum(negatives, axis=1, dtype=np.float64)
    below -= negatives / 2
    in_order = np.einsum("rb,rb->r", bootstrap.positives, below)  # r replicate, b bin
    pairs = bootstrap.positives.sum(axis=1, dtype=np.float64) * negatives.sum(axis=1, dtype=np.float64)
    areas: NDArray[np.float64] = np.full(len(pairs), np.nan)
    np.divide(in_order, pairs, out=areas, where=pairs > 0)
    return areas


def bootstrap_auroc(bootstrap: BootstrapHistograms) -> Estimate:
    """All-ECG AUROC with the 95 % percentile interval over patients."""
    return _percentiles(replicate_aurocs(bootstrap), _bound(bootstrap))


def bootstrap_difference(first: BootstrapHistograms, second: BootstrapHistograms) -> Estimate:
    """AUROC of `first` minus that of `second`, paired: both models scored on the same patients with the same
    seed."""
    return mean_site_difference([(first, second)])


def mean_site_difference(sites: Sequence[tuple[BootstrapHistograms, BootstrapHistograms]]) -> Estimate:
    """Mean over sites of (AUROC of the first model minus that of the second) at that site, paired, every site
    equal.

    Sites where the sample lacks a class are left out. Use it for "federated minus local-only".
    """
    usable = []
    for first, second in sites:
        _same_patients(first, second)
        difference = replicate_aurocs(first) - replicate_aurocs(second)
        if not np.isnan(difference[0]):
            usable.append((difference, _bound(first) + _bound(second)))
    if not usable:
        return absent("no site has both classes")
    differences = np.mean([difference for difference, _ in usable], axis=0)
    return _percentiles(differences, float(np.mean([bound for _, bound in usable])))


def _percentiles(values: NDArray[np.float64], bound: float) -> Estimate:
    """Sample value and percentile interval; the sample is entry 0."""
    if np.isnan(values[0]):
        return absent("a class is empty")
    usable = values[1:][~np.isnan(values[1:])]
    if len(usable) < 2 or len(usable) < FEWEST_USABLE * (len(values) - 1):
        return Estimate(float(values[0]), bound=bound, reason="too few replicates contain both classes")
    low, high = np.quantile(usable, [0.025, 0.975])
    return Estimate(float(values[0]), float(low) - bound, float(high) + bound, bound, float(usable.std(ddof=1)))


def _bound(bootstrap: BootstrapHistograms) -> float:
    """Binning bound of the sample's AUROC; 0 where a class is empty."""
    positives, negatives = (
        bootstrap.positives[0].astype(np.float64),
        bootstrap.negatives[0].astype(np.float64),
    )
    return float(positives @ negatives / max(2 * positives.sum() * negatives.sum(), 1.0))


def _same_patients(first: BootstrapHistograms, second: BootstrapHistograms) -> None:
    same = first.replicates == second.replicates
    for a, b in ((first.positives, second.positives), (first.negatives, second.negatives)):
        same = same and np.array_equal(a.sum(axis=1), b.sum(axis=1))
    if not same:
        raise HemoFedError(
            "two models can only be compared on the same ECGs with the same bootstrap seed: score both on one test set"
        )
