"""A folder of WFDB records (`*.hea`, at any depth) with an optional labels.csv."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from client.records.files import files_below
from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, read_labels
from client.records.options import ReaderOptions
from client.records.record import (
    UNKNOWN,
    Archive,
    EcgRecord,
    Item,
    Noticed,
    Reading,
    Remark,
    TurnedAway,
    Unusable,
    known_age,
    known_sex,
    told,
)
from client.records.table_join import joined
from client.records.wfdb_header import Header, read_header, segment_names
from client.records.wfdb_signal import read_leads

SUFFIX = ".hea"

LabelsOf = Callable[[Header], Mapping[str, float]]


def recognises(source: Path) -> bool:
    """Whether there is a WFDB header anywhere below."""
    return next(files_below(source, SUFFIX), None) is not None


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """List the records of a folder. A segment of a multi-segment record is part of it, not a record.

    Raises:
        HemoFedError: labels.csv is broken.
    """
    del options  # a header says all that is needed
    return open_records(source, _no_labels)


def open_records(source: Path, labels_of: LabelsOf) -> Archive:
    """The same, with the labels that a format writes into its headers."""
    segments: set[str] = set()
    count = 0
    for header in files_below(source, SUFFIX):
        count += 1
        segments.update(os.path.join(os.path.dirname(header), name + SUFFIX) for name in segment_names(header))
    records = (header for header in files_below(source, SUFFIX) if header not in segments)
    present = sum(os.path.isfile(segment) for segment in segments)
    table = read_labels(source / LABELS_FILE)
    return Archive(count - present, _readings(source, records, table, labels_of))


def _no_labels(header: Header) -> Mapping[str, float]:
    del header
    return {}


def _readings(source: Path, headers: Iterable[str], table: LabelTable, labels_of: LabelsOf) -> Iterator[Reading]:
    yield told(table.remarks)
    present, start = set(), len(os.path.join(source, ""))
    for path in headers:
        name = readable(path[start:])
        record_id = name.removesuffix(SUFFIX)
        row = table.rows.get(record_id)
        if row is not None:
            present.add(record_id)
        yield partial(read_record, Path(path), record_id, name, row, labels_of)
    yield told(rows_without_record(table, present, SUFFIX))


def rows_without_record(table: LabelTable, present: Collection[str], suffix: str) -> Iterator[Remark]:
    """A remark for each row of labels.csv whose record is not there."""
    for record_id in table.rows:
        if record_id not in present:
            detail = f"there is no {record_id}{suffix}; copy the record or remove the row"
            yield Remark(f"{LABELS_FILE}: {record_id}", Noticed.LABEL_WITHOUT_RECORD, detail)


def readable(path: Path | str) -> str:
    """A path as text that can be stored and printed, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_record(
    path: Path, record_id: str, source: str, row: LabelRow | None, labels_of: LabelsOf = _no_labels
) -> Iterator[Item]:
    """One record with its remarks, or one TurnedAway. The table's word goes before the header's."""
    try:
        header = read_header(path)
        leads = read_leads(header)
    except Unusable as unusable:
        yield TurnedAway(source, unusable.reason, unusable.detail)
        return
    record = EcgRecord(
        record_id=record_id,
        source=source,
        signal_mv=leads.signal_mv,
        lead_names=leads.lead_names,
        sampling_rate_hz=header.sampling_rate_hz,
        patient_id=header.comments.get("patient_id", ""),
        recorded_at=header.recorded_at,
        age_years=known_age(header.comments.get("age", "")),
        sex=known_sex(header.comments.get("sex", "")),
        race=header.comments.get("race", "").lower() or UNKNOWN,
        labels=labels_of(header),
    )
    yield from joined(record, row, f"{LABELS_FILE} or header")
