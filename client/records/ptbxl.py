"""PTB-XL 1.0.3: ptbxl_database.csv, scp_statements.csv, records500/ and records100/ (doi:10.13026/kfzx-aw45).

ptbxl_database.csv may be a selection of rows, and records500/ may hold some of them only.
"""

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, merged, read_labels
from client.records.options import ReaderOptions
from client.records.record import (
    UNKNOWN,
    Archive,
    EcgRecord,
    Item,
    Noticed,
    Reading,
    Reason,
    Remark,
    TurnedAway,
    Unusable,
    known_age,
    told,
    unix_seconds,
)
from client.records.tables import Row, parse_selection, path_inside, plain_id, read_rows
from client.records.wfdb_folder import SUFFIX, read_record, rows_without_record

ARCHIVE = "PTB-XL"
DATABASE_FILE, STATEMENTS_FILE = "ptbxl_database.csv", "scp_statements.csv"
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
NEEDED = ("ecg_id", "patient_id", "age", "sex", "recording_date", "scp_codes", "filename_lr", "filename_hr")
# PTB-XL writes 300 for every age above 89, so that nobody is known by it: such a patient counts as 90.
HIDDEN_AGE, HIDDEN_AGE_STANDS_FOR = 300.0, 90.0
SEX = {"0": "male", "1": "female"}


def recognises(source: Path) -> bool:
    """Whether the folder holds PTB-XL's table."""
    return (source / DATABASE_FILE).is_file()


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """Read the two tables, and labels.csv where it is there, and select rows by `options.where`.

    Raises:
        HemoFedError: a table is absent or broken, or `where` names no column or selects nothing.
    """
    selection, path = parse_selection(options.where), source / DATABASE_FILE
    rows = list(selection.rows(path, NEEDED, ARCHIVE))
    if not rows:
        raise selection.nothing(path)
    superclass = {
        row[""]: row["diagnostic_class"]
        for row in read_rows(source / STATEMENTS_FILE, ("", "diagnostic", "diagnostic_class"), ARCHIVE)
        if row["diagnostic"] in ("1", "1.0")
    }
    return Archive(len(rows), _readings(source, rows, superclass, read_labels(source / LABELS_FILE)))


def _readings(source: Path, rows: Sequence[Row], superclass: dict[str, str], table: LabelTable) -> Iterator[Reading]:
    yield told(table.remarks)
    for row in rows:
        record_id = plain_id(row["ecg_id"])
        label_row, remarks = _label_row(row, superclass)
        yield told(replace(remark, source=f"{DATABASE_FILE}: ecg_id {record_id}") for remark in remarks)
        device = row.get("device", "").strip() or UNKNOWN
        names = row["filename_hr"].strip(), row["filename_lr"].strip()
        yield partial(_read_row, source, *names, record_id, merged(label_row, table.rows.get(record_id)), device)
    yield told(rows_without_record(table, {plain_id(row["ecg_id"]) for row in rows}, SUFFIX))


def _read_row(
    source: Path, name_500_hz: str, name_100_hz: str, record_id: str, row: LabelRow, device: str
) -> Iterator[Item]:
    try:
        path = _header_path(source, name_500_hz, name_100_hz)
    except Unusable as unusable:
        yield TurnedAway(name_500_hz or name_100_hz or f"ecg_id {record_id}", unusable.reason, unusable.detail)
        return
    for item in read_record(path, record_id, path.relative_to(source).as_posix(), row):
        yield replace(item, device=device) if isinstance(item, EcgRecord) else item


def _header_path(source: Path, name_500_hz: str, name_100_hz: str) -> Path:
    """The 500 Hz record where its header is there, else the 100 Hz one. Raises Unusable if neither is."""
    for column, name in (("filename_hr", name_500_hz), ("filename_lr", name_100_hz)):
        path = path_inside(source, f"{name}.hea", f"{DATABASE_FILE} ({column})")
        if name and path.is_file():
            return path
    raise Unusable(Reason.MISSING_FILE, "neither its 500 Hz nor its 100 Hz header is there; copy one of them")


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
        patient_id=plain_id(row["patient_id"]),
        age_years=age,
        sex=SEX.get(plain_id(row["sex"]), "unknown"),
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
