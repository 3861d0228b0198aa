"""results.json and metrics.jsonl, written and read."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from server.report.results import Results, RoundMetrics
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import explain

RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.jsonl"


def write_results(results: Results, folder: Path) -> Path:
    """Write results.json into `folder` (made if absent), whole or not at all; returns its path."""
    path = folder / RESULTS_FILE
    write_whole(path, results.model_dump_json(indent=2) + "\n")
    return path


def load_results(path: Path) -> Results:
    """Read results.json; `path` is the file or its folder.

    Raises:
        HemoFedError: absent, not JSON, or not these results; one line with the key at fault.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    text = _read_text(path, "run the study first, or give the folder that holds results.json")
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        raise HemoFedError(explain(error, str(path)), ExitCode.USAGE) from None


def append_metrics(row: RoundMetrics, folder: Path) -> None:
    """Add one line to metrics.jsonl in `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(_metrics_line(row))


def write_metrics(rows: Iterable[RoundMetrics], folder: Path) -> None:
    """Replace metrics.jsonl: a resumed run keeps only the rounds before the one it resumes."""
    write_whole(folder / METRICS_FILE, "".join(_metrics_line(row) for row in rows))


def load_metrics(path: Path) -> tuple[RoundMetrics, ...]:
    """Read metrics.jsonl; `path` is the file or its folder. A last line cut short by a crash is left out.

    Raises:
        HemoFedError: absent, or a line is not a round; the message names the line.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    text = _read_text(path, "run the study first, or give the folder that holds metrics.jsonl")
    lines = text.split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(RoundMetrics.model_validate_json(line))
        except ValidationError as error:
            raise HemoFedError(explain(error, f"{path} line {number}"), ExitCode.USAGE) from None
    return tuple(rows)


def _metrics_line(row: RoundMetrics) -> str:
    return json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False, allow_nan=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise HemoFedError(f"{path}: cannot be read ({error.strerror}); {remedy}", ExitCode.USAGE) from None
    except UnicodeDecodeError:
        raise HemoFedError(f"{path}: not text in UTF-8; {remedy}", ExitCode.USAGE) from None
