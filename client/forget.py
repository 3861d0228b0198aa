"""Take a patient out of a site store, and say what had been learned with them."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.lock import hold_lock
from client.pseudonym import SPLIT_NAMES, PatientKey, read_patient_key
from client.schema import INDEX_FILE, check_key, connect, damaged, utc_now
from client.site import load_site
from client.store_writer import end_of_rows, open_signals, signal_key
from client.uses import Use, uses_of
from shared_model.errors import ExitCode, HemoFedError

LOCAL_STATE = "state"
# Everything that hangs on a stored ECG, before the ECG itself; then what is kept by patient.
OF_A_ROW = ("labels", "measurements", "record_events")
OF_A_PATIENT = ("records", "events", "turned_away", "remarks")
# What names a record of the patient elsewhere: a remark on a table's row is filed under the row ("ecg_id 17"), or
# begins with the record; the reason of a twin, in whatever archive, names the first of the two.
NAMING_A_RECORD = (
    """DELETE FROM remarks WHERE EXISTS (SELECT 1 FROM records r WHERE r.patient = ? AND r.archive = remarks.archive
    AND (remarks.source = r.source OR substr(remarks.source, -length(r.record_id) - 4) = '_id ' || r.record_id
    OR instr(remarks.detail, r.record_id || ' ') = 1))""",
    """DELETE FROM turned_away WHERE EXISTS (SELECT 1 FROM records r WHERE r.patient = ?
    AND instr(turned_away.detail, 'the same signal as ' || r.record_id || ';') = 1)""",
)


@dataclass(frozen=True)
class Forgotten:
    """What was removed, and which runs had used it."""

    ecgs: int
    """10 s ECGs removed; 0 also when the patient had been forgotten before."""
    records: int
    events: int
    """Measurements with a time of their own (docs/labels.md)."""
    uses: tuple[Use, ...]
    """Runs that had the patient's ECGs in the split they used: their models cannot unlearn them."""
    local_weights: tuple[str, ...]
    """Folders, below the site's, with weights of those runs that never left."""


def forget(site_dir: Path | str, patient_id: str, also_unknown: bool = False) -> Forgotten:
    """Remove a patient from the index and the signal file, and keep their records out from now on.

    Guarantee: when this returns, the patient's samples are overwritten in the signal file, their rows are deleted
    (SQLite overwrites what it deletes) and caches made from them are gone. What stays are the pseudonym, the runs that
    had used them, and keyed hashes of their signals, to turn later records away, under another patient too. A process
    killed in between has the rest done by the next `forget` or `ingest`.
    It does not hold for: backups and copies, a disk that keeps old blocks (a solid-state disk, a snapshot), records
    turned away before their patient was known, whose lines name the source file only, the source itself, and models.

    Raises:
        HemoFedError: no such patient is stored (unless `also_unknown`), or the folder is unusable or in use.
    """
    site_dir = Path(site_dir)
    load_site(site_dir)
    if not (site_dir / INDEX_FILE).is_file():
        raise HemoFedError(f"{site_dir}: no site store here; nothing is stored of anyone", ExitCode.BAD_SITE)
    try:
        with hold_lock(site_dir), closing(connect(site_dir)) as connection:
            key = read_patient_key(site_dir)
            check_key(connection, key, site_dir)
            outcome = _removed(connection, site_dir, key, patient_id, also_unknown)
            with open_signals(site_dir, connection):  # overwrites the rows listed in `wipes`, and removes caches
                pass
            _empty_log(connection, site_dir)
    except sqlite3.Error as error:
        raise damaged(site_dir, error) from None
    except OSError as error:
        raise HemoFedError(
            f"{error.filename or site_dir}: {error.strerror}; mend this and run the same command again",
            ExitCode.BAD_SITE,
        ) from None
    return outcome


def _empty_log(connection: sqlite3.Connection, site_dir: Path) -> None:
    """SQLite's write-ahead log still holds the pages as they were; a reader keeps it from being emptied."""
    (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise HemoFedError(
            f"{site_dir / INDEX_FILE}: the patient is removed, but another program is reading the index, and old pages "
            "stay on the disk until it ends; close it and run the same command again",
            ExitCode.BAD_SITE,
        )


def _removed(
    connection: sqlite3.Connection, site_dir: Path, key: PatientKey, patient_id: str, also_unknown: bool
) -> Forgotten:
    """Delete the patient's rows and list them for overwriting, in one transaction."""
    patient = key.pseudonym(patient_id)

    def ask(statement: str) -> list[tuple[Any, ...]]:
        return connection.execute(statement, (patient,)).fetchall()

    connection.execute("BEGIN IMMEDIATE")
    rows = ask("SELECT row, split, archive, record_id, content FROM records WHERE patient = ?")
    events = len(ask("SELECT event FROM events WHERE patient = ?"))
    before = ask("SELECT uses FROM forgotten WHERE patient = ?")
    known = before or any(ask(f"SELECT 1 FROM {table} WHERE patient = ? LIMIT 1") for table in OF_A_PATIENT)
    if not known and not also_unknown:
        connection.execute("ROLLBACK")
        raise HemoFedError(
            f"{site_dir}: no record and no label of this patient is stored; check the id, or keep later records out "
            "all the same with --also-unknown",
            ExitCode.NO_USABLE_PATIENTS,
        )
    earlier = [Use.model_validate(use) for use in json.loads(before[0][0])] if before else []
    used = [use for use in uses_of(site_dir) if _touched(use, [(row, split) for row, split, *_ in rows])]
    uses = tuple(dict.fromkeys([*earlier, *used]))
    # Kept with the pseudonym: killed after the commit, the next run would find no rows to tell it by.
    written = json.dumps([use.model_dump() for use in uses])
    connection.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?, ?)", (patient, utc_now(), written))
    signals = {(signal_key(key, content),) for *_, content in rows}
    connection.executemany("INSERT OR IGNORE INTO forgotten_signals VALUES (?)", signals)
    _delete(connection, patient)
    connection.execute("COMMIT")
    states = (Path(LOCAL_STATE) / run_id for run_id in dict.fromkeys(use.run_id for use in uses))
    return Forgotten(
        ecgs=len(rows),
        records=len({(archive, record_id) for _, _, archive, record_id, _ in rows}),
        events=events,
        uses=uses,
        local_weights=tuple(str(state) for state in states if (site_dir / state).is_dir()),
    )


def _delete(connection: sqlite3.Connection, patient: str) -> None:
    """All rows of a patient, and of other records what names theirs; the places of their samples go to `wipes`."""
    of_patient, of_events = (patient,), "(SELECT event FROM events WHERE patient = ?)"
    connection.execute("INSERT INTO wipes SELECT row FROM records WHERE patient = ?", of_patient)
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('next_row', ?)", (str(end_of_rows(connection)),))
    for statement in NAMING_A_RECORD:
        connection.execute(statement, of_patient)
    for table in OF_A_ROW:
        connection.execute(f"DELETE FROM {table} WHERE row IN (SELECT row FROM wipes)")
    for table in ("record_events", "event_values"):
        connection.execute(f"DELETE FROM {table} WHERE event IN {of_events}", of_patient)
    for table in OF_A_PATIENT:
        connection.execute(f"DELETE FROM {table} WHERE patient = ?", of_patient)


def _touched(use: Use, rows: list[tuple[int, int]]) -> bool:
    return any(row < use.rows and SPLIT_NAMES[split] == use.split for row, split in rows)
