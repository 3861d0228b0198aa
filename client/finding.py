"""What a check of `hemofed-client doctor` found."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is: a warning may wait, with a problem the work would fail or leak."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do."""

    check: str
    level: Level
    found: str
    remedy: str = ""
    """Empty where nothing has to be done."""


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """Something to mend when there is time."""
    return Finding(check, Level.WARNING, found, remedy)


def problem(check: str, found: str, remedy: str) -> Finding:
    """Something to mend first."""
    return Finding(check, Level.PROBLEM, found, remedy)
