"""What is particular to the archives' own readers; what they have in common is in test_reader_contract.py."""

import json
import math
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from client.cli import main
from client.ingest import ingest
from client.records import open_archive
from client.records.cinc import diagnosis_labels
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Item, Noticed, Reason, Remark, TurnedAway
from client.records.wfdb_header import read_header
from client.store import open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, to_millivolt
from tests.archive_fixtures import ARCHIVES, DECLARED, write_challenge_record, write_table, write_wfdb
from tests.realdata import REAL_DATA, needs_real_data
from tests.wfdb_fixtures import ecg_steps


def items_of(folder: Path, format_name: str, options: ReaderOptions | None = None) -> list[Item]:
    return list(open_archive(folder, format_name, options or ReaderOptions()).items)


def records_of(folder: Path, format_name: str, options: ReaderOptions | None = None) -> list[EcgRecord]:
    return [item for item in items_of(folder, format_name, options) if isinstance(item, EcgRecord)]


@pytest.mark.parametrize(
    ("comment", "present"),
    [
        ("#Dx: 426783006", {"sinus_rhythm"}),
        ("# Dx: 713427006,164884008", {"right_bundle_branch_block"}),
        ("#Dx: ,63593006, 17338001,", {"premature_atrial_contraction", "premature_ventricular_contraction"}),
        ("#Dx: AF,CLBBB", {"atrial_fibrillation", "left_bundle_branch_block"}),
        ("#dx:999999", set()),
        ("#Dx: ", None),
        ("#Dx: Unknown", None),
        ("#Rx: 426783006", None),
    ],
)
def test_diagnoses_are_read_leniently(tmp_path: Path, comment: str, present: set[str] | None) -> None:
    labels = diagnosis_labels(read_header(write_challenge_record(tmp_path, "A0", ecg_steps(), (comment,))))
    assert (None if not labels else {name for name, value in labels.items() if value}) == present
    assert set(labels.values()) <= {0.0, 1.0}
    assert len(labels) in (0, 10)


def test_labels_csv_goes_before_the_codes(tmp_path: Path) -> None:
    write_challenge_record(tmp_path, "A0", ecg_steps(), ("#Dx: 426783006",))
    write_table(tmp_path / "labels.csv", [{"record": "A0", "sinus_rhythm": 0, "co": 4.5}])
    (record,) = records_of(tmp_path, "cinc")
    assert (record.labels["sinus_rhythm"], record.labels["co"], record.labels["atrial_flutter"]) == (0, 4.5, 0)


def write_mimic(folder: Path, *changes: dict[str, object]) -> None:
    rows = []
    for study, change in enumerate(changes):
        path = f"files/p1000/p10000032/s{study}/{study}"
        write_wfdb(folder, path, ecg_steps(seed=study) // 5, 200.0)
        row = {"subject_id": 10000032, "study_id": study, "file_name": study, "ecg_time": "2180-07-23 08:44:00"}
        rows.append({**row, "path": path, **change})
    write_table(folder / "record_list.csv", rows)


def test_awkward_rows_of_mimic(tmp_path: Path) -> None:
    patients = [
        {"subject_id": 10000032, "gender": "M", "anchor_age": 52, "anchor_year": 2178},
        {"subject_id": 7, "gender": "", "anchor_age": 91, "anchor_year": "unknown"},
    ]
    write_mimic(
        tmp_path,
        {},
        {"path": "files/p1000/absent"},
        {"path": "../../../etc/passwd"},
        {"subject_id": 7, "ecg_time": "soon"},
        {"subject_id": 8, "ecg_time": "2180-07-23 08:44:00"},
    )
    write_table(tmp_path / "patients.csv", patients)
    write_table(tmp_path / "labels.csv", [{"record": 4, "age_years": 33, "sex": "F"}, {"record": 99, "sex": "F"}])
    items = items_of(tmp_path, "mimic-iv-ecg")
    first, timeless, labelled = (item for item in items if isinstance(item, EcgRecord))
    assert (first.record_id, first.age_years, first.sex) == ("0", 54, "male")
    assert math.isnan(timeless.recorded_at)
    assert math.isnan(timeless.age_years)
    assert (labelled.patient_id, labelled.age_years, labelled.sex) == ("8", 33, "female")
    away = [(item.source, item.reason) for item in items if isinstance(item, TurnedAway)]
    assert away == [
        ("record_list.csv: study_id 1", Reason.MISSING_FILE),
        ("record_list.csv: study_id 2", Reason.PATH_OUTSIDE_FOLDER),
    ]
    noticed = [item.noticed for item in items if isinstance(item, Remark)]
    assert noticed == [Noticed.UNREADABLE_TIME, Noticed.LABEL_WITHOUT_RECORD]


def test_mimic_rows_are_selected(tmp_path: Path) -> None:
    write_mimic(tmp_path, {}, {"subject_id": 8}, {"subject_id": 9})
    options = ReaderOptions(where=("study_id=1", "study_id=2.0"))
    assert open_archive(tmp_path, "mimic-iv-ecg", options).count == 2
    assert [record.patient_id for record in records_of(tmp_path, "mimic-iv-ecg", options)] == ["8", "9"]
    with pytest.raises(HemoFedError, match="no such column"):
        open_archive(tmp_path, "mimic-iv-ecg", ReaderOptions(where=("ward=1",)))


@pytest.mark.parametrize("left_out", ["sampling_rate_hz", "unit", "variable", "axis"])
def test_what_a_matlab_file_does_not_say_is_asked_for(tmp_path: Path, left_out: str) -> None:
    ARCHIVES["matlab"].write(tmp_path)
    declared = {name: getattr(DECLARED, name) for name in ("sampling_rate_hz", "unit", "variable", "axis")}
    del declared[left_out]
    with pytest.raises(
        HemoFedError, match=rf"give --{left_out.replace('_', '-')} \(A0.mat holds ECG.data 5000x12\)"
    ) as caught:
        open_archive(tmp_path, "matlab", ReaderOptions(**declared))
    assert caught.value.exit_code == ExitCode.FORMAT_UNDECLARED


def test_declared_leads_unit_and_axis_are_what_counts(tmp_path: Path) -> None:
    steps = ecg_steps(leads=3)
    scipy.io.savemat(tmp_path / "r.mat", {"x": steps, "names": "text"}, format="4")
    options = ReaderOptions(
        sampling_rate_hz=250, unit="V", variable="x", axis="lead-time", leads=("V6", "lead ii", "AVR")
    )
    (record,) = records_of(tmp_path, "matlab", options)
    assert (record.lead_names, record.sampling_rate_hz) == (("V6", "II", "aVR"), 250)
    np.testing.assert_allclose(record.signal_mv, steps * 1000.0)


@pytest.mark.parametrize("variable", ["y", "ECG", "ECG.sex", "ECG.data.x", "val.data", "cube", "text"])
def test_a_file_unlike_the_declaration_is_turned_away(tmp_path: Path, variable: str) -> None:
    content = {"ECG": {"sex": "Male", "data": np.zeros((5000, 12))}, "val": np.zeros((9, 12)), "text": "12"}
    scipy.io.savemat(tmp_path / "r.mat", {**content, "cube": np.zeros((2, 3, 12))})
    options = ReaderOptions(sampling_rate_hz=500, unit="mV", variable=variable, axis="time-lead")
    (away,) = items_of(tmp_path, "matlab", options)
    assert isinstance(away, TurnedAway)
    assert away.reason == Reason.NOT_AS_DECLARED


def test_matlab_7_3_is_turned_away_with_the_remedy(tmp_path: Path) -> None:
    # The text that MATLAB writes into the 512 bytes before the HDF5 superblock, and the version 0x0200.
    with h5py.File(tmp_path / "r.mat", "w", userblock_size=512) as file:
        file["val"] = np.zeros((12, 5000))
    content = bytearray((tmp_path / "r.mat").read_bytes())
    content[:128] = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    (tmp_path / "r.mat").write_bytes(content)
    (away,) = items_of(tmp_path, "matlab", DECLARED)
    assert isinstance(away, TurnedAway)
    assert "save it again with -v7" in away.detail


@pytest.mark.parametrize(
    "wrong",
    [{"unit": "mmHg"}, {"axis": "both"}, {"sampling_rate_hz": 5}, {"leads": ("I", "V")}, {"leads": ("I", "lead i")}],
)
def test_a_wrong_declaration_is_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(HemoFedError) as caught:
        ReaderOptions(**wrong)  # type: ignore[arg-type]
    assert caught.value.exit_code == ExitCode.USAGE
    assert f"--{next(iter(wrong)).replace('_', '-')}" in caught.value.message


def write_code15_part(folder: Path, part: int, tracings: np.ndarray, first_exam: int = 1) -> None:
    with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
        file["exam_id"] = np.arange(first_exam, first_exam + len(tracings))
        file["tracings"] = tracings


@pytest.mark.parametrize(("ids", "tracings"), [(2, 1), (10**10, 1), (10**10, 10**10)])
def test_a_code15_part_with_more_ids_than_exams_is_one_damaged_record(tmp_path: Path, ids: int, tracings: int) -> None:
    """Nothing of the large ones is on the disk: reading the ids would take 80 GB."""
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file.create_dataset("exam_id", (ids,), np.int64, chunks=(min(ids, 1000),))
        file.create_dataset("tracings", (tracings, 4096, 12), np.float32, chunks=(1, 4096, 12))
    write_table(tmp_path / "exams.csv", [{"exam_id": 0, "age": 40, "is_male": False, "patient_id": 5}])
    archive = open_archive(tmp_path, "code15", ReaderOptions())
    (away,) = archive.items
    assert archive.count == 1
    assert isinstance(away, TurnedAway)
    assert away.reason == Reason.UNREADABLE


def test_padding_of_code15_goes_and_zeros_within_stay(tmp_path: Path) -> None:
    signal = (ecg_steps(seconds=10, rate_hz=400).T / 1000 + 0.001).astype(np.float32)
    signal[100:200] = 0
    signal[0, 1:] = 0  # one lead is enough to be a sample
    tracings = np.zeros((3, 4096, 12), np.float32)
    tracings[0, 48:4048], tracings[2, :4000] = signal, signal
    tracings[2, 7, 3] = np.nan
    write_code15_part(tmp_path, 0, tracings)
    write_table(tmp_path / "exams.csv", [{"exam_id": 1, "age": "", "is_male": "", "patient_id": 5, "AF": "maybe"}])
    first, filler, remark, third = items_of(tmp_path, "code15")
    assert isinstance(first, EcgRecord)
    assert isinstance(third, EcgRecord)
    np.testing.assert_array_equal(first.signal_mv, signal.T)
    assert (first.sex, first.labels, third.patient_id) == ("unknown", {}, "record:3")
    assert np.isnan(third.signal_mv).sum() == 1
    assert isinstance(filler, TurnedAway)
    assert filler.reason == Reason.ALL_LEADS_FLAT
    assert isinstance(remark, Remark)
    (declared, *_) = records_of(tmp_path, "code15", ReaderOptions(unit="uV"))
    np.testing.assert_allclose(declared.signal_mv, signal.T / 1000, rtol=1e-6)


def test_parts_of_code15_in_their_order_and_damaged_ones_reported(tmp_path: Path) -> None:
    padded = np.zeros((1, 4096, 12), np.float32)
    padded[0, :4000] = ecg_steps(rate_hz=400).T
    for part in (10, 2):
        write_code15_part(tmp_path, part, padded, first_exam=part)
    write_code15_part(tmp_path, 3, np.zeros((4, 4096, 8), np.float32))
    write_table(tmp_path / "exams.csv", [{"exam_id": 2, "age": 40, "is_male": False, "patient_id": 5}])
    items = items_of(tmp_path, "code15")
    assert open_archive(tmp_path, "code15", ReaderOptions()).count == 3
    assert [item.record_id for item in items if isinstance(item, EcgRecord)] == ["2", "10"]
    assert [item.source for item in items if isinstance(item, TurnedAway)] == ["exams_part3.hdf5"]


def test_a_part_of_code15_that_goes_away_is_accounted_for(tmp_path: Path) -> None:
    padded = np.zeros((3, 4096, 12), np.float32)
    padded[:, :4000] = ecg_steps(rate_hz=400).T / 1000
    write_code15_part(tmp_path, 0, padded)
    write_table(tmp_path / "exams.csv", [{"exam_id": 2, "age": 40, "is_male": False, "patient_id": 5}])
    archive = open_archive(tmp_path, "code15", ReaderOptions())
    readings = list(archive.readings)
    (tmp_path / "exams_part0.hdf5").unlink()
    items = [item for reading in readings for item in reading()]
    assert [item.reason for item in items if isinstance(item, TurnedAway)] == [Reason.UNREADABLE] * archive.count


def test_without_h5py_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ARCHIVES["code15"].write(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(HemoFedError, match=r"pip install 'hemofed\[records\]'"):
        open_archive(tmp_path, "code15", ReaderOptions())


def test_the_command_line_declares_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ARCHIVES["matlab"].write(source)
    command = ["hemofed-client", "ingest", str(source), "--site-dir", str(tmp_path / "site"), "--json"]
    declared = ["--sampling-rate-hz", "500", "--unit", "uV", "--variable", "ECG.data", "--axis", "time-lead"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == ExitCode.FORMAT_UNDECLARED
    assert "give --sampling-rate-hz, --unit, --variable, --axis" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, *declared])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == ExitCode.DONE
    summary = json.loads(capsys.readouterr().out)
    assert (summary["read"], summary["stored"], summary["turned_away"]) == (3, 1, {"unreadable": 2})


@needs_real_data
@pytest.mark.parametrize(
    ("folder", "options", "count"),
    [
        ("code15-dev", ReaderOptions((), 400, "mV", "feats", "lead-time"), 5),
        ("cpsc2018-mat-dev", ReaderOptions((), 500, "mV", "ECG.data", "lead-time"), 5),
        ("chapman-denoised-dev", ReaderOptions((), 500, "uV", "val", "time-lead"), 8),
    ],
)
def test_real_matlab_archives(tmp_path: Path, folder: str, options: ReaderOptions, count: int) -> None:
    with pytest.raises(HemoFedError, match="--sampling-rate-hz"):
        ingest(REAL_DATA / folder, tmp_path)
    summary = ingest(REAL_DATA / folder, tmp_path, options=options)
    assert (summary.read, summary.stored, summary.turned_away) == (count, count, {})
    index = open_store(tmp_path)
    signal_mv, _ = to_millivolt(index.read(np.arange(len(index.index))))
    # Lead II spans 0.3 to 8 mV in all of them; a wrong unit would be a thousandfold out, a wrong axis no ECG.
    spans_mv = np.ptp(signal_mv[:, LEADS.index("II")], axis=1)
    assert ((spans_mv > 0.3) & (spans_mv < 8)).all()


@needs_real_data
def test_real_challenge_headers_give_their_codes() -> None:
    records = records_of(REAL_DATA / "cinc2021-dev", "cinc")
    assert len(records) == 31
    assert sum(record.labels["sinus_rhythm"] for record in records) == 11
    assert all(len(record.labels) == 10 for record in records)
    assert {record.sex for record in records} == {"female", "male"}
    assert all(0 < record.age_years < 100 for record in records)
