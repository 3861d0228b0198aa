"""What `hemofed-client doctor` looks at in a site folder. Nothing is changed, made or mended."""

import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from client.finding import Finding, ok, problem, warning
from client.lock import LOCK_FILE
from client.pseudonym import KEY_BYTES, KEY_FILE
from client.schema import INDEX_FILE, SCHEMA_VERSION, check_schema
from client.site import load_site
from client.store import ROW_BYTES, SIGNAL_FILE
from client.store_writer import end_of_rows
from shared_model.errors import HemoFedError

RESTORE = "restore the site folder from a backup, or ingest into a new one"


def examine_site(site_dir: Path, has_gpu: bool) -> list[Finding]:
    """Everything about one site folder; one line where there is none."""
    if not site_dir.is_dir():
        remedy = f"make it: hemofed-client ingest SOURCE --site-dir {site_dir}"
        return [warning("site folder", f"{site_dir}: not there", remedy)]
    return [
        folder_rights(site_dir),
        settings(site_dir, has_gpu),
        key_file(site_dir),
        *store(site_dir),
    ]


def folder_rights(site_dir: Path) -> Finding:
    """Who may look into the folder, and whether we may write."""
    mode = stat.S_IMODE(site_dir.stat().st_mode)
    found = f"{site_dir}: mode {mode:04o}"
    if os.name == "posix" and mode & 0o007:
        return problem("site folder", f"{found}, open to everybody on this machine", f"run: chmod 700 {site_dir}")
    if not os.access(site_dir, os.W_OK | os.X_OK):
        return problem("site folder", f"{found}, not writable by you", "run as its owner, or ask them for the right")
    if os.name == "posix" and mode & 0o070:
        return warning("site folder", f"{found}, open to its group", f"run: chmod 700 {site_dir}")
    return ok("site folder", found)


def settings(site_dir: Path, has_gpu: bool) -> Finding:
    """site.toml."""
    try:
        site = load_site(site_dir)
    except HemoFedError as error:
        found, _, remedy = error.message.rpartition("; ")
        return problem("site.toml", found or error.message, remedy if found else "mend that line")
    if site.device == "cuda" and not has_gpu:
        return problem("site.toml", 'device = "cuda", and there is none', 'set device = "auto" or "cpu"')
    return ok("site.toml", f"{site.name}, disclosure {site.disclosure}, cells of at least {site.minimum_cell} patients")


def key_file(site_dir: Path) -> Finding:
    """The secret behind the pseudonyms: there, private, and a key."""
    path = site_dir / KEY_FILE
    try:
        mode, text = stat.S_IMODE(path.stat().st_mode), path.read_text(encoding="ascii")
        whole = len(bytes.fromhex(text.strip())) >= KEY_BYTES
    except FileNotFoundError:
        if not (site_dir / INDEX_FILE).exists():
            return ok("patient key", "none yet; the first ingest makes it")
        remedy = "restore it from your backup: with a new key a known patient would count as another"
        return problem("patient key", f"{path}: not there", remedy)
    except OSError as error:
        return problem("patient key", f"{path}: cannot be read ({error.strerror})", "run as its owner")
    except ValueError:
        mode, whole = 0o600, False
    if not whole:
        return problem("patient key", f"{path}: not a key", "restore it from your backup")
    if os.name == "posix" and mode & 0o077:
        return problem("patient key", f"{path}: mode {mode:04o}, others may read it", f"run: chmod 600 {path}")
    return ok("patient key", f"mode {mode:04o}; keep a copy apart from the store")


def store(site_dir: Path) -> Iterator[Finding]:
    """Index and signal file."""
    path = site_dir / INDEX_FILE
    if not path.is_file():
        yield warning("store", "nothing is stored yet", f"run: hemofed-client ingest SOURCE --site-dir {site_dir}")
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            check_schema(connection, path)
            faults = [fault for (fault,) in connection.execute("PRAGMA quick_check(3)")]
            if faults != ["ok"]:
                yield problem("index", f"{path}: {'; '.join(faults)[:200]}", RESTORE)
                return
            yield ok("index", f"whole, schema {SCHEMA_VERSION}")
            yield signal_file(site_dir, connection)
            yield ingests(site_dir, connection)
            yield wipes(site_dir, connection)
    except HemoFedError as error:
        found, _, remedy = error.message.rpartition("; ")
        yield problem("index", found or error.message, remedy if found else RESTORE)
    except sqlite3.Error as error:
        yield problem("index", f"{path}: {error}", RESTORE)


def signal_file(site_dir: Path, connection: sqlite3.Connection) -> Finding:
    """Whether the signals of all rows are there."""
    path = site_dir / SIGNAL_FILE
    count, end = connection.execute("SELECT count(*) FROM records").fetchone()[0], end_of_rows(connection)
    size = path.stat().st_size if path.exists() else 0
    if size < end * ROW_BYTES:
        return problem("signals", f"{path}: holds {size // ROW_BYTES:,} of {end:,} rows", RESTORE)
    return ok("signals", f"{count:,} ECGs, {size / 1e9:.2f} GB")


def ingests(site_dir: Path, connection: sqlite3.Connection) -> Finding:
    """Whether an ingest is at work, or was cut off."""
    asked = "SELECT source, format FROM ingests JOIN archives USING (archive) WHERE finished_at IS NULL"
    unfinished = connection.execute(asked).fetchall()
    if is_locked(site_dir):
        return ok("ingest", "one is at work just now")
    if unfinished:
        source, format_name = unfinished[0]
        more = f" (and {len(unfinished) - 1} more)" if len(unfinished) > 1 else ""
        remedy = f"what is stored is whole; go on: hemofed-client ingest {source} --site-dir {site_dir}"
        return warning("ingest", f"{source} ({format_name}) was cut off{more}", remedy)
    return ok("ingest", "none was cut off")


def wipes(site_dir: Path, connection: sqlite3.Connection) -> Finding:
    """Whether samples of forgotten patients are still in the signal file."""
    rows = connection.execute("SELECT count(*) FROM wipes").fetchone()[0]
    if rows and not is_locked(site_dir):
        found = f"{rows} ECGs of forgotten patients are out of the index, and not overwritten yet"
        return problem("forgotten", found, f"run any ingest into {site_dir} again: it begins with that")
    patients = connection.execute("SELECT count(*) FROM forgotten").fetchone()[0]
    return ok("forgotten", f"{patients} patients; nothing is left to overwrite")


def is_locked(site_dir: Path) -> bool:
    """Whether an ingest holds the folder's lock. The file is not made if it is absent."""
    try:
        with (site_dir / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
