"""One writer a site folder at a time, and one user of its privacy ledger."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_model.errors import ExitCode, HemoFedError

LOCK_FILE = "ingest.lock"
LEDGER_LOCK_FILE = "ledger.lock"


@contextmanager
def hold_lock(site_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however it ends.

    Raises:
        HemoFedError: another process holds it.
    """
    busy = f"{site_dir}: another ingest is at work here; wait for its end and run again"
    with _hold(site_dir / LOCK_FILE, HemoFedError(busy, ExitCode.BAD_SITE)):
        yield


@contextmanager
def hold_ledger_lock(site_dir: Path) -> Iterator[None]:
    """Hold the lock of the folder's privacy ledger, for the whole of a private round.

    Raises:
        HemoFedError: another client holds it (LEDGER_BUSY), or the folder cannot be written (LEDGER_NOT_WRITTEN).
    """
    busy = f"{site_dir}: another client works with this privacy ledger; wait for its end and run again"
    try:
        with _hold(site_dir / LEDGER_LOCK_FILE, HemoFedError(busy, ExitCode.LEDGER_BUSY)):
            yield
    except OSError as error:
        if error.filename != str(site_dir / LEDGER_LOCK_FILE):
            raise
        line = f"{error.filename}: cannot be written ({error.strerror}); mend the folder's rights and run again"
        raise HemoFedError(line, ExitCode.LEDGER_NOT_WRITTEN) from None


@contextmanager
def _hold(path: Path, busy: HemoFedError) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
