"""The reader of SCG-RHC: ECG around the wedge, labels of the Mac-Lab report."""

import math
from pathlib import Path

import numpy as np
import pytest

from client.records import choose_format
from client.records.record import Noticed, Reason, unix_seconds
from client.segments import cut_segments
from tests.clinical_fixtures import only_record, records_of, write_scg_rhc
from tests.wfdb_fixtures import ecg_steps


def test_scg_rhc_around_the_wedge(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path)
    assert choose_format(tmp_path) == "scg-rhc"
    (record,), _, remarks = records_of(tmp_path)
    assert (record.record_id, record.patient_id) == ("TRM107-RHC1", "TRM107")
    assert (record.age_years, record.sex) == (61, "male")
    assert record.lead_names == ("I", "II", "aVR", "V1")
    assert record.labels == {"mpcwp_mmhg": 21, "mpap_mmhg": 34, "pasp_mmhg": 52}
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


def test_scg_rhc_broken_json(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path, "TRM1-RHC1")
    for number, text in enumerate(("", "[1]", "[" * 100_000, '{"age": '), start=2):
        write_scg_rhc(tmp_path, f"TRM{number}-RHC1", 12).with_suffix(".json").write_text(text)
    records, away, _ = records_of(tmp_path)
    assert len(records) == 1
    assert [item.reason for item in away] == [Reason.UNREADABLE] * 4
