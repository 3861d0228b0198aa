"""Measurements with a time of their own, as arrays: from the cells of a table to events with values.

What is dropped for which reason: docs/labels.md. Patient ids stay in memory; the index gets pseudonyms
(client/labels.py).
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from client.label_join import Moments, nearest
from client.pseudonym import plain_patient_id
from client.records.plausible import PA_MEAN, WEDGE, plausible_range
from client.records.record import unix_seconds

WEDGE_ABOVE_PA_MEAN_MMHG = 2.0
"""Blood flows from the pulmonary artery to the wedge position: more than reading error above it is a misreading."""


class Dropped(StrEnum):
    """Why a row or a value of a table was left out."""

    ROW_LENGTH = "row_length"
    NO_PATIENT = "no_patient"
    UNREADABLE_TIME = "unreadable_time"
    WARNING = "warning"
    NO_VALUE = "no_value"
    NOT_A_NUMBER = "not_a_number"
    OUT_OF_RANGE = "out_of_range"
    WEDGE_ABOVE_PA_MEAN = "wedge_above_pa_mean"
    REPEATED = "repeated"


@dataclass(frozen=True)
class Measured:
    """Single values; all arrays have one length."""

    patient: NDArray[np.int64]
    at: NDArray[np.float64]
    """Unix seconds."""
    label: NDArray[np.int64]
    """Place in the table's `labels`."""
    value: NDArray[np.float64]

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Measured":
        """Those chosen, by mask or in the order of the places."""
        return Measured(self.patient[chosen], self.at[chosen], self.label[chosen], self.value[chosen])

    @property
    def moments(self) -> Moments:
        """When each was measured."""
        return Moments(self.patient, self.at)


@dataclass
class Cells:
    """What is taken from a table, row by row: 32 bytes a value, however long the table."""

    labels: tuple[str, ...]
    patients: dict[str, int] = field(default_factory=dict)
    """Id -> code, in order of appearance."""
    patient: "array[int]" = field(default_factory=lambda: array("q"))
    at: "array[float]" = field(default_factory=lambda: array("d"))
    label: "array[int]" = field(default_factory=lambda: array("q"))
    value: "array[float]" = field(default_factory=lambda: array("d"))
    rows: int = 0
    read: int = 0
    """Values of `labels` that were met, kept or dropped."""
    dropped: Counter[str] = field(default_factory=Counter)
    text_columns: tuple[str, ...] = ()

    def plausible(self, label: int, value: float) -> bool:
        """Whether a value is within the range of its label."""
        low, high = plausible_range(self.labels[label])
        return low <= value <= high

    def keep(self, patient: int, at: float, label: int, value: float) -> None:
        """Take one value in."""
        self.patient.append(patient)
        self.at.append(at)
        self.label.append(label)
        self.value.append(value)

    def who_and_when(self, patient_id: str, time: str) -> tuple[int, float] | None:
        """Code of the patient and unix seconds; None, and counted as dropped, if either is not there."""
        try:
            at = unix_seconds(time)
        except (ValueError, OverflowError):
            at = math.nan
        patient_id = plain_patient_id(patient_id)
        if not patient_id:
            self.dropped[Dropped.NO_PATIENT] += 1
        elif math.isnan(at):
            self.dropped[Dropped.UNREADABLE_TIME] += 1
        else:
            return self.patients.setdefault(patient_id, len(self.patients)), at
        return None

    def measured(self) -> Measured:
        """The values as arrays."""
        return Measured(np.array(self.patient), np.array(self.at), np.array(self.label), np.array(self.value))


def number(text: str) -> float | None:
    """The number in a cell; None if there is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class EventTable:
    """The events of one table, ordered by patient (as they first stand in the table) and time.

    Guarantee: every value of an event was measured at `measured_at` or later, so that an ECG recorded at or before
    the event was recorded at or before each of its values.
    """

    source: str
    """The file's name without `.gz`: a packed and an unpacked copy are one source."""
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    patient: NDArray[np.int64]
    """(event,) place in `patients`."""
    measured_at: NDArray[np.float64]
    """(event,) unix seconds."""
    first_value: NDArray[np.int64]
    """(event + 1,) where an event's values begin in `label` and `value`."""
    label: NDArray[np.int64]
    """(value,) place in `labels`."""
    value: NDArray[np.float64]
    rows: int
    """Rows in the file below its header."""
    read: int
    """Values read of the labels that are taken."""
    dropped: Mapping[str, int]
    """Reason -> rows or values left out."""
    text_columns: tuple[str, ...]
    """Columns that hold text only, so that they are no label."""

    def __len__(self) -> int:
        return len(self.measured_at)

    def events(self) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Place of the patient in `patients`, unix seconds and values of each event."""
        ends = zip(self.first_value[:-1].tolist(), self.first_value[1:].tolist(), strict=True)
        for patient, at, (first, end) in zip(self.patient.tolist(), self.measured_at.tolist(), ends, strict=True):
            names = [self.labels[label] for label in self.label[first:end]]
            yield patient, at, dict(zip(names, self.value[first:end].tolist(), strict=True))


def without_wedge_above_pa_mean(measured: Measured, labels: tuple[str, ...], within_s: float) -> Measured:
    """Leave out wedges more than 2 mmHg above the patient's nearest mean PA pressure within `within_s` seconds."""
    if WEDGE not in labels or PA_MEAN not in labels:
        return measured
    wedges = np.flatnonzero(measured.label == labels.index(WEDGE))
    means = measured.where(measured.label == labels.index(PA_MEAN))
    wedge = measured.where(wedges)
    found = nearest(means.moments, wedge.moments, "either")
    highest = np.append(means.value, np.inf)[found.ecg] + WEDGE_ABOVE_PA_MEAN_MMHG
    kept = np.ones(len(measured.at), np.bool_)
    kept[wedges] = (np.abs(found.after_s) > within_s) | (wedge.value <= highest)
    return measured.where(kept)


def event_table(source: str, cells: Cells, measured: Measured) -> EventTable:
    """Values of one patient and one time become an event; of one label the median."""
    measured = measured.where(np.lexsort((measured.value, measured.label, measured.at, measured.patient)))
    starts_event = _changes(measured.patient, measured.at)
    first = np.flatnonzero(starts_event | _changes(measured.label))
    length = np.diff(np.append(first, len(measured.at)))
    median = (measured.value[first + (length - 1) // 2] + measured.value[first + length // 2]) / 2
    events = first[starts_event[first]]
    return EventTable(
        source=source,
        patients=tuple(cells.patients),
        labels=cells.labels,
        patient=measured.patient[events],
        measured_at=measured.at[events],
        first_value=np.append(np.searchsorted(first, events), len(first)),
        label=measured.label[first],
        value=median,
        rows=cells.rows,
        read=cells.read,
        dropped=dict(sorted(cells.dropped.items())),
        text_columns=cells.text_columns,
    )


def _changes(*columns: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether an entry differs from the one before it in any column; the first one does."""
    changed = np.ones(len(columns[0]), np.bool_)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed
