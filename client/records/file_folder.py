"""A folder with one ECG a file (MUSE XML, DICOM, HL7 aECG) and an optional labels.csv."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, read_labels
from client.records.record import (
    Archive,
    EcgRecord,
    Item,
    Reading,
    Reason,
    Remark,
    TurnedAway,
    Unusable,
    told,
)
from client.records.table_join import joined
from client.records.wfdb_folder import readable, rows_without_record
from client.records.wfdb_header import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
from client.records.wfdb_signal import LONGEST_READ_S
from shared_model.leads import LEADS

# From a path and the name a person knows it by: remarks, then the record. May raise Unusable.
ReadFile = Callable[[Path, str], Iterator[EcgRecord | Remark]]


def open_folder(source: Path, files_of: Callable[[Path], Iterator[str]], read_file: ReadFile) -> Archive:
    """One record a file; a record's name is its path below `source` without the extension.

    The files are looked for twice, to count and to read them: a list of them would grow with the archive.

    Raises:
        HemoFedError: labels.csv is broken.
    """
    count = sum(1 for _ in files_of(source))
    return Archive(count, _readings(source, files_of(source), read_file, read_labels(source / LABELS_FILE)))


def _readings(source: Path, paths: Iterator[str], read_file: ReadFile, table: LabelTable) -> Iterator[Reading]:
    yield told(table.remarks)
    present, start = set(), len(os.path.join(source, ""))
    for path in paths:
        name = readable(path[start:])
        record_id = _without_extension(name)
        row = table.rows.get(record_id)
        if row is not None:
            present.add(record_id)
        yield partial(_read, read_file, Path(path), name, record_id, row)
    yield told(rows_without_record(table, present, ""))


def _read(read_file: ReadFile, path: Path, name: str, record_id: str, row: LabelRow | None) -> Iterator[Item]:
    try:
        for item in read_file(path, name):
            yield from (item,) if isinstance(item, Remark) else joined(replace(item, record_id=record_id), row)
    except Unusable as unusable:
        yield TurnedAway(name, unusable.reason, _one_line(unusable.detail))


def _one_line(detail: str) -> str:
    """A detail may quote a damaged file: no line breaks, and nothing that a terminal would act on."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in detail).split())


def _without_extension(name: str) -> str:
    """DICOM files are often named by their UID: only a known extension is one."""
    return name[:-4] if name.lower().endswith((".xml", ".dcm")) else name


def checked_rate(rate_hz: float) -> float:
    """The sampling rate that a file states; Unusable unless it is one of an ECG."""
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise Unusable(
            Reason.NO_SAMPLING_RATE,
            f"the file states {rate_hz:g} Hz; an ECG has {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz: export it again",
        )
    return rate_hz


def add_lead(leads: dict[str, NDArray[np.float64]], lead: str, signal_mv: NDArray[np.float64]) -> None:
    """Take a lead in; Unusable if it is there already, because then one of the two names is wrong."""
    if lead in leads:
        raise Unusable(Reason.UNREADABLE, f"lead {lead} stands twice in one waveform; export it again")
    leads[lead] = signal_mv


def stacked(leads: Mapping[str, NDArray[np.float64]], sampling_rate_hz: float) -> NDArray[np.float32]:
    """The leads as (lead, time) float32 mV, NaN for what is no finite number, at most the first 60 s.

    Raises:
        Unusable: there is no lead, or their lengths differ.
    """
    if not leads:
        raise Unusable(Reason.NO_KNOWN_LEAD, f"no channel is one of {', '.join(LEADS)}; export the 12-lead ECG")
    lengths = {lead: len(signal) for lead, signal in leads.items()}
    if len(set(lengths.values())) > 1:
        shortest, longest = min(lengths, key=lambda lead: lengths[lead]), max(lengths, key=lambda lead: lengths[lead])
        raise Unusable(
            Reason.TRUNCATED,
            f"lead {shortest} has {lengths[shortest]} samples, lead {longest} {lengths[longest]}; export it again",
        )
    longest_read = round(LONGEST_READ_S * sampling_rate_hz)
    with np.errstate(over="ignore"):
        signal_mv = np.stack([signal[:longest_read] for signal in leads.values()]).astype(np.float32)
    signal_mv[~np.isfinite(signal_mv)] = np.nan
    return signal_mv
