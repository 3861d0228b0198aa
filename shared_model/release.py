"""Which code is running: one hash over the source of the four packages."""

import hashlib
from functools import lru_cache
from pathlib import Path

PACKAGES = ("client", "server", "shared_model", "simulation")
VERSION = "0.1.0"


@lru_cache(maxsize=1)
def release_sha256() -> str:
    """SHA-256 over path and content of every source file beside this one, hexadecimal.

    Flower's simulation workers can silently import another checkout that lies in the working directory
    they were started from; centre and sites compare this hash before a study starts.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
