"""A store's whole content, for comparing two stores."""

import sqlite3
from contextlib import closing
from pathlib import Path

from client.schema import INDEX_FILE

CLOCK_TIMES = {"ingests": ("started_at", "finished_at"), "forgotten": ("forgotten_at",)}


def dump(site_dir: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, clock times apart."""
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        content = {}
        for name in names:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
            kept = ", ".join(column for column in columns if column not in CLOCK_TIMES.get(name, ()))
            content[name] = sorted(connection.execute(f"SELECT {kept} FROM {name}"), key=repr)
        return content


def structure(connection: sqlite3.Connection) -> dict[str, object]:
    """Tables with their columns, and indexes, as SQLite knows them."""
    listed = connection.execute("SELECT type, name FROM sqlite_master ORDER BY 1, 2").fetchall()
    return {
        name: connection.execute(f"PRAGMA {'table' if kind == 'table' else 'index'}_info({name})").fetchall()
        for kind, name in listed
    }
