"""MIMIC-IV `icu/chartevents.csv`: a row a value, as nurses charted it (doi:10.13026/kpb9-mt58).

Only the items of CHARTED_ITEMS are taken. The file has hundreds of millions of rows: it is read once, and what is
kept of it is a few million numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from client.event_table import Cells, Dropped, Measured, number
from client.label_join import HOUR_S, NONE, Moments, nearest
from client.records.plausible import WEDGE
from client.records.tables import plain_id

RECOGNISED_BY = ("itemid", "charttime", "valuenum")
COLUMNS = ("subject_id", "charttime", "itemid", "valuenum", "warning")
CHARTED_ITEMS = {
    "223771": WEDGE,
    "220061": "mpap_mmhg",
    "220059": "pasp_mmhg",
    "220060": "padp_mmhg",
    "220074": "cvp_mmhg",
    "220088": "co_thermodilution_l_min",
    "224842": "co_continuous_l_min",
}
"""itemid -> label (MIMIC-IV d_items; mapping/meas_chartevents_main.csv of MIT-LCP/mimic-iv). 220059 is no wedge."""


def read_charted(columns: Sequence[str], rows: Iterator[list[str]]) -> Cells:
    """The values of CHARTED_ITEMS; a row with another number of cells than the header is dropped."""
    cells = Cells(labels=tuple(CHARTED_ITEMS.values()))
    code = {item: place for place, item in enumerate(CHARTED_ITEMS)}
    subject_at, time_at, item_at, value_at, warning_at = (columns.index(column) for column in COLUMNS)
    for row in rows:
        cells.rows += 1
        if len(row) != len(columns):
            cells.dropped[Dropped.ROW_LENGTH] += 1
        elif row[item_at] in code:
            cells.read += 1
            _take(cells, row[subject_at], row[time_at], code[row[item_at]], row[value_at], row[warning_at])
    return cells


def _take(cells: Cells, subject: str, time: str, label: int, text: str, warning: str) -> None:
    value = number(text)
    if warning.strip() not in ("", "0"):
        cells.dropped[Dropped.WARNING] += 1
    elif not text.strip():
        cells.dropped[Dropped.NO_VALUE] += 1
    elif value is None:
        cells.dropped[Dropped.NOT_A_NUMBER] += 1
    elif not cells.plausible(label, value):
        cells.dropped[Dropped.OUT_OF_RANGE] += 1
    elif (place := cells.who_and_when(plain_id(subject), time)) is not None:
        cells.keep(*place, label, value)


def in_hours(measured: Measured) -> Measured:
    """The values with the beginnings of their hours as times, so that what was charted in one hour is one event.

    An hour begins with a wedge and holds whatever is charted less than 60 min after it. What lies in no such hour
    is put into hours of its own in the same way, each beginning with the first value that is left. An hour never
    begins after one of its values.
    """
    measured = measured.where(np.lexsort((measured.label, measured.at, measured.patient)))
    is_wedge = measured.label == list(CHARTED_ITEMS.values()).index(WEDGE)
    at = measured.at.copy()
    at[is_wedge] = _hour_beginnings(measured.where(is_wedge))
    hours = Moments(measured.patient[is_wedge], at[is_wedge])
    found = nearest(hours, measured.moments, "before")
    inside = (found.ecg != NONE) & (found.after_s > -HOUR_S)
    at[inside] = hours.at[found.ecg[inside]]
    at[~inside] = _hour_beginnings(measured.where(~inside))
    return replace(measured, at=at)


def _hour_beginnings(measured: Measured) -> NDArray[np.float64]:
    """For values sorted by patient and time: the time of the first value of each one's hour."""
    beginnings = measured.at.copy()
    patient, began_at = -1, 0.0
    for place, (who, at) in enumerate(zip(measured.patient.data, measured.at.data, strict=True)):
        if who != patient or at - began_at >= HOUR_S:
            patient, began_at = who, at
        beginnings[place] = began_at
    return beginnings
