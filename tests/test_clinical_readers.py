"""Readers of what hospital systems export: MUSE XML, DICOM, HL7 aECG."""

import math
from pathlib import Path

import numpy as np
import pytest

from client.ingest import ingest
from client.records import choose_format, dicom_ecg
from client.records.demographics import age_in_years, american_birth_time, american_time, birth_time, compact_time
from client.records.options import ReaderOptions
from client.records.record import Noticed, Reason, unix_seconds
from client.segments import cut_segments
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from tests.clinical_fixtures import (
    MUSE_LEADS,
    dicom_group,
    only_reason,
    only_record,
    records_of,
    steps_for,
    write_aecg,
    write_dicom,
    write_muse,
    write_scg_rhc,
)

RECORDED = unix_seconds("2024-05-31T09:30:05")


@pytest.mark.parametrize("rate_hz", [250, 500])
@pytest.mark.parametrize(("units", "units_per_bit"), [("MICROVOLTS", "4.88"), ("MILLIVOLTS", "0.00488")])
@pytest.mark.parametrize("lead_names", [MUSE_LEADS, LEADS])
@pytest.mark.parametrize("encoding", ["ISO-8859-1", "UTF-8", "UTF-16", "windows-1252"])
def test_muse(
    tmp_path: Path, rate_hz: int, units: str, units_per_bit: str, lead_names: tuple[str, ...], encoding: str
) -> None:
    steps = steps_for(lead_names, rate_hz)
    write_muse(
        tmp_path / "a" / "r.xml",
        steps,
        lead_names=lead_names,
        rate_hz=rate_hz,
        units=units,
        units_per_bit=units_per_bit,
        encoding=encoding,
    )
    assert choose_format(tmp_path) == "muse-xml"
    record = only_record(tmp_path)
    assert (record.record_id, record.source, record.patient_id) == ("a/r", "a/r.xml", "0017")
    assert (record.age_years, record.sex, record.race, record.recorded_at) == (67, "female", "caucasian", RECORDED)
    assert record.lead_names == lead_names
    assert record.sampling_rate_hz == rate_hz
    np.testing.assert_allclose(record.signal_mv, steps * 0.00488, rtol=1e-6)


def test_muse_limb_leads_are_derived_only_where_absent(tmp_path: Path) -> None:
    write_muse(tmp_path / "eight.xml")
    derived = cut_segments(only_record(tmp_path)).steps[0].astype(float)
    one, two = derived[0], derived[1]
    for row, expected in enumerate((two - one, -(one + two) / 2, one - two / 2, two - one / 2), start=2):
        np.testing.assert_allclose(derived[row], expected, atol=2)  # each is rounded to 1 uV
    stored = steps_for(LEADS)
    stored[2] = stored[0]  # a III that is not II - I
    write_muse(tmp_path / "eight.xml", stored, lead_names=LEADS)
    kept = cut_segments(only_record(tmp_path)).steps[0].astype(float)
    assert np.abs(kept[2] - (kept[1] - kept[0])).max() > 20  # it stays


@pytest.mark.parametrize(
    ("patient", "test", "age", "recorded_at"),
    [
        ({"PatientAge": "6", "AgeUnits": "MONTHS"}, {}, 0.5, RECORDED),
        ({"PatientAge": "", "DateofBirth": "05-31-1964"}, {}, 60, RECORDED),
        ({"PatientAge": "", "AgeUnits": ""}, {}, math.nan, RECORDED),
        ({"PatientAge": "67", "AgeUnits": ""}, {}, math.nan, RECORDED),
        ({"PatientAge": "967"}, {"AcquisitionDate": "XX-XX-XXXX"}, math.nan, math.nan),
        ({}, {"AcquisitionTime": "09:30"}, 67, RECORDED - 5),
    ],
)
def test_muse_ages_and_dates(
    tmp_path: Path, patient: dict[str, str], test: dict[str, str], age: float, recorded_at: float
) -> None:
    write_muse(tmp_path / "r.xml", patient=patient, test=test)
    record = only_record(tmp_path)
    np.testing.assert_allclose(record.age_years, age, atol=0.01)
    np.testing.assert_equal(record.recorded_at, recorded_at)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<LeadDataCRC32>", "<LeadDataCRC32>1", Reason.WRONG_CHECKSUM),
        ("<LeadSampleCountTotal>5000", "<LeadSampleCountTotal>4999", Reason.TRUNCATED),
        ("<LeadSampleCountTotal>5000", "<LeadSampleCountTotal>500000000", Reason.TRUNCATED),
        ("<LeadByteCountTotal>10000", "<LeadByteCountTotal>1000000000", Reason.TRUNCATED),
        ("<NumberofLeads>8", "<NumberofLeads>12", Reason.TRUNCATED),
        ("<SampleBase>500", "<SampleBase>5", Reason.NO_SAMPLING_RATE),
        ("<SampleBase>500", "<SampleBase>", Reason.NO_SAMPLING_RATE),
        ("<SampleExponent>0", "<SampleExponent>999999999", Reason.NO_SAMPLING_RATE),
        (">MICROVOLTS<", ">COUNTS<", Reason.UNKNOWN_UNIT),
        ("<LeadAmplitudeUnitsPerBit>4.88", "<LeadAmplitudeUnitsPerBit>nan", Reason.UNKNOWN_UNIT),
        ("<WaveformType>Rhythm", "<WaveformType>Median", Reason.NO_KNOWN_LEAD),
        ("<LeadID>V2", "<LeadID>V1", Reason.UNREADABLE),
        ("<LeadTimeOffset>0", "<LeadTimeOffset>40", Reason.UNREADABLE),
        ("<LeadSampleSize>2", "<LeadSampleSize>4", Reason.UNREADABLE),
        ("<WaveFormData>\n", "<WaveFormData>\n?", Reason.UNREADABLE),
        ("</RestingECG>", "", Reason.UNREADABLE),
        ("RestingECG", "OtherECG", Reason.NOT_AN_ECG),
    ],
)
def test_muse_faults_have_a_reason(tmp_path: Path, old: str, new: str, reason: Reason) -> None:
    path = write_muse(tmp_path / "r.xml")
    write_muse(tmp_path / "sound.xml")  # keeps the folder recognised
    head, rhythm, tail = path.read_text("latin-1").partition("<Waveform><WaveformType>Rhythm")
    changed = (rhythm + tail).replace(old, new, 1) if old != "RestingECG" else ""
    assert changed != rhythm + tail
    path.write_text(head + changed if changed else (head + rhythm + tail).replace(old, new), "latin-1")
    records, (away,), _ = records_of(tmp_path)
    assert [record.record_id for record in records] == ["sound"]
    assert away.reason == reason


def test_muse_electrode_off_and_labels(tmp_path: Path) -> None:
    path = write_muse(tmp_path / "r.xml", patient={"PatientID": ""})
    head, mark, tail = path.read_text("latin-1").rpartition("<LeadID>V4")
    path.write_text(head + mark + tail.replace("<LeadOff>FALSE", "<LeadOff>TRUE", 1), "latin-1")
    record = only_record(tmp_path)
    assert record.lead_names == tuple(lead for lead in MUSE_LEADS if lead != "V4")
    assert record.patient_id == "record:r"
    (tmp_path / "labels.csv").write_text("record,patient_id,sex,mpcwp_mmhg\nr.xml,P1,M,21\nabsent,P2,M,3\n")
    (record,), _, remarks = records_of(tmp_path)
    assert (record.patient_id, record.sex, record.labels) == ("P1", "male", {"mpcwp_mmhg": 21.0})
    assert [remark.noticed for remark in remarks] == [Noticed.LABEL_WITHOUT_RECORD]


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    ("increment", "rate_hz"),
    [(("0.002", "s"), 500), (("4", "ms"), 250), (("1000", "us"), 1000), (("0.00390625", "s"), 256)],
)
@pytest.mark.parametrize(
    ("origin", "scale", "expected"),
    [
        (("0", "uV"), ("2.5", "uV"), lambda digits: digits * 0.0025),
        (("0.5", "mV"), ("5", "uV"), lambda digits: 0.5 + digits * 0.005),
        (("-250", "uV"), ("0.005", "mV"), lambda digits: -0.25 + digits * 0.005),
    ],
)
def test_aecg(
    tmp_path: Path, absolute: bool, increment: tuple[str, str], rate_hz: int, origin: object, scale: object, expected
) -> None:
    steps = steps_for(LEADS)
    write_aecg(tmp_path / "r.xml", steps, absolute=absolute, increment=increment, origin=origin, scale=scale)
    assert choose_format(tmp_path) == "hl7-aecg"
    record = only_record(tmp_path)
    assert (record.patient_id, record.sex, record.race) == ("S-17", "male", "white")
    assert record.age_years == pytest.approx(70, abs=0.01)
    assert (record.lead_names, record.sampling_rate_hz, record.recorded_at) == (LEADS, rate_hz, RECORDED)
    np.testing.assert_allclose(record.signal_mv, expected(steps.astype(float)), rtol=1e-6, atol=1e-6)


def test_aecg_negated_avr(tmp_path: Path) -> None:
    codes = ("MDC_ECG_LEAD_I", "MDC_ECG_LEAD_AVRNEG", "MDC_ECG_LEAD_V3R")
    steps = steps_for(codes)
    write_aecg(tmp_path / "r.xml", steps, lead_codes=codes)
    record = only_record(tmp_path)
    assert record.lead_names == ("I", "aVR")
    np.testing.assert_allclose(record.signal_mv[1], -steps[1] * 0.005, rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('code="RHYTHM"', 'code="REPRESENTATIVE_BEAT"', Reason.NO_KNOWN_LEAD),
        ("MDC_ECG_LEAD_", "MDC_EEG_", Reason.NO_KNOWN_LEAD),
        ('unit="s"', 'unit="h"', Reason.NO_SAMPLING_RATE),
        ('value="0.002"', 'value="0"', Reason.NO_SAMPLING_RATE),
        ('value="0.002"', 'value="1e-300"', Reason.NO_SAMPLING_RATE),
        ('scale value="5" unit="uV"', 'scale value="5" unit="mmHg"', Reason.UNKNOWN_UNIT),
        ('scale value="5"', 'scale value="0"', Reason.UNKNOWN_UNIT),
        ('scale value="5"', 'scale value="inf"', Reason.UNKNOWN_UNIT),
        ("<digits>", "<digits>1 ", Reason.TRUNCATED),
        ("<digits>", "<digits>x ", Reason.UNREADABLE),
        ("<digits>", f"<digits>{'9' * 400} ", Reason.UNREADABLE),
        ("SLIST_PQ", "SLIST_TS", Reason.UNREADABLE),
        ("LEAD_V2", "LEAD_V1", Reason.UNREADABLE),
    ],
)
def test_aecg_faults_have_a_reason(tmp_path: Path, old: str, new: str, reason: Reason) -> None:
    path = write_aecg(tmp_path / "r.xml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1 if "digits" in old else -1))
    assert only_reason(tmp_path) == reason


def oracle_mv(path: Path) -> dict[str, np.ndarray]:
    """Lead by name in mV as ecgdatakit reads the file."""
    kit = pytest.importorskip("ecgdatakit", reason="ecgdatakit is a second opinion, and not installed")
    leads = [lead.to_physical() for lead in kit.FileParser.parse(str(path)).leads]
    return {lead.label: lead.samples * {"uV": 1e-3, "mV": 1.0}[lead.units] for lead in leads}


@pytest.mark.parametrize("writer", ["muse", "aecg", "dicom"])
def test_ecgdatakit_reads_the_same(tmp_path: Path, writer: str) -> None:
    if writer == "muse":
        path = write_muse(tmp_path / "r.xml")
    elif writer == "aecg":
        path = write_aecg(tmp_path / "r.xml", origin=("0.5", "mV"))
    else:
        pytest.importorskip("pydicom")
        path = write_dicom(tmp_path / "r.dcm", [dicom_group(steps_for(LEADS), baseline="12.5", correction="4")])
    expected, record = oracle_mv(path), only_record(tmp_path)
    assert set(record.lead_names) <= set(expected)
    for lead, signal in zip(record.lead_names, record.signal_mv, strict=True):
        np.testing.assert_allclose(signal, expected[lead], atol=1e-6)


@pytest.mark.parametrize("scheme", ["MDC", "SCPECG", "99LOCAL"])
@pytest.mark.parametrize("sop_class", ["1.1", "1.2", "1.3"])
@pytest.mark.parametrize(
    ("unit", "sensitivity", "correction", "baseline", "to_mv"),
    [
        ("uV", "1.25", "1", "0", lambda steps: steps * 0.00125),
        ("uV", "1", "4.88", "100", lambda steps: steps * 0.00488 + 0.1),
        ("mV", "0.005", "1", "-0.5", lambda steps: steps * 0.005 - 0.5),
    ],
)
def test_dicom(
    tmp_path: Path, scheme: str, sop_class: str, unit: str, sensitivity, correction, baseline, to_mv
) -> None:
    pydicom = pytest.importorskip("pydicom")
    steps = steps_for(LEADS)
    group = dicom_group(
        steps, scheme=scheme, unit=unit, sensitivity=sensitivity, correction=correction, baseline=baseline
    )
    path = write_dicom(tmp_path / "1.2.840.1", [group], sop_class, EthnicGroup="Asian")
    assert choose_format(tmp_path) == "dicom"
    record = only_record(tmp_path)
    assert (record.record_id, record.patient_id, record.age_years) == ("1.2.840.1", "D-17", 67)
    assert (record.sex, record.race, record.recorded_at) == ("female", "asian", RECORDED)
    assert (record.lead_names, record.sampling_rate_hz) == (LEADS, 500)
    np.testing.assert_allclose(record.signal_mv, to_mv(steps.astype(float)), rtol=1e-5, atol=1e-6)
    in_units = pydicom.dcmread(path).waveform_array(0).T * {"uV": 1e-3, "mV": 1}[unit]
    np.testing.assert_allclose(record.signal_mv, in_units, rtol=1e-5, atol=1e-6)


def test_dicom_takes_the_rhythm_and_masks_padding(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    steps = steps_for(LEADS)
    steps[3, 100:300] = -32768
    median = dicom_group(steps[:, :600], label="MEDIAN BEAT", originality="DERIVED")
    rhythm = dicom_group(steps, padding=-32768)
    strip = dicom_group(steps_for(("II",), seconds=30), ("II",))
    write_dicom(tmp_path / "r.dcm", [median, strip, rhythm], PatientAge="", PatientBirthDate="19640531")
    (record,), _, remarks = records_of(tmp_path)
    assert record.signal_mv.shape == (12, 5000)
    assert record.age_years == pytest.approx(60, abs=0.01)
    assert np.isnan(record.signal_mv[3, 100:300]).all()
    assert np.isnan(record.signal_mv).sum() == 200
    assert [remark.noticed for remark in remarks] == [Noticed.SEGMENTS_LEFT_OUT]


def test_dicom_groups_of_the_same_seconds_are_one_ecg(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    steps = steps_for(LEADS)
    groups = [dicom_group(steps[first : first + 3], LEADS[first : first + 3]) for first in range(0, 12, 3)]
    write_dicom(tmp_path / "r.dcm", groups)
    (record,), _, remarks = records_of(tmp_path)
    assert not remarks
    assert set(record.lead_names) == set(LEADS)
    for lead, signal in zip(record.lead_names, record.signal_mv, strict=True):
        np.testing.assert_allclose(signal, steps[LEADS.index(lead)] * 0.00125, rtol=1e-6)
    groups[3].MultiplexGroupTimeOffset = "10000"  # ms: not the same seconds
    write_dicom(tmp_path / "r.dcm", groups)
    (record,), _, remarks = records_of(tmp_path)
    assert set(record.lead_names) == set(LEADS[:9])
    assert [remark.noticed for remark in remarks] == [Noticed.SEGMENTS_LEFT_OUT]


def test_a_real_dicom_ecg(tmp_path: Path) -> None:
    """pydicom's own sample: a Mortara 12-lead object with SCPECG codes, a rhythm group and a median beat."""
    pydicom = pytest.importorskip("pydicom")
    sample = Path(pydicom.__file__).parent / "data" / "test_files" / "waveform_ecg.dcm"
    (tmp_path / "r").write_bytes(sample.read_bytes())
    record = only_record(tmp_path)
    assert record.lead_names == LEADS
    assert (record.age_years, record.sex, record.sampling_rate_hz) == (42, "female", 1000)
    np.testing.assert_allclose(record.signal_mv, pydicom.dcmread(sample).waveform_array(0).T / 1000, atol=1e-6)
    limb = record.signal_mv
    assert np.abs(limb[0] + limb[2] - limb[1]).max() < 0.006  # Einthoven holds: leads are named right


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NumberOfWaveformSamples": 4_000_000_000}, Reason.TRUNCATED),
        ({"NumberOfWaveformSamples": 4000}, Reason.TRUNCATED),
        ({"SamplingFrequency": "0"}, Reason.NO_SAMPLING_RATE),
        ({"WaveformSampleInterpretation": "MB"}, Reason.UNREADABLE),
        ({"WaveformBitsAllocated": 12}, Reason.UNREADABLE),
        ({"WaveformData": b""}, Reason.TRUNCATED),
        ({"ChannelDefinitionSequence": []}, Reason.UNREADABLE),
    ],
)
def test_dicom_faults_have_a_reason(tmp_path: Path, change: dict[str, object], reason: Reason) -> None:
    pytest.importorskip("pydicom")
    group = dicom_group(steps_for(LEADS))
    for name, value in change.items():
        setattr(group, name, value)
    write_dicom(tmp_path / "r.dcm", [group])
    assert only_reason(tmp_path) == reason


def test_dicom_values_beyond_all_bounds_are_missing(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    group = dicom_group(steps_for(LEADS))
    group.ChannelDefinitionSequence[2].ChannelBaseline = "1e300"
    write_dicom(tmp_path / "r.dcm", [group])
    assert np.isnan(only_record(tmp_path).signal_mv).all(axis=1).tolist() == [lead == "III" for lead in LEADS]


def test_dicom_that_is_no_ecg_and_units_and_skew(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    steps = steps_for(LEADS)
    skewed = dicom_group(steps)
    skewed.ChannelDefinitionSequence[4].ChannelTimeSkew = "0.1"
    write_dicom(tmp_path / "a.dcm", [dicom_group(steps)], "2.1")
    write_dicom(tmp_path / "b.dcm", [dicom_group(steps, unit="mmHg")])
    write_dicom(tmp_path / "c.dcm", [skewed])
    write_dicom(tmp_path / "d.dcm", [])
    (tmp_path / "e.dcm").write_bytes(b"no DICOM at all")
    _, away, _ = records_of(tmp_path)
    assert [item.reason for item in away] == [
        Reason.NOT_AN_ECG,
        Reason.UNKNOWN_UNIT,
        Reason.UNREADABLE,
        Reason.NO_KNOWN_LEAD,
        Reason.UNREADABLE,
    ]


def test_without_pydicom_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_ecg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HemoFedError, match=r"pip install 'hemofed\[records\]'") as caught:
        dicom_ecg.open_archive(tmp_path, ReaderOptions())
    assert caught.value.exit_code == ExitCode.USAGE


def test_all_of_it_goes_into_a_store(tmp_path: Path) -> None:
    write_muse(tmp_path / "muse" / "r.xml")
    write_aecg(tmp_path / "aecg" / "r.xml", steps_for(LEADS) + np.int16(3))
    write_scg_rhc(tmp_path / "scg")
    stored = [ingest(tmp_path / name, tmp_path / "site").segments for name in ("muse", "aecg", "scg")]
    assert stored == [1, 1, 6]


def test_ages_and_times() -> None:
    assert age_in_years("90", "Y") == 90
    assert age_in_years("52", "WEEKS") == pytest.approx(1, abs=0.01)
    assert all(math.isnan(age_in_years(*pair)) for pair in (("x", "Y"), ("3", "?"), ("", ""), ("inf", "Y")))
    assert compact_time("20240531093005.5") == RECORDED + 0.5
    assert compact_time("20240531093005.5+0200") == RECORDED + 0.5  # as the clock reads
    assert math.isnan(compact_time("20240531"))  # no clock: not before an event at 08:00
    assert all(math.isnan(compact_time(text)) for text in ("2024", "20241331", "20240531+9999", "", "x" * 99))
    assert birth_time("19540531") == birth_time("195405310930") == unix_seconds("1954-05-31")
    assert birth_time("1954") == unix_seconds("1954-07-01")
    assert birth_time("195406") == unix_seconds("1954-06-15")
    assert american_time("05-31-2024", "09:30") == unix_seconds("2024-05-31T09:30")
    assert math.isnan(american_time("05-31-2024", ""))
    assert american_birth_time("05-31-1954") == unix_seconds("1954-05-31")
