"""Simulated hospitals on disk: WFDB that another reader agrees with, labels, and refusals."""

import csv
import filecmp
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_model.errors import HemoFedError
from shared_model.leads import LEADS, canonical_lead
from simulation.hospitals import LABEL_COLUMNS, LEAD_ORDERS, DeviceFilter, HospitalSpec, write_hospital
from simulation.oracle import auroc
from simulation.wfdb_writer import to_adc_units, write_record

WHEN = datetime(2017, 3, 8, 7, 5, 9)


def labels_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_below(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


# The writer


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    leads=st.integers(1, 15),
    samples=st.integers(1, 300),
    rate_hz=st.sampled_from([100.0, 257.0, 360.5, 500.0, 1000.0]),
    gain=st.sampled_from([200.0, 204.9, 1000.0, 204.8]),
    comment=st.text(st.characters(codec="ascii", min_codepoint=36), max_size=30),  # wfdb strips # at the end
)
def test_writer_agrees_with_wfdb(tmp_path_factory, seed, leads, samples, rate_hz, gain, comment) -> None:
    folder = tmp_path_factory.mktemp("wfdb")
    stored = np.random.default_rng(seed).integers(-32767, 32768, (samples, leads)).astype(np.int16)
    names = [f"lead {k}" for k in range(leads)]
    write_record(folder / "r-1_a", stored, names, rate_hz, gain, WHEN, ["Age: 67", f"x{comment}"])

    digital = wfdb.rdrecord(str(folder / "r-1_a"), physical=False)
    np.testing.assert_array_equal(digital.d_signal, stored)
    assert digital.fs == rate_hz
    assert digital.sig_name == names
    assert digital.comments == ["Age: 67", f"x{comment}"]
    assert digital.base_datetime == WHEN
    assert digital.init_value == stored[0].tolist()
    assert [value % 65536 for value in digital.checksum] == digital.calc_checksum()
    assert all(-32768 <= value < 32768 for value in digital.checksum)
    physical = wfdb.rdrecord(str(folder / "r-1_a"))
    np.testing.assert_allclose(physical.p_signal, stored / gain, rtol=1e-12, atol=1e-12)
    assert physical.units == ["mV"] * leads


def test_writer_writes_the_bytes_that_wrsamp_writes(tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(-3000, 3000, (5000, 12)).astype(np.int16)
    write_record(tmp_path / "ours", stored, LEADS, 500.0, 1000.0, WHEN, ["Age: 67"])
    wfdb.wrsamp(
        "theirs", 500, ["mV"] * 12, list(LEADS), d_signal=stored, fmt=["16"] * 12, adc_gain=[1000.0] * 12,
        baseline=[0] * 12, base_time=WHEN.time(), base_date=WHEN.date(), write_dir=str(tmp_path),
    )  # fmt: skip
    assert (tmp_path / "ours.dat").read_bytes() == (tmp_path / "theirs.dat").read_bytes()
    ours, theirs = (wfdb.rdrecord(str(tmp_path / name)) for name in ("ours", "theirs"))
    np.testing.assert_array_equal(ours.p_signal, theirs.p_signal)
    assert ours.base_datetime == theirs.base_datetime


@pytest.mark.parametrize(
    ("name", "shape", "lead", "message"),
    [
        ("a b", (10, 1), "I", "letters, digits"),
        ("a", (10, 2), "I", "2\\) samples for 1 leads"),
        ("a", (0, 1), "I", "samples for 1 leads"),
        ("a", (10, 1), "I\nII", "line break"),
    ],
)
def test_writer_refuses_what_a_header_cannot_hold(tmp_path: Path, name, shape, lead, message) -> None:
    with pytest.raises(HemoFedError, match=message):
        write_record(tmp_path / name, np.zeros(shape, np.int16), [lead], 500.0, 1000.0, WHEN)
    assert files_below(tmp_path) == []


def test_adc_rounds_and_saturates() -> None:
    mv = np.array([0.0, 0.0014, -0.0016, 99.0, -99.0], dtype=np.float32)
    np.testing.assert_array_equal(to_adc_units(mv, 1000.0), [0, 1, -2, 32767, -32767])


# The specification


def test_a_name_and_a_size_are_enough() -> None:
    spec = HospitalSpec(name="north", patients=80)
    assert spec.leads == LEADS
    assert spec.lead_names == LEADS
    assert spec.acquisition.samples == 5000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patients", 0, "greater than or equal to 1"),
        ("name", "North Hospital", "pattern"),
        ("name", "../elsewhere", "pattern"),
        ("labelled_share", 1.2, "less than or equal to 1"),
        ("sampling_rate_hz", 50, "greater than or equal to 100"),
        ("sampling_rate_hz", float("nan"), "sampling_rate_hz"),
        ("lead_order", ["I", "II", "V9"], "each of its leads once"),
        ("lead_order", ["I", "I"], "each of its leads once"),
        ("lead_order", [], "each of its leads once"),
        ("lead_order", "cabrera-like", "lead_order"),
        ("race_mix", {"martian": 1.0}, "unknown race martian"),
        ("race_mix", {"white": 0.0}, "weight above 0"),
        ("wedge_convention", "guess", "end_expiratory"),
        ("filter", {"high_pass_hz": 50, "low_pass_hz": 40}, "must lie below"),
        ("mains_hz", 55, "50 or 60"),
        ("bed_count", 400, "Extra inputs are not permitted"),
    ],
)
def test_bad_specifications_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HospitalSpec.model_validate({"name": "north", "patients": 80, field: value})


def test_specification_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        HospitalSpec(name="north", patients=80).patients = 3


# The hospital on disk


@pytest.mark.parametrize(
    ("rate_hz", "order", "spelling"),
    [
        (250, "standard", "standard"),
        (500, "mimic", "upper"),
        (1000, "cabrera", "lower"),
        (257, "standard", "mdc"),
        (500, "cabrera", "lead_prefix"),
        (500, ("I", "II", "V1", "V6"), "upper"),
    ],
)
def test_each_dialect_is_read_back_as_the_same_hearts(tmp_path: Path, rate_hz, order, spelling) -> None:
    spec = HospitalSpec(
        name="dialect", patients=4, sampling_rate_hz=rate_hz, lead_order=order, lead_spelling=spelling,
        gain_adc_per_mv=204.9,
    )  # fmt: skip
    truth = write_hospital(spec, tmp_path / "it", seed=3)
    for record in truth.records:
        read = wfdb.rdrecord(str(tmp_path / "it" / record))
        assert read.fs == rate_hz
        assert read.sig_len == round(10 * rate_hz)
        leads = [canonical_lead(name) for name in read.sig_name]
        assert tuple(leads) == (LEAD_ORDERS[order] if isinstance(order, str) else order)
        signal = {lead: read.p_signal[:, k] for k, lead in enumerate(leads)}
        assert 0.1 < np.ptp(signal["II"]) < 12
        if len(leads) == 12:
            step = 1 / 204.9
            assert np.abs(signal["III"] - (signal["II"] - signal["I"])).max() < 1.6 * step
            assert np.abs(signal["aVR"] + (signal["I"] + signal["II"]) / 2).max() < 1.1 * step
            assert np.abs(signal["aVL"] - (signal["I"] - signal["II"] / 2)).max() < 1.3 * step
            assert np.abs(signal["aVF"] - (signal["II"] - signal["I"] / 2)).max() < 1.3 * step


def test_labels_and_headers_tell_the_same_story(tmp_path: Path) -> None:
    spec = HospitalSpec(name="north", patients=12)
    truth = write_hospital(spec, tmp_path / "it", seed=3)
    rows = labels_of(tmp_path / "it")
    assert tuple(rows[0]) == LABEL_COLUMNS
    assert [row["record"] for row in rows] == list(truth.records)
    assert [row["patient_id"] for row in rows] == list(truth.patient_ids)
    assert len(set(truth.patient_ids)) == 12
    for row, pressure in zip(rows, truth.recorded_mpcwp_mmhg, strict=True):
        header = wfdb.rdheader(str(tmp_path / "it" / row["record"]))
        said = dict(comment.split(": ") for comment in header.comments)
        assert said["patient_id"] == row["patient_id"]
        assert said["Age"] == row["age_years"]
        assert said["Sex"].lower() == row["sex"]
        assert said["Race"].lower() == row["race"]
        assert header.base_datetime == datetime.fromisoformat(row["recorded_at"])
        gap = datetime.fromisoformat(row["measured_at"]) - header.base_datetime
        assert timedelta(0) < gap <= timedelta(hours=12)
        assert float(row["mpcwp_mmhg"]) == pressure
        assert row["mpcwp_mmhg"].isdigit()


def test_the_true_pressure_is_written_nowhere(tmp_path: Path) -> None:
    truth = write_hospital(HospitalSpec(name="north", patients=6), tmp_path / "it", seed=3)
    assert {path.suffix for path in files_below(tmp_path / "it")} == {".hea", ".dat", ".csv"}
    text = "".join(path.read_text() for path in (tmp_path / "it").rglob("*") if path.suffix in {".hea", ".csv"})
    assert not any(f"{pressure:.3f}"[:6] in text for pressure in truth.circulation.mpcwp_mmhg)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    spec = HospitalSpec(name="north", patients=5, labelled_share=0.5)
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_hospital(spec, tmp_path / folder, seed)
    write_hospital(spec.model_copy(update={"name": "south"}), tmp_path / "d", 1)
    names = files_below(tmp_path / "a")
    assert names == files_below(tmp_path / "b")
    _, differing, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert not differing
    assert not errors
    first = (tmp_path / "a" / "ecg/000/p000000_1.dat").read_bytes()
    assert first != (tmp_path / "c" / "ecg/000/p000000_1.dat").read_bytes()
    assert first != (tmp_path / "d" / "ecg/000/p000000_1.dat").read_bytes()


def test_a_larger_hospital_begins_with_the_same_patients(tmp_path: Path) -> None:
    write_hospital(HospitalSpec(name="north", patients=50), tmp_path / "small", 1)
    write_hospital(HospitalSpec(name="north", patients=53), tmp_path / "large", 1)
    for record in files_below(tmp_path / "small" / "ecg"):
        assert filecmp.cmp(tmp_path / "small/ecg" / record, tmp_path / "large/ecg" / record, shallow=False)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 3), (1.0, 12)])
def test_labels_are_as_scarce_as_asked(tmp_path: Path, share: float, expected: int) -> None:
    spec = HospitalSpec(name="north", patients=12, labelled_share=share)
    truth = write_hospital(spec, tmp_path / "it", seed=3)
    rows = labels_of(tmp_path / "it")
    labelled = {row["patient_id"] for row in rows if row["mpcwp_mmhg"]}
    without = {row["patient_id"] for row in rows if not row["mpcwp_mmhg"]}
    assert len(labelled) == expected
    assert not labelled & without
    assert [bool(row["mpcwp_mmhg"]) for row in rows] == truth.labelled.tolist()
    assert all(bool(row["measured_at"]) == bool(row["mpcwp_mmhg"]) for row in rows)


def test_progress_counts_patients(tmp_path: Path) -> None:
    steps: list[int] = []
    write_hospital(HospitalSpec(name="north", patients=53), tmp_path / "it", 1, steps.append)
    assert steps == [50, 3]


def test_hospitals_differ_in_patients_and_in_what_they_record(tmp_path: Path) -> None:
    common = {"patients": 150, "noise_scale": 0.0, "labelled_share": 1.0}
    plain = write_hospital(HospitalSpec(name="plain", **common), tmp_path / "plain", 1)
    other = HospitalSpec(
        name="other", age_mean_years=50, age_sd_years=5, female_share=0.9, race_mix={"black": 1.0},
        pressure_shift=0.8, wedge_convention="digital_mean", amplitude_gain=0.5, **common,
    )  # fmt: skip
    truth = write_hospital(other, tmp_path / "other", 1)
    assert truth.circulation.mpcwp_mmhg.mean() > plain.circulation.mpcwp_mmhg.mean() + 3
    assert truth.circulation.female.mean() > 0.8
    assert {row["race"] for row in labels_of(tmp_path / "other")} == {"black"}
    assert truth.circulation.age_years.mean() == pytest.approx(50, abs=2)
    reading = truth.recorded_mpcwp_mmhg - truth.circulation.mpcwp_mmhg
    assert reading.mean() == pytest.approx(-3.0, abs=0.5)

    def height(folder: str, records: tuple[str, ...]) -> float:
        return float(np.median([np.ptp(wfdb.rdrecord(str(tmp_path / folder / r)).p_signal) for r in records[:40]]))

    assert height("other", truth.records) < 0.75 * height("plain", plain.records)


def test_oracle_scores_these_very_records(tmp_path: Path) -> None:
    spec = HospitalSpec(name="north", patients=300, sampling_rate_hz=100, filter=DeviceFilter(low_pass_hz=None))
    truth = write_hospital(spec, tmp_path / "it", 1)
    score = truth.oracle_probability()
    assert score.shape == (len(truth.records),)
    assert auroc(score, truth.recorded_mpcwp_mmhg > 18) > 0.75
    assert np.all(truth.oracle_probability(15.0) > score)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(HemoFedError, match="not an empty folder"):
        write_hospital(HospitalSpec(name="north", patients=3), tmp_path, 1)
    assert files_below(tmp_path) == [Path("kept.txt")]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HemoFedError, match="cannot write here"):
        write_hospital(HospitalSpec(name="north", patients=3), tmp_path / "file" / "below", 1)


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="negative"):
        write_hospital(HospitalSpec(name="north", patients=3), tmp_path / "it", -1)
