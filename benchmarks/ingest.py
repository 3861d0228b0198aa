"""Ingest against wfdb.rdrecord + resample_poly one by one, and the store's batches against numpy and HDF5.

Run: python -m benchmarks.ingest [--records 1000] [--memory-records 20000]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import wfdb
from scipy.signal import resample_poly

from benchmarks.timing import compare
from client.ingest import ingest
from client.records.wfdb_header import read_header
from client.records.wfdb_signal import read_leads
from client.store import ROW_SHAPE, SIGNAL_FILE, open_store
from shared_model.leads import LEADS, SAMPLING_RATE_HZ, resample, to_steps

RATE_HZ, SECONDS, BATCH, IN_A_FOLDER = 500, 10, 64, 1000
# What one process and its readers hold together, in MB, sampled while the ingest of argv[1] into argv[2] runs.
MEMORY = """
import os, sys, threading, time
from pathlib import Path
def held(pid):
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        return own + sum(held(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return 0.0
if __name__ == "__main__":
    from client.ingest import ingest
    most = [0.0]
    def watch():
        while True:
            most[0] = max(most[0], held(os.getpid()))
            time.sleep(0.1)
    threading.Thread(target=watch, daemon=True).start()
    ingest(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
    print(round(most[0]))
"""


def write_records(folder: Path, count: int, seed: int = 1) -> list[Path]:
    """Plain format-16 records of 12 leads, 500 Hz, 10 s, at 1 uV a step; returns their headers."""
    random = np.random.default_rng(seed)
    time_s = np.arange(RATE_HZ * SECONDS) / RATE_HZ
    beat = 900 * np.exp(-(((time_s % 0.8) - 0.3) ** 2) / 0.0004) + 150 * np.exp(-(((time_s % 0.8) - 0.55) ** 2) / 0.004)
    headers = []
    for record in range(count):
        steps = beat[:, None] * random.uniform(0.4, 1.6, len(LEADS)) + random.normal(0, 12, (len(time_s), len(LEADS)))
        one, two = steps[:, 0], steps[:, 1]
        steps[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], axis=1)
        name = f"r{record:05}"
        headers.append(folder / f"p{record // IN_A_FOLDER:03}" / f"{name}.hea")
        headers[-1].parent.mkdir(parents=True, exist_ok=True)
        steps.astype("<i2").tofile(headers[-1].with_suffix(".dat"))
        lines = [f"{name} {len(LEADS)} {RATE_HZ} {RATE_HZ * SECONDS}"]
        lines += [f"{name}.dat 16 1000(0)/mV 16 0 {random.integers(-99, 99)} 0 0 {lead}" for lead in LEADS]
        lines += [f"# patient_id: {record // 2}", "#Age: 67", "#Sex: Female"]
        headers[-1].write_text("\n".join(lines) + "\n")
    return headers


def rival_ingest(headers: list[Path], target: Path) -> None:
    """What one would write in five lines: wfdb, scipy, one file."""
    with target.open("wb") as file:
        for header in headers:
            record = wfdb.rdrecord(str(header.with_suffix("")))
            signal = resample_poly(record.p_signal, 1, 2, axis=0)
            file.write(np.rint(signal.T * 1000).astype(np.int16).tobytes())


def bare_ingest(headers: list[Path], target: Path) -> None:
    """Our own reading, resampling and writing, without checks, hash and index."""
    with target.open("wb") as file:
        for header in headers:
            parsed = read_header(header)
            signal_mv = resample(read_leads(parsed).signal_mv, parsed.sampling_rate_hz, SAMPLING_RATE_HZ)
            file.write(to_steps(signal_mv).data)


def memory_mb(source: Path, site_dir: Path, workers: int) -> int:
    """The most memory that an ingest holds, all its processes together, shared pages counted once."""
    script = site_dir.with_suffix(".py")
    script.write_text(MEMORY)
    words = [sys.executable, str(script), str(source), str(site_dir), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout)


def compare_ingest(scratch: Path, count: int) -> None:
    """One process against the rival; several against one."""
    source, headers = scratch / "source", write_records(scratch / "source", count)

    def fresh_ingest(workers: int) -> None:
        shutil.rmtree(scratch / "site", ignore_errors=True)
        ingest(source, scratch / "site", workers=workers)

    def rival() -> None:
        rival_ingest(headers, scratch / "rival.i16")

    name = "wfdb.rdrecord + resample_poly + write"
    compare("read, resample and write", lambda: bare_ingest(headers, scratch / "bare.i16"), rival, name, 3)
    row = compare("ingest in one process, all of it", lambda: fresh_ingest(1), rival, name, 3)
    print(f"# {count / float(str(row['ours_s'])):.0f} records/s in one process")
    compare(
        "read a plain format-16 record to mV",
        lambda: [read_leads(read_header(header)) for header in headers[:50]],
        lambda: [wfdb.rdrecord(str(header.with_suffix(""))) for header in headers[:50]],
        "wfdb.rdrecord",
    )


def compare_processes(scratch: Path, source: Path, count: int) -> None:
    """All cores against one, on an archive that is worth it."""

    def fresh_ingest(workers: int) -> None:
        shutil.rmtree(scratch / "shared-out", ignore_errors=True)
        ingest(source, scratch / "shared-out", workers=workers)

    cores = len(os.sched_getaffinity(0))
    row = compare(
        f"ingest of {count} records in {cores} reading processes",
        lambda: fresh_ingest(cores),
        lambda: fresh_ingest(1),
        "in one process",
        1,
    )
    print(f"# {count / float(str(row['ours_s'])):.0f} records/s in {cores} reading processes")


def compare_batches(scratch: Path) -> None:
    """Random batches of the store that `compare_ingest` left, warm."""
    store = open_store(scratch / "site")
    count = len(store.index)
    bare = np.memmap(scratch / "site" / SIGNAL_FILE, np.int16, "r", shape=(count, *ROW_SHAPE))
    with h5py.File(scratch / "rival.h5", "w") as file:
        file.create_dataset("signals", data=bare, chunks=(1, *ROW_SHAPE))
    random = np.random.default_rng(2)
    batches = [random.integers(0, count, BATCH) for _ in range(20)]

    def read_all() -> None:
        for rows in batches:
            store.read(rows)

    def read_bare() -> None:
        for rows in batches:
            bare.take(rows, axis=0)

    compare(f"random batches of {BATCH}", read_all, read_bare, "bare numpy memory map", 15)
    with h5py.File(scratch / "rival.h5", "r") as file:
        signals = file["signals"]

        def read_hdf5() -> None:
            for rows in batches:
                np.stack([signals[row] for row in rows.tolist()])

        compare(f"random batches of {BATCH}", read_all, read_hdf5, "HDF5, a chunk a record", 5)


def main() -> None:
    """Print one JSON line a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--memory-records", type=int, default=20000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        compare_ingest(scratch, chosen.records)
        compare_batches(scratch)
        write_records(scratch / "many", chosen.memory_records)
        compare_processes(scratch, scratch / "many", chosen.memory_records)
        for source, count in (("source", chosen.records), ("many", chosen.memory_records)):
            for workers in (1, 2):
                held = memory_mb(scratch / source, scratch / f"memory-{source}-{workers}", workers)
                print(json.dumps({"benchmark": "memory", "records": count, "processes": workers, "most_mb": held}))


if __name__ == "__main__":
    main()
