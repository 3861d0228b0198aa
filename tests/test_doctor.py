"""hemofed-client doctor: every check passes on what is fit, and is shown what is not."""

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client import doctor, doctor_site
from client.doctor import examine, findings_table, worst
from client.finding import Finding, Level
from client.ingest import ingest
from client.lock import LOCK_FILE
from client.pseudonym import KEY_FILE
from client.schema import INDEX_FILE
from client.site import SITE_FILE
from client.store import SIGNAL_FILE
from shared_model.errors import ExitCode
from tests.wfdb_fixtures import ecg_steps, write_record

GB = doctor.GB
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def sound_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    for number in range(3):
        write_record(folder / "source", f"r{number}", ecg_steps(seed=number), comments=[f"patient_id: {number}"])
    ingest(folder / "source", folder / "site")
    return folder / "site"


@pytest.fixture
def site_dir(sound_site: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound_site, tmp_path / "site"))


def found(findings: list[Finding], check: str) -> Finding:
    (finding,) = [each for each in findings if each.check == check]
    return finding


def change(site_dir: Path, sql: str) -> None:
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection, connection:
        connection.execute(sql)


# --- the machine


def test_the_bounds_are_those_of_the_project() -> None:
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, doctor.OLDEST_PYTHON))}"
    needed = dict(line.partition(">=")[::2] for line in PROJECT["dependencies"])
    for package, oldest in doctor.OLDEST_PACKAGES.items():
        assert needed[package].partition(",")[0] == oldest
    extra = {line.partition(">=")[0] for line in PROJECT["optional-dependencies"]["records"]}
    assert extra == set(doctor.OPTIONAL_PACKAGES)


@pytest.mark.parametrize(("version", "level"), [((3, 11, 0), Level.OK), ((3, 13, 1), "ok"), ((3, 10, 9), "problem")])
def test_python(version: tuple[int, ...], level: str) -> None:
    assert doctor.python_version(version).level == level


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.11", "ok"), ("2.11.0+cpu", "ok"), ("10.0", "ok"), ("2.9.1", "problem"), (None, "problem")],
)
def test_a_package_that_is_too_old_or_absent_is_a_problem(version: str | None, level: str) -> None:
    findings = doctor.packages(lambda name: version if name == "torch" else "99")
    assert found(findings, "torch").level == level
    assert {each.level for each in findings if each.check != "torch"} == {Level.OK}


def test_an_optional_package_is_not_needed_but_said() -> None:
    assert {each.level for each in doctor.optional_packages(lambda name: None)} == {Level.WARNING}
    assert {each.level for each in doctor.optional_packages(lambda name: "3")} == {Level.OK}


@pytest.mark.parametrize(
    ("free_gb", "stored_gb", "level"),
    [(100, 0, "ok"), (100, 900, "ok"), (9, 0, "warning"), (40, 500, "warning"), (0.9, 0, "problem")],
)
def test_disk(free_gb: float, stored_gb: float, level: str, tmp_path: Path) -> None:
    finding = doctor.free_disk(tmp_path, int(free_gb * GB), int(stored_gb * GB))
    assert finding.level == level
    assert f"room for {int(free_gb * GB) // 60_000:,} more ECGs" in finding.found


@pytest.mark.parametrize(("gigabytes", "level"), [(16, "ok"), (3.9, "warning"), (1.5, "problem")])
def test_memory(gigabytes: float, level: str) -> None:
    assert doctor.memory(int(gigabytes * GB)).level == level


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    whole = doctor.memory_bytes(tmp_path / "absent")
    (tmp_path / "limit").write_text("1500000000\n")
    (tmp_path / "none").write_text("max\n")
    assert doctor.memory_bytes(tmp_path / "limit") == min(whole, 1_500_000_000)
    assert doctor.memory_bytes(tmp_path / "none") == whole


def test_cores() -> None:
    assert [doctor.cores(count).level for count in (1, 2, 64)] == ["warning", "ok", "ok"]


def test_no_gpu_is_no_fault_and_a_broken_one_is_said() -> None:
    def broken() -> list[str]:
        raise RuntimeError("the driver is too old")

    assert doctor.gpu(list) == Finding("gpu", Level.OK, "none; the CPU works")
    assert doctor.gpu(lambda: ["H200, 150 GB"]).found == "H200, 150 GB"
    assert doctor.gpu(broken).level == Level.WARNING


@pytest.mark.parametrize(("wall_per_second", "level"), [(1.0, "ok"), (0.0, "warning"), (1.5, "warning")])
def test_a_clock_that_stands_still_or_hurries_is_seen(wall_per_second: float, level: str) -> None:
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += seconds

    finding = doctor.clock_rate(lambda: 1e9 + wall_per_second * passed[0], lambda: passed[0], sleep)
    assert finding.level == level


@pytest.mark.parametrize(("year", "level"), [(2026, "ok"), (1970, "problem"), (2106, "problem")])
def test_the_year_must_be_plausible(year: int, level: str) -> None:
    finding = doctor.clock_date(datetime(year, 1, 1, tzinfo=UTC), "-0530")
    assert finding.level == level
    assert "local time -05:30" in finding.found


def test_a_file_server_with_another_clock_is_seen(tmp_path: Path) -> None:
    now = os.stat(tmp_path).st_mtime
    assert doctor.file_time(tmp_path, lambda: now).level == Level.OK
    assert doctor.file_time(tmp_path, lambda: now - 3600).level == Level.WARNING
    assert doctor.file_time(tmp_path / "absent", lambda: now).level == Level.PROBLEM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "level"),
    [(("UTF-8", "utf-8"), "ok"), (("ANSI_X3.4-1968", "utf-8"), "warning"), (("UTF-8", "ascii"), "warning")],
)
def test_text_that_is_not_utf8_is_said(names: tuple[str, str], level: str) -> None:
    assert doctor.text_encoding(*names).level == level


def test_the_folder_above_is_looked_at_where_there_is_none_yet(tmp_path: Path) -> None:
    assert doctor.existing_folder(tmp_path / "a" / "b") == tmp_path.resolve()
    assert doctor.existing_folder(None) == Path().resolve()


# --- the site folder


def test_a_sound_folder_has_no_complaint_and_is_left_as_it_is(site_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in site_dir.iterdir()}
    findings = doctor_site.examine_site(site_dir, has_gpu=False)
    assert [each for each in findings if each.level != Level.OK] == []
    assert {path.name: path.read_bytes() for path in site_dir.iterdir()} == before


def set_schema(site_dir: Path, version: int) -> None:
    change(site_dir, f"UPDATE meta SET value = '{version}' WHERE key = 'schema_version'")


def cut_signals(site_dir: Path) -> None:
    path = site_dir / SIGNAL_FILE
    path.write_bytes(path.read_bytes()[:-1])


def spoil_index(site_dir: Path) -> None:
    path = site_dir / INDEX_FILE
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * 8192 + content[16384:])


FAULTS: dict[str, tuple[str, Level, Callable[[Path], object]]] = {
    "folder open to all": ("site folder", Level.PROBLEM, lambda site: site.chmod(0o755)),
    "folder open to the group": ("site folder", Level.WARNING, lambda site: site.chmod(0o750)),
    "no settings": ("site.toml", Level.PROBLEM, lambda site: (site / SITE_FILE).unlink()),
    "no disclosure": ("site.toml", Level.PROBLEM, lambda site: (site / SITE_FILE).write_text('name = "a"\n')),
    "no such device": (
        "site.toml",
        Level.PROBLEM,
        lambda site: (site / SITE_FILE).write_text('name = "a"\ndisclosure = "clear"\ndevice = "cuda"\n'),
    ),
    "no key": ("patient key", Level.PROBLEM, lambda site: (site / KEY_FILE).unlink()),
    "open key": ("patient key", Level.PROBLEM, lambda site: (site / KEY_FILE).chmod(0o644)),
    "broken key": ("patient key", Level.PROBLEM, lambda site: (site / KEY_FILE).write_text("not a key")),
    "no index": ("store", Level.WARNING, lambda site: (site / INDEX_FILE).unlink()),
    "no database": ("index", Level.PROBLEM, lambda site: (site / INDEX_FILE).write_bytes(b"not a database" * 99)),
    "spoilt index": ("index", Level.PROBLEM, spoil_index),
    "other schema": (
        "index",
        Level.PROBLEM,
        lambda site: set_schema(site, 99),
    ),
    "older schema": (
        "index",
        Level.PROBLEM,
        lambda site: set_schema(site, 1),
    ),
    "short signals": ("signals", Level.PROBLEM, cut_signals),
    "no signals": ("signals", Level.PROBLEM, lambda site: (site / SIGNAL_FILE).unlink()),
    "cut-off ingest": ("ingest", Level.WARNING, lambda site: change(site, "UPDATE ingests SET finished_at = NULL")),
    "unwiped rows": ("forgotten", Level.PROBLEM, lambda site: change(site, "INSERT INTO wipes VALUES (1)")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_folder_is_found_and_has_a_remedy(site_dir: Path, fault: str) -> None:
    check, level, spoil = FAULTS[fault]
    spoil(site_dir)
    finding = found(doctor_site.examine_site(site_dir, has_gpu=False), check)
    assert finding.level == level
    assert finding.remedy
    assert "\n" not in finding.found + finding.remedy


def test_a_folder_that_cannot_be_written(site_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    assert doctor_site.folder_rights(site_dir).level == Level.PROBLEM


def test_an_ingest_at_work_is_no_fault(site_dir: Path) -> None:
    change(site_dir, "UPDATE ingests SET finished_at = NULL")
    with (site_dir / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found(doctor_site.examine_site(site_dir, has_gpu=False), "ingest").level == Level.OK


def test_cuda_is_taken_at_its_word_where_there_is_a_gpu(site_dir: Path) -> None:
    FAULTS["no such device"][2](site_dir)
    assert doctor_site.settings(site_dir, has_gpu=True).level == Level.OK


def test_without_a_folder_only_the_machine_is_looked_at(tmp_path: Path) -> None:
    checks = {each.check for each in examine(None)}
    assert {"python", "torch", "disk", "memory", "gpu", "clock", "locale"} <= checks
    assert not {"site folder", "index"} & checks
    assert found(examine(tmp_path / "absent"), "site folder").level == Level.WARNING


# --- the command


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_the_command_ends_well_or_with_the_first_problem(site_dir: Path) -> None:
    ended = command("--site-dir", site_dir, "--json")
    assert ended.returncode == ExitCode.DONE, ended.stderr
    outcome = json.loads(ended.stdout)
    assert outcome["worst"] in ("ok", "warning")
    (site_dir / KEY_FILE).chmod(0o644)
    ended = command("--site-dir", site_dir, "--quiet")
    assert ended.returncode == ExitCode.UNFIT
    (line,) = ended.stderr.splitlines()
    assert "patient key" in line
    assert "chmod 600" in line
    assert "python" not in ended.stdout  # quiet: what is well is left out
    assert json.loads(command("--site-dir", site_dir, "--json").stdout)["worst"] == "problem"


def test_the_worst_level_counts() -> None:
    levels = [Finding("a", level, "b") for level in Level]
    assert worst(levels) == Level.PROBLEM
    assert worst(levels[:2]) == Level.WARNING
    assert worst([]) == Level.OK
    assert findings_table(levels).row_count == 3
