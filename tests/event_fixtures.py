"""Tables of measurements in the form of the real ones."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

WEDGE, PA_SYSTOLIC, PA_DIASTOLIC, PA_MEAN, CVP = 223771, 220059, 220060, 220061, 220074
CO_THERMODILUTION, CO_CONTINUOUS, HEART_RATE = 220088, 224842, 220045
CHART_COLUMNS = (
    *("subject_id", "hadm_id", "stay_id", "caregiver_id", "charttime", "storetime"),
    *("itemid", "value", "valuenum", "valueuom", "warning"),
)

Charted = tuple[int, str, int, object]
"""Subject, time of day on 2180-07-23 (or a whole time), item, valuenum."""


def chart_row(subject: int, time: str, item: int, value: object, warning: object = 0) -> list[object]:
    """One row as MIMIC-IV's icu/chartevents.csv has it."""
    charted = time if len(time) > 8 else f"2180-07-23 {time}:00"
    unit = "L/min" if item in (CO_THERMODILUTION, CO_CONTINUOUS) else "mmHg"
    return [subject, subject + 9, subject + 19, 4711, charted, charted, item, value, value, unit, warning]


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_chart(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A chartevents table; packed where the name ends in .gz."""
    content = csv_text([CHART_COLUMNS, *rows]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
