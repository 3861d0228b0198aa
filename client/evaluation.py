"""Scores become counts, inside the hospital; `release` decides in which form they may leave it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from shared_model.bootstrap import bootstrap_histograms, bootstrap_weights
from shared_model.disclosure import check_tier, protect, suppressed_groups
from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import empty_histogram, histogram_of
from shared_model.moments import RegressionMoments, moments_of
from shared_model.subgroups import PARTITIONS, Levels, group_masks
from shared_model.tally import Arrays, SiteTally, to_arrays

PRESSURE_SCALE_MMHG = 4.0


@dataclass(frozen=True, eq=False)
class Scores:
    """n test ECGs of a site with what the model said of them. Arrays of length n.

    `patients` are codes into `patient_keys`; `recorded_at` and `measured_at` are unix seconds, NaN unknown;
    `attributes` as from `subgroups.attributes_of`. For classification `outcomes` (0, 1, NaN unlabelled) and
    `probabilities` (0 to 1, never logits); for regression `measured_mmhg` (NaN unlabelled) and
    `predicted_mmhg`; both pairs may be given, labelled on the same records.
    """

    patients: NDArray[np.int64]
    patient_keys: Sequence[str]
    recorded_at: NDArray[np.float64]
    measured_at: NDArray[np.float64]
    attributes: Mapping[str, Levels]
    outcomes: NDArray[np.float64] | None = None
    probabilities: NDArray[np.float64] | None = None
    measured_mmhg: NDArray[np.float64] | None = None
    predicted_mmhg: NDArray[np.float64] | None = None


def count(scores: Scores, partitions: Sequence[str] = PARTITIONS, replicates: int = 200, seed: int = 0) -> SiteTally:
    """Count a site's scored ECGs: index ECGs by group, and all ECGs by bootstrap replicate (none with 0
    replicates).

    Unlabelled ECGs are left out before the index ECG is chosen. Raises HemoFedError for scores that are no
    probabilities, for arrays that do not match, and for a partition over an unknown factor.
    """
    labelled = _labelled(scores)
    rows = np.flatnonzero(labelled)
    index = rows[index_ecgs(scores.patients[rows], scores.recorded_at[rows], scores.measured_at[rows])]
    attributes = {factor: levels[index] for factor, levels in scores.attributes.items()}
    masks = group_masks(attributes, partitions)
    members = {name: index[mask] for name, mask in masks.items()}
    histograms, moments, bootstrap = {}, {}, None
    if scores.probabilities is not None and scores.outcomes is not None:
        probabilities, outcomes = scores.probabilities, scores.outcomes
        histograms = {name: histogram_of(probabilities[m], outcomes[m]) for name, m in members.items()}
        if replicates:
            weights = bootstrap_weights(scores.patient_keys, replicates, seed)
            bootstrap = bootstrap_histograms(probabilities[rows], outcomes[rows], scores.patients[rows], weights)
    if scores.measured_mmhg is not None and scores.predicted_mmhg is not None:
        truth, guess = scores.measured_mmhg, scores.predicted_mmhg
        moments = {name: moments_of(truth[m], guess[m]) for name, m in members.items()}
    return SiteTally(histograms, moments, bootstrap)


def index_ecgs(patients: ArrayLike, recorded_at: ArrayLike, measured_at: ArrayLike) -> NDArray[np.int64]:
    """Positions, ascending, of one ECG a patient: the last at or before the measurement, else the first.

    All `(n,)`; times in unix seconds, NaN unknown. ECGs of unknown time rank last among the first; equal
    times go by position.
    """
    codes = np.asarray(patients)
    recorded = np.asarray(recorded_at, dtype=np.float64)
    before = recorded <= np.asarray(measured_at, dtype=np.float64)  # False where either is unknown
    ascending = np.where(np.isnan(recorded), np.inf, recorded)
    # per patient: those before the measurement first, the latest leading; then the rest, earliest leading
    order = np.lexsort((np.arange(len(codes)), np.where(before, -ascending, ascending), ~before, codes))
    first = np.ones(len(codes), dtype=np.bool_)
    first[1:] = codes[order][1:] != codes[order][:-1]
    return np.sort(order[first]).astype(np.int64)


def pressure_score(predicted_mmhg: ArrayLike, threshold_mmhg: float) -> NDArray[np.float64]:
    """Predicted pressure as a score from 0 to 1 that ranks alike and is 0.5 at the threshold, for the AUROC
    and 2x2 table of a regression. It is no calibrated probability: leave its Brier score and calibration
    out."""
    return np.asarray(expit((np.asarray(predicted_mmhg, np.float64) - threshold_mmhg) / PRESSURE_SCALE_MMHG))


def release(
    counts: SiteTally,
    tier: str | None,
    minimum_cell: int | None,
    secure_sum_available: bool = False,
    threshold_edge: int | None = None,
    groups: Sequence[str] | None = None,
) -> Arrays:
    """The arrays that may leave the hospital under its tier, for `shared_model.tally.merge`.

    `threshold_edge`: the study's threshold on the score grid, kept as a cell edge where counts allow
    (`clear`). `groups`: all groups of the study (`subgroups.group_names`), for a secure sum, in which all
    sites must send the same arrays.

    Guarantee
    ---------
    `clear`: what `disclosure.protect` states; groups that are suppressed are named,
    without counts; bootstrap replicates stay. `masked`: exact fine counts, safe only if the caller hands
    these arrays to the secure sum and to nothing else, and the centre applies `disclosure.suppress_published`
    to the sum. Everything else is refused (HemoFedError, exit code DISCLOSURE_REFUSED): `noised` too, whose counts are
    made by `client.noised.release_noised` in private studies alone.
    """
    chosen = check_tier(tier, minimum_cell, secure_sum_available)
    if chosen == "masked":
        return to_arrays(_padded(counts, groups), fine=True)
    assert minimum_cell is not None  # check_tier refused it
    histograms, suppressed = protect(counts.histograms, minimum_cell, threshold_edge)
    if not counts.histograms:
        sizes = {name: (m.count, m.count) for name, m in counts.moments.items()}
        suppressed = suppressed_groups(sizes, minimum_cell, whole_intersections=True)
    moments = {name: m for name, m in counts.moments.items() if name not in suppressed}
    return to_arrays(SiteTally(histograms, moments, None, dict.fromkeys(suppressed, 1)))


def _padded(counts: SiteTally, groups: Sequence[str] | None) -> SiteTally:
    """The tally with an entry for every group of the study, so that all sites send the same arrays."""
    if groups is None:
        return counts
    if extra := (set(counts.histograms) | set(counts.moments)) - set(groups):
        raise HemoFedError(
            f"group '{min(extra)}' is not one of the study's: map its level to 'other' (restrict_levels)",
            ExitCode.DISCLOSURE_REFUSED,
        )
    histograms = {n: counts.histograms.get(n, empty_histogram()) for n in groups} if counts.histograms else {}
    moments = {n: counts.moments.get(n, RegressionMoments()) for n in groups} if counts.moments else {}
    return SiteTally(histograms, moments, counts.bootstrap)


def _labelled(scores: Scores) -> NDArray[np.bool_]:
    """Which records have a label, after checking that the arrays go together."""
    n = len(scores.patients)
    pairs = [(scores.outcomes, scores.probabilities), (scores.measured_mmhg, scores.predicted_mmhg)]
    given = [(labels, values) for labels, values in pairs if labels is not None and values is not None]
    if not given or any((labels is None) != (values is None) for labels, values in pairs):
        raise HemoFedError("evaluation needs outcomes with probabilities, or measured with predicted pressures")
    columns = [scores.recorded_at, scores.measured_at, *scores.attributes.values()]
    if any(len(column) != n for column in [*columns, *(array for pair in given for array in pair)]):
        raise HemoFedError("the arrays of scored records differ in length")
    labelled = [~np.isnan(np.asarray(labels, np.float64)) for labels, _ in given]
    if not all(np.array_equal(labelled[0], other) for other in labelled):
        raise HemoFedError("outcomes and measured pressures must be labelled on the same records")
    return labelled[0]
