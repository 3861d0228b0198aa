"""What a cart's own program measured, from the units in which systems write it, and from MIMIC-IV-ECG's table."""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.records.record import known_measurements
from client.records.tables import plain_id, read_rows

FACTORS = {
    "ms": {"ms": 1.0, "s": 1000.0, "us": 1e-3},
    "deg": {"deg": 1.0},
    "bpm": {"bpm": 1.0, "/min": 1.0, "1/min": 1.0, "{h.b.}/min": 1.0, "{beats}/min": 1.0, "{beat}/min": 1.0},
}
NOT_MEASURED = 29_999
MACHINE_COLUMNS = (
    *("rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end"),
    *("t_end", "p_axis", "qrs_axis", "t_axis"),
)


def as_number(text: str) -> float:
    """The number that a text spells, else NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def in_unit(name: str, value: str, unit: str) -> float:
    """A quantity in the unit that the name of the measurement ends with (`qt_ms`); NaN if it is none."""
    return as_number(value) * FACTORS[name.rpartition("_")[2]].get(unit.strip().lower(), math.nan)


def first_known(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Of several values of a measurement the first that is within its range."""
    known: dict[str, float] = {}
    for name, value in values:
        known = known_measurements({name: value}) | known
    return known


@dataclass(frozen=True)
class MachineMeasurements:
    """MIMIC-IV-ECG's machine_measurements.csv: 26 bytes a study, because there are 800,035."""

    studies: NDArray[np.int64]
    """Sorted."""
    values: NDArray[np.int16]
    """(study, column of MACHINE_COLUMNS), ms and degrees, 29999 where not measured."""

    def of(self, study: str) -> dict[str, float]:
        """The measurements of a study, by name; what is not known is left out."""
        if not study.isdecimal():
            return {}
        place = int(np.searchsorted(self.studies, int(study)))
        if place == len(self.studies) or self.studies[place] != int(study):
            return {}
        row = dict(zip(MACHINE_COLUMNS, map(float, self.values[place]), strict=True))
        return known_measurements(_durations({name: math.nan if v == NOT_MEASURED else v for name, v in row.items()}))


def _durations(row: Mapping[str, float]) -> dict[str, float]:
    """Durations from the onsets and ends of the median beat, all in ms from its beginning."""
    return {
        "heart_rate_bpm": 60_000 / row["rr_interval"] if row["rr_interval"] > 0 else math.nan,
        "rr_ms": row["rr_interval"],
        "p_duration_ms": row["p_end"] - row["p_onset"],
        "pr_ms": row["qrs_onset"] - row["p_onset"],
        "qrs_ms": row["qrs_end"] - row["qrs_onset"],
        "qt_ms": row["t_end"] - row["qrs_onset"],
        **{f"{axis}_deg": row[axis] for axis in ("p_axis", "qrs_axis", "t_axis")},
    }


def read_machine_measurements(path: Path, archive: str) -> MachineMeasurements:
    """Read the table; an absent file is an empty one. Of two rows of a study the first counts.

    Raises:
        HemoFedError: it cannot be read as CSV, or a column is not there.
    """
    studies, values = array("q"), array("h")
    for row in read_rows(path, ("study_id", *MACHINE_COLUMNS), archive) if path.is_file() else ():
        study = plain_id(row["study_id"])
        if study.isdecimal() and len(study) < 19:
            studies.append(int(study))
            values.extend(_whole(row[column]) for column in MACHINE_COLUMNS)
    numbers, places = np.unique(np.array(studies, np.int64), return_index=True)
    return MachineMeasurements(numbers, np.array(values, np.int16).reshape(-1, len(MACHINE_COLUMNS))[places])


def _whole(text: str) -> int:
    value = as_number(text)
    return round(value) if abs(value) < NOT_MEASURED else NOT_MEASURED
