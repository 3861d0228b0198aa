"""Which ECGs meet in a batch: pairs belong together, no patient is in a batch twice, events part before from after."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError
from shared_model.objectives.draws import (
    DAY_S,
    DRAWS,
    Cohort,
    DrawSettings,
    around_events,
    drawable_patients,
    patient_pairs,
    whole_patients,
)

USUAL = DrawSettings()


def cohort(ecgs_of_patients: list[int], seed: int = 0) -> Cohort:
    """Patients with so many ECGs each, in a shuffled order; rows do not begin at 0."""
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat(np.arange(len(ecgs_of_patients)) + 5, ecgs_of_patients))
    n = len(patient)
    return Cohort(1000 + rng.permutation(n), patient, np.arange(n), rng.uniform(0, 100 * DAY_S, n), np.full(n, np.nan))


def patients_of(drawn_from: Cohort, rows: NDArray[np.int64]) -> list[int]:
    owner = dict(zip(drawn_from.rows.tolist(), drawn_from.patient.tolist(), strict=True))
    return [owner[row] for row in rows.tolist()]


@settings(deadline=None, max_examples=60)
@given(
    ecgs=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    size=st.integers(2, 20),
    name=st.sampled_from(sorted(set(DRAWS) - {"around_events"})),
    seed=st.integers(0, 99),
)
def test_a_draw_gives_rows_of_the_cohort_under_its_seed(ecgs: list[int], size: int, name: str, seed: int) -> None:
    group = cohort(ecgs, seed)
    if name == "patient_pairs" and sum(count > 1 for count in ecgs) < 2:
        with pytest.raises(HemoFedError):
            list(DRAWS[name](group, size, 5, seed, USUAL))
        return
    batches = list(DRAWS[name](group, size, 5, seed, USUAL))
    assert len(batches) == 5
    for rows in batches:
        assert 1 <= len(rows) <= max(size, 2)
        assert set(rows.tolist()) <= set(group.rows.tolist())
        assert len(set(rows.tolist())) == len(rows)
    again = list(DRAWS[name](group, size, 5, seed, USUAL))
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_shuffled_sees_every_ecg_once_an_epoch() -> None:
    group = cohort([1] * 12)
    batches = list(DRAWS["shuffled"](group, 4, 6, 0, USUAL))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == sorted(group.rows.tolist())
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:]))


def test_pairs_are_two_ecgs_of_one_patient_and_no_patient_comes_twice() -> None:
    group = cohort([1, 2, 3, 1, 5, 2, 4])
    for rows in patient_pairs(group, 8, 20, 0, USUAL):
        owners = patients_of(group, rows)
        half = len(owners) // 2
        assert owners[:half] == owners[half:]
        assert len(set(owners[:half])) == half == 4
        assert len(set(rows.tolist())) == len(rows)


def test_whole_patients_brings_a_patients_ecgs_together_up_to_the_cap() -> None:
    group = cohort([6, 2, 3, 1, 1, 5])
    seen: set[int] = set()
    for rows in whole_patients(group, 10, 30, 0, DrawSettings(ecgs_per_patient=3)):
        owners = patients_of(group, rows)
        assert len(rows) == 10  # of 14 that the cap leaves
        counts = {owner: owners.count(owner) for owner in owners}
        whole = {owner: min(3, int((group.patient == owner).sum())) for owner in counts}
        cut = [owner for owner in counts if counts[owner] != whole[owner]]
        assert len(cut) <= 1  # only the last patient of a batch may be cut
        seen |= set(rows.tolist())
    assert seen == set(group.rows.tolist())  # chance leaves none of them out for good


def events(at_days: list[float], event_days: list[float | None], patient: list[int]) -> Cohort:
    event = np.array([np.nan if day is None else day for day in event_days])
    n = len(at_days)
    return Cohort(np.arange(n), np.array(patient), np.arange(n), np.array(at_days) * DAY_S, event * DAY_S)


def two_alike(at_days: list[float], event_days: list[float | None]) -> Cohort:
    """Two patients with the same ECGs and events: of one alone nothing can be told apart."""
    return events(at_days * 2, event_days * 2, [1] * len(at_days) + [2] * len(at_days))


def pairs_of(batches: Iterable[NDArray[np.int64]]) -> set[tuple[int, int]]:
    return {pair for rows in batches for pair in zip(*np.split(rows, 2), strict=True)}


def test_an_event_parts_the_last_ecg_before_from_the_first_after() -> None:
    group = two_alike([0.0, 5.0, 6.0, 9.0, 40.0], [None, 5.5, None, None, None])
    assert pairs_of(around_events(group, 4, 10, 0, USUAL)) == {(1, 2), (6, 7)}


def test_ecgs_outside_the_window_make_no_pair() -> None:
    group = two_alike([0.0, 10.0], [0.1, None])
    assert pairs_of(around_events(group, 4, 1, 0, DrawSettings(window_days=10))) == {(0, 1), (2, 3)}
    with pytest.raises(HemoFedError, match="within 7 days") as caught:
        list(around_events(group, 4, 1, 0, DrawSettings(window_days=7)))
    assert caught.value.exit_code == ExitCode.NO_USABLE_PATIENTS


def test_the_control_splits_between_any_two_ecgs_and_needs_no_event() -> None:
    group = two_alike([0.0, 10.0, 200.0], [None] * 3)
    with pytest.raises(HemoFedError):
        list(around_events(group, 4, 1, 0, USUAL))
    drawn = pairs_of(around_events(group, 4, 5, 0, DrawSettings(random_split=True)))
    assert drawn == {(0, 1), (3, 4)}  # 190 days are more than twice the window


@pytest.mark.parametrize("name", ["patient_pairs", "around_events"])
def test_ecgs_of_one_record_are_no_pair(name: str) -> None:
    """A 60 s record is stored as six ECGs of one time; a batch of such pairs would teach nothing."""
    group = replace(two_alike([0.0] * 3 + [1.0], [None] * 4), record=np.array([0, 0, 0, 1, 2, 2, 2, 3]))
    control = DrawSettings(random_split=True)
    for rows in DRAWS[name](group, 4, 20, 0, control):
        for one, other in pairs_of([rows]):
            assert group.record[one] != group.record[other]
    longer = replace(group, record=np.array([0, 0, 0, 0, 2, 2, 2, 2]))
    assert drawable_patients(name, longer, control) == 0
    with pytest.raises(HemoFedError):
        list(DRAWS[name](longer, 4, 1, 0, control))


def test_one_patient_with_pairs_is_nobody_to_learn_from() -> None:
    """A pair is told from other patients' pairs: such a site would send back what it got, at full weight."""
    assert drawable_patients("patient_pairs", cohort([3, 1, 1]), USUAL) == 0
    assert drawable_patients("patient_pairs", cohort([3, 2, 1]), USUAL) == 2


def test_no_batch_of_whole_patients_is_of_one_patient_where_there_are_more() -> None:
    for rows in whole_patients(cohort([2] * 9), 4, 40, 0, USUAL):
        assert len(rows) == 4


def test_an_event_of_another_patient_parts_nothing() -> None:
    group = events([0.0, 10.0, 4.0], [None, None, 5.0], [1, 1, 2])
    with pytest.raises(HemoFedError):
        list(around_events(group, 4, 1, 0, USUAL))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999))
def test_every_pair_around_events_is_of_one_patient_before_then_after_one_of_its_events(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 30
    patient = rng.integers(0, 6, n)
    at = rng.uniform(0, 60, n)
    event = np.where(rng.random(n) < 0.4, at + rng.uniform(0, 1, n), np.nan)
    group = Cohort(np.arange(n), patient, np.arange(n), at * DAY_S, event * DAY_S)
    try:
        batches = list(around_events(group, 8, 5, seed, DrawSettings(window_days=20)))
    except HemoFedError:
        return
    for rows in batches:
        half = len(rows) // 2
        assert len(set(patient[rows[:half]])) == half
        for before, after in zip(rows[:half], rows[half:], strict=True):
            assert patient[before] == patient[after]
            own = event[(patient == patient[before]) & ~np.isnan(event)]
            near = (at[before] <= own) & (own < at[after]) & (own - at[before] <= 20) & (at[after] - own <= 20)
            assert near.any()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), name=st.sampled_from(sorted(DRAWS)))
def test_the_patients_a_draw_can_use_are_those_it_draws(seed: int, name: str) -> None:
    """Counted before a study begins, so that a site with nobody to learn from is not asked."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    at = rng.uniform(0, 60, n)
    event = np.where(rng.random(n) < 0.4, at + rng.uniform(0, 1, n), np.nan)
    group = Cohort(np.arange(n), rng.integers(0, 8, n), rng.integers(0, n, n), at * DAY_S, event * DAY_S)
    usable = drawable_patients(name, group, USUAL)
    try:
        drawn = {owner for rows in DRAWS[name](group, 4, 200, seed, USUAL) for owner in patients_of(group, rows)}
    except HemoFedError:
        drawn = set()
    assert len(drawn) == usable
