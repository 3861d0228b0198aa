"""docs/exit-codes.md and the exit codes are the same list."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared_model.errors import ExitCode

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| `([A-Z_]+)` \| (.+?) \| ?(.*?) ?\|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str, str]]:
    return ROW.findall((ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8"))


def test_every_code_is_documented_and_no_other() -> None:
    assert [(int(code), name) for code, name, _, _ in rows()] == [(int(code), code.name) for code in ExitCode]


def test_every_failure_says_what_to_do() -> None:
    assert [name for _, name, meaning, remedy in rows() if not meaning or (name != "DONE" and not remedy)] == []


def test_every_code_is_used() -> None:
    sources = [
        path.read_text(encoding="utf-8")
        for package in ("client", "server", "shared_model", "simulation")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert [code.name for code in ExitCode if not any(f"ExitCode.{code.name}" in text for text in sources)] == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("client.cli", "ingest"), ExitCode.USAGE),
        (("simulation.cli", "run", "nowhere.toml", "--out", "out"), ExitCode.BAD_STUDY),
        (("client.cli", "check", "--site-dir", "nowhere"), ExitCode.BAD_SITE),
        (("client.cli", "ingest", "nowhere", "--site-dir", "site"), ExitCode.BAD_SOURCE),
    ],
)
def test_a_command_ends_with_the_documented_code(tmp_path: Path, arguments: tuple[str, ...], code: ExitCode) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
