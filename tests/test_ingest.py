"""Ingest as a hospital runs it: awkward archives, kills, repeats, and the command line."""

import fcntl
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client.cli import main
from client.ingest import ingest
from client.lock import LOCK_FILE
from client.records.options import ReaderOptions
from client.schema import INDEX_FILE
from client.site import load_site
from client.store import open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import MISSING
from tests.realdata import REAL_DATA, needs_real_data
from tests.store_dump import dump
from tests.wfdb_fixtures import ecg_steps, write_record

KEY = bytes(range(32))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def turned_away(site_dir: Path) -> dict[str, str]:
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        return dict(connection.execute("SELECT source, reason FROM turned_away"))


AWKWARD = {
    "100_3chan.hea": "too_short",
    "12726.hea": "missing_file",
    "310derive_2.hea": "no_known_lead",
    "310derive_3.hea": "no_known_lead",
    "a103l-no-len.hea": "no_length",
    "binformats.hea": "no_known_lead",
    "flacformats.hea": "no_known_lead",
}


@needs_real_data
def test_awkward_records_end_in_the_store_or_with_a_reason(tmp_path: Path) -> None:
    summary = ingest(REAL_DATA / "wfdb-awkward-dev", tmp_path)
    assert turned_away(tmp_path) == AWKWARD
    assert (summary.read, summary.stored) == (12, 5)
    index = open_store(tmp_path).index
    # a103l: II, 60 s of 330; 041s: I and III, 16 s; v102s: II, 60 s; p000878: II, 10 s of the first 60;
    # s0010_re: all twelve, 38.4 s.
    masks = {int(record): set(index.lead_mask[index.record == record].tolist()) for record in index.record}
    assert masks == {0: {0b10}, 1: {0b101}, 2: {0b10}, 3: {0b10}, 4: {0b1111_1111_1111}}
    assert np.bincount(index.record).tolist() == [6, 2, 6, 1, 4]
    assert set(index.source_rate_hz.tolist()) == {125, 250, 1000}


@needs_real_data
@pytest.mark.parametrize(
    ("folder", "read", "stored", "reasons"),
    [
        ("cinc2020-dev", 2, 0, {"wrong_gain": 2}),
        ("ludb-dev", 1, 1, {}),
        ("cinc2021-dev", 31, 30, {"duplicate": 1}),
        ("cinc2011-dev", 36, 29, {"all_leads_flat": 4, "implausible_amplitude": 2, "low_quality": 1}),
        ("ptbxl-dev", 262, 261, {"duplicate": 1}),
        ("mimic-pap-dev", 138, 0, {"no_known_lead": 138}),
    ],
)
def test_real_archives(tmp_path: Path, folder: str, read: int, stored: int, reasons: dict[str, int]) -> None:
    summary = ingest(REAL_DATA / folder, tmp_path)
    assert (summary.read, summary.stored, summary.turned_away) == (read, stored, reasons)
    assert summary.usable == (stored > 0)


@needs_real_data
def test_ptbxl_keeps_the_source_rate_and_finds_the_twins(tmp_path: Path) -> None:
    summary = ingest(REAL_DATA / "ptbxl-dev", tmp_path)
    assert summary.source_rates_hz == {"100": 220, "500": 41}
    assert summary.duplicates == [["143", "144"]]
    assert summary.labels["not_norm"] == 261
    index = open_store(tmp_path).index
    assert int(index.labels["norm"].sum()) + int(index.labels["not_norm"].sum()) == 261
    assert int(index.labels["mi"].sum()) == 33


def test_what_is_stored_is_what_was_written(tmp_path: Path) -> None:
    steps = ecg_steps(rate_hz=250)
    write_record(tmp_path / "source", "r", steps, rate_hz=250, gain="1000(0)/mV")
    ingest(tmp_path / "source", tmp_path / "site")
    np.testing.assert_array_equal(open_store(tmp_path / "site").read(np.array([0]))[0], steps)


def test_a_long_and_a_short_record(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "long", ecg_steps(26, 250), rate_hz=250, comments=["patient_id: 1"])
    write_record(tmp_path / "source", "short", ecg_steps(6, 250), rate_hz=250, comments=["patient_id: 2"])
    summary = ingest(tmp_path / "source", tmp_path / "site")
    assert (summary.stored, summary.segments) == (2, 4)
    store = open_store(tmp_path / "site")
    assert store.index.segment.tolist() == [0, 1, 2, 0]
    assert store.index.record.tolist() == [0, 0, 0, 1]
    last = store.read(np.array([2, 3]))
    assert [(ecg[0] != MISSING).sum() for ecg in last] == [1500, 1500]


def test_a_second_ingest_adds_what_is_new_only(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "a", ecg_steps(seed=1))
    first = ingest(source, site_dir)
    before = dump(site_dir)
    again = ingest(source, site_dir)
    assert (first.stored, again.stored, again.already_stored) == (1, 0, 1)
    assert again.usable
    assert dump(site_dir)["records"] == before["records"]
    write_record(source, "b", ecg_steps(seed=2))
    assert ingest(source, site_dir).stored == 1
    assert len(open_store(site_dir).index) == 2


def test_a_moved_archive_is_recognised(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a", ecg_steps(seed=1))
    ingest(tmp_path / "source", tmp_path / "site")
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert ingest(tmp_path / "elsewhere", tmp_path / "site").already_stored == 1


def test_two_archives_may_use_the_same_record_names(tmp_path: Path) -> None:
    for archive in (1, 2):
        write_record(tmp_path / f"source{archive}", "a", ecg_steps(seed=archive))
        assert ingest(tmp_path / f"source{archive}", tmp_path / "site").stored == 1
    assert open_store(tmp_path / "site").index.record.tolist() == [0, 1]


def test_a_changed_record_is_noticed_and_not_overwritten(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "a", ecg_steps(seed=1))
    ingest(source, site_dir)
    write_record(source, "a", ecg_steps(seed=2))
    assert ingest(source, site_dir).turned_away == {"changed": 1}
    assert len(open_store(site_dir).index) == 1


def test_changed_labels_are_noticed(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "a", ecg_steps(seed=1), comments=["patient_id: 1"])
    for value in (12, 21):
        (source / "labels.csv").write_text(f"record,mpcwp_mmhg\na,{value}\n")
        summary = ingest(source, site_dir)
    assert summary.noticed == {"labels_differ": 1}
    assert open_store(site_dir).index.labels["mpcwp_mmhg"].tolist() == [12]


def test_duplicates_are_found_under_another_patient(tmp_path: Path) -> None:
    for name, patient in (("a", 1), ("b", 2), ("c", 3)):
        write_record(tmp_path / "source", name, ecg_steps(seed=5), comments=[f"patient_id: {patient}"])
    write_record(tmp_path / "source", "d", ecg_steps(seed=6))
    summary = ingest(tmp_path / "source", tmp_path / "site")
    assert summary.duplicates == [["a", "b", "c"]]
    assert (summary.stored, summary.turned_away) == (2, {"duplicate": 2})


def test_a_corrected_patient_is_refused_loudly(tmp_path: Path) -> None:
    """The stored ECG's split hangs on its patient: another one may be in another split."""
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "a", ecg_steps(seed=1), comments=["patient_id: 1"])
    ingest(source, site_dir)
    (source / "labels.csv").write_text("record,patient_id,age_years\na,1,50\n")
    summary = ingest(source, site_dir)
    assert (summary.already_stored, summary.noticed) == (1, {"details_differ": 1})
    (source / "labels.csv").write_text("record,patient_id\na,2\n")
    summary = ingest(source, site_dir)
    assert summary.turned_away == {"changed": 1}
    assert "its patient differs" in summary.examples[0]


def test_a_twin_of_the_same_name_in_another_archive_is_a_duplicate(tmp_path: Path) -> None:
    for archive, patient in (("x", 1), ("y", 2)):
        write_record(tmp_path / archive, "a", ecg_steps(seed=1), comments=[f"patient_id: {patient}"])
    ingest(tmp_path / "x", tmp_path / "site")
    summary = ingest(tmp_path / "y", tmp_path / "site")
    assert (summary.turned_away, summary.duplicates) == ({"duplicate": 1}, [["a", "a"]])


def test_another_quality_policy_does_not_make_records_changed(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    steps = ecg_steps(seed=1)
    steps[7, :2500] = 0
    write_record(source, "a", steps, comments=["patient_id: 1"])
    ingest(source, site_dir)
    settings = site_dir / "site.toml"
    assert 'flat_lead = "mask"' in settings.read_text()
    settings.write_text(settings.read_text().replace('flat_lead = "mask"', 'flat_lead = "accept"'))
    assert ingest(source, site_dir).already_stored == 1


def test_a_patient_is_no_condition(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="no patient id"):
        ReaderOptions(where=("patient_id=17",))


def test_a_mended_record_leaves_the_turned_away_table(tmp_path: Path) -> None:
    header = write_record(tmp_path / "source", "a")
    data = header.with_suffix(".dat").read_bytes()
    header.with_suffix(".dat").write_bytes(data[:-10])
    assert ingest(tmp_path / "source", tmp_path / "site").turned_away == {"truncated": 1}
    assert turned_away(tmp_path / "site") == {"a.hea": "truncated"}
    header.with_suffix(".dat").write_bytes(data)
    assert ingest(tmp_path / "source", tmp_path / "site").stored == 1
    assert turned_away(tmp_path / "site") == {}


def test_one_ingest_at_a_time(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a")
    ingest(tmp_path / "source", tmp_path / "site")
    with (tmp_path / "site" / LOCK_FILE).open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # even beside a mere reader of the lock
        with pytest.raises(HemoFedError, match="another ingest"):
            ingest(tmp_path / "source", tmp_path / "site")
    assert ingest(tmp_path / "source", tmp_path / "site").already_stored == 1


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from client.cli import main
sys.argv = ["hemofed-client", "ingest", *sys.argv[1:], "--quiet"]
main()
"""


def test_a_disk_that_is_full_is_one_line_and_the_store_stays_whole(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "r0", ecg_steps(seed=0), comments=["patient_id: 1"])
    ingest(source, site_dir)
    for record in range(1, 20):
        write_record(source, f"r{record}", ecg_steps(seed=record), comments=["patient_id: 1"])
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), "--site-dir", str(site_dir)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == ExitCode.BAD_SITE, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "File too large" in line
    assert len(open_store(site_dir).index) == 1
    assert ingest(source, site_dir).stored == 19


def test_name_and_disclosure_are_kept_from_the_first_ingest(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a")
    ingest(tmp_path / "source", tmp_path / "site", name="north", disclosure="masked", simulated=True)
    ingest(tmp_path / "source", tmp_path / "site")
    settings = load_site(tmp_path / "site")
    assert (settings.name, settings.disclosure, settings.simulated) == ("north", "masked", True)
    with pytest.raises(HemoFedError, match="'north', not 'south'"):
        ingest(tmp_path / "source", tmp_path / "site", name="south")
    with pytest.raises(HemoFedError, match="choose another"):
        ingest(tmp_path / "source", tmp_path / "site2", name="a/b")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a")
    write_record(tmp_path / "source", "b", ecg_steps(2))
    seen: list[tuple[int, int]] = []
    ingest(tmp_path / "source", tmp_path / "site", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)


def test_command_line(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "good", comments=["patient_id: 1"])
    write_record(source, "flat", np.zeros((12, 5000), np.int16), comments=["patient_id: 2"])
    write_record(source, "unit", gain="10/mmHg", comments=["patient_id: 3"])
    (source / "labels.csv").write_text("record,mpcwp_mmhg\ngood,400\n")
    ended = command("ingest", source, "--site-dir", site_dir, "--name", "north", "--json", "--quiet")
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads(ended.stdout)
    assert (outcome["read"], outcome["stored"], outcome["patients"]) == (3, 1, 1)
    assert outcome["turned_away"] == {"all_leads_flat": 1, "unknown_unit": 1}
    assert outcome["labels"] == {}
    assert outcome["duplicates"] == []
    lines = ended.stderr.splitlines()
    assert "hemofed-client: flat.hea: all_leads_flat: every lead is a constant; check the" in ended.stderr
    assert any("unit.hea: unknown_unit" in line and "state mV, uV or V" in line for line in lines)
    assert any("labels.csv line 2: absurd_label: mpcwp_mmhg = 400" in line for line in lines)
    card = json.loads(command("check", "--site-dir", site_dir, "--json").stdout)
    assert (card["site"], card["ecgs"], card["patients"]) == ("north", 1, 1)
    assert card["turned_away"] == {"all_leads_flat": 1, "unknown_unit": 1}


def test_the_table_is_printed(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a", comments=["patient_id: 1", "Sex: Female"])
    write_record(tmp_path / "source", "b", ecg_steps(2), comments=["patient_id: 1"])
    ended = command("ingest", tmp_path / "source", "--site-dir", tmp_path / "site")
    assert ended.returncode == 0
    assert "turned away: too_short" in ended.stdout
    shown = command("check", "--site-dir", tmp_path / "site").stdout
    assert "female" in shown
    assert "too_short" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ingest", "{tmp}/absent", "--site-dir", "{tmp}/s"], ExitCode.BAD_SOURCE, "absent: no such folder"),
        (["ingest", "{tmp}/empty", "--site-dir", "{tmp}/s"], ExitCode.BAD_SOURCE, "empty: no ECG records"),
        (["ingest", "{tmp}/short", "--site-dir", "{tmp}/s"], ExitCode.NOTHING_STORED, "none of 1 records"),
        (["ingest", "{tmp}/table", "--site-dir", "{tmp}/s"], ExitCode.BAD_SOURCE, "no column 'record'"),
        (["ingest", "{tmp}/short", "--site-dir", "{tmp}/s", "--where", "a=1"], ExitCode.USAGE, "has no use for it"),
        (["ingest", "{tmp}/short", "--site-dir", "{tmp}/s", "--disclosure", "x"], ExitCode.USAGE, "masked"),
        (["ingest", "{tmp}/short", "--site-dir", "{tmp}/s", "--format", "x"], ExitCode.USAGE, "cinc, scg-rhc, wfdb"),
        (["ingest", "{tmp}/short"], ExitCode.USAGE, "--site-dir"),
        (["ingest", "{tmp}/short", "--site-dir", "{tmp}/short/short.hea"], ExitCode.BAD_SITE, "short.hea"),
        (["check", "--site-dir", "{tmp}/empty"], ExitCode.BAD_SITE, "site.toml"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    (tmp_path / "empty").mkdir()
    write_record(tmp_path / "short", "short", ecg_steps(3), comments=["patient_id: 1"])
    write_record(tmp_path / "table", "r")
    (tmp_path / "table" / "labels.csv").write_text("name,mpcwp_mmhg\nr,4\n")
    typed = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hemofed-client", *typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hemofed-client: ")
    assert said in last


def test_a_mistake_ends_the_real_process_without_a_traceback(tmp_path: Path) -> None:
    ended = command("ingest", tmp_path / "absent", "--site-dir", tmp_path / "s")
    assert ended.returncode == ExitCode.BAD_SOURCE
    (line,) = ended.stderr.splitlines()
    assert line.endswith("absent: no such folder; give the folder that holds the records")
    assert not (tmp_path / "s").exists()
