"""CODE-15%: exams.csv and exams_part*.hdf5 (doi:10.5281/zenodo.4916206).

`tracings` is (exam, 4096, 12) at 400 Hz with zeros on both sides of the 7 or 10 s of ECG. The file names no unit;
mV is what the archive's users take it for, and `--unit` says otherwise.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.records.files import may_be_opened
from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, merged, read_labels
from client.records.options import ReaderOptions
from client.records.record import (
    Archive,
    EcgRecord,
    Item,
    Reading,
    Reason,
    TurnedAway,
    Unusable,
    known_age,
    told,
)
from client.records.table_join import joined
from client.records.tables import plain_id, read_rows
from client.records.wfdb_folder import rows_without_record
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, millivolt_per_unit

ARCHIVE, EXAMS_FILE, PARTS = "CODE-15%", "exams.csv", "exams_part*.hdf5"
NEEDED = ("exam_id", "age", "is_male", "patient_id")
SAMPLING_RATE_HZ, SAMPLES, UNIT = 400.0, 4096, "mV"
TAKES = frozenset({"--unit"})
MOST_EXAMS = 1_000_000  # of a part; the archive's own have 20,001
EXAMS_AT_ONCE = 64  # opening the file again for each exam would cost more than reading it
LABEL_COLUMNS = {
    "1dAVb": "first_degree_av_block",
    "RBBB": "right_bundle_branch_block",
    "LBBB": "left_bundle_branch_block",
    "SB": "sinus_bradycardia",
    "ST": "sinus_tachycardia",
    "AF": "atrial_fibrillation",
}
TRUTH = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


def recognises(source: Path) -> bool:
    """Whether the folder holds the archive's table and at least one part."""
    return (source / EXAMS_FILE).is_file() and any(_parts(source))


def _parts(source: Path) -> list[Path]:
    """The parts in the order of their numbers."""
    parts = (path for path in source.glob(PARTS) if may_be_opened(path))
    return sorted(parts, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """Read exams.csv and count the exams of the parts that are there; a damaged part counts as one record.

    Raises:
        HemoFedError: h5py is not installed, or exams.csv or labels.csv is broken.
    """
    _h5py()
    parts = _parts(source)
    count = sum(_count(part) for part in parts)
    exams, table = _read_exams(source / EXAMS_FILE), read_labels(source / LABELS_FILE)
    return Archive(count, _readings(parts, exams, table, options.unit or UNIT))


def _h5py() -> Any:
    """h5py, or the one line that says how to get it."""
    try:
        import h5py
    except ImportError:
        raise HemoFedError(
            "CODE-15% needs the package h5py, which is not installed; run: pip install 'hemofed[records]'",
            ExitCode.BAD_SOURCE,
        ) from None
    return h5py


def _read_exams(path: Path) -> dict[str, LabelRow]:
    """Patient, age, sex and labels by exam. Equal sets of labels are one object: there are 345,779 exams."""
    known: dict[tuple[tuple[str, float], ...], Mapping[str, float]] = {}
    exams = {}
    for row in read_rows(path, NEEDED, ARCHIVE):
        truths = {label: TRUTH.get(row.get(column, "").lower()) for column, label in LABEL_COLUMNS.items()}
        labels = tuple((label, truth) for label, truth in truths.items() if truth is not None)
        male = TRUTH.get(row["is_male"].lower())
        exams[plain_id(row["exam_id"])] = LabelRow(
            patient_id=plain_id(row["patient_id"]),
            age_years=known_age(row["age"]),
            sex="unknown" if male is None else "male" if male else "female",
            labels=known.setdefault(labels, dict(labels)),
        )
    return exams


@contextmanager
def _open_part(part: Path) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """Exam ids and the tracings, still on the disk. Raises Unusable if the file is not a part of the archive."""
    try:
        file = _h5py().File(part, "r")
        ids, tracings = file["exam_id"], file["tracings"]
        # Before the ids are read: compressed ones could unpack to any number.
        most = min(len(tracings), MOST_EXAMS)
        if ids.ndim != 1 or tracings.shape[1:] != (SAMPLES, len(LEADS)) or len(ids) > most:
            raise ValueError(f"exam_id {ids.shape}, tracings {tracings.shape}")
        exam_ids = ids[:]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"not a whole part of CODE-15% ({_one_line(error)}); copy it again"
        raise Unusable(Reason.UNREADABLE, detail) from None
    with file:
        yield exam_ids, tracings


def _count(part: Path) -> int:
    try:
        with _open_part(part) as (exam_ids, _):
            return len(exam_ids)
    except Unusable:
        return 1


def _readings(parts: list[Path], exams: Mapping[str, LabelRow], table: LabelTable, unit: str) -> Iterator[Reading]:
    yield told(table.remarks)
    present: set[str] = set()
    for part in parts:
        try:
            with _open_part(part) as (exam_ids, _):
                names = [plain_id(str(exam_id)) for exam_id in exam_ids]
        except Unusable as unusable:
            yield partial(tuple, [TurnedAway(part.name, unusable.reason, unusable.detail)])
            continue
        for start in range(0, len(names), EXAMS_AT_ONCE):
            rows = [(exam, _row_of(exam, exams, table)) for exam in names[start : start + EXAMS_AT_ONCE]]
            yield partial(_read_exams_at, part, start, rows, unit)
        present.update(table.rows.keys() & set(names))
    yield told(rows_without_record(table, present, ""))


def _row_of(exam: str, exams: Mapping[str, LabelRow], table: LabelTable) -> LabelRow | None:
    row = exams.get(exam)
    return table.rows.get(exam) if row is None else merged(row, table.rows.get(exam))


def _read_exams_at(part: Path, start: int, rows: Sequence[tuple[str, LabelRow | None]], unit: str) -> Iterator[Item]:
    try:
        with _open_part(part) as (_, tracings):
            for place, (exam, row) in enumerate(rows, start):
                yield from _read_exam(tracings, place, exam, f"{part.name}: exam_id {exam}", row, unit)
    except Unusable as unusable:  # the part was there when the exams were counted
        for exam, _ in rows:
            yield TurnedAway(f"{part.name}: exam_id {exam}", unusable.reason, unusable.detail)


def _read_exam(tracings: Any, place: int, exam: str, source: str, row: LabelRow | None, unit: str) -> Iterator[Item]:
    try:
        signal_mv = _signal(tracings, place) * np.float32(millivolt_per_unit(unit) or 0)
    except Unusable as unusable:
        yield TurnedAway(source, unusable.reason, unusable.detail)
        return
    record = EcgRecord(
        record_id=exam,
        source=source,
        signal_mv=signal_mv,
        lead_names=LEADS,
        sampling_rate_hz=SAMPLING_RATE_HZ,
        patient_id="",
    )
    yield from joined(record, row, f"{EXAMS_FILE} or {LABELS_FILE}")


def _signal(tracings: Any, place: int) -> NDArray[np.float32]:
    """(lead, time) of one exam as stored, without the samples at both ends that are zero in every lead."""
    try:
        tracing: NDArray[np.float32] = np.asarray(tracings[place], np.float32).T
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        detail = f"its block is damaged ({_one_line(error)}); copy the part again"
        raise Unusable(Reason.UNREADABLE, detail) from None
    recorded = np.flatnonzero(tracing.any(axis=0))
    if not recorded.size:
        raise Unusable(Reason.ALL_LEADS_FLAT, "every sample is 0, as in the archive's filler rows; leave it out")
    signal = tracing[:, recorded[0] : recorded[-1] + 1].copy()
    signal[~np.isfinite(signal)] = np.nan
    return signal


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
