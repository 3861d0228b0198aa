"""CSV tables that list an archive's records, row by row, and the rows that --where selects."""

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from client.records.record import Reason, Unusable
from shared_model.errors import ExitCode, HemoFedError

Row = dict[str, str]


def read_rows(path: Path, needed: Sequence[str], archive: str) -> Iterator[Row]:
    """The rows of a table, one after the other; empty cells are "". A table ending in .gz is unpacked on the way.

    Raises:
        HemoFedError: it cannot be read as CSV in UTF-8, or a needed column is not there.
    """
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [column for column in needed if column not in (reader.fieldnames or ())]
            if absent:
                raise HemoFedError(
                    f"{path}: column {absent[0]!r} is not there; copy the file from the {archive} archive",
                    ExitCode.BAD_SOURCE,
                )
            for row in reader:
                yield {key: value or "" for key, value in row.items() if key is not None}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise HemoFedError(
            f"{path}: cannot be read ({error}); copy it from the {archive} archive", ExitCode.BAD_SOURCE
        ) from None


@dataclass(frozen=True)
class Selection:
    """Rows by `--where COLUMN=VALUE`: values of one column are alternatives, different columns must all hold."""

    where: tuple[str, ...]
    wanted: Mapping[str, frozenset[str]]

    def matches(self, row: Row) -> bool:
        """Whether the row is selected."""
        return all(plain_value(row[column]) in values for column, values in self.wanted.items())

    def rows(self, path: Path, needed: Sequence[str], archive: str) -> Iterator[Row]:
        """The selected rows of a table. Raises HemoFedError as `read_rows`, and for a column that is not there."""
        for row in read_rows(path, needed, archive):
            for column in self.wanted:
                if column not in row:
                    raise HemoFedError(
                        f"--where {column}: {path} has no such column; it has: {', '.join(row)}", ExitCode.USAGE
                    )
            if self.matches(row):
                yield row

    def nothing(self, path: Path) -> HemoFedError:
        """The error for a selection without a row."""
        conditions = " ".join(f"--where {condition!r}" for condition in self.where) or "the whole table"
        return HemoFedError(
            f"{path}: no row for {conditions}; check the values in that column", ExitCode.NOTHING_STORED
        )


def parse_selection(where: Sequence[str]) -> Selection:
    """Raises HemoFedError if a condition is not COLUMN=VALUE."""
    wanted: dict[str, set[str]] = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise HemoFedError(f"--where {condition!r}: write COLUMN=VALUE, for example site=0", ExitCode.USAGE)
        wanted.setdefault(column.strip(), set()).add(plain_value(value))
    return Selection(tuple(where), {column: frozenset(values) for column, values in wanted.items()})


def plain_value(text: str) -> str:
    """Text without blanks around it; numbers in one spelling, so that 0 and 0.0 are the same."""
    try:
        return repr(float(text))
    except ValueError:
        return text.strip()


def plain_id(text: str) -> str:
    """`15709.0` and `15709` are the same patient."""
    return text.strip().removesuffix(".0")


def path_inside(source: Path, name: str, table: str) -> Path:
    """The path that a table names. Raises Unusable if it leads out of the archive."""
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        detail = f"{table} points to {name[:80]!r}, outside the archive; mend the table"
        raise Unusable(Reason.PATH_OUTSIDE_FOLDER, detail)
    return source / name
