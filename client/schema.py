"""The site store's SQLite schema. A change to it is a new SCHEMA_VERSION and a step in docs/site-store.md."""

import sqlite3
from pathlib import Path

from shared_model.errors import ExitCode, HemoFedError

SCHEMA_VERSION = 1
INDEX_FILE = "index.sqlite"

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
    content BLOB NOT NULL,              -- SHA-256 of all segments of the record
    source TEXT NOT NULL, ingest INTEGER NOT NULL REFERENCES ingests (ingest),
    UNIQUE (archive, record_id, segment));
CREATE INDEX records_content ON records (content);
CREATE TABLE labels (
    row INTEGER NOT NULL REFERENCES records (row), name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (row, name)) WITHOUT ROWID;
CREATE TABLE turned_away (
    archive INTEGER NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL,
    ingest INTEGER NOT NULL, PRIMARY KEY (archive, source)) WITHOUT ROWID;
CREATE TABLE remarks (
    archive INTEGER NOT NULL, source TEXT NOT NULL, noticed TEXT NOT NULL, detail TEXT NOT NULL,
    ingest INTEGER NOT NULL, PRIMARY KEY (archive, source, noticed)) WITHOUT ROWID;
"""


def connect(site_dir: Path) -> sqlite3.Connection:
    """Open the index of a site for writing, making it if it is absent.

    Raises:
        HemoFedError: the file is not an index, or of another schema version.
    """
    path = site_dir / INDEX_FILE
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("BEGIN IMMEDIATE")
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        connection.execute("COMMIT")
        check_schema(connection, path)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise damaged(path, error) from None
        raise
    return connection


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raises HemoFedError unless the index is of this release's schema version."""
    try:
        row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    except sqlite3.DatabaseError as error:
        raise damaged(path, error) from None
    version = row[0] if row else "none"
    if version != str(SCHEMA_VERSION):
        raise HemoFedError(
            f"{path}: schema version {version}, this release reads {SCHEMA_VERSION}; use the release that "
            "made it, or ingest the source again into a new site folder",
            ExitCode.BAD_SITE,
        )


def damaged(path: Path, error: sqlite3.Error) -> HemoFedError:
    """The one line for an index that SQLite cannot read or write."""
    return HemoFedError(
        f"{path}: the index cannot be used ({error}); free disk space and close other programs that use it, "
        "or restore the site folder from a backup",
        ExitCode.BAD_SITE,
    )
