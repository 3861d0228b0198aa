"""What carts measured, and which cart it was: from MIMIC's table, MUSE, aECG and DICOM into the index."""

import gzip
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ingest import ingest
from client.records import open_archive
from client.records.cart_measurements import MACHINE_COLUMNS, in_unit, read_machine_measurements
from client.records.options import ReaderOptions
from client.records.record import MEASUREMENTS, EcgRecord
from shared_model.errors import ExitCode, HemoFedError
from tests.archive_fixtures import ARCHIVES, MEASURED, machine_row, write_table
from tests.clinical_fixtures import dicom_group, only_record, steps_for, write_aecg, write_dicom, write_muse

MIMIC_MEASURED = {name: value for name, value in MEASURED.items() if name != "qtc_ms"}


def measured_of(folder: Path, *rows: dict[str, object]) -> dict[str, float]:
    write_table(folder / "machine_measurements.csv", list(rows))
    return read_machine_measurements(folder / "machine_measurements.csv", "MIMIC-IV-ECG").of("7")


@pytest.mark.parametrize(
    ("changed", "absent"),
    [
        ({}, set()),
        ({"rr_interval": 29999}, {"rr_ms", "heart_rate_bpm"}),
        ({"rr_interval": 0}, {"rr_ms", "heart_rate_bpm"}),
        ({"p_onset": 29999, "p_end": 29999}, {"p_duration_ms", "pr_ms"}),  # atrial fibrillation
        ({"p_onset": 29999}, {"p_duration_ms", "pr_ms"}),
        ({"qrs_onset": 29999, "t_end": 29999}, {"pr_ms", "qrs_ms", "qt_ms"}),
        ({"t_end": 100}, {"qt_ms"}),  # before the QRS
        ({"p_axis": 29999}, {"p_axis_deg"}),
        ({"p_axis": -32768}, {"p_axis_deg"}),
        ({"p_axis": 99999999}, {"p_axis_deg"}),
        ({"p_axis": ""}, {"p_axis_deg"}),
        ({"p_axis": "none"}, {"p_axis_deg"}),
        ({"p_axis": "inf"}, {"p_axis_deg"}),
        ({"p_axis": "41.0"}, set()),
    ],
)
def test_a_code_in_mimics_table_is_no_measurement(tmp_path: Path, changed: dict[str, object], absent: set[str]) -> None:
    expected = {name: value for name, value in MIMIC_MEASURED.items() if name not in absent}
    assert measured_of(tmp_path, machine_row(7, **changed)) == expected


def test_odd_rows_of_mimics_table(tmp_path: Path) -> None:
    rows = [machine_row(9), machine_row(7, rr_interval=1000), machine_row(7), machine_row(5), machine_row("x")]  # type: ignore[arg-type]
    assert measured_of(tmp_path, *rows)["rr_ms"] == 1000  # the first of two
    table = read_machine_measurements(tmp_path / "machine_measurements.csv", "MIMIC-IV-ECG")
    assert [bool(table.of(study)) for study in ("5", "7", "9", "6", "10", "", "x", "-5")] == [True] * 3 + [False] * 5
    assert read_machine_measurements(tmp_path / "absent.csv", "MIMIC-IV-ECG").of("7") == {}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(-40_000, 40_000), min_size=9, max_size=9)), max_size=30
    )
)
def test_the_compact_table_says_what_the_rows_say(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("mimic") / "machine_measurements.csv"
    cells = [dict(zip(MACHINE_COLUMNS, values, strict=True)) for _, values in rows]
    write_table(path, [machine_row(1)] + [machine_row(row[0], **cell) for row, cell in zip(rows, cells, strict=True)])
    table = read_machine_measurements(path, "MIMIC-IV-ECG")
    first = {study: cell for (study, _), cell in reversed(list(zip(rows, cells, strict=True))) if study != 1}
    for study in range(41):
        if study == 1:
            continue
        axis = first.get(study, {}).get("qrs_axis", 40_000)
        assert table.of(str(study)).get("qrs_axis_deg") == (axis if -360 <= axis <= 360 else None)


def test_a_table_without_a_column_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="column 'rr_interval' is not there") as caught:
        measured_of(tmp_path, {"study_id": 7})
    assert caught.value.exit_code == ExitCode.BAD_SOURCE


@pytest.mark.parametrize(
    ("measured", "absent"),
    [
        ({}, set()),
        ({"POnset": "-1", "POffset": "-1", "PRInterval": "", "PAxis": ""}, {"p_duration_ms", "pr_ms", "p_axis_deg"}),
        ({"POnset": "-1"}, {"p_duration_ms"}),
        ({"ECGSampleBase": ""}, {"p_duration_ms"}),
        ({"ECGSampleExponent": "1"}, {"p_duration_ms"}),
        ({"QTInterval": "0", "QTCorrected": "0"}, {"qt_ms", "qtc_ms"}),
        ({"VentricularRate": "?"}, {"heart_rate_bpm"}),
    ],
)
def test_muse_measurements(tmp_path: Path, measured: dict[str, str], absent: set[str]) -> None:
    write_muse(tmp_path / "r.xml", measured=measured)
    record = only_record(tmp_path)
    assert record.measurements == {name: value for name, value in MEASURED.items() if name not in absent}
    assert record.device == "MAC55"


def test_muse_without_measurements(tmp_path: Path) -> None:
    path = write_muse(tmp_path / "r.xml", test={"AcquisitionDevice": ""})
    head, _, tail = path.read_text("latin-1").partition("<RestingECGMeasurements>")
    tail = tail.partition("</QRSTimesTypes>")[2]
    path.write_text(head + tail, "latin-1")
    record = only_record(tmp_path)
    assert (record.measurements, record.device) == ({}, "unknown")


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([("TIME_PD_QT", "0.4", "s")], {"qt_ms": 400}),
        ([("TIME_PD_QT", "400000", "us")], {"qt_ms": 400}),
        ([("TIME_PD_QT", "400", "")], {}),
        ([("TIME_PD_QT", "400", "mm")], {}),
        ([("TIME_PD_QT", "nan", "ms")], {}),
        ([("TIME_PD_QT", "-400", "ms"), ("TIME_PD_QT", "410", "ms")], {"qt_ms": 410}),
        ([("TIME_PD_QT", "400", "ms"), ("TIME_PD_QT", "410", "ms")], {"qt_ms": 400}),
        ([("TIME_PD_QTcF", "431", "ms")], {}),
        ([("TIME_PD_QTcB", "447", "ms")], {"qtc_ms": 447}),
        ([("HEART_RATE", "75", "/min")], {"heart_rate_bpm": 75}),
        ([("HEART_RATE", "75", "ms")], {}),
    ],
)
def test_aecg_annotations(tmp_path: Path, measured: list[tuple[str, str, str]], expected: dict[str, float]) -> None:
    write_aecg(tmp_path / "r.xml", measured=measured)
    record = only_record(tmp_path)
    assert record.measurements == pytest.approx(expected)
    assert record.device == "ELI250"


def test_aecg_annotations_of_one_beat_or_lead_are_left_out(tmp_path: Path) -> None:
    path = write_aecg(tmp_path / "r.xml", measured=[("TIME_PD_QT", "400", "ms")])
    path.write_text(path.read_text().replace("</annotation>", "<support><supportingROI/></support></annotation>"))
    assert only_record(tmp_path).measurements == {}


def test_dicom_annotations_of_one_channel_are_left_out(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(["I"]), ["I"])], annotations={"qt_ms": 400})
    assert only_record(tmp_path).measurements == {"qt_ms": 400}
    content = path.read_bytes()
    of_all, of_one = bytes.fromhex("4000 b0a0 5553 0400 0100 0000"), bytes.fromhex("4000 b0a0 5553 0400 0100 0200")
    assert content.count(of_all) == 1
    path.write_bytes(content.replace(of_all, of_one))
    assert only_record(tmp_path).measurements == {}


def test_a_real_dicom_ecg_gives_its_carts_measurements(tmp_path: Path) -> None:
    """The Mortara ECG among pydicom's own test files, which has the codes of the older scheme."""
    pydicom_data = pytest.importorskip("pydicom.data")
    sample = Path(pydicom_data.get_testdata_file("waveform_ecg.dcm"))
    (tmp_path / "r.dcm").write_bytes(sample.read_bytes())
    record = only_record(tmp_path)
    assert record.device == "el250"
    assert record.measurements == {
        **{"rr_ms": 982, "pr_ms": 161, "qrs_ms": 75, "qt_ms": 368, "qtc_ms": 370},
        **{"p_axis_deg": 74, "qrs_axis_deg": 52, "t_axis_deg": 57},
    }


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_a_unit_of_its_own(name: str) -> None:
    unit = name.rpartition("_")[2]
    assert in_unit(name, "5", unit) == 5


@pytest.mark.parametrize("format_name", ["mimic-iv-ecg", "muse-xml", "hl7-aecg", "dicom", "ptbxl"])
def test_measurements_and_device_come_into_the_index(tmp_path: Path, format_name: str) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    whole = ARCHIVES[format_name].write(source)
    ingest(source, site_dir)
    index = sqlite3.connect(site_dir / "index.sqlite")
    assert dict(index.execute("SELECT name, value FROM measurements")) == whole.measurements
    assert set(index.execute("SELECT device FROM records")) == {(whole.device,)}


def test_patients_of_mimic_packed_or_not(tmp_path: Path) -> None:
    whole = ARCHIVES["mimic-iv-ecg"].write(tmp_path)
    path = tmp_path / "patients.csv"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    assert ingest(tmp_path, tmp_path / "site").stored == 1
    (tmp_path / "patients.csv.gz").write_bytes(packed)
    ages = [only_first(tmp_path).age_years]
    (tmp_path / "patients.csv.gz").write_bytes(packed[:-10])
    with pytest.raises(HemoFedError, match=r"patients.csv.gz: cannot be read .*; copy it from the MIMIC-IV archive"):
        only_first(tmp_path)
    (tmp_path / "patients.csv.gz").write_bytes(b"subject_id,gender\n")
    with pytest.raises(HemoFedError, match="cannot be read"):
        only_first(tmp_path)
    path.write_bytes(gzip.decompress(packed))  # it goes before the packed one
    assert [*ages, only_first(tmp_path).age_years] == [whole.age_years] * 2


def only_first(folder: Path) -> EcgRecord:
    items = open_archive(folder, "mimic-iv-ecg", ReaderOptions()).items
    return next(item for item in items if isinstance(item, EcgRecord))
