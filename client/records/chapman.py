"""Chapman-Shaoxing and Ningbo as PhysioNet ecg-arrhythmia 1.0.0: WFDBRecords/01/010/JS00001.hea and .mat
(doi:10.13026/wgex-er52). One ECG a patient, so a record's name stands for its patient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from client.records.cinc import diagnosis_labels
from client.records.files import files_below
from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, read_labels
from client.records.options import ReaderOptions
from client.records.record import Archive, Reading, told
from client.records.wfdb_folder import SUFFIX, read_record, readable, rows_without_record

RECORDS_FOLDER = "WFDBRecords"


def recognises(source: Path) -> bool:
    """Whether the folder holds the archive's own folder of records."""
    return (source / RECORDS_FOLDER).is_dir()


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """List the records; ids are `JS00001`, and labels.csv at the top may name them so.

    Raises:
        HemoFedError: labels.csv is broken.
    """
    del options  # a header says all that is needed
    folder = source / RECORDS_FOLDER
    headers = [Path(path) for path in files_below(folder, SUFFIX)] if folder.is_dir() else []
    return Archive(len(headers), _readings(source, headers, read_labels(source / LABELS_FILE)))


def _readings(source: Path, headers: Sequence[Path], table: LabelTable) -> Iterator[Reading]:
    yield told(table.remarks)
    present = set()
    for path in headers:
        name = readable(Path(path.stem))
        present.add(name)
        row = table.rows.get(name, LabelRow())
        row = replace(row, patient_id=row.patient_id or name)
        yield partial(read_record, path, name, readable(path.relative_to(source)), row, diagnosis_labels)
    yield told(rows_without_record(table, present, SUFFIX))
