"""Small archives of each format, written as the archives themselves are, with what a reader must make of them."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import wfdb

from client.records.options import ReaderOptions
from client.records.record import unix_seconds
from shared_model.leads import LEADS
from tests.clinical_fixtures import dicom_group, write_aecg, write_dicom, write_muse
from tests.wfdb_fixtures import ecg_steps, write_record

# What the carts of these archives measured of their whole record.
MEASURED: Mapping[str, float] = {
    **{"heart_rate_bpm": 75, "rr_ms": 800, "p_duration_ms": 112, "pr_ms": 162, "qrs_ms": 96, "qt_ms": 400},
    **{"qtc_ms": 447, "p_axis_deg": 41, "qrs_axis_deg": -17, "t_axis_deg": 30},
}
MIMIC_ORDER = ("I", "II", "III", "aVR", "aVF", "aVL", *LEADS[6:])
UPPER_CASE = tuple(lead.upper() for lead in LEADS)


@dataclass(frozen=True)
class Whole:
    """The record of an archive that must come through, as it must come through."""

    record_id: str
    patient_id: str
    signal_mv: np.ndarray
    """(12, time) in canonical order."""
    lsb_mv: float
    sampling_rate_hz: float = 500
    recorded_at: float = math.nan
    age_years: float = math.nan
    sex: str = "unknown"
    labels: Mapping[str, float] = field(default_factory=dict)
    device: str = "unknown"
    measurements: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ArchiveFixture:
    """`write(folder)` makes an archive of three records: one whole, one cut short, one unreadable."""

    write: Callable[[Path], Whole]
    options: ReaderOptions = field(default_factory=ReaderOptions)


def write_wfdb(
    folder: Path, name: str, steps: np.ndarray, gain: float, lead_names: tuple[str, ...] = LEADS, **header: object
) -> Path:
    """A format-16 record by wfdb; `steps` is (12, time) in canonical order, written in the order of `lead_names`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    order = [UPPER_CASE.index(lead.upper()) for lead in lead_names]
    wfdb.wrsamp(
        *(path.name, 500, ["mV"] * 12, list(lead_names)),
        d_signal=steps[order].T.astype(np.int32),
        fmt=["16"] * 12,
        adc_gain=[gain] * 12,
        baseline=[0] * 12,
        write_dir=str(path.parent),
        **header,
    )
    return path


def cut_short(path: Path) -> None:
    """Leave two thirds of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def spoil(path: Path) -> None:
    """Leave a file whose content is of no format."""
    path.write_bytes(b"\x00\xff spoilt" * 40)


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _wfdb_folder(folder: Path) -> Whole:
    comments = ["patient_id: P1", "Age: 67", "Sex: Female"]
    for number, name in enumerate(("a/r0", "r1", "r2")):
        write_wfdb(folder, name, ecg_steps(seed=number), 1000.0, comments=comments)
    cut_short(folder / "r1.dat")
    spoil(folder / "r2.hea")
    write_table(folder / "labels.csv", [{"record": "a/r0", "recorded_at": "2024-05-01T10:00:00", "mpcwp_mmhg": 21.5}])
    moment = unix_seconds("2024-05-01T10:00:00")
    return Whole("a/r0", "P1", ecg_steps() / 1000, 1e-3, 500, moment, 67, "female", {"mpcwp_mmhg": 21.5})


def _ptbxl(folder: Path) -> Whole:
    rows = []
    for number in range(3):
        high, low = f"records500/00000/{number:05d}_hr", f"records100/00000/{number:05d}_lr"
        write_wfdb(folder, high, ecg_steps(seed=number), 1000.0, UPPER_CASE)
        rows.append(
            {"ecg_id": number, "patient_id": "15709.0", "age": 56.0, "sex": 1, "site": 0.0, "device": "CS-12   E"}
            | {"recording_date": "1984-11-09 09:17:34", "scp_codes": "{'IMI': 100.0, 'SR': 0.0}"}
            | {"filename_lr": low, "filename_hr": high}
        )
    cut_short(folder / "records500/00000/00001_hr.dat")
    spoil(folder / "records500/00000/00002_hr.hea")
    write_table(folder / "ptbxl_database.csv", rows)
    statements = [{"": "IMI", "diagnostic": 1.0, "diagnostic_class": "MI"}]
    write_table(folder / "scp_statements.csv", statements)
    labels = {"not_norm": 1, "norm": 0, "mi": 1, "sttc": 0, "cd": 0, "hyp": 0}
    moment = unix_seconds("1984-11-09T09:17:34")
    return Whole("0", "15709", ecg_steps() / 1000, 1e-3, 500, moment, 56, "female", labels, "CS-12   E")


def _mimic_iv_ecg(folder: Path) -> Whole:
    rows = []
    for number, study in enumerate((40689238, 44458630, 49036311)):
        path = f"files/p1000/p10000032/s{study}/{study}"
        write_wfdb(folder, path, ecg_steps(seed=number) // 5, 200.0, MIMIC_ORDER, comments=["<subject_id>: 10000032"])
        rows.append(
            {"subject_id": 10000032, "study_id": study, "file_name": study}
            | {"ecg_time": "2180-07-23 08:44:00", "path": path}
        )
    cut_short(folder / f"{rows[1]['path']}.dat")
    spoil(folder / f"{rows[2]['path']}.hea")
    write_table(folder / "record_list.csv", rows)
    patient = {"subject_id": 10000032, "gender": "F", "anchor_age": 52, "anchor_year": 2180}
    write_table(folder / "patients.csv", [patient])
    write_table(folder / "labels.csv", [{"record": 40689238, "mpcwp_mmhg": 17}])
    write_table(folder / "machine_measurements.csv", [machine_row(40689238), machine_row(7, rr_interval=29999)])
    moment = unix_seconds("2180-07-23T08:44:00")
    signal_mv, labels = (ecg_steps() // 5) / 200, {"mpcwp_mmhg": 17}
    device, measured = "unknown", {name: value for name, value in MEASURED.items() if name != "qtc_ms"}
    return Whole("40689238", "10000032", signal_mv, 5e-3, 500, moment, 52, "female", labels, device, measured)


def machine_row(study: int, **changed: object) -> dict[str, object]:
    """A row of machine_measurements.csv that says what MEASURED says."""
    row: dict[str, object] = {"subject_id": 10000032, "study_id": study, "cart_id": 6848296}
    row |= {"ecg_time": "2180-07-23 08:44:00", "report_0": "Sinus rhythm", "bandwidth": "0.005-150 Hz"}
    row |= {"filtering": "60 Hz notch", "rr_interval": 800, "p_onset": 40, "p_end": 152, "qrs_onset": 202}
    row |= {"qrs_end": 298, "t_end": 602, "p_axis": 41, "qrs_axis": -17, "t_axis": 30}
    return row | changed


DIAGNOSES = dict.fromkeys(
    (
        *("sinus_rhythm", "sinus_bradycardia", "sinus_tachycardia", "atrial_fibrillation", "atrial_flutter"),
        *("first_degree_av_block", "right_bundle_branch_block", "left_bundle_branch_block"),
        *("premature_atrial_contraction", "premature_ventricular_contraction"),
    ),
    0.0,
)


def write_challenge_record(folder: Path, name: str, steps: np.ndarray, comments: tuple[str, ...]) -> Path:
    """`.hea` and `.mat` (v4, a header of 24 bytes, then int16) of CinC 2020/2021; returns the header's path."""
    header = folder / f"{name}.hea"
    header.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(header.with_suffix(".mat"), {"val": steps.astype(np.int16)}, format="4")
    lines = [f"{header.stem} 12 500 {steps.shape[1]} 05-Feb-2020 11:39:16"]
    lines += [
        f"{header.stem}.mat 16+24 1000/mv 16 0 {row[0]} 0 0 {lead}" for lead, row in zip(LEADS, steps, strict=True)
    ]
    header.write_text("\n".join([*lines, *comments]) + "\n")
    return header


def _challenge(folder: Path, prefix: str) -> None:
    for number in range(3):
        comments = ("# Age: 74", "#Sex: Male", "#Dx: 59118001, 164889003,", "#Rx: Unknown")
        write_challenge_record(folder, f"{prefix}{number:05d}", ecg_steps(seed=number), comments)
    cut_short(folder / f"{prefix}00001.mat")
    spoil(folder / f"{prefix}00002.hea")


def _cinc(folder: Path) -> Whole:
    _challenge(folder / "training", "A")
    labels = DIAGNOSES | {"right_bundle_branch_block": 1.0, "atrial_fibrillation": 1.0}
    moment = unix_seconds("2020-02-05T11:39:16")
    record = "training/A00000"
    return Whole(record, f"record:{record}", ecg_steps() / 1000, 1e-3, 500, moment, 74, "male", labels)


def _chapman(folder: Path) -> Whole:
    _challenge(folder / "WFDBRecords" / "01" / "010", "JS")
    labels = DIAGNOSES | {"right_bundle_branch_block": 1.0, "atrial_fibrillation": 1.0}
    moment = unix_seconds("2020-02-05T11:39:16")
    return Whole("JS00000", "JS00000", ecg_steps() / 1000, 1e-3, 500, moment, 74, "male", labels)


def _matlab(folder: Path) -> Whole:
    """MATLAB v5 structs as CPSC 2018 has them, but (time, lead) in microvolt."""
    for number in range(3):
        ecg = {"sex": "Male", "age": 52, "data": ecg_steps(seed=number).T.astype(np.float64)}
        scipy.io.savemat(folder / f"A{number}.mat", {"ECG": ecg})
    cut_short(folder / "A1.mat")
    spoil(folder / "A2.mat")
    row = {"record": "A0", "patient_id": "P1", "recorded_at": "2024-05-01T10:00:00", "mpcwp_mmhg": 21.5}
    write_table(folder / "labels.csv", [row])
    moment = unix_seconds("2024-05-01T10:00:00")
    return Whole("A0", "P1", ecg_steps() / 1000, 1e-6, 500, moment, 52, "male", {"mpcwp_mmhg": 21.5})


def _code15(folder: Path) -> Whole:
    """Three parts of one exam each: whole, with fewer tracings than exam ids, and no HDF5 at all."""
    steps = ecg_steps(seconds=7, rate_hz=400)
    for part, (exam, tracings) in enumerate(((590673, 1), (1486427, 0))):
        padded = np.zeros((tracings, 4096, 12), np.float32)
        padded[:, 648 : 648 + steps.shape[1]] = steps.T / 1000
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            file["exam_id"], file["tracings"] = np.array([exam], np.int64), padded
    spoil(folder / "exams_part2.hdf5")
    truths = {"1dAVb": False, "RBBB": True, "LBBB": False, "SB": False, "ST": False, "AF": True}
    row = {"exam_id": 590673, "age": 38, "is_male": True, "patient_id": 1473117, **truths}
    write_table(folder / "exams.csv", [row])
    labels = {
        **{"first_degree_av_block": 0, "right_bundle_branch_block": 1, "left_bundle_branch_block": 0},
        **{"sinus_bradycardia": 0, "sinus_tachycardia": 0, "atrial_fibrillation": 1},
    }
    return Whole("590673", "1473117", steps / 1000, 1e-6, 400, math.nan, 38, "male", labels)


def _muse_xml(folder: Path) -> Whole:
    for number, name in enumerate(("a/r0", "r1", "r2")):
        write_muse(folder / f"{name}.xml", ecg_steps(seed=number), lead_names=LEADS, units_per_bit="1")
    cut_short(folder / "r1.xml")
    spoil(folder / "r2.xml")
    write_table(folder / "labels.csv", [{"record": "a/r0", "mpcwp_mmhg": 21.5}])
    labels = {"mpcwp_mmhg": 21.5}
    return Whole(
        *("a/r0", "0017", ecg_steps() / 1000, 1e-6, 500, unix_seconds("2024-05-31T09:30:05"), 67, "female", labels),
        *("MAC55", MEASURED),
    )


def _hl7_aecg(folder: Path) -> Whole:
    for number, name in enumerate(("a/r0", "r1", "r2")):
        write_aecg(folder / f"{name}.xml", ecg_steps(seed=number), scale=("1", "uV"))
    cut_short(folder / "r1.xml")
    spoil(folder / "r2.xml")
    moment, born = unix_seconds("2024-05-31T09:30:05"), unix_seconds("1954-06-01")
    age = (moment - born) / (365.25 * 86_400)
    return Whole("a/r0", "S-17", ecg_steps() / 1000, 1e-6, 500, moment, age, "male", {}, "ELI250", MEASURED)


def _dicom(folder: Path) -> Whole:
    for number, name in enumerate(("a/r0", "r1", "r2")):
        group = dicom_group(ecg_steps(seed=number), LEADS, sensitivity="1")
        write_dicom(folder / f"{name}.dcm", [group], annotations=MEASURED, ManufacturerModelName="ELI250")
    cut_short(folder / "r1.dcm")
    spoil(folder / "r2.dcm")
    moment = unix_seconds("2024-05-31T09:30:05")
    return Whole("a/r0", "D-17", ecg_steps() / 1000, 1e-6, 500, moment, 67, "female", {}, "ELI250", MEASURED)


def _scg_rhc(folder: Path) -> Whole:
    """Procedures of 100 s with all leads; a pressure channel is in test_scg_rhc.py."""
    names = [f"ECG_lead_{lead}" if lead[0] != "a" else lead for lead in LEADS]
    for number in range(3):
        steps = ecg_steps(100, seed=number)
        header = write_record(folder / "processed_data", f"TRM{number}-RHC1", steps, lead_names=names)
        content = {"age": 61, "gender": "Male", "ChamEvents": {"PCW": "12-Mar-2018 10:15:00 AM"}}
        content |= {"ChamEvents_in_s": {"PCW": 40}, "maclabMeas": {"PCWM         ": "21"}}
        header.with_suffix(".json").write_text(json.dumps(content))
    cut_short(folder / "processed_data" / "TRM1-RHC1.dat")
    spoil(folder / "processed_data" / "TRM2-RHC1.hea")
    moment, signal_mv = unix_seconds("2018-03-12T10:14:30"), ecg_steps(100)[:, 5000:35_000] / 1000
    return Whole("TRM0-RHC1", "TRM0", signal_mv, 1e-6, 500, moment, 61, "male", {"mpcwp_mmhg": 21})


DECLARED = ReaderOptions(sampling_rate_hz=500, unit="uV", variable="ECG.data", axis="time-lead")
ARCHIVES = {
    "wfdb": ArchiveFixture(_wfdb_folder),
    "ptbxl": ArchiveFixture(_ptbxl),
    "mimic-iv-ecg": ArchiveFixture(_mimic_iv_ecg),
    "cinc": ArchiveFixture(_cinc),
    "chapman": ArchiveFixture(_chapman),
    "matlab": ArchiveFixture(_matlab, DECLARED),
    "code15": ArchiveFixture(_code15),
    "muse-xml": ArchiveFixture(_muse_xml),
    "hl7-aecg": ArchiveFixture(_hl7_aecg),
    "dicom": ArchiveFixture(_dicom),
    "scg-rhc": ArchiveFixture(_scg_rhc),
}
