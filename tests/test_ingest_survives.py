"""An ingest that is killed, starved or shared out ends with the store that an uninterrupted one makes."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from client.ingest import ingest
from client.lock import hold_lock
from client.schema import INDEX_FILE, MIGRATIONS, SCHEMA_VERSION, connect
from client.store import ROW_BYTES, SIGNAL_FILE, open_store
from shared_model.errors import ExitCode, HemoFedError
from tests.store_dump import dump, structure
from tests.wfdb_fixtures import ecg_steps, write_record

KEY = bytes(range(32))
INGEST = """
import sys
from client import preparation, store_writer
store_writer.CHUNK_ROWS = 8
preparation.READINGS_AT_ONCE = 4
from client.ingest import ingest
from shared_model.workers import worker_pool
def started(*given):  # or a small archive would be read before the other processes are there
    pool = worker_pool(*given)
    pool.submit(int).result()
    return pool
preparation.worker_pool = started
if __name__ == "__main__":
    print("ready", flush=True)
    ingest(sys.argv[1], sys.argv[2], patient_key=bytes(range(32)), workers=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole records, twins, long and short ones, one without its signal file, and labels."""
    source = tmp_path_factory.mktemp("archive") / "source"
    for record in range(150):
        seed = record - record % 20 if record % 20 == 7 else record
        seconds = {3: 24, 5: 3}.get(record % 25, 10)
        patient = f"patient_id: {record // 3}"
        header = write_record(source, f"r{record:03}", ecg_steps(seconds, seed=seed), comments=[patient])
        if record % 30 == 11:
            header.with_suffix(".dat").unlink()
    rows = [f"r{record:03},{record % 25}" for record in range(0, 150, 2)]
    (source / "labels.csv").write_text("\n".join(["record,mpcwp_mmhg", *rows, "absent,3"]))
    return source


@pytest.fixture(scope="module")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site_dir = tmp_path_factory.mktemp("whole") / "site"
    ingest(archive, site_dir, patient_key=KEY)
    return site_dir


def same(one: Path, other: Path) -> bool:
    """Signal files byte for byte, and every row of the index."""
    assert (one / SIGNAL_FILE).read_bytes() == (other / SIGNAL_FILE).read_bytes()
    assert dump(one) == dump(other)
    return True


def start(script: Path, archive: Path, site_dir: Path, workers: int = 1) -> subprocess.Popen[str]:
    """The ingest as a process of its own, past its imports."""
    script.write_text(INGEST)
    words = [sys.executable, str(script), str(archive), str(site_dir), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_rows(process: subprocess.Popen[str], site_dir: Path, rows: int) -> None:
    """Return as soon as so many rows are in the signal file of an ingest at work."""
    signals = site_dir / SIGNAL_FILE
    while not signals.exists() or signals.stat().st_size < rows * ROW_BYTES:
        assert process.poll() is None, "the ingest ended too early"
        time.sleep(0.0005)


def finished(site_dir: Path) -> bool:
    """Whether the ingest got to its end before it was killed; what is there until then is a whole store."""
    try:
        rows = len(open_store(site_dir).index)
    except HemoFedError:  # killed before there was an index
        return False
    assert not rows or (site_dir / SIGNAL_FILE).stat().st_size >= rows * ROW_BYTES
    return any(row[-1] for row in sqlite3.connect(site_dir / INDEX_FILE).execute("SELECT finished_at FROM ingests"))


def kill_and_go_on(tmp_path: Path, archive: Path, whole: Path, kills: int, workers: int, seed: int) -> int:
    """Kill the ingest at `kills` random moments of its work, let it end, and compare; how many kills were in time."""
    chance, site_dir, hits = random.Random(seed), tmp_path / "cut", 0
    process = start(tmp_path / "ingest.py", archive, tmp_path / "timed", workers)
    began = time.monotonic()
    assert process.wait() == 0
    longest_s = time.monotonic() - began
    for _ in range(10 * kills):
        process = start(tmp_path / "ingest.py", archive, site_dir, workers)
        time.sleep(chance.random() * longest_s)
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        if hits == kills:
            break
        if finished(site_dir):  # the kill came too late: compare, and begin anew
            assert same(site_dir, whole)
            shutil.rmtree(site_dir)
    if not finished(site_dir):
        assert start(tmp_path / "ingest.py", archive, site_dir, workers).wait() == 0
    assert same(site_dir, whole)
    return hits


def test_kills_at_random_points(tmp_path: Path, archive: Path, whole: Path) -> None:
    assert kill_and_go_on(tmp_path, archive, whole, kills=2, workers=1, seed=1) == 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_many_random_points(tmp_path: Path, archive: Path, whole: Path, seed: int, workers: int) -> None:
    assert kill_and_go_on(tmp_path, archive, whole, kills=4, workers=workers, seed=seed) == 4


@pytest.mark.parametrize("rows_before_the_kill", [1, 37, 90])
def test_half_a_row_is_cut_off(tmp_path: Path, archive: Path, whole: Path, rows_before_the_kill: int) -> None:
    site_dir = tmp_path / "cut"
    process = start(tmp_path / "ingest.py", archive, site_dir)
    wait_for_rows(process, site_dir, rows_before_the_kill)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with (site_dir / SIGNAL_FILE).open("ab") as file:  # as if the kill came while a chunk was being written
        file.write(b"half a row")
    assert len(open_store(site_dir).index) < len(open_store(whole).index)
    ingest(archive, site_dir, patient_key=KEY)
    assert same(site_dir, whole)


def test_ctrl_c_ends_with_130_and_a_usable_store(tmp_path: Path, archive: Path) -> None:
    site_dir = tmp_path / "site"
    # Slowed down, or a fast machine has ended before the signal comes.
    script = (
        "import time; from client import cli, preparation, store_writer; store_writer.CHUNK_ROWS = 8; "
        "prepare = preparation.prepare; preparation.prepare = lambda *given: (time.sleep(0.02), prepare(*given))[1]; "
        "cli.main()"
    )
    words = [sys.executable, "-c", script, "ingest", str(archive), "--site-dir", str(site_dir), "--quiet"]
    words += ["--workers", "1"]
    # A shell starts what runs in its background with this signal ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_rows(process, site_dir, 20)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    assert len(open_store(site_dir).index) >= 8


def test_a_lost_byte_is_seen_by_the_comparison(tmp_path: Path, archive: Path, whole: Path) -> None:
    """The negative control of `same`."""
    ingest(archive, tmp_path / "site", patient_key=KEY)
    assert same(tmp_path / "site", whole)
    with (tmp_path / "site" / SIGNAL_FILE).open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(AssertionError):
        same(tmp_path / "site", whole)
    ingest(archive, tmp_path / "other", patient_key=bytes(32))
    with pytest.raises(AssertionError):
        same(tmp_path / "other", whole)


def test_any_number_of_processes_makes_the_same_store(tmp_path: Path, archive: Path, whole: Path) -> None:
    assert start(tmp_path / "ingest.py", archive, tmp_path / "site", workers=3).wait() == 0
    assert same(tmp_path / "site", whole)


def children_of(process_id: int) -> list[int]:
    listed = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(word) for word in listed.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_the_reading_processes_end_with_the_one_that_was_killed(tmp_path: Path, archive: Path) -> None:
    process = start(tmp_path / "ingest.py", archive, tmp_path / "site", workers=3)
    wait_for_rows(process, tmp_path / "site", 1)
    readers = children_of(process.pid)
    assert len(readers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{reader}").exists() for reader in readers):
        assert time.monotonic() < deadline, "a reading process outlived its parent"
        time.sleep(0.05)


def test_two_ingests_at_once_are_one_clear_error(tmp_path: Path, archive: Path, whole: Path) -> None:
    first = start(tmp_path / "ingest.py", archive, tmp_path / "site")
    while not (tmp_path / "site" / SIGNAL_FILE).exists():
        assert first.poll() is None
    words = [sys.executable, "-m", "client.cli", "ingest", archive, "--site-dir", tmp_path / "site", "--quiet"]
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot be done before the second has started
    second = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == ExitCode.BAD_SITE
    (line,) = second.stderr.splitlines()
    assert "another ingest is at work here" in line
    assert first.wait() == 0
    assert same(tmp_path / "site", whole)


AS_NOBODY = """
import os, sys
from client import cli
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)  # root may write anywhere
sys.argv = ["hemofed-client", "ingest", *sys.argv[1:], "--quiet"]
cli.main()
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may reach; pytest's own are for the user alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("closed", ["site", "source"])
def test_a_folder_that_may_not_be_used_is_one_clear_error(open_folder: Path, closed: str) -> None:
    source, site_dir = open_folder / "source", open_folder / "site"
    write_record(source / "inner", "a", ecg_steps(seed=1), comments=["patient_id: 1"])
    ingest(source, site_dir)
    write_record(source / "outer", "b", ecg_steps(seed=2), comments=["patient_id: 1"])
    if closed == "site":
        for path in (site_dir, *site_dir.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
    else:
        site_dir.chmod(0o777)
        (source / "inner").chmod(0)
    words = [sys.executable, "-c", AS_NOBODY, str(source), "--site-dir", str(site_dir)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == (ExitCode.BAD_SITE if closed == "site" else ExitCode.BAD_SOURCE), ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "denied" in line
    for path in (source / "inner", site_dir, *site_dir.iterdir()):
        path.chmod(0o755)
    (site_dir / "patient.key").chmod(0o600)
    assert len(open_store(site_dir).index) == 1


def version_1(site_dir: Path) -> None:
    """Turn a store into one that the first release would have left."""
    with closing(sqlite3.connect(site_dir / INDEX_FILE, isolation_level=None)) as connection:
        for table in (
            "wipes",
            "forgotten",
            "forgotten_signals",
            "record_events",
            "event_values",
            "events",
            "measurements",
        ):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX records_patient")
        for column in ("records.device", "records.quality", "turned_away.patient", "remarks.patient"):
            connection.execute("ALTER TABLE {} DROP COLUMN {}".format(*column.split(".")))
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")


def test_a_store_of_an_older_release_is_brought_up_to_date(tmp_path: Path, archive: Path, whole: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(archive, site_dir, patient_key=KEY)
    version_1(site_dir)
    with pytest.raises(HemoFedError, match="hemofed-client migrate"):
        open_store(site_dir)
    words = [sys.executable, "-m", "client.cli", "migrate", "--site-dir", str(site_dir)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as one, closing(sqlite3.connect(whole / INDEX_FILE)) as other:
        assert structure(one) == structure(other)
    migrated, fresh = dump(site_dir), dump(whole)
    assert [row[:16] for row in migrated["records"]] == [row[:16] for row in fresh["records"]]
    assert migrated["labels"] == fresh["labels"]
    summary = ingest(archive, site_dir, patient_key=KEY)
    assert (summary.stored, summary.already_stored) == (0, len({row[2] for row in fresh["records"]}))


def test_a_migration_that_is_cut_off_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path / "source", "a", ecg_steps(seed=1), comments=["patient_id: 1"])
    ingest(tmp_path / "source", tmp_path / "site")
    version_1(tmp_path / "site")
    monkeypatch.setitem(MIGRATIONS, 1, MIGRATIONS[1] + "CREATE TABLE wipes (row);\n")  # the last step fails
    with pytest.raises(HemoFedError, match="the index cannot be used"):
        connect(tmp_path / "site")
    with closing(sqlite3.connect(tmp_path / "site" / INDEX_FILE)) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("1",)
        assert "device" not in str(structure(connection))


def test_every_older_version_has_its_migration() -> None:
    assert set(MIGRATIONS) == set(range(1, SCHEMA_VERSION))


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold_lock(tmp_path):
        raise RuntimeError
    with hold_lock(tmp_path):
        pass
