"""The reader of SCG-RHC: ECG around the wedge, labels of the Mac-Lab report."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.records import choose_format
from client.records.record import Noticed, Reason, unix_seconds
from client.segments import cut_segments
from tests.clinical_fixtures import only_record, records_of, scg_pressure_mmhg, write_scg_rhc
from tests.wfdb_fixtures import ecg_steps


def test_scg_rhc_around_the_wedge(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path)
    assert choose_format(tmp_path) == "scg-rhc"
    (record,), _, remarks = records_of(tmp_path)
    assert (record.record_id, record.patient_id) == ("TRM107-RHC1", "TRM107")
    assert (record.age_years, record.sex) == (61, "male")
    assert record.lead_names == ("I", "II", "aVR", "V1")
    assert {name: value for name, value in record.labels.items() if "waveform" not in name} == {
        "mpcwp_mmhg": 21,
        "mpap_mmhg": 34,
        "pasp_mmhg": 52,
    }
    assert record.labels["mpcwp_waveform_mmhg"] == pytest.approx(22, abs=0.2)
    assert record.labels["mpap_waveform_mmhg"] == pytest.approx(34, abs=0.5)
    assert [remark.noticed for remark in remarks] == [Noticed.ABSURD_LABEL]  # TDCO of 999
    assert record.measured_at == unix_seconds("2018-03-12T10:15:00")
    assert record.recorded_at == record.measured_at - 30
    whole = ecg_steps(200, 500, 7)[[1, 3, 4, 5]] / 1000
    np.testing.assert_allclose(record.signal_mv, whole[:, 30_000:60_000], atol=1e-6)
    # Of the six segments, one begins when the wedge is reached: the last one not after measured_at.
    assert record.measured_at - record.recorded_at in cut_segments(record).starts_s


@pytest.mark.parametrize(
    ("events", "start_s"),
    [({"PCW_2": 150, "PCW_1": "60"}, 30), ({"PCW": 5}, 0), ({"PCW": 199}, 140)],
)
def test_scg_rhc_other_wedge_events(tmp_path: Path, events: dict[str, object], start_s: float) -> None:
    write_scg_rhc(tmp_path, events=events)
    record = only_record(tmp_path)
    assert record.labels["mpcwp_mmhg"] == 21
    np.testing.assert_allclose(
        record.signal_mv[0, 0], ecg_steps(200, 500, 7)[1, round(start_s * 500)] / 1000, rtol=1e-6
    )
    assert record.signal_mv.shape[1] == 30_000


@pytest.mark.parametrize("events", [[], "nd", {"PCW": "nd"}, {"PCW": 201}, {"PCW": -1}, {"RA": 10}, {"PCW": [1]}])
def test_scg_rhc_without_a_wedge_is_unlabelled(tmp_path: Path, events: object) -> None:
    write_scg_rhc(tmp_path, events=events)
    (record,), _, remarks = records_of(tmp_path)
    assert record.labels == {}
    assert math.isnan(record.measured_at)
    assert [remark.noticed for remark in remarks] == [Noticed.NO_WEDGE_INTERVAL]
    np.testing.assert_allclose(record.signal_mv[0, :100], ecg_steps(200, 500, 7)[1, :100] / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("events", "measured"),
    [
        # Settled 2 s after the event; up to the next event, or 15 s: the wedge at 90 s is no part of the artery.
        ({"PA": 50, "PCW": 90}, {"mpcwp_waveform_mmhg": 22, "mpap_waveform_mmhg": 34}),
        ({"PA": 80, "PCW": 90}, {"mpcwp_waveform_mmhg": 22, "mpap_waveform_mmhg": 34}),
        ({"PCW": 100, "PA_2": 70, "PA_1": 40}, {"mpcwp_waveform_mmhg": 22, "mpap_waveform_mmhg": 34}),
        ({"PCW": 100, "RA": 103}, {}),  # one second after settling
        ({"PCW": 199.5}, {}),
        ({"PCW": 100, "PA": 300}, {"mpcwp_waveform_mmhg": 22}),
        ({"PCW": 100, "PA": -5}, {"mpcwp_waveform_mmhg": 22}),
    ],
)
def test_scg_rhc_pressures_are_measured_at_their_events(
    tmp_path: Path, events: dict[str, float], measured: dict[str, float]
) -> None:
    write_scg_rhc(tmp_path, events=events)
    labels = only_record(tmp_path).labels
    assert {name: value for name, value in labels.items() if "waveform" in name} == pytest.approx(measured, abs=0.6)


@pytest.mark.parametrize(
    ("change", "noticed", "said", "measured"),
    [
        (lambda pressure: pressure, None, "", True),
        (lambda pressure: pressure + 4, None, "", True),
        (lambda pressure: pressure + 9, Noticed.PRESSURE_DIFFERS, "mpcwp_waveform_mmhg = 31.0 but", True),
        (
            lambda pressure: pressure - 30 * (np.arange(len(pressure)) > 45_000),
            Noticed.PRESSURE_REFUSED,
            "PCW: a mean of -8.0 mmHg",
            False,
        ),
        (lambda pressure: np.full(len(pressure), 25.0), Noticed.PRESSURE_REFUSED, "PCW: still: 15.0 s at 25", False),
        (
            lambda pressure: np.where(np.arange(len(pressure)) // 50 % 1000 < 950, pressure, 250),
            Noticed.PRESSURE_REFUSED,
            "PCW: out of range: ",
            False,
        ),
    ],
)
def test_scg_rhc_artefact_and_differences_are_told(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], noticed: Noticed | None, said: str, measured: bool
) -> None:
    write_scg_rhc(tmp_path, pressure=change(scg_pressure_mmhg(200)))
    (record,), _, remarks = records_of(tmp_path)
    assert record.labels["mpcwp_mmhg"] == 21  # the report stays
    assert ("mpcwp_waveform_mmhg" in record.labels) == measured
    told = {remark.noticed: remark.detail for remark in remarks if remark.noticed != Noticed.ABSURD_LABEL}
    assert list(told) == ([noticed] if noticed else [])
    assert said in told.get(noticed or Noticed.PRESSURE_DIFFERS, "")


@pytest.mark.parametrize("instead", ["100(0)/mV", "100(0)/kPa"])
def test_scg_rhc_pressure_in_another_unit_is_not_measured(tmp_path: Path, instead: str) -> None:
    header = write_scg_rhc(tmp_path)
    header.write_text(header.read_text().replace("100(0)/mmHg", instead))
    assert not any("waveform" in name for name in only_record(tmp_path).labels)


def test_scg_rhc_broken_json(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path, "TRM1-RHC1")
    for number, text in enumerate(("", "[1]", "[" * 100_000, '{"age": '), start=2):
        write_scg_rhc(tmp_path, f"TRM{number}-RHC1", 12).with_suffix(".json").write_text(text)
    records, away, _ = records_of(tmp_path)
    assert len(records) == 1
    assert [item.reason for item in away] == [Reason.UNREADABLE] * 4


def test_a_name_without_a_patient_is_a_patient_of_its_own(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path, "-RHC1")
    assert only_record(tmp_path).patient_id == "record:-RHC1"
