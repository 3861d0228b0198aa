"""labels.csv: who a record's patient is and what was measured. Columns and their meaning: docs/labels.md.

A labels.csv without the column `record` is a table of measurements by patient and time: see client/events.py.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from client.records.plausible import plausible_range
from client.records.record import UNKNOWN, Noticed, Remark, known_age, known_sex, unix_seconds
from shared_model.errors import ExitCode, HemoFedError

LABELS_FILE = "labels.csv"
RECORD_COLUMNS = ("record", "patient_id", "age_years", "sex", "race", "recorded_at", "measured_at")
EVENT_COLUMNS = ("patient_id", "measured_at")
EMPTY = frozenset({"", "na", "nan", "n/a", "nd", "none", "null"})
RECORD_SUFFIXES = (".hea", ".dat", ".mat", ".xml", ".dcm")  # all of one length


@dataclass(frozen=True, slots=True)  # a large archive has a million of them
class LabelRow:
    """One row of labels.csv; empty cells are "" or NaN."""

    patient_id: str = ""
    age_years: float = math.nan
    sex: str = UNKNOWN
    race: str = ""
    recorded_at: float = math.nan
    measured_at: float = math.nan
    labels: Mapping[str, float] = field(default_factory=dict)


def merged(row: LabelRow, over: LabelRow | None) -> LabelRow:
    """An archive's own row with that of labels.csv, which goes before it; labels that it does not name stay."""
    if over is None:
        return row
    return replace(
        over,
        patient_id=over.patient_id or row.patient_id,
        age_years=row.age_years if math.isnan(over.age_years) else over.age_years,
        sex=row.sex if over.sex == UNKNOWN else over.sex,
        race=over.race or row.race,
        recorded_at=row.recorded_at if math.isnan(over.recorded_at) else over.recorded_at,
        measured_at=row.measured_at if math.isnan(over.measured_at) else over.measured_at,
        labels={**row.labels, **over.labels},
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A row as it stands in the file."""

    number: int
    cells: Mapping[str, str]
    """Column -> text without blanks around it."""
    length: int
    """How many cells the row has."""

    @property
    def aligned(self) -> bool:
        """Whether each cell can be taken to stand in its own column."""
        return self.length == len(self.cells)


@dataclass(frozen=True)
class LabelTable:
    """The rows by record, and what was noticed while reading them."""

    rows: Mapping[str, LabelRow]
    remarks: tuple[Remark, ...]


def read_labels(path: Path) -> LabelTable:
    """Read a labels.csv; an absent file, or one of measurements by patient and time, is an empty table.

    A column beyond the known ones is a label if any of its cells is a number; a column of text is left out
    with a remark. A single cell of a label column that is no plausible number is dropped with a remark. Of a row with
    more or fewer cells than the header only record and patient are taken, with a remark.

    Raises:
        HemoFedError: it cannot be read as CSV, a column name stands twice, or there is no `record` column.
    """
    if not path.is_file() or is_event_form(path):
        return LabelTable({}, ())
    remarks: list[Remark] = []
    columns = _label_columns(_lines(path), path, remarks)
    rows: dict[str, LabelRow] = {}
    for line in _lines(path):  # read a second time: as text the table would take twice the memory
        record, where = record_name(line.cells["record"]), f"{path.name} line {line.number}"
        if record in rows:
            detail = f"{record} has a row already; the first is used, remove the other"
            remarks.append(Remark(where, Noticed.REPEATED_LABEL_ROW, detail))
        elif line.aligned:
            rows[record] = _label_row(line.cells, columns, where, remarks)
        else:
            detail = (
                f"{line.length} cells, but the header has {len(line.cells)} (a decimal comma?): only its record and "
                "patient_id are taken; mend the row"
            )
            remarks.append(Remark(where, Noticed.TEXT_LABEL, detail))
            rows[record] = LabelRow(patient_id=line.cells.get("patient_id", ""))
    return LabelTable(rows, tuple(remarks))


def is_event_form(path: Path) -> bool:
    """Whether a table has no `record` but `patient_id` and `measured_at`; False where it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = {column.strip() for column in next(csv.reader(file), ())}
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return "record" not in columns and columns.issuperset(EVENT_COLUMNS)


def _lines(path: Path) -> Iterator[Line]:
    """Each row that is not blank. Raises HemoFedError as `read_labels`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _checked_lines(csv.DictReader(file), path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HemoFedError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8", ExitCode.BAD_SOURCE) from None


def _checked_lines(reader: "csv.DictReader[str]", path: Path) -> Iterator[Line]:
    columns = [column.strip() for column in reader.fieldnames or ()]
    if "record" not in columns:
        raise HemoFedError(
            f"{path}: no column 'record' in the first line; add it (each record's path without extension), or both "
            f"{' and '.join(EVENT_COLUMNS)} for measurements by patient and time",
            ExitCode.BAD_SOURCE,
        )
    if len(set(columns)) < len(columns):
        raise HemoFedError(f"{path}: a column name stands twice in the first line; rename one", ExitCode.BAD_SOURCE)
    reader.fieldnames = columns
    for row in reader:
        beyond: Sequence[str] = row.get(None, ())  # where DictReader puts extra cells
        length = sum(row[column] is not None for column in columns) + len(beyond)
        yield Line(reader.line_num, {column: (row[column] or "").strip() for column in columns}, length)


def _label_columns(lines: Iterable[Line], path: Path, remarks: list[Remark]) -> list[str]:
    """The columns that hold numbers; a remark for each that holds text only."""
    first_text: dict[str, str] = {}
    numbers: set[str] = set()
    names: list[str] = []
    for line in lines:
        cells = line.cells
        names = names or [name for name in cells if name not in RECORD_COLUMNS]
        for column in names if line.aligned else ():
            if column not in numbers and cells[column].lower() not in EMPTY:
                if _number(cells[column]) is not None:
                    numbers.add(column)
                else:
                    first_text.setdefault(column, cells[column])
    for column in names:
        if column in first_text and column not in numbers:
            detail = f"holds text ({first_text[column][:30]!r}), so it is no label; write 0 and 1 to make it one"
            remarks.append(Remark(f"{path.name} column {column}", Noticed.TEXT_COLUMN, detail))
    return [column for column in names if column in numbers]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def record_name(text: str) -> str:
    """A record's name as ingest knows it: forward slashes, no leading "./", no extension of a record's file."""
    name = text.strip().replace("\\", "/").removeprefix("./")
    return name[: -len(RECORD_SUFFIXES[0])] if name.lower().endswith(RECORD_SUFFIXES) else name


def _label_row(cells: Mapping[str, str], columns: Sequence[str], where: str, remarks: list[Remark]) -> LabelRow:
    labels: dict[str, float] = {}
    for column in columns:
        text = cells[column]
        if text.lower() in EMPTY:
            continue
        value = _number(text)
        low, high = plausible_range(column)
        if value is None:
            detail = f"{column} = {text[:40]!r} is not a number; the label is dropped, mend the cell"
            remarks.append(Remark(where, Noticed.TEXT_LABEL, detail))
        elif low <= value <= high:
            labels[column] = value
        else:
            detail = f"{column} = {text} is outside {low:g} to {high:g}; the label is dropped, check the source"
            remarks.append(Remark(where, Noticed.ABSURD_LABEL, detail))
    return LabelRow(
        patient_id=cells.get("patient_id", ""),
        age_years=known_age(cells.get("age_years", "")),
        sex=known_sex(cells.get("sex", "")),
        race=cells.get("race", "").lower(),
        recorded_at=_time(cells, "recorded_at", where, remarks),
        measured_at=_time(cells, "measured_at", where, remarks),
        labels=labels,
    )


def _time(cells: Mapping[str, str], column: str, where: str, remarks: list[Remark]) -> float:
    text = cells.get(column, "")
    try:
        # A date alone is no time of an ECG: as midnight it would come before whatever was measured that day.
        if column == "recorded_at" and len(text.strip()) == len("2024-05-31"):
            raise ValueError
        return math.nan if text.lower() in EMPTY else unix_seconds(text)
    except ValueError:
        detail = f"{column} = {text[:40]!r} is not ISO 8601 (2024-05-31T09:30:00); taken as unknown"
        remarks.append(Remark(where, Noticed.UNREADABLE_TIME, detail))
        return math.nan
