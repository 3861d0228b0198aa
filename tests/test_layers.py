"""Which package may import which, and that the contract in pyproject.toml notices when one does not obey."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("client", "server", "shared_model", "simulation")
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(folder: Path) -> tuple[int, str]:
    """Exit code and output of the contracts on one checkout."""
    done = subprocess.run([sys.executable, "-c", COMMAND, "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_packages_obey_the_arrows(copy: Path) -> None:
    code, output = check(copy)
    assert code == 0, output
    assert "4 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("client/training.py", "import server.rounds"),
        ("server/rounds.py", "from client import store"),
        ("shared_model/leads.py", "from client import store"),
        ("shared_model/leads.py", "import simulation"),
        ("client/tasks.py", "from simulation import grid"),
        ("server/rounds.py", "from flwr.app import Message"),
        ("shared_model/model.py", "import flwr"),
        ("simulation/cli.py", "import flwr.simulation"),
        ("client/policy.py", "from client import store"),
    ],
)
def test_a_planted_import_is_noticed(copy: Path, file: str, line: str) -> None:
    path = copy / file
    whole = path.read_text()
    try:
        path.write_text(f"{whole}\n{line}\n")
        code, output = check(copy)
    finally:
        path.write_text(whole)
    assert code == 1
    assert re.search(r"\b[1-9] broken", output)
    assert file.removesuffix(".py").replace("/", ".") in output
