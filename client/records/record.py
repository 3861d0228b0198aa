"""The one typed record that every reader yields, and what a reader says when there is none."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "unknown"
OLDEST_AGE_YEARS = 120
# What a cart's own program measures, and the range outside which a value is a code for "not measured" or a slip.
MEASUREMENTS = {
    "heart_rate_bpm": (10.0, 350.0),
    "rr_ms": (170.0, 6000.0),
    "p_duration_ms": (10.0, 300.0),
    "pr_ms": (30.0, 700.0),
    "qrs_ms": (20.0, 400.0),
    "qt_ms": (100.0, 900.0),
    "qtc_ms": (150.0, 900.0),
    "p_axis_deg": (-360.0, 360.0),
    "qrs_axis_deg": (-360.0, 360.0),
    "t_axis_deg": (-360.0, 360.0),
}


class Reason(StrEnum):
    """Why a record was turned away. Each is explained, with its remedy, in docs/site-store.md."""

    UNREADABLE = "unreadable"
    MISSING_FILE = "missing_file"
    TRUNCATED = "truncated"
    WRONG_CHECKSUM = "wrong_checksum"
    NOT_AN_ECG = "not_an_ecg"
    NO_LENGTH = "no_length"
    NO_SAMPLING_RATE = "no_sampling_rate"
    PATH_OUTSIDE_FOLDER = "path_outside_folder"
    NO_KNOWN_LEAD = "no_known_lead"
    UNKNOWN_UNIT = "unknown_unit"
    NOT_AS_DECLARED = "not_as_declared"
    TOO_SHORT = "too_short"
    ALL_LEADS_FLAT = "all_leads_flat"
    MOSTLY_MISSING = "mostly_missing"
    IMPLAUSIBLE_AMPLITUDE = "implausible_amplitude"
    WRONG_GAIN = "wrong_gain"
    LOW_QUALITY = "low_quality"
    DUPLICATE = "duplicate"
    CHANGED = "changed"
    FORGOTTEN = "forgotten"


class Noticed(StrEnum):
    """What was noticed about a record or a table's row without turning a record away.

    What was found on the ECG itself is a `client.quality_policy.Finding`.
    """

    LABEL_WITHOUT_RECORD = "label_without_record"
    REPEATED_LABEL_ROW = "repeated_label_row"
    ABSURD_LABEL = "absurd_label"
    TEXT_LABEL = "text_label"
    TEXT_COLUMN = "text_column"
    UNREADABLE_TIME = "unreadable_time"
    UNREADABLE_CODES = "unreadable_codes"
    PATIENT_FROM_RECORD_NAME = "patient_from_record_name"
    LABELS_DIFFER = "labels_differ"
    DETAILS_DIFFER = "details_differ"
    SEGMENTS_LEFT_OUT = "segments_left_out"
    NO_WEDGE_INTERVAL = "no_wedge_interval"
    ECG_AFTER_MEASUREMENT = "ecg_after_measurement"
    PRESSURE_DIFFERS = "pressure_differs"
    PRESSURE_REFUSED = "pressure_refused"


class Unusable(Exception):
    """A record cannot be used. `detail` is one line that ends with the remedy."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EcgRecord:
    """One ECG as the source holds it."""

    record_id: str
    """Unique and stable in its source, for example the path without extension."""
    source: str
    """The file a person would open, relative to the source folder."""
    signal_mv: NDArray[np.float32]
    """(lead, time) in mV, NaN for a missing sample; at most the first 60 s."""
    lead_names: tuple[str, ...]
    """Canonical name of each row of `signal_mv`."""
    sampling_rate_hz: float
    patient_id: str
    recorded_at: float = math.nan
    """Unix seconds. Clock times without a zone are taken as UTC: only differences are used."""
    age_years: float = math.nan
    sex: str = UNKNOWN
    race: str = UNKNOWN
    labels: Mapping[str, float] = field(default_factory=dict)
    measured_at: float = math.nan
    """Unix seconds of the measurement behind the labels."""
    device: str = UNKNOWN
    """The cart's model, as the source spells it."""
    measurements: Mapping[str, float] = field(default_factory=dict)
    """What the cart measured, by name of `MEASUREMENTS`; what it did not measure is left out."""


@dataclass(frozen=True)
class TurnedAway:
    """A source record that does not enter the store."""

    source: str
    reason: Reason
    detail: str
    patient_id: str = ""
    """Where the record could be read that far."""


@dataclass(frozen=True)
class Remark:
    """Something to tell that turned no record away."""

    source: str
    noticed: Noticed
    detail: str


Item = EcgRecord | TurnedAway | Remark
Reading = Callable[[], Iterable[Item]]
"""The reading of one record (or of one table's remarks), still to be done: `functools.partial` of a module's function
and small data, so that it can be sent to another process."""


@dataclass(frozen=True)
class Archive:
    """An opened source: how many records it lists, and how each is read, one after the other."""

    count: int
    readings: Iterator[Reading]

    @property
    def items(self) -> Iterator[Item]:
        """What the readings yield, read here and now."""
        for reading in self.readings:
            yield from reading()


def told(remarks: Iterable[Remark]) -> Reading:
    """Remarks that need no reading, as a reading."""
    return partial(tuple, list(remarks))


def known_measurements(values: Mapping[str, float]) -> dict[str, float]:
    """The measurements that are within their range of `MEASUREMENTS`: 29999, -1 and NaN mean "not measured"."""
    return {name: value for name, value in values.items() if MEASUREMENTS[name][0] <= value <= MEASUREMENTS[name][1]}


def known_sex(text: str) -> str:
    """'female', 'male' or 'unknown' from what sources write ("F", "Male" ...)."""
    return {"f": "female", "female": "female", "m": "male", "male": "male"}.get(text.strip().lower(), UNKNOWN)


def known_age(text: str) -> float:
    """Years, or NaN for what is not a number within 0 to 120."""
    try:
        age = float(text)
    except ValueError:
        return math.nan
    return age if 0 <= age <= OLDEST_AGE_YEARS else math.nan


def unix_seconds(text: str) -> float:
    """Unix seconds of an ISO 8601 date or time as its clock reads, whatever its zone; NaN if empty.

    All times of a hospital are compared as they read: most sources state no zone. Raises ValueError if neither.
    """
    if not text.strip():
        return math.nan
    moment = datetime.fromisoformat(text.strip())
    return moment.replace(tzinfo=UTC).timestamp()
