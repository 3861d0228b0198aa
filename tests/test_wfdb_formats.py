"""The storage formats of WFDB (signal-5.htm): each into the store's own millivolts, or turned away when cut short."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wfdb

from client.records.record import EcgRecord, Item, Reason, TurnedAway
from client.records.wfdb_folder import read_record
from client.records.wfdb_header import read_header
from client.records.wfdb_signal import read_leads
from shared_model.leads import LEADS
from tests.realdata import REAL_DATA, needs_real_data
from tests.wfdb_fixtures import ecg_steps, write_record

GAIN = 80.0


def pack_61(samples: np.ndarray) -> bytes:
    """16 bits, the high byte first."""
    return samples.astype(">i2").tobytes()


def pack_310(samples: np.ndarray) -> bytes:
    """Three 10-bit samples in two words: one in the low 11 bits of each, the third in the high 5 of both."""
    first, second, third = (samples.reshape(-1, 3) & 0x3FF).T
    words = [first << 1 | (third & 0x1F) << 11, second << 1 | third >> 5 << 11]
    return np.stack(words, axis=1).astype("<u2").tobytes()


def pack_311(samples: np.ndarray) -> bytes:
    """Three 10-bit samples in the low 30 bits of a word, the first lowest."""
    first, second, third = (samples.reshape(-1, 3).astype(np.int64) & 0x3FF).T
    return (first | second << 10 | third << 20).astype("<u4").tobytes()


PACKED: dict[str, Callable[[np.ndarray], bytes]] = {"61": pack_61, "310": pack_310, "311": pack_311}
BY_WFDB = ("16", "80", "212", "24", "32", "508", "516", "524")


def write_format(folder: Path, storage_format: str) -> np.ndarray:
    """Twelve leads of 10 s in one file, within 8 bits; returns the steps, (lead, time)."""
    steps = (ecg_steps().astype(np.int32) // 13).clip(-100, 120)
    if storage_format in PACKED:
        header = write_record(folder, "r", steps.astype(np.int16), gain=f"{GAIN:g}(0)/mV")
        header.write_text(header.read_text().replace("r.dat 16 ", f"r.dat {storage_format} "))
        (folder / "r.dat").write_bytes(PACKED[storage_format](steps.T.reshape(-1)))
    else:
        wfdb.wrsamp(
            *("r", 500, ["mV"] * 12, list(LEADS)),
            d_signal=steps.T,
            fmt=[storage_format] * 12,
            adc_gain=[GAIN] * 12,
            baseline=[0] * 12,
            write_dir=str(folder),
        )
    return steps


def read(folder: Path) -> Item:
    """The record, or why there is none; remarks left out."""
    *_, item = read_record(folder / "r.hea", "r", "r.hea", None)
    return item


@pytest.mark.parametrize("storage_format", [*BY_WFDB, *PACKED])
def test_a_format_is_read_to_the_step(tmp_path: Path, storage_format: str) -> None:
    steps = write_format(tmp_path, storage_format)
    record = read(tmp_path)
    assert isinstance(record, EcgRecord)
    assert record.lead_names == LEADS
    np.testing.assert_allclose(record.signal_mv, steps / GAIN, atol=1e-6)


@pytest.mark.parametrize("storage_format", [*BY_WFDB, *PACKED])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_file_cut_short_is_turned_away(tmp_path: Path, storage_format: str, share: float) -> None:
    write_format(tmp_path, storage_format)
    data = next(path for path in tmp_path.iterdir() if path.suffix != ".hea")
    content = data.read_bytes()
    data.write_bytes(content[: int(len(content) * share)])
    away = read(tmp_path)
    assert isinstance(away, TurnedAway)
    assert away.reason in (Reason.TRUNCATED, Reason.UNREADABLE)


@needs_real_data
@pytest.mark.parametrize("name", ["binformats", "flacformats"])
def test_real_files_of_every_format_read_as_wfdb_reads_them(tmp_path: Path, name: str) -> None:
    for path in (REAL_DATA / "wfdb-awkward-dev").glob(f"{name}.*"):
        shutil.copyfile(path, tmp_path / path.name)
    header = tmp_path / f"{name}.hea"
    lines = header.read_text().splitlines()
    named = [line.split(" sig ")[0] + f" {lead}" for line, lead in zip(lines[1:], LEADS, strict=False)]
    header.write_text("\n".join([lines[0], *named]) + "\n")
    expected = wfdb.rdrecord(str(tmp_path / name)).p_signal.T
    leads = read_leads(read_header(header))
    assert leads.lead_names == LEADS[: len(named)]
    np.testing.assert_array_equal(leads.signal_mv, expected.astype(np.float32))
