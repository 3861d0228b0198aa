"""The site store's SQLite schema. A change to it is a new SCHEMA_VERSION and a step in MIGRATIONS."""

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from client.pseudonym import KEY_FILE, PatientKey
from shared_model.errors import ExitCode, HemoFedError

SCHEMA_VERSION = 2
INDEX_FILE = "index.sqlite"
KEY_MARK = "hemofed: the mark of a key"  # its pseudonym stands for the key itself

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE archives (
    archive INTEGER PRIMARY KEY,        -- a source folder; record ids are unique within it
    source TEXT NOT NULL UNIQUE);
CREATE TABLE ingests (
    ingest INTEGER PRIMARY KEY, archive INTEGER NOT NULL REFERENCES archives (archive), format TEXT NOT NULL,
    selection TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT);
CREATE TABLE records (
    row INTEGER PRIMARY KEY,            -- place in signals.i16
    archive INTEGER NOT NULL REFERENCES archives (archive),
    record_id TEXT NOT NULL, segment INTEGER NOT NULL,
    patient TEXT NOT NULL,              -- pseudonym, never the id
    split INTEGER NOT NULL,             -- 0 train, 1 validation, 2 test
    recorded_at REAL,                   -- unix seconds of the segment's first sample
    age_years REAL, sex TEXT NOT NULL, race TEXT NOT NULL,
    measured_at REAL,                   -- unix seconds of the catheterisation
    source_rate_hz REAL NOT NULL,
    lead_mask INTEGER NOT NULL,         -- bit i: LEADS[i] is present
    content BLOB NOT NULL,              -- SHA-256 of the record at 250 Hz, before masks
    source TEXT NOT NULL, ingest INTEGER NOT NULL REFERENCES ingests (ingest),
    device TEXT NOT NULL DEFAULT 'unknown',
    quality REAL,                       -- 0 useless to 1 clean; NULL: stored before it was assessed
    UNIQUE (archive, record_id, segment));
CREATE INDEX records_content ON records (content);
CREATE INDEX records_patient ON records (patient);
CREATE TABLE labels (
    row INTEGER NOT NULL REFERENCES records (row), name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (row, name)) WITHOUT ROWID;
CREATE TABLE turned_away (
    archive INTEGER NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    ingest INTEGER NOT NULL,
    patient TEXT,                       -- pseudonym, where the record could be read that far
    PRIMARY KEY (archive, source)) WITHOUT ROWID;
CREATE TABLE remarks (
    archive INTEGER NOT NULL, source TEXT NOT NULL, noticed TEXT NOT NULL, detail TEXT NOT NULL,
    ingest INTEGER NOT NULL,
    patient TEXT,
    PRIMARY KEY (archive, source, noticed)) WITHOUT ROWID;
"""

# What schema 2 adds: machine measurements; measurements of the heart with their own times (events), joined to
# records by a chosen window; patients who were forgotten, and rows whose samples are still to be overwritten.
ADDED_IN_2 = """
CREATE TABLE measurements (
    row INTEGER NOT NULL REFERENCES records (row), name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (row, name)) WITHOUT ROWID;
CREATE TABLE events (
    event INTEGER PRIMARY KEY, patient TEXT NOT NULL, measured_at REAL NOT NULL, source TEXT NOT NULL,
    UNIQUE (patient, measured_at, source));
CREATE TABLE event_values (
    event INTEGER NOT NULL REFERENCES events (event), name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (event, name)) WITHOUT ROWID;
CREATE TABLE record_events (
    row INTEGER PRIMARY KEY REFERENCES records (row), event INTEGER NOT NULL REFERENCES events (event));
CREATE TABLE forgotten (
    patient TEXT PRIMARY KEY, forgotten_at TEXT NOT NULL,
    uses TEXT NOT NULL                  -- JSON: runs that had used the patient's ECGs
    ) WITHOUT ROWID;
CREATE TABLE forgotten_signals (
    signal TEXT PRIMARY KEY             -- keyed hash of a forgotten ECG's content
    ) WITHOUT ROWID;
CREATE TABLE wipes (row INTEGER PRIMARY KEY);
"""

MIGRATIONS = {
    1: """
ALTER TABLE records ADD COLUMN device TEXT NOT NULL DEFAULT 'unknown';
ALTER TABLE records ADD COLUMN quality REAL;
ALTER TABLE turned_away ADD COLUMN patient TEXT;
ALTER TABLE remarks ADD COLUMN patient TEXT;
CREATE INDEX records_patient ON records (patient);
"""
    + ADDED_IN_2,
}
"""Schema version -> the statements that lead to the next one."""


def connect(site_dir: Path) -> sqlite3.Connection:
    """Open the index of a site for writing: made if it is absent, brought to this release's schema if it is older.

    Raises:
        HemoFedError: the file is not an index, or of a later release.
    """
    path = site_dir / INDEX_FILE
    path.touch(mode=0o600)  # it names files, and SQLite would make it readable for others
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # a forgotten patient's rows are overwritten, not unlinked
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _migrate(connection)
        else:
            _run(connection, SCHEMA + ADDED_IN_2)
            connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        connection.execute("COMMIT")
        check_schema(connection, path)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise damaged(path, error) from None
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    """Take the index to this release's schema, step by step, inside the caller's transaction."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    version = int(row[0]) if row and row[0].isdecimal() else SCHEMA_VERSION
    while version in MIGRATIONS:
        _run(connection, MIGRATIONS[version])
        version += 1
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(version),))


def _run(connection: sqlite3.Connection, script: str) -> None:
    """Execute statement by statement: `executescript` would commit first."""
    for statement in script.split(";\n"):
        connection.execute(statement)


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raises HemoFedError unless the index is of this release's schema version."""
    try:
        row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from None
    version = row[0] if row else "none"
    if version.isdecimal() and int(version) in MIGRATIONS:
        raise HemoFedError(
            f"{path}: made by an older release (schema {version}, this one reads {SCHEMA_VERSION}); run: "
            f"hemofed-client migrate --site-dir {path.parent}",
            ExitCode.BAD_SITE,
        )
    if version != str(SCHEMA_VERSION):
        raise HemoFedError(
            f"{path}: schema version {version}, this release reads {SCHEMA_VERSION}; use the release that made it",
            ExitCode.BAD_SITE,
        )


def check_key(connection: sqlite3.Connection, key: PatientKey, site_dir: Path) -> None:
    """Note at first use which key the pseudonyms are made with.

    Guarantee: with another key a patient would have another pseudonym, be in two splits, and be forgotten no more;
    so a store refuses every key but its own.

    Raises:
        HemoFedError: the store was made with another key.
    """
    mark = key.pseudonym(KEY_MARK)
    connection.execute("INSERT OR IGNORE INTO meta VALUES ('patient_key', ?)", (mark,))
    if connection.execute("SELECT value FROM meta WHERE key = 'patient_key'").fetchone()[0] != mark:
        raise HemoFedError(
            f"{site_dir / KEY_FILE}: not the key that this store was made with; restore it from a backup",
            ExitCode.BAD_SITE,
        )


def utc_now() -> str:
    """The clock time as the index keeps it: ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def damaged(path: Path, error: sqlite3.Error) -> HemoFedError:
    """The one line for an index that SQLite cannot read or write."""
    return HemoFedError(
        f"{path}: the index cannot be used ({error}); free disk space and close other programs that use it, "
        "or restore the site folder from a backup",
        ExitCode.BAD_SITE,
    )
