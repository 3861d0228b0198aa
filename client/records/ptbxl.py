"""PTB-XL 1.0.3: ptbxl_database.csv, scp_statements.csv, records500/ and records100/ (doi:10.13026/kfzx-aw45).

ptbxl_database.csv may be a selection of rows, and records500/ may hold some of them only.
"""

import ast
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from client.records.labels_csv import LabelRow
from client.records.record import (
    Archive,
    Item,
    Noticed,
    Reason,
    Remark,
    TurnedAway,
    known_age,
    unix_seconds,
)
from client.records.wfdb_folder import read_record
from shared_model.errors import ExitCode, HemoFedError

DATABASE_FILE, STATEMENTS_FILE = "ptbxl_database.csv", "scp_statements.csv"
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
NEEDED = ("ecg_id", "patient_id", "age", "sex", "recording_date", "scp_codes", "filename_lr", "filename_hr")
# PTB-XL writes 300 for every age above 89, so that nobody is known by it: such a patient counts as 90.
HIDDEN_AGE, HIDDEN_AGE_STANDS_FOR = 300.0, 90.0
SEX = {"0": "male", "1": "female"}

Row = dict[str, str]


def recognises(source: Path) -> bool:
    """Whether the folder holds PTB-XL's table."""
    return (source / DATABASE_FILE).is_file()


def open_archive(source: Path, where: Sequence[str]) -> Archive:
    """Read the two tables and select rows: `where` holds COLUMN=VALUE.

    Values of one column are alternatives, different columns must all hold.

    Raises:
        HemoFedError: a table is absent or broken, or `where` names no column or selects nothing.
    """
    rows = _selected(_read_csv(source / DATABASE_FILE, NEEDED), where, source / DATABASE_FILE)
    superclass = {
        row[""]: row["diagnostic_class"]
        for row in _read_csv(source / STATEMENTS_FILE, ("", "diagnostic", "diagnostic_class"))
        if row["diagnostic"] in ("1", "1.0")
    }
    return Archive(len(rows), _items(source, rows, superclass))


def _read_csv(path: Path, needed: Sequence[str]) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HemoFedError(
            f"{path}: cannot be read ({error}); copy it from the PTB-XL archive", ExitCode.BAD_SOURCE
        ) from None
    absent = [column for column in needed if column not in (reader.fieldnames or ())]
    if absent:
        raise HemoFedError(
            f"{path}: column {absent[0]!r} is not there; copy the file from the PTB-XL archive",
            ExitCode.BAD_SOURCE,
        )
    return rows


def _selected(rows: list[Row], where: Sequence[str], path: Path) -> list[Row]:
    wanted: dict[str, set[str]] = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise HemoFedError(f"--where {condition!r}: write COLUMN=VALUE, for example site=0", ExitCode.USAGE)
        if rows and column.strip() not in rows[0]:
            raise HemoFedError(
                f"--where {condition!r}: {path} has no such column; it has: {', '.join(rows[0])}",
                ExitCode.USAGE,
            )
        wanted.setdefault(column.strip(), set()).add(_plain_value(value))
    chosen = [row for row in rows if all(_plain_value(row[column]) in values for column, values in wanted.items())]
    if not chosen:
        conditions = " ".join(f"--where {condition!r}" for condition in where) or "the whole table"
        raise HemoFedError(f"{path}: no row for {conditions}; check the values in that column", ExitCode.NOTHING_STORED)
    return chosen


def _plain_value(text: str) -> str:
    """Text without blanks around it; numbers in one spelling, so that 0 and 0.0 are the same."""
    try:
        return repr(float(text))
    except ValueError:
        return text.strip()


def _items(source: Path, rows: Sequence[Row], superclass: dict[str, str]) -> Iterator[Item]:
    for row in rows:
        record_id = _plain_id(row["ecg_id"])
        path = _header_path(source, row)
        if isinstance(path, TurnedAway):
            yield path
            continue
        label_row, remarks = _label_row(row, superclass)
        yield from (replace(remark, source=f"{DATABASE_FILE}: ecg_id {record_id}") for remark in remarks)
        yield from read_record(path, record_id, path.relative_to(source).as_posix(), label_row)


def _header_path(source: Path, row: Row) -> Path | TurnedAway:
    """The 500 Hz record where its header is there, else the 100 Hz one."""
    for column in ("filename_hr", "filename_lr"):
        name = row[column].strip()
        if name.startswith(("/", "\\")) or ".." in Path(name).parts:
            detail = f"{column} points to {name[:80]!r}, outside the archive; mend {DATABASE_FILE}"
            return TurnedAway(name, Reason.PATH_OUTSIDE_FOLDER, detail)
        path = source / f"{name}.hea"
        if name and path.is_file():
            return path
    name = row["filename_lr"].strip() or f"ecg_id {row['ecg_id']}"
    return TurnedAway(name, Reason.MISSING_FILE, "neither its 500 Hz nor its 100 Hz header is there; copy one of them")


def _plain_id(text: str) -> str:
    """`15709.0` and `15709` are the same patient."""
    return text.strip().removesuffix(".0")


def _label_row(row: Row, superclass: dict[str, str]) -> tuple[LabelRow, list[Remark]]:
    remarks: list[Remark] = []
    labels: dict[str, float] = {}
    try:
        labels = superclass_labels(row["scp_codes"], superclass)
    except (ValueError, SyntaxError, TypeError):
        remarks.append(Remark("", Noticed.UNREADABLE_CODES, f"scp_codes {row['scp_codes'][:40]!r}: no labels taken"))
    try:
        recorded_at = unix_seconds(row["recording_date"])
    except ValueError:
        recorded_at = math.nan
        remarks.append(Remark("", Noticed.UNREADABLE_TIME, f"recording_date {row['recording_date'][:40]!r}: unknown"))
    age = known_age(row["age"])
    if row["age"].strip() in ("300", "300.0"):
        age = HIDDEN_AGE_STANDS_FOR
    label_row = LabelRow(
        patient_id=_plain_id(row["patient_id"]),
        age_years=age,
        sex=SEX.get(_plain_id(row["sex"]), "unknown"),
        recorded_at=recorded_at,
        labels=labels,
    )
    return label_row, remarks


def superclass_labels(scp_codes: str, superclass: dict[str, str]) -> dict[str, float]:
    """0/1 labels `norm`, `mi`, `sttc`, `cd`, `hyp` and `not_norm` from one `scp_codes` cell.

    A superclass is present when any code of the cell belongs to it (`diagnostic` = 1 and `diagnostic_class`
    in scp_statements.csv), whatever the code's likelihood, as in the archive's own example_physionet.py.
    `not_norm` is 1 - `norm`: also 1 where the cell has no diagnostic statement at all.
    Raises ValueError, SyntaxError or TypeError if the cell is not a dictionary.
    """
    codes = ast.literal_eval(scp_codes)
    if not isinstance(codes, dict):
        raise TypeError("scp_codes is not a dictionary")
    found = {superclass[code] for code in codes if code in superclass}
    labels = {name.lower(): float(name in found) for name in SUPERCLASSES}
    return {"not_norm": 1 - labels["norm"], **labels}
