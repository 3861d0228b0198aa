"""Pipes, devices, oversized headers and deep folders in an archive: nothing may hang, fill memory or overflow."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.records import READERS
from client.records.chapman import RECORDS_FOLDER
from client.records.dicom_ecg import _leads, _read_dataset
from client.records.files import files_below
from client.records.record import Reason
from client.records.wfdb_header import LARGEST_HEADER_BYTES
from shared_model.leads import LEADS
from tests.archive_fixtures import ARCHIVES
from tests.clinical_fixtures import dicom_group, only_reason, records_of, steps_for, write_dicom, write_scg_rhc
from tests.wfdb_fixtures import write_record

SUFFIXES = (".hea", ".xml", ".dcm", ".mat", ".json", ".hdf5", "")
READ_ALL = """
import sys
from pathlib import Path
from client.records import choose_format, open_archive
from client.records.record import EcgRecord, TurnedAway
from tests.archive_fixtures import ARCHIVES
for name in sys.argv[2:]:
    folder = Path(sys.argv[1]) / name
    assert choose_format(folder) == name, choose_format(folder)
    archive = open_archive(folder, name, ARCHIVES[name].options)
    items = [item for item in archive.items if isinstance(item, EcgRecord | TurnedAway)]
    assert archive.count == len(items) == 3, (name, items)
"""


def run(code: str, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_what_is_no_regular_file_is_passed_over_by_every_reader(tmp_path: Path) -> None:
    for name in READERS:
        (tmp_path / name).mkdir()
        ARCHIVES[name].write(tmp_path / name)
        for folder in {tmp_path / name, *(path for path in (tmp_path / name).rglob("*") if path.is_dir())}:
            for suffix in SUFFIXES:
                os.mkfifo(folder / f"A-pipe{suffix}")
                (folder / f"A-zero{suffix}").symlink_to("/dev/zero")
            os.mkfifo(folder / "exams_part9.hdf5")
    done = run(READ_ALL, tmp_path, *READERS)
    assert done.returncode == 0, done.stderr


def test_a_pipe_would_hang(tmp_path: Path) -> None:
    """The control: without the guard, the test above would run into its limit."""
    os.mkfifo(tmp_path / "r.hea")
    with pytest.raises(subprocess.TimeoutExpired):
        run("import sys; open(sys.argv[1]).read()", tmp_path / "r.hea", timeout_s=2)


@pytest.mark.parametrize("piped", ["r1.hea", "r1.dat"])
def test_a_segment_that_is_a_pipe_is_turned_away(tmp_path: Path, piped: str) -> None:
    for number in range(2):
        write_record(tmp_path, f"r{number}")
    (tmp_path / "r.hea").write_text(f"r/2 {len(LEADS)} 500 10000\nr0 5000\nr1 5000\n")
    (tmp_path / piped).unlink()
    os.mkfifo(tmp_path / piped)
    done = run(
        "import sys; from pathlib import Path; from tests.clinical_fixtures import only_reason;"
        "print(only_reason(Path(sys.argv[1])))",
        tmp_path,
    )
    assert done.stdout.strip() in {Reason.UNREADABLE, Reason.MISSING_FILE}, done.stderr


def test_the_json_of_a_procedure_may_be_a_pipe(tmp_path: Path) -> None:
    write_scg_rhc(tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.unlink()
    os.mkfifo(path)
    done = run(
        "import sys; from pathlib import Path; from client.records.scg_rhc import _read_json;"
        "_read_json(Path(sys.argv[1]))",
        path,
    )
    assert "no regular file" in done.stderr


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.hea").symlink_to(tmp_path / "gone.hea")
    assert only_reason(tmp_path) == Reason.UNREADABLE


def test_an_oversized_header_is_not_read(tmp_path: Path) -> None:
    header = write_record(tmp_path, "r")
    os.truncate(header, LARGEST_HEADER_BYTES)
    assert len(records_of(tmp_path)[0]) + len(records_of(tmp_path)[1]) == 1
    os.truncate(header, LARGEST_HEADER_BYTES + 1)
    _, (away,), _ = records_of(tmp_path)
    assert away.reason == Reason.UNREADABLE
    assert "larger than 1 MB" in away.detail


def test_folders_deeper_than_the_stack(tmp_path: Path) -> None:
    folder, deepest = tmp_path, 1200
    for _ in range(deepest):
        folder = folder / "d"
        folder.mkdir()
    (folder / "r.hea").touch()
    try:
        (found,) = files_below(tmp_path, ".hea")
    finally:  # here, because pytest's own removal of folders is a recursion
        (folder / "r.hea").unlink()
        while folder != tmp_path:
            folder.rmdir()
            folder = folder.parent
    assert Path(found).relative_to(tmp_path).parts == (*["d"] * deepest, "r.hea")


def test_the_order_is_by_name_folders_among_files(tmp_path: Path) -> None:
    for name in ("c.hea", "a/z.hea", "b.hea", "a/b/x.HEA", "d/e.txt", "a.hea"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(path).relative_to(tmp_path).as_posix() for path in files_below(tmp_path, ".hea")]
    assert found == ["a/b/x.HEA", "a/z.hea", "a.hea", "b.hea", "c.hea"]


def test_chapman_without_its_folder_is_empty(tmp_path: Path) -> None:
    assert not (tmp_path / RECORDS_FOLDER).exists()
    assert READERS["chapman"].open_archive(tmp_path, ARCHIVES["chapman"].options).count == 0


def test_a_dicom_is_cut_to_a_minute_before_it_becomes_float64(tmp_path: Path) -> None:
    steps = steps_for(LEADS, 100, 70)
    write_dicom(tmp_path / "r.dcm", [dicom_group(steps, rate_hz=100)])
    (record,), _, _ = records_of(tmp_path)
    np.testing.assert_allclose(record.signal_mv, steps[:, :6000] * 1.25 / 1000, rtol=1e-5)
    leads = _leads(_read_dataset(tmp_path / "r.dcm").WaveformSequence[0], 100)
    assert {len(signal) for signal in leads.values()} == {6000}
