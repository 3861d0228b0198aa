"""MIMIC-IV-ECG 1.0: record_list.csv and files/p1000/p10000032/s40689238/ (doi:10.13026/4nqg-sb35).

A record is known by its study_id and its line in record_list.csv, so that the paths, which spell the subject_id,
do not enter the index. The archive has neither age nor sex: `patients.csv` or `patients.csv.gz` of MIMIC-IV (hosp),
copied beside record_list.csv, brings them; labels.csv, by study_id, brings the labels; machine_measurements.csv is
the archive's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from client.records.cart_measurements import MachineMeasurements, read_machine_measurements
from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, read_labels
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
    known_sex,
    told,
    unix_seconds,
)
from client.records.tables import Row, Selection, parse_selection, path_inside, plain_id, read_rows
from client.records.wfdb_folder import SUFFIX, read_record, rows_without_record

ARCHIVE = "MIMIC-IV-ECG"
RECORD_LIST, MEASUREMENTS_FILE = "record_list.csv", "machine_measurements.csv"
PATIENTS_FILES = ("patients.csv", "patients.csv.gz")
NEEDED = ("subject_id", "study_id", "ecg_time", "path")
NEEDED_OF_PATIENTS = ("subject_id", "gender", "anchor_age", "anchor_year")

Patients = Mapping[str, tuple[str, float]]
"""subject_id -> (sex, year of birth on the patient's own shifted calendar)."""


@dataclass(frozen=True)
class Beside:
    """What lies beside record_list.csv."""

    table: LabelTable
    patients: Patients
    machine: MachineMeasurements


def recognises(source: Path) -> bool:
    """Whether the folder holds the archive's list of records."""
    return (source / RECORD_LIST).is_file()


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """Count the rows that `options.where` selects; they are read again, one by one, with their records.

    Raises:
        HemoFedError: a table is broken, or `where` names no column or selects nothing.
    """
    selection, path = parse_selection(options.where), source / RECORD_LIST
    count = sum(1 for _ in selection.rows(path, NEEDED, ARCHIVE))
    if not count:
        raise selection.nothing(path)
    beside = Beside(
        read_labels(source / LABELS_FILE),
        _read_patients(source),
        read_machine_measurements(source / MEASUREMENTS_FILE, ARCHIVE),
    )
    return Archive(count, _readings(source, selection, beside))


def _read_patients(source: Path) -> Patients:
    path = next((source / name for name in PATIENTS_FILES if (source / name).is_file()), None)
    if path is None:
        return {}
    return {
        plain_id(row["subject_id"]): (
            known_sex(row["gender"]),
            float(row["anchor_year"]) - known_age(row["anchor_age"]) if row["anchor_year"].isdecimal() else math.nan,
        )
        for row in read_rows(path, NEEDED_OF_PATIENTS, "MIMIC-IV")
    }


def _readings(source: Path, selection: Selection, beside: Beside) -> Iterator[Reading]:
    table = beside.table
    yield told(table.remarks)
    present = set()
    for row in selection.rows(source / RECORD_LIST, NEEDED, ARCHIVE):
        study = plain_id(row["study_id"])
        if study in table.rows:
            present.add(study)
        label_row = _label_row(row, table.rows.get(study, LabelRow()), beside.patients)
        measurements = beside.machine.of(study)
        yield partial(_read_row, source, row["path"].strip(), study, row["ecg_time"][:40], label_row, measurements)
    yield told(rows_without_record(table, present, SUFFIX))


def _read_row(
    source: Path, name: str, study: str, ecg_time: str, row: LabelRow, measurements: Mapping[str, float]
) -> Iterator[Item]:
    place = f"{RECORD_LIST}: study_id {study}"
    try:
        path = path_inside(source, name + SUFFIX, RECORD_LIST)
        if not path.is_file():
            raise Unusable(Reason.MISSING_FILE, "the header that its row names is not there; copy the record")
    except Unusable as unusable:
        yield TurnedAway(place, unusable.reason, unusable.detail)
        return
    if math.isnan(row.recorded_at):
        yield Remark(place, Noticed.UNREADABLE_TIME, f"ecg_time {ecg_time!r}: the header's is used")
    for item in read_record(path, study, place, row):
        yield replace(item, measurements=measurements) if isinstance(item, EcgRecord) else item


def _label_row(row: Row, labels: LabelRow, patients: Patients) -> LabelRow:
    """labels.csv goes before patients.csv; patient and time are the archive's own."""
    subject = plain_id(row["subject_id"])
    try:
        recorded_at = unix_seconds(row["ecg_time"])
    except ValueError:
        recorded_at = math.nan
    sex, born = patients.get(subject, (UNKNOWN, math.nan))
    year = row["ecg_time"].strip()[:4]
    # known_age refuses what leaves 0 to 120, as a study and a patient that do not belong together would.
    age = known_age(str(float(year) - born)) if year.isdecimal() else math.nan
    return replace(
        labels,
        patient_id=subject,
        recorded_at=recorded_at,
        age_years=age if math.isnan(labels.age_years) else labels.age_years,
        sex=sex if labels.sex == UNKNOWN else labels.sex,
    )
