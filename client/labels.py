"""Labels by patient and time in a site store: events are imported once, and joined to ECGs as often as is liked.

The tables `events` and `event_values` hold what was measured, `record_events` which stored ECG has which event. Window
and side of the join are in `meta`. How an event finds its ECG: client/label_join.py and docs/labels.md.
"""

import math
import sqlite3
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.event_table import EventTable
from client.events import read_events
from client.label_join import HOUR_S, NONE, JoinSettings, Moments, Nearest, Side, choose, nearest
from client.pseudonym import PatientKey
from client.records.plausible import WEDGE
from client.records.record import EcgRecord, Noticed, Remark
from client.store import LABEL_SIDE, SIMULTANEOUS_S, Progress
from shared_model.errors import ExitCode, HemoFedError

LABEL_WINDOW_HOURS = "label_window_hours"


@dataclass(frozen=True)
class ImportCounts:
    """What became of a table of measurements."""

    source: str
    rows: int
    values_read: int
    dropped: dict[str, int]
    """Reason -> rows or values of the table that were left out."""
    text_columns: tuple[str, ...]
    events: int
    """Events in the table: `events_new` + those of an earlier import + `events_of_forgotten`."""
    events_new: int
    events_differing: int
    """Events that an earlier import stored with another value; the stored one stays."""
    events_of_forgotten: int
    """Events of patients who were forgotten at this site; they are not stored."""


@dataclass(frozen=True)
class Timeline:
    """When the patients of a store were recorded and measured; their codes are common to ECGs and events."""

    row: NDArray[np.int64]
    """(row,) 10 s ECGs with a known time, ascending."""
    row_at: NDArray[np.float64]
    row_record: NDArray[np.int64]
    """(row,) place in `records`."""
    records: Moments
    """Records with a known time: that of their first row."""
    event: NDArray[np.int64]
    """(event,) ids of the events of these patients, ordered by time, then by source: that order settles ties."""
    events: Moments
    wedge_mmhg: NDArray[np.float64]
    """(event,) NaN where an event has none."""
    _nearest: dict[Side, Nearest] = field(default_factory=dict, repr=False)

    def event_of_record(self, settings: JoinSettings) -> NDArray[np.int64]:
        """(record,) the place of the event that labels it, or NONE. An event with a wedge goes before another."""
        with_wedge, window_s = ~np.isnan(self.wedge_mmhg), settings.window_hours * HOUR_S
        return choose(self.nearest_record(settings.side), len(self.records), with_wedge, window_s)

    def nearest_record(self, side: Side) -> Nearest:
        """The nearest record of each event, whatever the distance; it is looked for once a side."""
        if side not in self._nearest:
            self._nearest[side] = nearest(self.records, self.events, side)
        return self._nearest[side]

    def labelled_rows(self, event_of_record: NDArray[np.int64], settings: JoinSettings) -> NDArray[np.bool_]:
        """(row,) the rows of labelled records; for `before` only those that do not begin after the event."""
        event = event_of_record[self.row_record]
        chosen: NDArray[np.bool_] = event != NONE
        if settings.side == "before":
            chosen &= self.row_at <= np.append(self.events.at, np.nan)[event]
        return chosen


def settings_of(connection: sqlite3.Connection) -> JoinSettings:
    """Window and side of the store: 24 h and `before` where none was ever chosen."""
    meta, usual = dict(connection.execute("SELECT key, value FROM meta")), JoinSettings()
    return JoinSettings(float(meta.get(LABEL_WINDOW_HOURS, usual.window_hours)), meta.get(LABEL_SIDE, usual.side))


def settle(connection: sqlite3.Connection, settings: JoinSettings) -> None:
    """Choose window and side for this and later joins."""
    pairs = [(LABEL_WINDOW_HOURS, f"{settings.window_hours:g}"), (LABEL_SIDE, settings.side)]
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)


def import_events(
    connection: sqlite3.Connection,
    key: PatientKey,
    path: Path,
    *,
    replace: bool = False,
    empty_ok: bool = False,
    progress: Progress | None = None,
) -> ImportCounts:
    """Store the events of a table; `join` comes after it. What is stored already stays as it is.

    `replace` first removes what a table of the same file name brought before. `empty_ok` takes a table of a header only
    as one without events.

    Guarantee: the index gets pseudonyms, times and values, never a patient id; of a patient who was forgotten nothing
    is stored again; of a table that cannot be read to its end nothing is stored.

    Raises:
        HemoFedError: the table cannot be read (see `read_events`), or none of its rows gives an event.
    """
    table = read_events(path, progress)
    if not len(table) and not (empty_ok and not table.rows):
        reasons = ", ".join(f"{reason} {count}" for reason, count in table.dropped.items()) or "it holds no numbers"
        raise HemoFedError(
            f"{path}: none of its {table.rows} rows gives a measurement ({reasons}); see docs/labels.md",
            ExitCode.NOTHING_STORED,
        )
    with transaction(connection):
        if replace:
            _remove(connection, table.source)
        return _store(connection, key, table)


def _remove(connection: sqlite3.Connection, source: str) -> None:
    for table in ("record_events", "event_values"):
        connection.execute(f"DELETE FROM {table} WHERE event IN (SELECT event FROM events WHERE source = ?)", (source,))
    connection.execute("DELETE FROM events WHERE source = ?", (source,))


def _store(connection: sqlite3.Connection, key: PatientKey, table: EventTable) -> ImportCounts:
    forgotten = {patient for (patient,) in connection.execute("SELECT patient FROM forgotten")}
    pseudonyms = [key.pseudonym(patient_id) for patient_id in table.patients]
    new = differing = of_forgotten = 0
    for place, at, values in table.events():
        patient = pseudonyms[place]
        if patient in forgotten:
            of_forgotten += 1
            continue
        moment = (patient, at, table.source)
        added = connection.execute(
            "INSERT OR IGNORE INTO events (patient, measured_at, source) VALUES (?, ?, ?)", moment
        )
        if added.rowcount:
            new += 1
            event, stored = added.lastrowid, {}
        else:
            where = "patient = ? AND measured_at = ? AND source = ?"
            (event,) = connection.execute(f"SELECT event FROM events WHERE {where}", moment).fetchone()
            stored = dict(connection.execute("SELECT name, value FROM event_values WHERE event = ?", (event,)))
        differing += any(stored.get(name, value) != value for name, value in values.items())
        connection.executemany(
            "INSERT INTO event_values VALUES (?, ?, ?)",
            [(event, name, value) for name, value in values.items() if name not in stored],
        )
    return ImportCounts(
        source=table.source,
        rows=table.rows,
        values_read=table.read,
        dropped=dict(table.dropped),
        text_columns=table.text_columns,
        events=len(table),
        events_new=new,
        events_differing=differing,
        events_of_forgotten=of_forgotten,
    )


def join(connection: sqlite3.Connection) -> None:
    """Give the stored ECGs their events, by the store's settings, in one transaction (or the one that is open).

    The outcome depends on records, events and settings only, not on what was joined before; where nothing changes
    nothing is written. To be called whenever one of the three has changed.
    """
    with transaction(connection):
        wanted = _wanted(connection)
        if wanted != connection.execute("SELECT row, event FROM record_events ORDER BY row").fetchall():
            connection.execute("DELETE FROM record_events")
            connection.executemany("INSERT INTO record_events VALUES (?, ?)", wanted)


def _wanted(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    if connection.execute("SELECT 1 FROM events LIMIT 1").fetchone() is None:
        return []
    settings, timeline = settings_of(connection), read_timeline(connection)
    event_of_record = timeline.event_of_record(settings)
    chosen = timeline.labelled_rows(event_of_record, settings)
    events = timeline.event[event_of_record[timeline.row_record[chosen]]]
    return list(zip(timeline.row[chosen].tolist(), events.tolist(), strict=True))


def read_timeline(connection: sqlite3.Connection) -> Timeline:
    """The times of a store's ECGs, and of the events of their patients."""
    patients: dict[str, int] = {}
    row, row_at, row_record = array("q"), array("d"), array("q")
    who, first_row = array("q"), array("q")
    record: tuple[int, str] | None = None
    query = (
        "SELECT row, archive, record_id, patient, recorded_at FROM records WHERE recorded_at IS NOT NULL "
        "ORDER BY archive, record_id, segment"
    )
    for number, archive, record_id, patient, at in connection.execute(query):
        if (archive, record_id) != record:
            record = (archive, record_id)
            who.append(patients.setdefault(patient, len(patients)))
            first_row.append(number)
        row.append(number)
        row_at.append(at)
        row_record.append(len(first_row) - 1)
    by_row, by_first_row = np.argsort(np.array(row)), np.argsort(np.array(first_row))
    place = np.argsort(by_first_row)
    rows, at_of_row, record_of_row = (
        np.array(row)[by_row],
        np.array(row_at)[by_row],
        place[np.array(row_record)[by_row]],
    )
    record_at = at_of_row[np.searchsorted(rows, np.array(first_row)[by_first_row])]
    event, events, wedge_mmhg = _read_moments(connection, patients)
    return Timeline(
        row=rows,
        row_at=at_of_row,
        row_record=record_of_row,
        records=Moments(np.array(who)[by_first_row], record_at),
        event=event,
        events=events,
        wedge_mmhg=wedge_mmhg,
    )


def _read_moments(
    connection: sqlite3.Connection, patients: dict[str, int]
) -> tuple[NDArray[np.int64], Moments, NDArray[np.float64]]:
    """Ids, moments and wedge pressures of the events of `patients`, ordered by time and source."""
    sources = [source for (source,) in connection.execute("SELECT DISTINCT source FROM events ORDER BY source")]
    event, who, at, source_rank, wedge_mmhg = array("q"), array("q"), array("d"), array("q"), array("d")
    query = (
        "SELECT events.event, patient, measured_at, source, value FROM events "
        "LEFT JOIN event_values ON event_values.event = events.event AND name = ?"
    )
    for number, patient, moment, source, value in connection.execute(query, (WEDGE,)):
        if patient in patients:
            event.append(number)
            who.append(patients[patient])
            at.append(moment)
            source_rank.append(sources.index(source))
            wedge_mmhg.append(math.nan if value is None else value)
    order = np.lexsort((np.array(who), np.array(source_rank), np.array(at)))
    return np.array(event)[order], Moments(np.array(who)[order], np.array(at)[order]), np.array(wedge_mmhg)[order]


def late_label(record: EcgRecord) -> Remark | None:
    """What to tell of a record whose labels were measured before it: client/store.py leaves them out (`before`)."""
    if not record.labels or not record.recorded_at - record.measured_at > SIMULTANEOUS_S:
        return None
    hours = (record.recorded_at - record.measured_at) / HOUR_S
    detail = (
        f"recorded {hours:.1f} h after its labels were measured, so they are not used (labels --side either uses them)"
    )
    return Remark(record.source, Noticed.ECG_AFTER_MEASUREMENT, detail)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; inside a transaction that is open already, part of that one."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
