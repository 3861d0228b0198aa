"""What the labels of a site store are: counts, distributions, and what another window or side would make of them.

For the hospital's own eyes: small counts are not suppressed here. No patient, record or path is named.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.label_join import HOUR_S, NONE, SIDES, JoinSettings
from client.labels import Timeline
from client.records.plausible import WEDGE
from client.store import SIMULTANEOUS_S, RecordIndex

WINDOWS_HOURS = (1, 6, 12, 24, 48, 72, 168)
ELEVATED_MMHG = (15, 18)
BINS = 12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class JoinCounts:
    """Which stored events label an ECG, and why the others do not."""

    events: int
    events_joined: int
    events_passed_over: int
    """The nearest ECG has another event."""
    events_outside_window: int
    """No ECG of the patient within the window and on the side."""
    events_without_patient: int
    """No ECG of the patient at all (with a known time)."""
    patients: int
    """Patients with an event."""
    patients_without_ecg: int
    ecgs_labelled: int
    """Source records, whole."""
    ecgs_labelled_after_event: int
    """Of these, recorded after their event; 0 unless the side is `either`."""
    segments_labelled: int
    """10 s ECGs."""
    patients_labelled: int


def join_counts(connection: sqlite3.Connection, timeline: Timeline, settings: JoinSettings) -> JoinCounts:
    """What a join by `settings` finds."""
    event_of_record = timeline.event_of_record(settings)
    labelled = event_of_record != NONE
    within = np.abs(timeline.nearest_record(settings.side).after_s) <= settings.window_hours * HOUR_S
    events, patients = connection.execute("SELECT count(*), count(DISTINCT patient) FROM events").fetchone()
    event_at = timeline.events.at[event_of_record[labelled]]
    return JoinCounts(
        events=events,
        events_joined=int(labelled.sum()),
        events_passed_over=int(within.sum() - labelled.sum()),
        events_outside_window=int((~within).sum()),
        events_without_patient=events - len(timeline.events),
        patients=patients,
        patients_without_ecg=patients - len(np.unique(timeline.events.patient)),
        ecgs_labelled=int(labelled.sum()),
        ecgs_labelled_after_event=int((timeline.records.at[labelled] > event_at).sum()),
        segments_labelled=int(timeline.labelled_rows(event_of_record, settings).sum()),
        patients_labelled=len(np.unique(timeline.records.patient[labelled])),
    )


@dataclass(frozen=True)
class LabelFigures:
    """One label of the store, over source records: a record of several 10 s ECGs counts once."""

    events: int
    """Stored events that have it, joined or not."""
    ecgs: int
    segments: int
    patients: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float
    histogram: list[int]
    """ECGs in 12 bins of equal width from minimum to maximum."""
    share_above: dict[str, float]
    """Of the wedge pressure: mmHg -> share of ECGs above it."""


def label_figures(index: RecordIndex, events: dict[str, int]) -> dict[str, LabelFigures]:
    """Each label that an ECG has; `events` counts the stored events by label."""
    figures = {}
    for name, values in index.labels.items():
        rows = np.flatnonzero(~np.isnan(values))
        if len(rows):
            _, first = np.unique(index.record[rows], return_index=True)
            figures[name] = _figures(name, index, values, rows, rows[first], events.get(name, 0))
    return figures


def _figures(
    name: str,
    index: RecordIndex,
    values: NDArray[np.float32],
    segments: NDArray[np.int64],
    ecgs: NDArray[np.int64],
    events: int,
) -> LabelFigures:
    of_ecg = values[ecgs].astype(np.float64)
    minimum, lower, median, upper, maximum = np.quantile(of_ecg, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return LabelFigures(
        events=events,
        ecgs=len(ecgs),
        segments=len(segments),
        patients=len(np.unique(index.patient[ecgs])),
        minimum=minimum,
        lower_quartile=lower,
        median=median,
        upper_quartile=upper,
        maximum=maximum,
        histogram=np.histogram(of_ecg, BINS, (minimum, maximum))[0].tolist(),
        share_above=_shares(of_ecg) if name == WEDGE else {},
    )


def _shares(mmhg: Floats) -> dict[str, float]:
    return {str(limit): float((mmhg > limit).mean()) for limit in ELEVATED_MMHG} if len(mmhg) else {}


@dataclass(frozen=True)
class WindowFigures:
    """What a join with this window and side would label with a wedge pressure."""

    side: str
    window_hours: int
    ecgs: int
    patients: int
    ecgs_after_event: int
    share_above: dict[str, float]


@dataclass(frozen=True)
class OwnWedges:
    """Wedge pressures that records brought themselves: (record,) of the timeline, NaN where there is none."""

    mmhg: Floats
    after_s: Floats
    """How long after the measurement the record was made."""


def own_wedges(connection: sqlite3.Connection, timeline: Timeline) -> OwnWedges:
    """Those whose own times are known."""
    mmhg, after_s = np.full((2, len(timeline.records)), np.nan)
    query = "SELECT row, value, measured_at FROM labels JOIN records USING (row) WHERE name = ? AND measured_at NOTNULL"
    record_of_row = dict(zip(timeline.row.tolist(), timeline.row_record.tolist(), strict=True))
    for row, value, measured_at in connection.execute(query, (WEDGE,)):
        record = record_of_row.get(row)
        if record is not None:
            mmhg[record], after_s[record] = value, timeline.records.at[record] - measured_at
    return OwnWedges(mmhg, after_s)


def window_figures(timeline: Timeline, own: OwnWedges) -> Iterator[WindowFigures]:
    """Counts and prevalence for every side and window. A record's own wedge goes before an event's."""
    for side in SIDES:
        for hours in WINDOWS_HOURS:
            event = timeline.event_of_record(JoinSettings(hours, side))
            mmhg = np.append(timeline.wedge_mmhg, np.nan)[event]
            after_s = timeline.records.at - np.append(timeline.events.at, np.nan)[event]
            latest_s = SIMULTANEOUS_S if side == "before" else hours * HOUR_S
            mine = ~np.isnan(own.mmhg) & (own.after_s >= -hours * HOUR_S) & (own.after_s <= latest_s)
            mmhg, after_s = np.where(mine, own.mmhg, mmhg), np.where(mine, own.after_s, after_s)
            labelled = ~np.isnan(mmhg)
            yield WindowFigures(
                side=side,
                window_hours=hours,
                ecgs=int(labelled.sum()),
                patients=len(np.unique(timeline.records.patient[labelled])),
                ecgs_after_event=int((after_s[labelled] > SIMULTANEOUS_S).sum()),
                share_above=_shares(mmhg[labelled]),
            )
