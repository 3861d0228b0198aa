"""hemofed-server as a person at the centre runs it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.cli import main
from server.report.files import write_metrics, write_results
from server.report.page import write_page
from shared_model.errors import ExitCode
from tests.example_results import example_ecg, example_metrics, example_results


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run hemofed-server in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["hemofed-server", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A study's folder as `hemofed-sim run` leaves it, with ECGs in the page."""
    results, metrics = example_results(), example_metrics()
    write_results(results, tmp_path)
    write_metrics(metrics, tmp_path)
    write_page(results, metrics, (example_ecg(),), tmp_path)
    return tmp_path


def test_report_writes_page_and_card_again_without_ecgs(command, finished: Path) -> None:
    page = finished / "report.html"
    assert 'id="ecg-1' in page.read_text(encoding="utf-8")
    done = command("report", finished)
    assert (done.code, done.err) == (0, "")
    assert str(page) in done.out
    assert 'id="ecg-1' not in page.read_text(encoding="utf-8")
    assert example_results().name in (finished / "model" / "card.md").read_text(encoding="utf-8")


def test_report_follows_the_figures(command, finished: Path) -> None:
    write_results(example_results(name="a study by another name"), finished)
    assert command("report", finished).code == 0
    assert "a study by another name" in (finished / "report.html").read_text(encoding="utf-8")


def test_json_names_files_that_exist(command, finished: Path) -> None:
    done = command("report", finished, "--json")
    paths = json.loads(done.out)
    assert set(paths) == {"report", "card", "card_json"}
    assert all(Path(path).is_file() for path in paths.values())


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda folder: (folder / "results.json").unlink(), "results.json"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl"),
        (lambda folder: (folder / "results.json").write_text('{"name": 3}'), "results.json"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{}\n"), "line 1"),
        (lambda folder: (folder / "model").write_text("a file where a folder should be"), "cannot write"),
    ],
)
def test_a_bad_folder_is_one_line_and_no_traceback(command, finished: Path, break_it, named: str) -> None:
    break_it(finished)
    done = command("report", finished)
    assert done.code == ExitCode.USAGE
    assert done.err.count("\n") == 1
    assert done.err.startswith("hemofed-server: ")
    assert named in done.err


def test_a_file_instead_of_a_folder_is_refused(command, finished: Path) -> None:
    done = command("report", finished / "results.json")
    assert done.code == ExitCode.USAGE
    assert "is a file" in done.err


def test_the_module_runs_as_a_program_and_a_mistake_has_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "report", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("hemofed-server: ")
    assert done.stderr.count("\n") == 1
