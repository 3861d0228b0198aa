"""Readers: headers, samples against wfdb, labels.csv, PTB-XL."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.records import choose_format, ptbxl, wfdb_folder
from client.records.labels_csv import read_labels, record_name
from client.records.options import ReaderOptions
from client.records.ptbxl import superclass_labels
from client.records.record import (
    EcgRecord,
    Noticed,
    Reason,
    Remark,
    TurnedAway,
    Unusable,
    known_age,
    known_sex,
    unix_seconds,
)
from client.records.wfdb_header import read_header
from client.records.wfdb_signal import is_plain, read_leads, read_plain, read_steps
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from tests.realdata import REAL_DATA, needs_real_data
from tests.wfdb_fixtures import ecg_steps, write_record


def records_of(source: Path, where: tuple[str, ...] = ()) -> tuple[list[EcgRecord], list[TurnedAway], list[Remark]]:
    items = list(
        (ptbxl if ptbxl.recognises(source) else wfdb_folder).open_archive(source, ReaderOptions(where=where)).items
    )
    return (
        [item for item in items if isinstance(item, EcgRecord)],
        [item for item in items if isinstance(item, TurnedAway)],
        [item for item in items if isinstance(item, Remark)],
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gain=st.sampled_from(["200", "1000.0", "4880", "1.052e+04", "-200"]),
    baseline=st.integers(-500, 500),
    leads=st.integers(1, 15),
    offset=st.sampled_from([0, 24]),
    seed=st.integers(0, 99),
)
def test_plain_format_16_reads_as_wfdb_does(
    tmp_path: Path, gain: str, baseline: int, leads: int, offset: int, seed: int
) -> None:
    steps = np.random.default_rng(seed).integers(-32768, 32768, (leads, 300)).astype(np.int16)
    steps[0, :5] = -32768  # missing
    names = [f"x{i}" for i in range(leads)]
    header = write_record(tmp_path, "r", steps, lead_names=names, gain=f"{gain}({baseline})/mV")
    if offset:
        header.write_text(header.read_text().replace(".dat 16 ", f".dat 16+{offset} "))
        data = header.with_suffix(".dat").read_bytes()
        header.with_suffix(".dat").write_bytes(bytes(offset) + data)
    parsed = read_header(header)
    assert is_plain(parsed)
    for length in (300, 120):
        record = wfdb.rdrecord(str(header.with_suffix("")), sampto=length)
        channels = {name: (place, 1.0) for place, name in enumerate(names)}
        np.testing.assert_array_equal(read_plain(parsed, length, channels).T, record.p_signal.astype(np.float32))
        digital = wfdb.rdrecord(str(header.with_suffix("")), sampto=length, physical=False).d_signal
        np.testing.assert_array_equal(read_steps(parsed, length), digital)


@needs_real_data
@pytest.mark.parametrize("folder", ["ludb-dev", "cinc2020-dev", "cinc2021-dev", "cinc2011-dev", "ptbxl-dev/records500"])
def test_real_records_read_as_wfdb_reads_them(folder: str) -> None:
    headers = sorted((REAL_DATA / folder).rglob("*.hea"))[:40]
    assert headers
    for header in headers:
        record = wfdb.rdrecord(str(header.with_suffix("")))
        leads = read_leads(read_header(header))
        assert leads.lead_names == LEADS
        np.testing.assert_array_equal(leads.signal_mv, record.p_signal.T.astype(np.float32))


def test_mimic_order_is_read_by_name(tmp_path: Path) -> None:
    order = ("I", "II", "III", "aVR", "aVF", "aVL", *LEADS[6:])
    write_record(tmp_path, "45106466", ecg_steps(), lead_names=order, comments=["<subject_id>: 12177274"])
    (record,), away, _ = records_of(tmp_path)
    assert not away
    assert record.patient_id == "12177274"
    assert record.lead_names == order
    np.testing.assert_allclose(record.signal_mv[order.index("aVL")], ecg_steps()[5] / 1000, atol=1e-6)


def test_units_are_brought_to_millivolt(tmp_path: Path) -> None:
    for name, gain in (("mv", "1000/mV"), ("uv", "1/\u00b5V"), ("v", "1000000/V"), ("none", "1000")):
        write_record(tmp_path, name, gain=gain)
    records, _, _ = records_of(tmp_path)
    assert len(records) == 4
    for record in records:
        np.testing.assert_allclose(record.signal_mv, ecg_steps() / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("line", "moment"),
    [
        ("r 12 500 5000 12:04:00 22/09/2182", unix_seconds("2182-09-22T12:04:00")),
        ("r 12 500 5000 04-Jun-2020 15:11:55", unix_seconds("2020-06-04T15:11:55")),
        ("r 12 500 5000 22/09/2182", math.nan),
        ("r 12 500 5000 12:04:00", math.nan),
        ("r 12 500 5000", math.nan),
        ("r 12 500 5000 99/99/2020", math.nan),
    ],
)
def test_base_time_in_both_spellings(tmp_path: Path, line: str, moment: float) -> None:
    header = read_header(write_record(tmp_path, "r", record_line=line))
    np.testing.assert_equal(header.recorded_at, moment)


@pytest.mark.parametrize(
    ("comment", "field", "value"),
    [
        ("Age: 67", "age", "67"),
        ("<age>: 28  <sex>: M  <Height>: 170", "age", "28"),
        ("<age>: 28  <sex>: M  <Height>: 170", "sex", "M"),
        ("Gender: Female", "sex", "Female"),
        ("patient_id: A-17", "patient_id", "A-17"),
        ("<subject_id>: 12177274", "patient_id", "12177274"),
        ("<subject>: p001224", "patient_id", "p001224"),
        ("Race: African American", "race", "African American"),
        ("Image: 5", "age", None),
    ],
)
def test_comments_are_read_leniently(tmp_path: Path, comment: str, field: str, value: str | None) -> None:
    assert read_header(write_record(tmp_path, "r", comments=[comment])).comments.get(field) == value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("r.dat", "../r.dat", 1), Reason.PATH_OUTSIDE_FOLDER),
        (lambda text: text.replace("r.dat", "/etc/passwd", 1), Reason.PATH_OUTSIDE_FOLDER),
        (lambda text: text.replace("r.dat", "..\\r.dat", 1), Reason.PATH_OUTSIDE_FOLDER),
        (lambda text: text.replace(" 500 5000", " 500", 1), Reason.NO_LENGTH),
        (lambda text: text.replace(" 500 5000", "", 1), Reason.NO_SAMPLING_RATE),
        (lambda text: text.replace(" 500 5000", " 0 5000", 1), Reason.NO_SAMPLING_RATE),
        (lambda text: text.replace(" 500 5000", " 500 0", 1), Reason.TOO_SHORT),
        (lambda text: text.replace(" 500 5000", " 500 9000", 1), Reason.TRUNCATED),
        (lambda text: text.replace("r.dat", "s.dat"), Reason.MISSING_FILE),
        (lambda text: text.replace("/mV", "/mmHg"), Reason.UNKNOWN_UNIT),
        (lambda text: text.rsplit("\n", 4)[0], Reason.UNREADABLE),
        (lambda text: "", Reason.UNREADABLE),
        (lambda text: "\x00\xff not a header", Reason.UNREADABLE),
        (lambda text: text.replace(" 16 ", " 999 "), Reason.UNREADABLE),
    ],
)
def test_bad_headers_are_turned_away_with_a_reason(tmp_path: Path, change: object, reason: Reason) -> None:
    header = write_record(tmp_path, "r")
    header.write_text(change(header.read_text()))  # type: ignore[operator]
    with pytest.raises(Unusable) as caught:
        read_leads(read_header(header))
    assert caught.value.reason == reason
    assert len(caught.value.detail.splitlines()) == 1
    # The remedy follows a semicolon or a colon.
    assert ";" in caught.value.detail or ":" in caught.value.detail


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 600), byte=st.integers(0, 255))
def test_a_flipped_header_byte_never_crashes_the_reader(tmp_path: Path, where: int, byte: int) -> None:
    header = write_record(tmp_path, "r", comments=["Age: 67", "patient_id: 1"])
    raw = bytearray(header.read_bytes())
    raw[where % len(raw)] = byte
    header.write_bytes(raw)
    records, away, _ = records_of(tmp_path)
    assert len(records) + len(away) == 1


def test_a_nameless_signal_of_another_format_is_no_lead(tmp_path: Path) -> None:
    (tmp_path / "r.hea").write_text("r 1 500 5000\nr.dat 80\n")
    (tmp_path / "r.dat").write_bytes(bytes(5000))
    _, (away,), _ = records_of(tmp_path)
    assert away.reason == Reason.NO_KNOWN_LEAD


@needs_real_data
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["flacformats", "binformats", "multi-segment/041s/041s", "a103l"]),
    where=st.integers(0, 700),
    byte=st.sampled_from(list(b"0123456789 /.-()+\n\x00\xffIV")),
)
def test_damaged_headers_of_every_format_never_crash(tmp_path: Path, name: str, where: int, byte: int) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree((REAL_DATA / "wfdb-awkward-dev" / name).parent, folder, ignore=lambda *_: ["multi-segment"])
    header = folder / f"{Path(name).name}.hea"
    raw = bytearray(header.read_bytes())
    raw[where % len(raw)] = byte
    header.unlink()  # the copy is as read-only as its source
    header.write_bytes(raw)
    records, away, _ = records_of(folder)
    assert len(records) + len(away) >= 1


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    header = write_record(tmp_path, "r", comments=["patient_id: 1"])
    header.rename(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9.hea"))
    (record,), _, _ = records_of(tmp_path)
    assert record.record_id == "r\\xe9"
    assert record.source.encode() == b"r\\xe9.hea"


def test_segments_of_a_long_record_are_not_records(tmp_path: Path) -> None:
    write_record(tmp_path, "part1")
    write_record(tmp_path, "part2")
    (tmp_path / "whole.hea").write_text("whole/2 12 500 10000\npart1 5000\npart2 5000\n")
    (record,), away, _ = records_of(tmp_path)
    assert not away
    assert record.record_id == "whole"
    np.testing.assert_allclose(record.signal_mv, np.tile(ecg_steps(), 2) / 1000, atol=1e-6)


def test_only_the_first_minute_is_read(tmp_path: Path) -> None:
    write_record(tmp_path, "r", ecg_steps(90))
    (record,), _, _ = records_of(tmp_path)
    assert record.signal_mv.shape == (12, 30_000)


def test_the_table_goes_before_the_header(tmp_path: Path) -> None:
    comments = ["patient_id: 1", "Age: 40", "Sex: Male", "Race: white"]
    write_record(tmp_path, "a/r1", comments=comments)
    write_record(tmp_path, "r2", comments=comments)
    (tmp_path / "labels.csv").write_text(
        "record,patient_id,age_years,sex,race,recorded_at,measured_at,mpcwp_mmhg\n"
        "a/r1,P9,71,F,Black,2024-05-01T10:00:00,2024-05-02T10:00:00+00:00,21.5\n"
    )
    (first, second), _, remarks = records_of(tmp_path)
    assert not remarks
    assert (first.patient_id, first.age_years, first.sex, first.race) == ("P9", 71, "female", "black")
    assert first.measured_at - first.recorded_at == 86_400
    assert first.labels == {"mpcwp_mmhg": 21.5}
    assert (second.patient_id, second.age_years, second.sex, second.race) == ("1", 40, "male", "white")
    assert second.labels == {}
    assert math.isnan(second.measured_at)


def test_labels_remarks(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(
        "\ufeffrecord,mpcwp_mmhg,co,ward,measured_at\n"
        "r1,999,4.2,CCU,yesterday\nr2.hea,nd,,CCU,\nr1,12,4,CCU,\nr3,-3,high,CCU,\nr4,18,5,,\n",
        encoding="utf-8",
    )
    table = read_labels(path)
    assert {name: dict(row.labels) for name, row in table.rows.items()} == {
        "r1": {"co": 4.2},
        "r2": {},
        "r3": {},
        "r4": {"mpcwp_mmhg": 18.0, "co": 5.0},
    }
    assert sorted(remark.noticed for remark in table.remarks) == sorted(
        [
            Noticed.TEXT_COLUMN,
            Noticed.ABSURD_LABEL,
            Noticed.ABSURD_LABEL,
            Noticed.TEXT_LABEL,
            Noticed.UNREADABLE_TIME,
            Noticed.REPEATED_LABEL_ROW,
        ]
    )
    assert all(remark.source.startswith("labels.csv ") for remark in table.remarks)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("patient,mpcwp_mmhg\nP,1\n", "no column 'record'"),
        ("", "no column 'record'"),
        ("record,co,co\nr,1,2\n", "rename"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path: Path, text: str, remedy: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(HemoFedError, match=remedy) as caught:
        read_labels(path)
    assert caught.value.message.startswith(str(path))
    assert caught.value.exit_code == ExitCode.BAD_SOURCE


def test_a_row_of_an_absent_record_is_reported(tmp_path: Path) -> None:
    write_record(tmp_path, "r1", comments=["patient_id: 1"])
    (tmp_path / "labels.csv").write_text("record,co\nr1,1\nr7,2\n")
    _, _, remarks = records_of(tmp_path)
    assert [(remark.noticed, remark.source) for remark in remarks] == [(Noticed.LABEL_WITHOUT_RECORD, "labels.csv: r7")]


def test_small_parsers() -> None:
    assert [known_sex(text) for text in ("F", "male ", "x", "")] == ["female", "male", "unknown", "unknown"]
    assert [known_age(text) for text in ("67", "0", "120")] == [67, 0, 120]
    assert all(math.isnan(known_age(text)) for text in ("300", "-1", "NaN", "old", ""))
    assert record_name(" ./a\\b.hea ") == "a/b"
    assert unix_seconds("1970-01-02") == 86_400
    assert math.isnan(unix_seconds(" "))


SUPERCLASS = {"NORM": "NORM", "IMI": "MI", "LVH": "HYP"}


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        ("{'NORM': 100.0, 'SR': 0.0}", {"norm"}),
        ("{'IMI': 0.0, 'LVH': 50.0}", {"not_norm", "mi", "hyp"}),  # likelihood 0 counts
        ("{'SR': 0.0}", {"not_norm"}),
        ("{'NORM': 80.0, 'LVH': 15.0}", {"norm", "hyp"}),
    ],
)
def test_superclasses(codes: str, found: set[str]) -> None:
    labels = superclass_labels(codes, SUPERCLASS)
    assert set(labels) == {"not_norm", "norm", "mi", "sttc", "cd", "hyp"}
    assert {name for name, value in labels.items() if value} == found


def write_ptbxl(folder: Path, rows: list[str]) -> None:
    header = "ecg_id,patient_id,age,sex,site,device,recording_date,scp_codes,filename_lr,filename_hr"
    (folder / "ptbxl_database.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "scp_statements.csv").write_text(
        ",description,diagnostic,diagnostic_class\nNORM,normal,1.0,NORM\nIMI,infarct,1.0,MI\nSR,sinus,,\n"
    )


def test_ptbxl_rows(tmp_path: Path) -> None:
    write_ptbxl(
        tmp_path,
        [
            "1,15709.0,300.0,1,0.0,CS-12   E,1984-11-09 09:17:34,\"{'NORM': 100.0}\",lr/1_lr,hr/1_hr",
            "2,15710.0,,,1.0,AT-6 C,,\"{'IMI': 15.0, 'SR': 0.0}\",lr/2_lr,hr/2_hr",
            "3,15710.0,50,0,1.0,AT-6 C,,oops,lr/3_lr,hr/3_hr",
            "4,15711.0,50,0,1.0,AT-6 C,,{},../../4_lr,",
        ],
    )
    write_record(tmp_path, "lr/1_lr", ecg_steps(rate_hz=100), rate_hz=100)
    write_record(tmp_path, "hr/1_hr", ecg_steps())
    write_record(tmp_path, "lr/2_lr", ecg_steps(rate_hz=100), rate_hz=100)
    (first, second), away, _ = records_of(tmp_path)
    assert (first.record_id, first.patient_id, first.age_years, first.sex) == ("1", "15709", 90, "female")
    assert first.sampling_rate_hz == 500
    assert first.recorded_at == unix_seconds("1984-11-09T09:17:34")
    assert (first.labels["not_norm"], second.labels["not_norm"], second.labels["mi"]) == (0, 1, 1)
    assert second.sampling_rate_hz == 100
    assert second.sex == "unknown"
    assert math.isnan(second.age_years)
    assert [item.reason for item in away] == [Reason.MISSING_FILE, Reason.PATH_OUTSIDE_FOLDER]


@needs_real_data
@pytest.mark.parametrize(
    ("where", "count"),
    [
        (("device=CS-12   E",), 130),
        (("site=0",), 132),
        (("site=0.0", "site=1"), 225),
        (("device= AT-6 C ", "sex=1"), None),
    ],
)
def test_ptbxl_selection(where: tuple[str, ...], count: int | None) -> None:
    records, away, _ = records_of(REAL_DATA / "ptbxl-dev", where)
    assert not away
    if count is not None:
        assert len(records) == count
    else:
        assert 0 < len(records) < 30
        assert {record.sex for record in records} == {"female"}


@pytest.mark.parametrize("where", ["site", "ward=1", "site=99"])
def test_a_wrong_selection_is_one_line(tmp_path: Path, where: str) -> None:
    write_ptbxl(tmp_path, ["1,1,50,1,0.0,CS,,{},lr/1_lr,hr/1_hr"])
    with pytest.raises(HemoFedError, match=where.split("=")[0]):
        ptbxl.open_archive(tmp_path, ReaderOptions(where=(where,)))


def test_format_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="no ECG records recognised"):
        choose_format(tmp_path)
    write_record(tmp_path, "deep/er/r")
    assert choose_format(tmp_path) == "wfdb"
    write_ptbxl(tmp_path, [])
    assert choose_format(tmp_path) == "ptbxl"
    with pytest.raises(HemoFedError, match="unknown"):
        choose_format(tmp_path, "no-such-format")
    with pytest.raises(HemoFedError, match="no such folder"):
        choose_format(tmp_path / "absent")
