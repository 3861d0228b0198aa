"""Which ECGs meet in a batch: any, or those that a method pairs (of one patient, around one catheterisation).

A draw of pairs gives the first ECG of every pair, then the second of every pair in the same order, so that row i and
row i + n/2 belong together; no patient is in a batch twice. The ECGs of a pair are of different records: a longer
record is stored as several ECGs, and two of those are no two recordings of a heart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError

DAY_S = 86_400.0
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cohort:
    """The training ECGs of a site. Arrays of length n.

    Attributes:
        rows: what `Store.read` is asked for.
        patient: code of the patient.
        record: code of the source record.
        recorded_at: unix seconds, NaN unknown.
        event_at: unix seconds of the catheterisation that the ECG's own label comes from, NaN where it has none.
    """

    rows: Rows
    patient: NDArray[np.int64]
    record: NDArray[np.int64]
    recorded_at: NDArray[np.float64]
    event_at: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class DrawSettings:
    """What a draw may be told.

    Attributes:
        window_days: EBCL: how far from the event an ECG may lie on either side.
        random_split: EBCL's control: a random instant between two ECGs of the patient takes the event's place.
        ecgs_per_patient: of whole patients, at most this many ECGs each.
    """

    window_days: float = 30.0
    random_split: bool = False
    ecgs_per_patient: int = 4


def batches(rows: Rows, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
    """`steps` batches of rows, reshuffled each epoch, so that no two ECGs always meet in one batch.

    The incomplete batch at an epoch's end is dropped; a site with fewer rows than a batch gives them all.
    """
    return _epochs(rows, min(batch_size, len(rows)), steps, np.random.default_rng(seed))


def shuffled(cohort: Cohort, batch_size: int, steps: int, seed: int, settings: DrawSettings) -> Iterator[Rows]:
    """Any ECGs, as `batches`."""
    del settings
    return batches(cohort.rows, batch_size, steps, seed)


def patient_pairs(cohort: Cohort, batch_size: int, steps: int, seed: int, settings: DrawSettings) -> Iterator[Rows]:
    """ECGs of two different records of each of batch_size / 2 patients (PCLR: Diamant et al. 2022).

    Raises:
        HemoFedError: fewer than two patients have two records, so that there is no pair to tell another from.
    """
    del settings
    generator = np.random.default_rng(seed)
    ecgs = _with_two(cohort)
    _require(ecgs, "fewer than two patients have two training ECGs")
    patients = np.arange(len(ecgs))
    for chosen in _epochs(patients, max(1, min(batch_size // 2, len(ecgs))), steps, generator):
        pairs = [_two_of(ecgs[patient], cohort.record, generator) for patient in chosen]
        yield cohort.rows[np.array(pairs).T.ravel()]


def whole_patients(cohort: Cohort, batch_size: int, steps: int, seed: int, settings: DrawSettings) -> Iterator[Rows]:
    """All ECGs of patients drawn one after the other, at most `ecgs_per_patient` each, until the batch is full.

    So an ECG meets others of its own patient and of other patients (RelCon's within-user and between-user
    candidates). The last patient's ECGs are cut to the batch size; the incomplete batch at an epoch's end is dropped,
    as it may be of one patient.
    """
    generator = np.random.default_rng(seed)
    ecgs = _by_patient(cohort)
    size = min(batch_size, sum(min(len(own), settings.ecgs_per_patient) for own in ecgs))
    order: list[int] = []
    for _ in range(steps):
        batch: list[int] = []
        while len(batch) < size:
            if not order:
                order, batch = generator.permutation(len(ecgs)).tolist(), []
            batch += generator.permutation(ecgs[order.pop()])[: settings.ecgs_per_patient].tolist()
        yield cohort.rows[np.array(batch[:size])]


def around_events(cohort: Cohort, batch_size: int, steps: int, seed: int, settings: DrawSettings) -> Iterator[Rows]:
    """An ECG before and an ECG after one catheterisation of each of batch_size / 2 patients (EBCL: Oufattole et al.,
    MLHC 2024), both within `window_days` of it.

    With `random_split` a random instant between two consecutive ECGs of the patient stands for the event. Only ECGs are
    paired here: no label enters, so that what came after an event says nothing of that event's pressure.

    Raises:
        HemoFedError: fewer than two patients have an ECG on either side of an event.
    """
    generator = np.random.default_rng(seed)
    pairs = _with_events(cohort, settings)
    _require(
        pairs,
        f"fewer than two patients have training ECGs within {settings.window_days:g} days before and after an event",
    )
    patients = np.arange(len(pairs))
    for chosen in _epochs(patients, max(1, min(batch_size // 2, len(pairs))), steps, generator):
        one_each = [pairs[patient][generator.integers(len(pairs[patient]))] for patient in chosen]
        yield cohort.rows[np.array(one_each).T.ravel()]


def drawable_patients(draw: str, cohort: Cohort, settings: DrawSettings) -> int:
    """How many patients a draw can use: what a site is worth in a method that pairs ECGs."""
    if draw == "patient_pairs":
        return len(_with_two(cohort))
    return len(_with_events(cohort, settings)) if draw == "around_events" else len(_by_patient(cohort))


def _with_two(cohort: Cohort) -> list[Rows]:
    """ECGs of each patient with two records or more; empty unless there are two such patients."""
    record = cohort.record
    found = [ecgs for ecgs in _by_patient(cohort) if (record[ecgs] != record[ecgs[0]]).any()]
    return found if len(found) > 1 else []


def _two_of(ecgs: Rows, record: NDArray[np.int64], generator: np.random.Generator) -> tuple[int, int]:
    first = generator.choice(ecgs)
    return int(first), int(generator.choice(ecgs[record[ecgs] != record[first]]))


def _with_events(cohort: Cohort, settings: DrawSettings) -> list[list[tuple[int, int]]]:
    found = [pairs for ecgs in _by_patient(cohort) if (pairs := _event_pairs(cohort, ecgs, settings))]
    return found if len(found) > 1 else []


def _event_pairs(cohort: Cohort, ecgs: Rows, settings: DrawSettings) -> list[tuple[int, int]]:
    """Every (before, after) pair of one patient's ECGs: the last before and the first after each event."""
    at = cohort.recorded_at[ecgs]
    ecgs, at = ecgs[np.isfinite(at)], at[np.isfinite(at)]
    ecgs, at = ecgs[np.argsort(at, kind="stable")], np.sort(at)
    if settings.random_split:
        # Any instant between two ECGs parts them alike: that they lie within twice the window of each other is left.
        record = cohort.record[ecgs]
        near = np.flatnonzero((np.diff(at) <= 2 * settings.window_days * DAY_S) & (record[1:] != record[:-1]))
        return [(int(ecgs[k]), int(ecgs[k + 1])) for k in near]
    found = []
    events = np.unique(cohort.event_at[ecgs])
    for event in events[np.isfinite(events)]:
        last, first = np.searchsorted(at, event, side="right") - 1, np.searchsorted(at, event, side="right")
        if last < 0 or first >= len(at):
            continue
        if max(event - at[last], at[first] - event) <= settings.window_days * DAY_S:
            found.append((int(ecgs[last]), int(ecgs[first])))
    return found


def _by_patient(cohort: Cohort) -> list[Rows]:
    """Places in the cohort of each patient's ECGs."""
    order = np.argsort(cohort.patient, kind="stable")
    starts = np.flatnonzero(np.diff(cohort.patient[order])) + 1
    return [part for part in np.split(order, starts) if len(part)]


def _epochs(items: Rows, size: int, steps: int, generator: np.random.Generator) -> Iterator[Rows]:
    order, start = generator.permutation(items), 0
    for _ in range(steps):
        if start + size > len(order):
            order, start = generator.permutation(items), 0
        yield order[start : start + size]
        start += size


def _require(found: Sequence[object], problem: str) -> None:
    if not found:
        raise HemoFedError(
            f"{problem}: this objective cannot train here; ingest more records or choose another objective",
            ExitCode.NO_USABLE_PATIENTS,
        )


Draw = Callable[[Cohort, int, int, int, DrawSettings], Iterator[Rows]]
DRAWS: dict[str, Draw] = {
    "shuffled": shuffled,
    "patient_pairs": patient_pairs,
    "whole_patients": whole_patients,
    "around_events": around_events,
}
