"""The release of counts with noise, inside the hospital: the disclosure tier `noised`."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from client.evaluation import Scores, index_ecgs
from shared_model.disclosure import check_tier
from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import Counts
from shared_model.noised import TABLE_SHAPE, judged_groups, noise_scale, noised_bins, tables_of, to_noised_arrays
from shared_model.study import Study
from shared_model.subgroups import UNKNOWN, Levels, group_levels
from shared_model.tally import Arrays
from shared_model.wire import Split

# Exact counts (n,), sensitivity and epsilon to noisy counts (n,).
OTHER = "other"
Noise = Callable[[Counts, int, float], Counts]


def release_noised(scores: Scores, study: Study, split: Split, tier: str, reserved_epsilon: float) -> Arrays:
    """The arrays that leave the hospital in a private study, for `shared_model.noised.from_noised_arrays`.

    Call it only after `reserved_epsilon` stands in the ledger: nothing here can be taken back, and a second call is a
    second release. `scores` must have outcomes and probabilities (of a regression, the pressure's score).

    Guarantee
    ---------
    As `noised_tables`, with the study's `release_epsilon`. Refused before anything is counted (HemoFedError, exit code
    DISCLOSURE_REFUSED): a study without `[privacy]`, a site whose tier is another one, and less epsilon reserved than
    the release costs.
    """
    check_tier(tier, 1, False, private=study.privacy is not None)
    assert study.privacy is not None  # check_tier refused it
    epsilon = study.privacy.release_epsilon
    if not reserved_epsilon >= epsilon:  # NaN is refused too
        raise HemoFedError(
            f"the release costs epsilon {epsilon:g} and {reserved_epsilon:g} is reserved for it",
            ExitCode.DISCLOSURE_REFUSED,
        )
    return to_noised_arrays(noised_tables(scores, judged_groups(study, split), epsilon))


def noised_tables(
    scores: Scores, groups: Sequence[str], epsilon: float, noise: Noise | None = None
) -> dict[str, Counts]:
    """Noisy counts `(2, NOISED_BINS) int64` of each of `groups`: without and with the condition, by score bin.

    `groups`: those of the study (`Evaluation.groups`), "all" among them. `noise` is replaced in tests only.

    Guarantee
    ---------
    Unit: a patient with all ECGs; neighbours: one patient more or less at this hospital. (epsilon, 0) differentially
    private. A patient is counted with one index ECG, which depends on that patient's ECGs alone, in one cell of each
    partition's table: `exact_tables` changes by an L1 of at most `tables_of(groups)`. Each cell, empty or not, has
    discrete Laplace noise of scale `tables_of(groups)` / epsilon, drawn exactly and from the operating system's entropy
    by OpenDP, whose own map is checked. Groups and bins are the study's, so which arrays leave says nothing either;
    no score, level or missing label of a patient makes the release fail.
    It is broken by a second release that the ledger does not hold, by groups or a threshold chosen after looking at
    exact counts, by a patient under two pseudonyms, and by a patient at two hospitals: their epsilons add.
    """
    exact = exact_tables(scores, groups)
    draw = discrete_laplace if noise is None else noise
    flat = np.concatenate([exact[name].ravel() for name in groups])
    noisy = draw(flat, tables_of(groups), epsilon)
    return dict(zip(groups, noisy.reshape(len(groups), *TABLE_SHAPE), strict=True))


def exact_tables(scores: Scores, groups: Sequence[str]) -> dict[str, Counts]:
    """Exact counts `(2, NOISED_BINS) int64` of each of `groups`. They must not leave: see `noised_tables`.

    ECGs without a label are left out before the index ECG is chosen. A level that no group names counts as "other", or
    as "unknown" where there is no such group, so that every patient is in one group of each partition.
    """
    if scores.outcomes is None or scores.probabilities is None:
        raise HemoFedError("noisy counts need outcomes with probabilities")
    rows = np.flatnonzero(~np.isnan(scores.outcomes))
    index = rows[index_ecgs(scores.patients[rows], scores.recorded_at[rows], scores.measured_at[rows])]
    cell = (scores.outcomes[index] > 0) * TABLE_SHAPE[1] + noised_bins(scores.probabilities[index])
    levels = {factor: named_levels(scores.attributes[factor][index], known) for factor, known in known_levels(groups)}
    tables = {}
    for name in groups:
        member = np.full(len(index), True)
        for factor, level in group_levels(name).items():
            member &= levels[factor] == level
        tables[name] = np.bincount(cell[member], minlength=np.prod(TABLE_SHAPE)).reshape(TABLE_SHAPE).astype(np.int64)
    return tables


def known_levels(groups: Sequence[str]) -> Iterable[tuple[str, set[str]]]:
    """Each factor of the groups with the levels that they name."""
    known: dict[str, set[str]] = {}
    for name in groups:
        for factor, level in group_levels(name).items():
            known.setdefault(factor, set()).add(level)
    return known.items()


def named_levels(levels: Levels, known: set[str]) -> Levels:
    """The levels `(n,)` with those that are not known turned into "other", or into "unknown"."""
    return np.where(np.isin(levels, sorted(known)), levels, OTHER if OTHER in known else UNKNOWN)


def discrete_laplace(counts: Counts, sensitivity: int, epsilon: float) -> Counts:
    """Counts `(n,)` plus discrete Laplace noise of scale `sensitivity` / `epsilon`, by OpenDP (exact sampler).

    Raises HemoFedError where OpenDP's own bound for this sensitivity is above `epsilon`.
    """
    import opendp.prelude as dp  # takes seconds, and is needed twice a study

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    mechanism = space >> dp.m.then_laplace(noise_scale(sensitivity, epsilon))
    if not mechanism.map(sensitivity) <= epsilon:
        raise HemoFedError("the noise of this release would not hold its epsilon", ExitCode.DISCLOSURE_REFUSED)
    return np.array(mechanism(counts.tolist()), np.int64)
