"""The files of an archive, found without listing it in memory."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(source: Path | str, suffix: str = "") -> Iterator[str]:
    """The paths of all files below whose name ends so (in any case), folder by folder in a fixed order.

    Guarantee: what is no regular file (a pipe, a socket, a device, also by way of a link) is left out, because
    reading it could wait or go on for ever. A link to nothing is given, so that its record is told as unreadable.
    Folders that are links are not followed. Raises OSError for a folder that may not be read.
    """
    folders = [_entries(source)]  # no recursion: folders may lie deeper than Python's stack
    while folders:
        entry = next(folders[-1], None)
        if entry is None:
            folders.pop()
        elif entry.is_dir(follow_symlinks=False):
            folders.append(_entries(entry.path))
        elif entry.name.lower().endswith(suffix) and (entry.is_file() or may_be_opened(entry.path)):
            yield entry.path


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def may_be_opened(path: Path | str) -> bool:
    """Whether opening a listed path returns at once: a regular file, or a link to nothing."""
    return os.path.isfile(path) or not os.path.exists(path)
