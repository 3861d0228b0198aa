"""The table "What became of public records" in docs/site-store.md against an ingest of those records."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from client.ingest import ingest
from client.records.options import ReaderOptions
from tests.realdata import REAL_DATA, needs_real_data

GUIDE = Path(__file__).parents[1] / "docs" / "site-store.md"
AWKWARD = "wfdb-awkward-dev"
NO_OPTIONS = ReaderOptions()
# The first words of a row -> the folders that it tells of.
FOLDERS = {
    "PTB-XL": {"ptbxl-dev": NO_OPTIONS},
    "CinC 2021": {"cinc2021-dev": NO_OPTIONS},
    "CinC 2020": {"cinc2020-dev": NO_OPTIONS},
    "CinC 2011": {"cinc2011-dev": NO_OPTIONS},
    "CPSC 2018": {
        "cpsc2018-mat-dev": ReaderOptions((), 500, "mV", "ECG.data", "lead-time"),
        "chapman-denoised-dev": ReaderOptions((), 500, "uV", "val", "time-lead"),
        "code15-dev": ReaderOptions((), 400, "mV", "feats", "lead-time"),
    },
    "LUDB": {"ludb-dev": NO_OPTIONS},
    "MIMIC pulmonary": {"mimic-pap-dev": NO_OPTIONS},
}


def table_rows() -> list[tuple[str, int, int, str]]:
    """(records, read, stored, turned away) of each row."""
    section = GUIDE.read_text(encoding="utf-8").partition("### What became of public records")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (.+) \|$", section, re.MULTILINE)
    return [(records, int(read), int(stored), away) for records, read, stored, away in rows]


def row_of(beginning: str) -> tuple[str, int, int, str]:
    (row,) = [row for row in table_rows() if row[0].startswith(beginning)]
    return row


@needs_real_data
@pytest.mark.parametrize("beginning", FOLDERS)
def test_a_row_says_what_an_ingest_says(tmp_path: Path, beginning: str) -> None:
    _, read, stored, told = row_of(beginning)
    summaries = [
        ingest(REAL_DATA / folder, tmp_path / folder, options=options) for folder, options in FOLDERS[beginning].items()
    ]
    assert (read, stored) == (sum(each.read for each in summaries), sum(each.stored for each in summaries))
    away = sum((Counter(each.turned_away) for each in summaries), Counter[str]())
    assert {reason: int(count) for count, reason in re.findall(r"(\d+) `(\w+)`", told)} == dict(away)


@needs_real_data
def test_each_awkward_record_is_named_with_its_reason(tmp_path: Path) -> None:
    summary = ingest(REAL_DATA / AWKWARD, tmp_path)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        reasons = dict(index.execute("SELECT source, reason FROM turned_away"))
        stored = {source for (source,) in index.execute("SELECT DISTINCT source FROM records")}
    outcome = {Path(source).stem: reason for source, reason in (reasons | dict.fromkeys(stored, "none")).items()}
    assert len(outcome) == summary.read
    named = []
    for records, read, count, told in table_rows():
        names = [] if records.startswith(tuple(FOLDERS)) else re.findall(r"`([\w-]+)`", records)
        assert all(outcome[name] in told for name in names)
        assert not names or (read, count) == (len(names), sum(outcome[name] == "none" for name in names))
        named += names
    assert sorted(named) == sorted(outcome)


@needs_real_data
def test_every_folder_of_public_records_has_a_row() -> None:
    told = {folder for folders in FOLDERS.values() for folder in folders} | {AWKWARD}
    assert told == {path.name for path in REAL_DATA.iterdir() if path.is_dir()}
    assert all(row_of(beginning) for beginning in FOLDERS)
