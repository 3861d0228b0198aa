"""A forgotten patient: gone from index, signals and caches, kept out from then on, and what had used them is named."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client.forget import forget
from client.ingest import ingest
from client.pseudonym import patient_key
from client.schema import INDEX_FILE
from client.store import ROW_BYTES, SIGNAL_FILE, open_pooled, open_store, record_ids
from client.store_writer import WIPED_ROW
from client.uses import USES_FILE, note_use, uses_of
from shared_model.errors import ExitCode, HemoFedError
from tests.wfdb_fixtures import ecg_steps, write_record

PATIENTS = ("ann", "bob", "ann", "cem")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, patient in enumerate(PATIENTS):
        comments = [f"patient_id: {patient}"]
        write_record(tmp_path / "source", f"r{number}", ecg_steps(seed=number), comments=comments)
    header = write_record(tmp_path / "source", "short-of-ann", ecg_steps(2), comments=["patient_id: ann"])
    assert header.exists()
    (tmp_path / "source" / "labels.csv").write_text("record,mpcwp_mmhg\nr0,11\nr1,12\nr2,13\nr3,14\n")
    return tmp_path / "source"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "client.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def all_text(site_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in site_dir.glob(f"{INDEX_FILE}*"))


def test_nothing_of_the_patient_is_left_and_the_others_are_as_they_were(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    before = open_store(site_dir)
    kept = [position for position, name in enumerate(record_ids(site_dir)) if name in ("r1", "r3")]
    signals = before.read(np.array(kept))
    before.derived("mean", 1, lambda steps: steps[:, 0, :1].astype(np.float32))
    pseudonym = patient_key(site_dir).pseudonym("ann")
    gone = [
        position for position, key in enumerate(before.index.patient) if before.index.patient_keys[key] == pseudonym
    ]
    assert len(gone) == 2
    assert b"short-of-ann" in all_text(site_dir)  # the negative control of what is asserted below

    outcome = forget(site_dir, "ann")

    assert (outcome.ecgs, outcome.records, outcome.uses) == (2, 2, ())
    after = open_store(site_dir)
    assert record_ids(site_dir) == ["r1", "r3"]
    assert pseudonym not in after.index.patient_keys
    assert after.index.row.tolist() == [0, 1]
    assert after.index.labels["mpcwp_mmhg"].tolist() == [12, 14]
    np.testing.assert_array_equal(after.read(np.array([0, 1])), signals)
    file = (site_dir / SIGNAL_FILE).read_bytes()
    for row in gone:
        assert file[row * ROW_BYTES : (row + 1) * ROW_BYTES] == WIPED_ROW
    assert not (site_dir / "derived").exists()
    for name in (b"r0.hea", b"r2.hea", b"short-of-ann"):
        assert name not in all_text(site_dir)
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        assert connection.execute("SELECT patient, uses FROM forgotten").fetchall() == [(pseudonym, "[]")]
        assert connection.execute("SELECT count(*) FROM wipes").fetchone() == (0,)


def test_a_gap_does_not_shift_what_is_computed_of_each_ecg(source: Path, tmp_path: Path) -> None:
    ingest(source, tmp_path / "site")
    forget(tmp_path / "site", "bob")
    store = open_store(tmp_path / "site")
    first = store.derived("first", 1, lambda steps: steps[:, 0, :1].astype(np.float32))
    np.testing.assert_array_equal(first[:, 0], store.read(store.index.row)[:, 0, 0])
    pooled = open_pooled([tmp_path / "site", tmp_path / "site"])
    np.testing.assert_array_equal(pooled.read(pooled.index.row)[3:], store.read(store.index.row))


def test_a_forgotten_patient_is_not_ingested_again_and_others_are(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    forget(site_dir, "ann")
    write_record(source, "r9", ecg_steps(seed=9), comments=["patient_id: ann"])
    write_record(source, "s9", ecg_steps(seed=10), comments=["patient_id: bob"])
    summary = ingest(source, site_dir)
    assert summary.turned_away == {"forgotten": 4}
    assert (summary.stored, summary.already_stored) == (1, 2)
    assert record_ids(site_dir) == ["r1", "r3", "s9"]
    assert b"r9.hea" not in all_text(site_dir)
    rows = sqlite3.connect(site_dir / INDEX_FILE).execute("SELECT row FROM records ORDER BY row").fetchall()
    assert rows == [(1,), (3,), (4,)]  # the freed rows are not used again: a run's list of uses stays true


def test_the_last_rows_are_not_used_again_either(source: Path, tmp_path: Path) -> None:
    ingest(source, tmp_path / "site")
    forget(tmp_path / "site", "cem")
    write_record(source, "s9", ecg_steps(seed=10), comments=["patient_id: bob"])
    ingest(source, tmp_path / "site")
    rows = sqlite3.connect(tmp_path / "site" / INDEX_FILE).execute("SELECT max(row) FROM records").fetchall()
    assert rows == [(4,)]


def test_killed_between_index_and_signals_the_next_ingest_ends_it(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    script = (
        "import os, sys, client.forget as f\n"
        "f.open_signals = lambda *_: os._exit(9)\n"  # as if killed at that point
        "f.forget(sys.argv[1], 'ann')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(site_dir)]).returncode == 9
    file = (site_dir / SIGNAL_FILE).read_bytes()
    assert file[:ROW_BYTES] != WIPED_ROW
    ingest(source, site_dir)
    assert (site_dir / SIGNAL_FILE).read_bytes()[:ROW_BYTES] == WIPED_ROW
    assert record_ids(site_dir) == ["r1", "r3"]


def test_runs_that_used_the_patient_are_named(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    store = open_store(site_dir)
    split = ("train", "validation", "test")[store.index.split[record_ids(site_dir).index("r0")]]
    other = "test" if split == "train" else "train"
    for _ in range(2):
        note_use(site_dir, store, "ab" * 8, "demo", "pretrain", split)
    note_use(site_dir, store, "cd" * 8, "demo", "pretrain", other)
    assert len(uses_of(site_dir)) == 2
    (site_dir / "state" / ("ab" * 8)).mkdir(parents=True)
    with (site_dir / USES_FILE).open("a") as file:
        file.write('{"run_id": "cut')
    outcome = forget(site_dir, "ann")
    assert [use.run_id for use in outcome.uses] == ["ab" * 8]
    assert outcome.local_weights == (f"state/{'ab' * 8}",)


def test_records_stored_after_a_run_were_not_used_by_it(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    for split in ("train", "validation", "test"):
        note_use(site_dir, open_store(site_dir), "ab" * 8, "demo", "pretrain", split)
    write_record(source, "z", ecg_steps(seed=33), comments=["patient_id: zoe"])
    ingest(source, site_dir)
    assert forget(site_dir, "zoe").uses == ()
    assert forget(site_dir, "bob").uses != ()


def test_the_command_says_what_it_did(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    unknown = command("forget", "dora", "--site-dir", site_dir)
    assert unknown.returncode == ExitCode.NO_USABLE_PATIENTS
    (line,) = unknown.stderr.splitlines()
    assert "--also-unknown" in line
    assert command("forget", "dora", "--site-dir", site_dir, "--also-unknown").returncode == 0
    said = command("forget", "ann", "--site-dir", site_dir)
    assert said.returncode == 0, said.stderr
    assert "removed 2 ECGs of 2 records" in said.stdout
    assert "ann" not in said.stdout.replace("annotation", "")
    again = json.loads(command("forget", "ann", "--site-dir", site_dir, "--json").stdout)
    assert (again["ecgs"], again["uses"]) == (0, [])
    write_record(source, "d", ecg_steps(seed=44), comments=["patient_id: dora"])
    assert ingest(source, site_dir).turned_away["forgotten"] == 4


def test_without_a_store_or_beside_an_ingest_it_stops(source: Path, tmp_path: Path) -> None:
    ended = command("forget", "ann", "--site-dir", tmp_path)
    assert ended.returncode == ExitCode.BAD_SITE
    assert len(ended.stderr.splitlines()) == 1
    ingest(source, tmp_path / "site")
    (tmp_path / "site" / INDEX_FILE).unlink()
    with pytest.raises(HemoFedError, match="no site store"):
        forget(tmp_path / "site", "ann")


def test_the_same_signal_does_not_come_back_under_another_patient(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    for patient in ("ann", "bob"):
        write_record(source, f"of-{patient}", ecg_steps(seed=7), comments=[f"patient_id: {patient}"])
    assert ingest(source, site_dir).turned_away == {"duplicate": 1}
    forget(site_dir, "ann")
    assert b"of-ann" not in all_text(site_dir)  # neither its own rows nor its twin's reason
    assert ingest(source, site_dir).turned_away == {"forgotten": 2}
    assert b"of-bob" not in all_text(site_dir)


def test_what_names_a_record_goes_and_what_only_resembles_it_stays(tmp_path: Path) -> None:
    """An underscore is a letter of its own here, and a twin may lie in another archive."""
    source, other, site_dir = tmp_path / "source", tmp_path / "other", tmp_path / "site"
    for name, patient in (("a_1", "ann"), ("ax1", "bob")):
        write_record(source, name, ecg_steps(seed=len(patient) + ord(name[1])), comments=[f"patient_id: {patient}"])
        write_record(other, f"twin-of-{name}", comments=["patient_id: cem"])
        (other / f"twin-of-{name}.dat").write_bytes((source / f"{name}.dat").read_bytes())
    ingest(source, site_dir)
    assert ingest(other, site_dir).turned_away == {"duplicate": 2}
    forget(site_dir, "ann")
    assert b"a_1" not in all_text(site_dir)
    assert b"twin-of-ax1" in all_text(site_dir)


def test_a_patient_of_whom_all_was_turned_away_can_be_forgotten(tmp_path: Path) -> None:
    source, site_dir = tmp_path / "source", tmp_path / "site"
    write_record(source, "good", ecg_steps(seed=1), comments=["patient_id: bob"])
    write_record(source, "flat", np.zeros((12, 5000), np.int16), comments=["patient_id: ann"])
    ingest(source, site_dir)
    assert b"flat.hea" in all_text(site_dir)
    assert forget(site_dir, "ann").ecgs == 0
    assert b"flat.hea" not in all_text(site_dir)


def test_a_reader_of_the_index_is_told_of(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM records").fetchone()
        with pytest.raises(HemoFedError, match="another program is reading"):
            forget(site_dir, "ann")
    assert forget(site_dir, "ann").ecgs == 0
    assert b"r0.hea" not in all_text(site_dir)


def test_killed_after_the_commit_the_runs_are_still_known(source: Path, tmp_path: Path) -> None:
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    store = open_store(site_dir)
    store.derived("mean", 1, lambda steps: steps[:, 0, :1].astype(np.float32))
    for split in ("train", "validation", "test"):
        note_use(site_dir, store, "ab" * 8, "demo", "pretrain", split)
    script = "import os, sys, client.forget as f\nf.open_signals = lambda *_: os._exit(9)\nf.forget(sys.argv[1], 'ann')"
    assert subprocess.run([sys.executable, "-c", script, str(site_dir)]).returncode == 9
    assert (site_dir / "derived").exists()
    assert [use.run_id for use in forget(site_dir, "ann").uses] == ["ab" * 8]
    assert not (site_dir / "derived").exists()


def test_a_lost_or_foreign_key_is_never_replaced(source: Path, tmp_path: Path) -> None:
    """With another key a forgotten patient would be a stranger, and a known one would change sides."""
    site_dir = tmp_path / "site"
    ingest(source, site_dir)
    forget(site_dir, "ann")
    key = site_dir / "patient.key"
    kept = key.read_text()
    key.unlink()
    for again in (lambda: ingest(source, site_dir), lambda: forget(site_dir, "bob")):
        with pytest.raises(HemoFedError, match="restore"):
            again()
        assert not key.exists()
    key.write_text("11" * 32)
    key.chmod(0o600)
    for again in (lambda: ingest(source, site_dir), lambda: forget(site_dir, "bob")):
        with pytest.raises(HemoFedError, match="not the key that this store was made with"):
            again()
    key.write_text(kept)
    assert ingest(source, site_dir).turned_away == {"forgotten": 3}


def test_a_traceback_holds_no_patient_id(source: Path, tmp_path: Path) -> None:
    ingest(source, tmp_path / "site")
    script = (
        "import sys, client.cli as c\n"
        "def broken(*_): raise RuntimeError('a fault of the program')\n"
        "c.forget_patient = broken\n"
        "sys.argv = ['hemofed-client', 'forget', 'SECRETPAT1', '--site-dir', sys.argv[1]]\n"
        "c.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "site")], capture_output=True, text=True)
    assert "a fault of the program" in ended.stderr
    assert "SECRETPAT1" not in ended.stderr
