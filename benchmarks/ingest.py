"""Ingest against wfdb.rdrecord + resample_poly one by one, and the store's batches against a bare memory map.

Run: python -m benchmarks.ingest [--records 300]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import wfdb
from scipy.signal import resample_poly

from benchmarks.timing import compare
from client.ingest import ingest
from client.records.wfdb_header import read_header
from client.records.wfdb_signal import read_leads
from client.store import ROW_SHAPE, SIGNAL_FILE, open_store
from shared_model.leads import LEADS

RATE_HZ, SECONDS, BATCH = 500, 10, 64


def write_records(folder: Path, count: int, seed: int = 1) -> list[Path]:
    """Plain format-16 records of 12 leads, 500 Hz, 10 s, at 1 uV a step; returns their headers."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    headers = []
    for record in range(count):
        steps = random.normal(0, 300, (RATE_HZ * SECONDS, len(LEADS))).cumsum(0) % 3000
        steps.astype("<i2").tofile(folder / f"r{record:05}.dat")
        lines = [f"r{record:05} {len(LEADS)} {RATE_HZ} {RATE_HZ * SECONDS}"]
        lines += [f"r{record:05}.dat 16 1000(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS]
        lines += [f"# patient_id: {record // 2}", "#Age: 67", "#Sex: Female"]
        headers.append(folder / f"r{record:05}.hea")
        headers[-1].write_text("\n".join(lines) + "\n")
    return headers


def rival_ingest(headers: list[Path], target: Path) -> None:
    """What one would write in five lines: wfdb, scipy, one file."""
    with target.open("wb") as file:
        for header in headers:
            record = wfdb.rdrecord(str(header.with_suffix("")))
            signal = resample_poly(record.p_signal, 1, 2, axis=0)
            file.write(np.rint(signal.T * 1000).astype(np.int16).tobytes())


def main() -> None:
    """Print one JSON line a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=300)
    count = parser.parse_args().records
    with tempfile.TemporaryDirectory() as scratch:
        source, site_dir = Path(scratch) / "source", Path(scratch) / "site"
        headers = write_records(source, count)

        def fresh_ingest() -> None:
            shutil.rmtree(site_dir, ignore_errors=True)
            ingest(source, site_dir)

        row = compare(
            f"ingest, {count} records of 10 s at 500 Hz: read, check, hash, resample, index",
            fresh_ingest,
            lambda: rival_ingest(headers, Path(scratch) / "rival.i16"),
            "wfdb.rdrecord + resample_poly + write",
            repeats=3,
        )
        print(f"# {count / float(str(row['ours_s'])):.0f} records/s")
        compare(
            "read a plain format-16 record to mV",
            lambda: [read_leads(read_header(header)) for header in headers[:50]],
            lambda: [wfdb.rdrecord(str(header.with_suffix(""))) for header in headers[:50]],
            "wfdb.rdrecord",
        )
        store = open_store(site_dir)
        bare = np.memmap(site_dir / SIGNAL_FILE, np.int16, "r", shape=(count, *ROW_SHAPE))
        random = np.random.default_rng(2)
        batches = [random.integers(0, count, BATCH) for _ in range(20)]
        compare(
            f"20 random batches of {BATCH} from the store, warm",
            lambda: [store.read(rows) for rows in batches],
            lambda: [bare[rows] for rows in batches],
            "bare numpy memory map",
        )


if __name__ == "__main__":
    main()
