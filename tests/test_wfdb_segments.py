"""Multi-segment WFDB records whose segments contradict the master header."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.records.record import Reason, Unusable
from client.records.wfdb_header import segment_names, split_header
from shared_model.leads import LEADS
from tests.clinical_fixtures import records_of
from tests.wfdb_fixtures import ecg_steps, write_record

THREE = LEADS[:3]


def write_segments(folder: Path, rate_hz: int = 100, names: Sequence[str] = THREE, gain: str = "1000(0)/mV") -> None:
    """A fixed layout of two segments of 600 samples; the second as given."""
    write_record(folder, "r0", ecg_steps(6, 100, 3), rate_hz=100, lead_names=THREE)
    write_record(folder, "r1", ecg_steps(6, 100, 3, seed=1), rate_hz=rate_hz, lead_names=names, gain=gain)
    (folder / "r.hea").write_text("r/2 3 100 1200\nr0 600\nr1 600\n")


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from(["", " ", "\n", "# note\n", "# a\x0bq/2\n", "\ufeff", "\u2028", "\x1c"]),
    name=st.sampled_from(["r", "r/2", "r-1", "r/x/2", "\u00e9", "/2", "#r/2"]),
    gap=st.sampled_from([" ", "\t", "\n", "\x0b", "\x1c", "\x85", "\u2028", ""]),
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-16"]),
)
def test_segments_are_seen_however_a_header_starts(
    tmp_path_factory: pytest.TempPathFactory, start: str, name: str, gap: str, encoding: str
) -> None:
    """Most headers are not parsed to see that they join nothing: the same comes out as if all were."""
    path = tmp_path_factory.mktemp("start") / "r.hea"
    path.write_bytes(f"{start}{name}{gap}3 100 1200\nr0 600\n~ 20\nr1 600\n".encode(encoding, "replace"))
    try:
        lines, _ = split_header(path)
        joins = "/" in lines[0].split()[0]
        expected = tuple(line.split()[0] for line in lines[1:] if joins and line.split()[0] != "~")
    except Unusable:
        expected = ()
    assert segment_names(path) == expected


def refusal(folder: Path) -> str:
    records, (away,), _ = records_of(folder)
    assert not records
    assert away.reason == Reason.UNREADABLE
    return away.detail


def test_segments_that_agree_are_joined(tmp_path: Path) -> None:
    write_segments(tmp_path)
    (record,), _, _ = records_of(tmp_path)
    whole = np.concatenate([ecg_steps(6, 100, 3), ecg_steps(6, 100, 3, seed=1)], axis=1) / 1000
    np.testing.assert_allclose(record.signal_mv, whole, rtol=1e-6)
    assert record.lead_names == THREE


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"rate_hz": 200}, "segment r1 has 200 Hz, the record 100 Hz"),
        ({"names": (THREE[1], THREE[0], THREE[2])}, "segment r1 has other signals"),
        ({"gain": "1000(0)/uV"}, "segment r1 has other signals or units"),
    ],
)
def test_a_second_segment_of_its_own_mind_is_refused(tmp_path: Path, second: dict[str, object], said: str) -> None:
    write_segments(tmp_path, **second)  # type: ignore[arg-type]
    assert said in refusal(tmp_path)
    assert "again" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("master", "said"),
    [
        ("r/2 3 200 1200\nr0 600\nr1 600\n", "segment r0 has 100 Hz, the record 200 Hz"),
        ("r/2 3 100 1100\nr0 500\nr1 600\n", "segment r0 has 600 samples, the record's header 500"),
        ("r/2 3 100 1300\nr0 600\nr1 700\n", "segment r1 has 600 samples, the record's header 700"),
        ("r/2 3 100 1200\nr0 600\nr1\n", "not a name and a number"),
    ],
)
def test_a_master_that_contradicts_its_segments_is_refused(tmp_path: Path, master: str, said: str) -> None:
    write_segments(tmp_path)
    (tmp_path / "r.hea").write_text(master)
    assert said in refusal(tmp_path)


def test_in_a_variable_layout_a_segment_may_have_fewer_leads(tmp_path: Path) -> None:
    write_record(tmp_path, "r0", ecg_steps(6, 100, 3), rate_hz=100, lead_names=THREE)
    write_record(tmp_path, "r1", ecg_steps(6, 100, 1), rate_hz=100, lead_names=THREE[1:2])
    lines = [f"~ 0 1000(0)/mV 16 0 0 0 0 {lead}" for lead in THREE]
    (tmp_path / "r_layout.hea").write_text("\n".join(["r_layout 3 100 0", *lines]) + "\n")
    (tmp_path / "r.hea").write_text("r/4 3 100 1300\nr_layout 0\nr0 600\n~ 100\nr1 600\n")
    (record,), _, _ = records_of(tmp_path)
    assert record.lead_names == THREE
    assert np.isfinite(record.signal_mv[1, 700:]).all()
    assert np.isnan(record.signal_mv[[0, 2], 600:]).all()


def test_a_segment_after_the_first_minute_is_not_asked_for(tmp_path: Path) -> None:
    write_record(tmp_path, "r0", ecg_steps(60, 100, 3), rate_hz=100, lead_names=THREE)
    (tmp_path / "r.hea").write_text("r/2 3 100 6600\nr0 6000\nr1 600\n")
    assert len(records_of(tmp_path)[0]) == 1
