"""Take a patient out of a site store, and say what had been learned with them."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.lock import hold_lock
from client.pseudonym import SPLIT_NAMES, patient_key
from client.schema import INDEX_FILE, connect, damaged
from client.site import load_site
from client.store_writer import end_of_rows, open_signals
from client.uses import Use, uses_of
from shared_model.errors import ExitCode, HemoFedError

LOCAL_STATE = "state"
# Everything that hangs on a stored ECG, before the ECG itself; then what is kept by patient.
OF_A_ROW = ("labels", "measurements", "record_events")
OF_A_PATIENT = ("records", "events", "turned_away", "remarks")


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
    (SQLite overwrites what it deletes) and caches made from them are gone; only the pseudonym stays, to turn later
    records of the patient away. A process killed in between has the rest done by the next `forget` or `ingest`.
    It does not hold for: backups and copies, a disk that keeps old blocks (a solid-state disk, a snapshot), records
    turned away before their patient was known, whose lines name the source file only, the source itself, and models.

    Raises:
        HemoFedError: no such patient is stored (unless `also_unknown`), or the folder is unusable or in use.
    """
    site_dir = Path(site_dir)
    load_site(site_dir)
    if not (site_dir / INDEX_FILE).is_file():
        raise HemoFedError(f"{site_dir}: no site store here; nothing is stored of anyone", ExitCode.BAD_SITE)
    with hold_lock(site_dir):
        patient = patient_key(site_dir).pseudonym(patient_id)
        try:
            with closing(connect(site_dir)) as connection:
                outcome = _removed(connection, site_dir, patient, also_unknown)
                with open_signals(site_dir, connection):  # overwrites the rows that are listed in `wipes`
                    pass
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise damaged(site_dir, error) from None
        shutil.rmtree(site_dir / "derived", ignore_errors=True)
    return outcome


def _removed(connection: sqlite3.Connection, site_dir: Path, patient: str, also_unknown: bool) -> Forgotten:
    """Delete the patient's rows and list them for overwriting, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    rows = connection.execute("SELECT row, split, record_id FROM records WHERE patient = ?", (patient,)).fetchall()
    events = connection.execute("SELECT count(*) FROM events WHERE patient = ?", (patient,)).fetchone()[0]
    known = rows or events or connection.execute("SELECT 1 FROM forgotten WHERE patient = ?", (patient,)).fetchone()
    if not known and not also_unknown:
        connection.execute("ROLLBACK")
        raise HemoFedError(
            f"{site_dir}: no ECG and no label of this patient is stored; check the id, or keep later records out "
            "all the same with --also-unknown",
            ExitCode.NO_USABLE_PATIENTS,
        )
    connection.execute("INSERT OR IGNORE INTO forgotten VALUES (?, ?)", (patient, _now()))
    connection.execute("INSERT INTO wipes SELECT row FROM records WHERE patient = ?", (patient,))
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('next_row', ?)", (str(end_of_rows(connection)),))
    # Remarks on a table's row name the record, not the patient: they go by the record's source.
    connection.execute(
        "DELETE FROM remarks WHERE EXISTS (SELECT 1 FROM records WHERE records.patient = ? "
        "AND records.archive = remarks.archive AND records.source = remarks.source)",
        (patient,),
    )
    of_events = "(SELECT event FROM events WHERE patient = ?)"
    for table in OF_A_ROW:
        connection.execute(f"DELETE FROM {table} WHERE row IN (SELECT row FROM wipes)")
    connection.execute(f"DELETE FROM record_events WHERE event IN {of_events}", (patient,))
    connection.execute(f"DELETE FROM event_values WHERE event IN {of_events}", (patient,))
    for table in OF_A_PATIENT:
        connection.execute(f"DELETE FROM {table} WHERE patient = ?", (patient,))
    connection.execute("COMMIT")
    uses = tuple(use for use in uses_of(site_dir) if _touched(use, [(row, split) for row, split, _ in rows]))
    states = (Path(LOCAL_STATE) / run_id for run_id in dict.fromkeys(use.run_id for use in uses))
    return Forgotten(
        ecgs=len(rows),
        records=len({record_id for _, _, record_id in rows}),
        events=events,
        uses=uses,
        local_weights=tuple(str(state) for state in states if (site_dir / state).is_dir()),
    )


def _touched(use: Use, rows: list[tuple[int, int]]) -> bool:
    return any(row < use.rows and SPLIT_NAMES[split] == use.split for row, split in rows)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
