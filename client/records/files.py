"""The files of an archive, found without listing it in memory."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(source: Path | str, suffix: str = "") -> Iterator[str]:
    """The paths of all files below whose name ends so (in any case), folder by folder in a fixed order.

    Folders that are links are not followed. Raises OSError for a folder that may not be read.
    """
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path, suffix)
        elif entry.name.lower().endswith(suffix):
            yield entry.path
