"""Damaged WFDB records against wfdb itself: what wfdb would refuse never comes through, and numbers are its numbers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wfdb.io.header import rx_record

from client.records import open_archive
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Reason, Remark, TurnedAway
from client.records.wfdb_header import BYTES_PER_SAMPLE
from shared_model.leads import LEADS, canonical_lead, millivolt_per_unit
from tests.archive_fixtures import write_challenge_record
from tests.mutations import damaged, fields_replaced
from tests.wfdb_fixtures import ecg_steps, write_record

EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMATS = ("16", "24", "32", "61", "80", "212", "310", "311", "516", "mat", "segments", "layout")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One record of each kind, in a folder of its own: 3 leads, 6 s at 100 Hz."""
    folder = tmp_path_factory.mktemp("records")
    steps = ecg_steps(6, 100, 3)
    for kind in FORMATS:
        (folder / kind).mkdir()
        if kind == "mat":
            write_challenge_record(folder / kind, "r", ecg_steps(6), ("#Age: 74",))
        elif kind == "segments":
            for number in range(2):
                write_record(folder / kind, f"r{number}", steps, rate_hz=100, lead_names=LEADS[:3])
            (folder / kind / "r.hea").write_text("r/2 3 100 1200\nr0 600\nr1 600\n")
        elif kind == "layout":  # of the second half nothing is there
            write_record(folder / kind, "r0", steps, rate_hz=100, lead_names=LEADS[:3])
            lines = [f"~ 0 1000(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS[:3]]
            (folder / kind / "r_layout.hea").write_text("\n".join(["r_layout 3 100 0", *lines]) + "\n")
            (folder / kind / "r.hea").write_text("r/3 3 100 1200\nr_layout 0\nr0 600\n~ 600\n")
        elif kind == "516":
            wfdb.wrsamp(
                *("r", 100, ["mV"] * 3, list(LEADS[:3])),
                d_signal=steps.T.astype(np.int32),
                fmt=[kind] * 3,
                adc_gain=[200.0] * 3,
                baseline=[0] * 3,
                write_dir=str(folder / kind),
            )
        else:  # any bytes are samples
            size = round(3 * 600 * BYTES_PER_SAMPLE[kind])
            (folder / kind / "r.dat").write_bytes(np.random.default_rng(0).bytes(size))
            lines = [f"r.dat {kind} 200(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS[:3]]
            (folder / kind / "r.hea").write_text("\n".join(["r 3 100 600", *lines, "# Age: 74"]) + "\n")
    return folder


def undated(header: Path) -> None:
    """Leave out the date: wfdb refuses a record for a date that is none, the reader takes it as unknown."""
    first, rest = header.read_text().split("\n", 1)
    match = rx_record.match(first)
    assert match is not None
    header.write_text(f"{first[: match.end('sig_len')]}\n{rest}")


def by_wfdb(stem: Path) -> dict[str, np.ndarray]:
    """The known leads in mV as wfdb reads them, the first 60 s."""
    try:
        record = wfdb.rdrecord(str(stem))
    except ValueError:
        undated(stem.with_suffix(".hea"))
        record = wfdb.rdrecord(str(stem))
    leads: dict[str, np.ndarray] = {}
    for name, unit, signal in zip(record.sig_name, record.units, record.p_signal.T, strict=True):
        lead = canonical_lead(name or "")
        if lead is not None and lead not in leads:
            leads[lead] = signal[: round(60 * record.fs)] * (millivolt_per_unit(unit) or np.nan)
    return leads


def wfdb_can_judge(header: Path) -> bool:
    """wfdb passes over bytes that are not ASCII; we do not."""
    return header.read_bytes().isascii()


def compared(folder: Path) -> int:
    """Read a folder and hold every record that comes through against wfdb; returns how many those are."""
    archive = open_archive(folder, "wfdb", ReaderOptions())
    items = [item for item in archive.items if not isinstance(item, Remark)]
    assert len(items) == archive.count
    records = [item for item in items if isinstance(item, EcgRecord)]
    if all(map(wfdb_can_judge, folder.glob("*.hea"))):
        for record in records:
            oracle = by_wfdb(folder / record.record_id)  # where wfdb raises, so does the test
            assert record.lead_names == tuple(oracle)
            expected = np.stack(list(oracle.values())).astype(np.float32)
            np.testing.assert_allclose(record.signal_mv, expected, rtol=1e-5, atol=1e-6)
    return len(records)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_record_comes_through(records: Path, kind: str) -> None:
    assert compared(records / kind) == 1


@pytest.mark.parametrize("kind", FORMATS)
@EXAMPLES
@given(data=st.data())
def test_what_comes_through_is_what_wfdb_reads(tmp_path: Path, records: Path, kind: str, data: st.DataObject) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(records / kind, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    way = fields_replaced if path.suffix == ".hea" and data.draw(st.booleans()) else damaged
    path.write_bytes(data.draw(way(path.read_bytes())))
    compared(copy)


LINE = "r.dat 16 200(0)/mV 16 0 0 0 0 "


@pytest.mark.parametrize(
    ("first", "lines", "reason"),
    [
        ("r 1 100 600", [f"{LINE}I", f"{LINE}II"], Reason.UNREADABLE),  # a signal more than stated
        ("r 2 100 600", [f"{LINE}II", LINE.replace(" 16 0", " 1- 0") + "I"], Reason.UNREADABLE),  # whose name is "0 I"
        ("r 2 100 6\xff0", [f"{LINE}I", f"{LINE}II"], Reason.NO_LENGTH),  # 6 samples, or 600?
        ("r 2 100 600", [LINE.replace("16 200", "32 200").replace("mV", "\x80V") + "I"] * 2, Reason.UNKNOWN_UNIT),
    ],
)
def test_a_header_understood_in_part_is_turned_away(
    tmp_path: Path, first: str, lines: list[str], reason: Reason
) -> None:
    (tmp_path / "r.dat").write_bytes(bytes(4 * 2 * 600))
    (tmp_path / "r.hea").write_text("\n".join([first, *lines]) + "\n", encoding="latin-1")
    items = [item for item in open_archive(tmp_path, "wfdb", ReaderOptions()).items if not isinstance(item, Remark)]
    assert [item.reason for item in items if isinstance(item, TurnedAway)] == [reason]
