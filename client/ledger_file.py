"""The files of a privacy ledger: SQLite in WAL mode with full syncs, a marker beside it, and the stored answers."""

import hashlib
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from pydantic import ValidationError

from client.policy import Policy
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import NO_HEAD, Entry, Header, Tip, canonical, head_of, verify_chain

LEDGER_FILE = "ledger.sqlite"
MARKER_FILE = "ledger.id"
ANSWERS_DIR = "answers"
ANSWER_NAME = re.compile(r"(\d{8})\.answer")
SCHEMA = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, entry TEXT NOT NULL, head TEXT NOT NULL)",
    "CREATE TABLE studies (digest TEXT PRIMARY KEY, study TEXT NOT NULL) WITHOUT ROWID",
)
RESTORE = "restore the newest backup of the site folder's ledger, and never begin a new one for the same patients"
BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
UNWRITABLE_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def utc_now() -> str:
    """The clock time as the ledger keeps it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """Open the database for work: each transaction is on the disk before COMMIT returns. Checks nothing."""
    if read_only:
        return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None)
    path.touch(mode=0o600)  # SQLite would make it readable for others
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def is_blank(path: Path) -> bool:
    """Whether there is no ledger in the file: it is absent, or its making was cut short before the first entry."""
    if not path.is_file():
        return True
    connection = connect(path, read_only=True)
    try:
        return not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise fault_of(path, error) from None
    finally:
        connection.close()


def make(connection: sqlite3.Connection, policy: Policy) -> None:
    """Tables and header, in one transaction. The cohort's id is drawn here."""
    header = Header(
        cohort=secrets.token_hex(16),
        unit="patient",
        adjacency="add or remove one",
        epsilon=policy.epsilon,
        delta=policy.delta,
    )
    entry = Entry(sequence=1, previous=NO_HEAD, kind="header", written_at=utc_now(), header=header)
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    _insert(connection, entry)
    connection.execute("COMMIT")


def append(connection: sqlite3.Connection, path: Path, entry: Entry, study: str = "") -> None:
    """Add an entry, on the disk before this returns; with an admission also the study's own JSON.

    Raises:
        HemoFedError: it could not be written, and nothing was; or somebody else wrote meanwhile.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT max(sequence) FROM entries").fetchone()[0] != entry.sequence - 1:
            raise HemoFedError(f"{path}: was changed by another program; run again", ExitCode.LEDGER_BUSY)
        _insert(connection, entry)
        if study:
            connection.execute("INSERT INTO studies VALUES (?, ?)", (entry.study, study))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise fault_of(path, error) from None
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    row = (entry.sequence, canonical(entry), head_of(entry))
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", row)


def read_chain(connection: sqlite3.Connection, path: Path) -> tuple[Entry, ...]:
    """All entries, after checking the database, its schema, every byte of every row, and the chain.

    Raises:
        HemoFedError: something is not as it was written (LEDGER_DAMAGED).
    """
    try:
        connection.execute("BEGIN")  # one look at one state
        pages = connection.execute("PRAGMA integrity_check").fetchone()[0]
        schema = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]
        rows = connection.execute("SELECT sequence, entry, head FROM entries ORDER BY sequence").fetchall()
        studies = connection.execute("SELECT digest, study FROM studies").fetchall()
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise fault_of(path, error) from None
    if pages != "ok" or schema != list(SCHEMA):
        raise damaged(path, "is torn, or is not a ledger's database")
    entries = tuple(_entry_of(row, path) for row in rows)
    try:
        verify_chain(Tip(), entries)
    except HemoFedError:
        raise damaged(path, "has rows that were edited or removed: the chain of hashes is broken") from None
    if not entries or any(tuple(row) != _study_row(row) for row in studies):
        raise damaged(path, "has a study that was edited, or no entry at all")
    if sorted(row[0] for row in studies) != sorted(entry.study for entry in entries if entry.kind == "admit"):
        raise damaged(path, "lacks a study that it admitted, or holds another")
    return entries


def read_study_names(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """Names of the admitted studies by digest, for the hospital's own eyes; call `read_chain` first."""
    try:
        rows = connection.execute("SELECT digest, study FROM studies").fetchall()
    except sqlite3.DatabaseError as error:
        raise fault_of(path, error) from None
    return {digest: str(json.loads(study)["name"]) for digest, study in rows}


def _entry_of(row: tuple[object, ...], path: Path) -> Entry:
    sequence, text, head = row
    try:
        entry = Entry.model_validate_json(text) if isinstance(text, str) else None
    except ValidationError:
        entry = None
    if entry is None or (sequence, text, head) != (entry.sequence, canonical(entry), head_of(entry)):
        raise damaged(path, f"entry {sequence} was edited")
    return entry


def _study_row(row: tuple[object, ...]) -> tuple[object, ...]:
    text = row[1] if isinstance(row[1], str) else ""
    return hashlib.sha256(text.encode()).hexdigest(), text


def check_place(site_dir: Path, entries: Sequence[Entry]) -> None:
    """Whether a whole ledger belongs to this folder and is not older than the answers beside it.

    Raises:
        HemoFedError: it is another cohort's (LEDGER_DAMAGED), or older (LEDGER_ROLLED_BACK).
    """
    path, marker = site_dir / LEDGER_FILE, read_marker(site_dir)
    header = entries[0].header
    if marker is None and len(entries) > 1:
        raise damaged(path, f"stands without its {MARKER_FILE}: it was copied from elsewhere, or that file removed")
    if marker is not None and (header is None or marker != header.cohort):
        raise damaged(path, f"is another cohort's: its id is not the one in {MARKER_FILE}")
    reserved = {entry.sequence for entry in entries if entry.kind == "reserve"}
    if orphans := answer_numbers(site_dir) - reserved:
        raise HemoFedError(
            f"{path}: lacks entry {min(orphans)}, whose answer is in {ANSWERS_DIR}: an older ledger was put back; "
            f"{RESTORE}",
            ExitCode.LEDGER_ROLLED_BACK,
        )


def read_marker(site_dir: Path) -> str | None:
    """The cohort's id that was noted when the ledger was made, or None."""
    try:
        return (site_dir / MARKER_FILE).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None


def answer_numbers(site_dir: Path) -> set[int]:
    """The reservations that there are answer files of."""
    names = (ANSWER_NAME.fullmatch(path.name) for path in (site_dir / ANSWERS_DIR).glob("*.answer"))
    return {int(name[1]) for name in names if name}


def answer_path(site_dir: Path, reservation: int) -> Path:
    """Where the answer of a reservation is stored."""
    return site_dir / ANSWERS_DIR / f"{reservation:08d}.answer"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 whole or not at all; it is on the disk when this returns.

    Raises:
        HemoFedError: it could not be written; nothing of it is left (LEDGER_NOT_WRITTEN).
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700)
            sync_folder(path.parent.parent)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise not_written(path, error.strerror or "unknown") from None


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk: without it a new file may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(path: Path, what: str) -> HemoFedError:
    """The one line for a ledger that is not what was written."""
    return HemoFedError(f"{path}: {what}; {RESTORE}", ExitCode.LEDGER_DAMAGED)


def not_written(path: Path, why: str) -> HemoFedError:
    """The one line for a disk that does not take what must be kept."""
    return HemoFedError(
        f"{path}: cannot be written ({why}); free disk space or mend the rights, then run again: nothing is lost, and "
        "what was reserved stays spent",
        ExitCode.LEDGER_NOT_WRITTEN,
    )


def fault_of(path: Path, error: sqlite3.Error) -> HemoFedError:
    """What an error of SQLite means for the ledger."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in BUSY_CODES:
        return HemoFedError(f"{path}: another program uses it; wait for its end and run again", ExitCode.LEDGER_BUSY)
    if code in UNWRITABLE_CODES:
        return not_written(path, str(error))
    return damaged(path, f"cannot be read as a ledger ({error})")
