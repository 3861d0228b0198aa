"""Reads a table of measurements: a hospital's own (`patient_id`, `measured_at`, values), or MIMIC-IV's chartevents."""

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from client.chartevents import COLUMNS as CHART_COLUMNS
from client.chartevents import RECOGNISED_BY, in_hours, read_charted
from client.event_table import Cells, Dropped, EventTable, event_table, number, without_wedge_above_pa_mean
from client.label_join import HOUR_S
from client.records.labels_csv import EMPTY, EVENT_COLUMNS, RECORD_COLUMNS
from client.store import Progress
from shared_model.errors import ExitCode, HemoFedError

ROWS_A_STEP = 65_536
MEGABYTE = 2**20


def read_events(path: Path, progress: Progress | None = None) -> EventTable:
    """Read a table of measurements, `.csv` or `.csv.gz`, from front to end without holding its text.

    `progress(done, total)` counts megabytes of the file as it lies on the disk.

    Raises:
        HemoFedError: it is not there, cut short or not CSV in UTF-8 with commas, or a column is absent or stands twice.
    """
    with closing(_rows(path, progress)) as rows:
        columns = _checked_columns(next(rows, []), path)
        charted = set(RECOGNISED_BY) <= set(columns)
        cells = read_charted(columns, rows) if charted else _read_own(columns, rows)
    measured = cells.measured()
    plausible = without_wedge_above_pa_mean(measured, cells.labels, within_s=HOUR_S if charted else 0.0)
    if len(plausible.at) < len(measured.at):
        cells.dropped[Dropped.WEDGE_ABOVE_PA_MEAN] = len(measured.at) - len(plausible.at)
    return event_table(path.name.removesuffix(".gz"), cells, in_hours(plausible) if charted else plausible)


def _rows(path: Path, progress: Progress | None) -> Generator[list[str]]:
    """All rows of a CSV file, its header first; blank lines are passed over."""
    try:
        with path.open("rb") as raw, io.TextIOWrapper(_unpacked(raw), encoding="utf-8-sig", newline="") as text:
            megabytes = path.stat().st_size // MEGABYTE + 1
            for count, row in enumerate(csv.reader(text, strict=True)):
                if progress is not None and count % ROWS_A_STEP == 0:
                    progress(raw.tell() // MEGABYTE, megabytes)
                if row:
                    yield row
            if progress is not None:
                progress(megabytes, megabytes)
    except FileNotFoundError:
        raise HemoFedError(f"{path}: no such file; give the table of measurements", ExitCode.BAD_SOURCE) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise HemoFedError(
            f"{path}: the packed file is cut short or damaged ({error}); copy it again", ExitCode.BAD_SOURCE
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HemoFedError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8", ExitCode.BAD_SOURCE) from None


def _unpacked(raw: BinaryIO) -> BinaryIO:
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[return-value]  # it is one in all but name


def _checked_columns(header: Sequence[str], path: Path) -> list[str]:
    """The column names. Raises HemoFedError unless they are those of one of the two kinds of table."""
    columns = [column.strip() for column in header]
    needed = CHART_COLUMNS if set(RECOGNISED_BY) <= set(columns) else EVENT_COLUMNS
    absent = [column for column in needed if column not in columns]
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        fault = "its columns are not separated by commas; save it as CSV with commas and decimal points"
    elif len(set(columns)) < len(columns):
        fault = "a column name stands twice in the first line; rename one"
    elif "record" in columns:
        fault = "has a column 'record', so it labels records and not patients; put it beside them and run ingest"
    elif absent:
        fault = f"no column {absent[0]!r} in the first line; a table of measurements has {', '.join(needed)}"
    else:
        return columns
    raise HemoFedError(f"{path}: {fault}", ExitCode.BAD_SOURCE)


def _read_own(columns: Sequence[str], rows: Iterator[list[str]]) -> Cells:
    """A hospital's own table: a row a measurement, every column beyond the known ones a label if it holds numbers."""
    cells = Cells(labels=tuple(column for column in columns if column and column not in RECORD_COLUMNS))
    patient_at, time_at = (columns.index(column) for column in EVENT_COLUMNS)
    label_at = [columns.index(label) for label in cells.labels]
    known: dict[tuple[int, float, int], float] = {}
    with_numbers: set[int] = set()
    texts: Counter[int] = Counter()
    for row in rows:
        cells.rows += 1
        if len(row) != len(columns):
            cells.dropped[Dropped.ROW_LENGTH] += 1
        elif (place := cells.who_and_when(row[patient_at], row[time_at])) is not None:
            for label, text in enumerate(row[at].strip() for at in label_at):
                if text.lower() in EMPTY:
                    continue
                value = number(text)
                if value is None:
                    texts[label] += 1
                else:
                    with_numbers.add(label)
                    _take(cells, known, (*place, label), value)
    not_numbers = sum(count for label, count in texts.items() if label in with_numbers)
    if not_numbers:
        cells.read += not_numbers
        cells.dropped[Dropped.NOT_A_NUMBER] = not_numbers
    cells.text_columns = tuple(cells.labels[label] for label in sorted(texts.keys() - with_numbers))
    return cells


def _take(
    cells: Cells, known: dict[tuple[int, float, int], float], place: tuple[int, float, int], value: float
) -> None:
    """Keep a plausible value; of one patient, time and label the first."""
    cells.read += 1
    if not cells.plausible(place[2], value):
        cells.dropped[Dropped.OUT_OF_RANGE] += 1
    elif place not in known:
        known[place] = value
        cells.keep(*place, value)
    elif known[place] != value:
        cells.dropped[Dropped.REPEATED] += 1
