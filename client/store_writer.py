"""Appends records to a site store.

A chunk's signals are on the disk before its rows are committed, so whatever cuts an ingest off leaves an
index of whole signals only; the next ingest cuts the signal file back to the index and goes on.
"""

import json
import math
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from client.ingest_summary import Count, IngestSummary, sum_up
from client.labels import join, late_label
from client.preparation import Outcome, Prepared
from client.pseudonym import PatientKey
from client.quality_policy import Finding, explain
from client.records.record import EcgRecord, Noticed, Reason, Remark, TurnedAway
from client.schema import utc_now
from client.store import DERIVED_FOLDER, ROW_BYTES, SIGNAL_FILE
from shared_model.errors import ExitCode, HemoFedError

CHUNK_ROWS = 1024
WIPED_ROW = b"\x00\x80" * (ROW_BYTES // 2)  # MISSING, little-endian

RECORD_COLUMNS = (
    "row, archive, record_id, segment, patient, split, recorded_at, age_years, sex, race, measured_at, "
    "source_rate_hz, lead_mask, content, source, ingest, device, quality"
)
INSERT_RECORD = f"INSERT INTO records ({RECORD_COLUMNS}) VALUES ({', '.join('?' * len(RECORD_COLUMNS.split(',')))})"


@contextmanager
def open_signals(site_dir: Path, connection: sqlite3.Connection) -> Iterator[BinaryIO]:
    """Open the signal file to append after what the index knows.

    Bytes of a cut-off ingest are dropped, and rows that a cut-off `forget` left behind are overwritten.
    """
    path = site_dir / SIGNAL_FILE
    end = end_of_rows(connection)
    path.touch(mode=0o600)
    if path.stat().st_size < end * ROW_BYTES:
        raise HemoFedError(
            f"{path}: shorter than its index says; restore it from a backup or use a new site folder",
            ExitCode.BAD_SITE,
        )
    with path.open("r+b") as file:
        file.truncate(end * ROW_BYTES)
        wipe_forgotten(site_dir, file, connection)
        file.seek(0, os.SEEK_END)
        yield file


def end_of_rows(connection: sqlite3.Connection) -> int:
    """The row after the last one that was ever used: a forgotten patient's rows are not used again."""
    in_use = connection.execute("SELECT coalesce(max(row) + 1, 0) FROM records").fetchone()[0]
    once = connection.execute("SELECT value FROM meta WHERE key = 'next_row'").fetchone()
    return max(int(in_use), int(once[0]) if once else 0)


def wipe_forgotten(site_dir: Path, file: BinaryIO, connection: sqlite3.Connection) -> None:
    """Overwrite the samples of forgotten patients' rows, on the disk, before they are struck off the list."""
    rows = [row for (row,) in connection.execute("SELECT row FROM wipes ORDER BY row")]
    if rows and (site_dir / DERIVED_FOLDER).exists():
        shutil.rmtree(site_dir / DERIVED_FOLDER)  # caches made of the same samples
    for row in rows:
        file.seek(row * ROW_BYTES)
        file.write(WIPED_ROW)
    file.flush()
    os.fsync(file.fileno())
    if rows:
        connection.execute("DELETE FROM wipes")


class StoreWriter:
    """Takes what became of each reading, one after the other; rows become visible a chunk at a time."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        signals: BinaryIO,
        key: PatientKey,
        source: Path,
        format_name: str,
        where: Sequence[str],
    ) -> None:
        self._connection = connection
        self._signals = signals
        self._key = key
        self._source = source
        self._format = format_name
        self._archive, self._ingest = _begin(connection, source, format_name, where)
        self._next_row = end_of_rows(connection)
        self._forgotten = {patient for (patient,) in connection.execute("SELECT patient FROM forgotten")}
        self._forgotten_signals = {signal for (signal,) in connection.execute("SELECT signal FROM forgotten_signals")}
        self._had_turned_away = bool(
            connection.execute("SELECT 1 FROM turned_away WHERE archive = ? LIMIT 1", (self._archive,)).fetchone()
        )
        self._rows_in_chunk = 0
        self._count = Count()
        connection.execute("BEGIN IMMEDIATE")

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Store what one reading gave: records, reasons why not, remarks."""
        patients = {
            outcome.source: self._key.pseudonym(outcome.patient_id)
            for outcome in outcomes
            if not isinstance(outcome, Remark) and outcome.patient_id
        }
        forgotten = {source for source, patient in patients.items() if patient in self._forgotten}
        if self._forgotten_signals:  # the same ECG may be filed under another patient too
            forgotten |= {outcome.source for outcome in outcomes if self._was_forgotten(outcome)}
        for outcome in outcomes:
            patient = patients.get(outcome.source)
            if outcome.source in forgotten:
                if not isinstance(outcome, Remark):  # counted only: a line would name the file again
                    self._count.turned_away[Reason.FORGOTTEN.value] += 1
            elif isinstance(outcome, TurnedAway):
                self._turn_away(outcome.source, outcome.reason, outcome.detail, patient)
            elif isinstance(outcome, Remark):
                self._remark(outcome.source, outcome.noticed, outcome.detail, patient)
            else:
                self._add_record(outcome, patient or self._key.pseudonym(f"record:{outcome.record.record_id}"))
        if self._rows_in_chunk >= CHUNK_ROWS:
            self._commit()
            self._connection.execute("BEGIN IMMEDIATE")

    def _was_forgotten(self, outcome: Outcome) -> bool:
        return isinstance(outcome, Prepared) and signal_key(self._key, outcome.content) in self._forgotten_signals

    def finish(self, site_dir: Path) -> IngestSummary:
        """Commit the last chunk, join what was measured to it, mark the ingest as finished, and sum up."""
        self._commit()
        _sync_folder(site_dir)
        join(self._connection)
        self._connection.execute("UPDATE ingests SET finished_at = ? WHERE ingest = ?", (utc_now(), self._ingest))
        return sum_up(self._count, str(self._source), self._format, self._connection)

    def _add_record(self, prepared: Prepared, patient: str) -> None:
        record, segments, content = prepared.record, prepared.segments, prepared.content
        for finding, leads in segments.findings.items():
            self._remark(record.source, finding, _told(finding, leads, segments.masked), patient)
        if segments.left_out:
            detail = f"{len(segments.left_out)} of its 10 s segments did not pass: {', '.join(segments.left_out)}"
            self._remark(record.source, Noticed.SEGMENTS_LEFT_OUT, detail, patient)
        if (remark := late_label(record)) is not None:
            self._remark(remark.source, remark.noticed, remark.detail, patient)
        stored = self._connection.execute(
            "SELECT content, row FROM records WHERE archive = ? AND record_id = ? AND segment = 0",
            (self._archive, record.record_id),
        ).fetchone()
        twin = self._connection.execute(
            "SELECT record_id, row, patient FROM records WHERE content = ? ORDER BY row LIMIT 1", (content,)
        ).fetchone()
        if stored is not None and stored[0] != content:
            detail = "its signal differs from the stored one; to take the new one, ingest into a new site folder"
            self._turn_away(record.source, Reason.CHANGED, detail, patient)
        elif stored is not None or (twin is not None and (twin[0], twin[2]) == (record.record_id, patient)):
            self._already_there(record, stored[1] if stored is not None else twin[1], patient)
        elif twin is not None:
            detail = f"the same signal as {twin[0]}; remove one of the two"
            self._turn_away(record.source, Reason.DUPLICATE, detail, patient)
            self._count.duplicates.setdefault(twin[0], [twin[0]]).append(record.record_id)
        else:
            self._append(prepared, patient)

    def _already_there(self, record: EcgRecord, row: int, patient: str) -> None:
        columns = "patient, recorded_at, age_years, sex, race"
        stored = self._connection.execute(f"SELECT {columns} FROM records WHERE row = ?", (row,)).fetchone()
        if stored[0] != patient:
            detail = "its patient differs from the stored one's; ingest everything into a new site folder, or one "
            detail += "patient may be in two splits"
            self._turn_away(record.source, Reason.CHANGED, detail, patient)
            return
        self._count.already_stored += 1
        if stored[1:] != (_or_null(record.recorded_at), _or_null(record.age_years), record.sex, record.race):
            detail = "its time, age, sex or race differ from the stored ones, which stay"
            self._remark(record.source, Noticed.DETAILS_DIFFER, detail, patient)
        labels = dict(self._connection.execute("SELECT name, value FROM labels WHERE row = ?", (row,)))
        if labels != dict(record.labels):
            detail = "its labels differ from the stored ones; to take the new ones, ingest into a new site folder"
            self._remark(record.source, Noticed.LABELS_DIFFER, detail, patient)

    def _append(self, prepared: Prepared, patient: str) -> None:
        record, segments = prepared.record, prepared.segments
        self._signals.write(segments.steps.data)
        split = self._key.split(record.patient_id)
        rows = range(self._next_row, self._next_row + len(segments.steps))
        self._connection.executemany(
            INSERT_RECORD,
            [
                (
                    *(row, self._archive, record.record_id, segment, patient, split),
                    *(_or_null(record.recorded_at + start_s), _or_null(record.age_years), record.sex, record.race),
                    *(_or_null(record.measured_at), record.sampling_rate_hz, lead_mask, prepared.content),
                    *(record.source, self._ingest, record.device, quality),
                )
                for segment, (row, start_s, lead_mask, quality) in enumerate(
                    zip(rows, segments.starts_s, segments.lead_masks, segments.qualities, strict=True)
                )
            ],
        )
        for table, values in (("labels", record.labels), ("measurements", record.measurements)):
            if values:
                self._connection.executemany(
                    f"INSERT INTO {table} VALUES (?, ?, ?)",
                    [(row, name, value) for row in rows for name, value in values.items()],
                )
        if self._had_turned_away:
            mended = "DELETE FROM turned_away WHERE archive = ? AND source = ?"
            self._connection.execute(mended, (self._archive, record.source))
        self._next_row += len(rows)
        self._rows_in_chunk += len(rows)
        self._count.segments += len(rows)
        self._count.stored += 1

    def _turn_away(self, source: str, reason: Reason, detail: str, patient: str | None) -> None:
        self._count.turn_away(source, reason, detail)
        self._connection.execute(
            "INSERT OR REPLACE INTO turned_away VALUES (?, ?, ?, ?, ?, ?)",
            (self._archive, source, reason.value, detail, self._ingest, patient),
        )

    def _remark(self, source: str, noticed: Noticed | Finding, detail: str, patient: str | None) -> None:
        self._count.remark(source, noticed, detail)
        self._connection.execute(
            "INSERT OR REPLACE INTO remarks VALUES (?, ?, ?, ?, ?, ?)",
            (self._archive, source, noticed.value, detail, self._ingest, patient),
        )

    def _commit(self) -> None:
        """Signals first, and on the disk, then the rows that point at them."""
        self._signals.flush()
        os.fsync(self._signals.fileno())
        self._connection.execute("COMMIT")
        self._rows_in_chunk = 0


def _begin(connection: sqlite3.Connection, source: Path, format_name: str, where: Sequence[str]) -> tuple[int, int]:
    """The numbers of archive and ingest; an ingest of the same selection that was cut off goes on."""
    selection = json.dumps(list(where))
    connection.execute("INSERT OR IGNORE INTO archives (source) VALUES (?)", (str(source),))
    archive = int(connection.execute("SELECT archive FROM archives WHERE source = ?", (str(source),)).fetchone()[0])
    unfinished = connection.execute(
        "SELECT ingest FROM ingests WHERE archive = ? AND format = ? AND selection = ? AND finished_at IS NULL",
        (archive, format_name, selection),
    ).fetchone()
    if unfinished is not None:
        return archive, int(unfinished[0])
    cursor = connection.execute(
        "INSERT INTO ingests (archive, format, selection, started_at) VALUES (?, ?, ?, ?)",
        (archive, format_name, selection, utc_now()),
    )
    return archive, int(cursor.lastrowid or 0)


def _told(finding: Finding, leads: tuple[str, ...], masked: tuple[str, ...]) -> str:
    """What was found, where, and whether it was masked."""
    explained = explain(finding, leads).removeprefix(f"{finding}: ").removeprefix(f"{finding} ")
    hidden = [lead for lead in leads if lead in masked]
    return f"{explained}; masked: {', '.join(hidden)}" if hidden else explained


def signal_key(key: PatientKey, content: bytes) -> str:
    """What is kept of a forgotten ECG: nobody without the key can tell whether it is of a given signal."""
    return key.pseudonym(f"signal:{content.hex()}")


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _sync_folder(folder: Path) -> None:
    """Make new file names durable (fsync of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
