"""One writer a site folder at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_model.errors import ExitCode, HemoFedError

LOCK_FILE = "ingest.lock"


@contextmanager
def hold_lock(site_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however it ends.

    Raises:
        HemoFedError: another process holds it.
    """
    with (site_dir / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HemoFedError(
                f"{site_dir}: another ingest is at work here; wait for its end and run again",
                ExitCode.BAD_SITE,
            ) from None
        yield
