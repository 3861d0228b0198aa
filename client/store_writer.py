"""Appends records to a site store.

A chunk's signals are on the disk before its rows are committed, so whatever cuts an ingest off leaves an
index of whole signals only; the next ingest cuts the signal file back to the index and goes on.
"""

import hashlib
import json
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from client.pseudonym import SPLIT_NAMES, PatientKey
from client.quality import Segments, cut_segments
from client.records.record import EcgRecord, Item, Noticed, Reason, Remark, TurnedAway, Unusable
from client.store import ROW_BYTES, SIGNAL_FILE
from shared_model.errors import ExitCode, HemoFedError

CHUNK_ROWS = 256
EXAMPLES = 10
# Counted, but not worth a line each: whole archives have no patient ids, and a flat lead is everyday.
QUIET = (Noticed.PATIENT_FROM_RECORD_NAME, Noticed.FLAT_LEADS, Noticed.SEGMENTS_LEFT_OUT)

RECORD_COLUMNS = (
    "row, archive, record_id, segment, patient, split, recorded_at, age_years, sex, race, measured_at, "
    "source_rate_hz, lead_mask, content, source, ingest, device"
)


@dataclass(frozen=True)
class IngestSummary:
    """What became of a source. `read` = `stored` + `already_stored` + all of `turned_away`."""

    source: str
    format: str
    read: int
    """Records that the source lists."""
    stored: int
    """Records that are new in the store."""
    already_stored: int
    """Records that an earlier ingest had stored."""
    segments: int
    """New 10 s ECGs."""
    turned_away: dict[str, int]
    """Reason -> records."""
    noticed: dict[str, int]
    """Remark -> how often."""
    duplicates: list[list[str]]
    """Groups of source records with the same signal; the first of each is the stored one."""
    patients: int
    """Patients in the store, all ingests together."""
    splits: dict[str, int]
    """Patients of each split, likewise."""
    labels: dict[str, int]
    """Label column -> 10 s ECGs that have it, likewise."""
    source_rates_hz: dict[str, int]
    """Sampling rate of the source -> 10 s ECGs, likewise."""
    examples: tuple[str, ...]
    """The first records turned away: one line each with file, reason and remedy."""
    remarks: tuple[str, ...]
    """The first remarks, likewise."""

    @property
    def usable(self) -> bool:
        """Whether any record of the source is in the store."""
        return self.stored + self.already_stored > 0


@contextmanager
def open_signals(site_dir: Path, connection: sqlite3.Connection) -> Iterator[BinaryIO]:
    """Open the signal file to append after what the index knows; bytes of a cut-off ingest are dropped."""
    path = site_dir / SIGNAL_FILE
    count = connection.execute("SELECT count(*) FROM records").fetchone()[0]
    path.touch(mode=0o600)
    if path.stat().st_size < count * ROW_BYTES:
        raise HemoFedError(
            f"{path}: shorter than its index says; restore it from a backup or use a new site folder",
            ExitCode.BAD_SITE,
        )
    with path.open("r+b") as file:
        file.truncate(count * ROW_BYTES)
        file.seek(0, os.SEEK_END)
        yield file


class StoreWriter:
    """Takes a reader's items one by one; rows become visible a chunk at a time."""

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
        self._next_row = connection.execute("SELECT count(*) FROM records").fetchone()[0]
        self._rows_in_chunk = 0
        self._stored = self._already_stored = self._segments = 0
        self._turned_away: Counter[str] = Counter()
        self._noticed: Counter[str] = Counter()
        self._duplicates: dict[str, list[str]] = {}
        self._examples: list[str] = []
        self._remarks: list[str] = []
        connection.execute("BEGIN IMMEDIATE")

    def add(self, item: Item) -> None:
        """Store a record, or note why not."""
        if isinstance(item, TurnedAway):
            self._turn_away(item.source, item.reason, item.detail)
        elif isinstance(item, Remark):
            self._remark(item.source, item.noticed, item.detail)
        else:
            try:
                segments = cut_segments(item)
            except Unusable as unusable:
                self._turn_away(item.source, unusable.reason, unusable.detail)
                return
            self._add_record(item, segments)
        if self._rows_in_chunk >= CHUNK_ROWS:
            self._commit()
            self._connection.execute("BEGIN IMMEDIATE")

    def finish(self, site_dir: Path) -> IngestSummary:
        """Commit the last chunk, mark the ingest as finished, and sum up."""
        self._connection.execute("UPDATE ingests SET finished_at = ? WHERE ingest = ?", (_now(), self._ingest))
        self._commit()
        _sync_folder(site_dir)
        ask = self._connection.execute
        splits = dict(ask("SELECT split, count(DISTINCT patient) FROM records GROUP BY split"))
        return IngestSummary(
            source=str(self._source),
            format=self._format,
            read=self._stored + self._already_stored + self._turned_away.total(),
            stored=self._stored,
            already_stored=self._already_stored,
            segments=self._segments,
            turned_away=dict(sorted(self._turned_away.items())),
            noticed=dict(sorted(self._noticed.items())),
            duplicates=list(self._duplicates.values()),
            patients=ask("SELECT count(DISTINCT patient) FROM records").fetchone()[0],
            splits={name: splits.get(split, 0) for split, name in enumerate(SPLIT_NAMES)},
            labels=dict(ask("SELECT name, count(*) FROM labels GROUP BY name ORDER BY name")),
            source_rates_hz={
                f"{rate:g}": count
                for rate, count in ask("SELECT source_rate_hz, count(*) FROM records GROUP BY 1 ORDER BY 1")
            },
            examples=tuple(self._examples),
            remarks=tuple(self._remarks),
        )

    def _add_record(self, record: EcgRecord, segments: Segments) -> None:
        if segments.flat_leads:
            self._remark(record.source, Noticed.FLAT_LEADS, f"masked, constant: {', '.join(segments.flat_leads)}")
        if segments.left_out:
            detail = f"{segments.left_out} of its 10 s segments were flat, missing or implausible"
            self._remark(record.source, Noticed.SEGMENTS_LEFT_OUT, detail)
        content = hashlib.sha256(segments.steps.data).digest()
        stored = self._connection.execute(
            "SELECT content, row FROM records WHERE archive = ? AND record_id = ? AND segment = 0",
            (self._archive, record.record_id),
        ).fetchone()
        twin = self._connection.execute(
            "SELECT record_id, row FROM records WHERE content = ? ORDER BY row LIMIT 1", (content,)
        ).fetchone()
        if stored is not None and stored[0] != content:
            detail = "its signal differs from the stored one; to take the new one, ingest into a new site folder"
            self._turn_away(record.source, Reason.CHANGED, detail)
        elif stored is not None or (twin is not None and twin[0] == record.record_id):
            self._already_there(record, row=stored[1] if stored is not None else twin[1])
        elif twin is not None:
            self._turn_away(record.source, Reason.DUPLICATE, f"the same signal as {twin[0]}; remove one of the two")
            self._duplicates.setdefault(twin[0], [twin[0]]).append(record.record_id)
        else:
            self._append(record, segments, content)

    def _already_there(self, record: EcgRecord, row: int) -> None:
        self._already_stored += 1
        labels = dict(self._connection.execute("SELECT name, value FROM labels WHERE row = ?", (row,)))
        if labels != dict(record.labels):
            detail = "its labels differ from the stored ones; to take the new ones, ingest into a new site folder"
            self._remark(record.source, Noticed.LABELS_DIFFER, detail)

    def _append(self, record: EcgRecord, segments: Segments, content: bytes) -> None:
        self._signals.write(segments.steps.data)
        patient, split = self._key.pseudonym(record.patient_id), self._key.split(record.patient_id)
        rows = range(self._next_row, self._next_row + len(segments.steps))
        place_holders = ", ".join("?" * len(RECORD_COLUMNS.split(",")))
        self._connection.executemany(
            f"INSERT INTO records ({RECORD_COLUMNS}) VALUES ({place_holders})",
            [
                (
                    *(row, self._archive, record.record_id, segment, patient, split),
                    *(
                        _or_null(record.recorded_at + start_s),
                        _or_null(record.age_years),
                        record.sex,
                        record.race,
                    ),
                    *(_or_null(record.measured_at), record.sampling_rate_hz, lead_mask, content),
                    *(record.source, self._ingest, record.device),
                )
                for segment, (row, start_s, lead_mask) in enumerate(
                    zip(rows, segments.starts_s, segments.lead_masks, strict=True)
                )
            ],
        )
        self._connection.executemany(
            "INSERT INTO labels VALUES (?, ?, ?)",
            [(row, name, value) for row in rows for name, value in record.labels.items()],
        )
        self._connection.executemany(
            "INSERT INTO measurements VALUES (?, ?, ?)",
            [(row, name, value) for row in rows for name, value in record.measurements.items()],
        )
        self._connection.execute(
            "DELETE FROM turned_away WHERE archive = ? AND source = ?", (self._archive, record.source)
        )
        self._next_row += len(rows)
        self._rows_in_chunk += len(rows)
        self._segments += len(rows)
        self._stored += 1

    def _turn_away(self, source: str, reason: Reason, detail: str, patient: str | None = None) -> None:
        self._turned_away[reason.value] += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(f"{source}: {reason}: {detail}")
        self._connection.execute(
            "INSERT OR REPLACE INTO turned_away VALUES (?, ?, ?, ?, ?, ?)",
            (self._archive, source, reason.value, detail, self._ingest, patient),
        )

    def _remark(self, source: str, noticed: Noticed, detail: str, patient: str | None = None) -> None:
        self._noticed[noticed.value] += 1
        if len(self._remarks) < EXAMPLES and noticed not in QUIET:
            self._remarks.append(f"{source}: {noticed}: {detail}")
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
        (archive, format_name, selection, _now()),
    )
    return archive, int(cursor.lastrowid or 0)


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sync_folder(folder: Path) -> None:
    """Make new file names durable (fsync of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
