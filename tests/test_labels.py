"""Labels by event in a site store: imported, joined, joined again, and read back; through the real command too."""

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from client.forget import forget
from client.ingest import ingest
from client.label_command import label_site
from client.labels import join, late_label, settings_of
from client.lock import hold_lock
from client.pseudonym import KEY_FILE, patient_key
from client.records.record import EcgRecord, Noticed, unix_seconds
from client.schema import INDEX_FILE, connect
from client.store import SIGNAL_FILE, RecordIndex, open_store
from shared_model.errors import ExitCode, HemoFedError
from tests.archive_fixtures import MIMIC_ORDER, write_table, write_wfdb
from tests.event_fixtures import CVP, HEART_RATE, PA_MEAN, WEDGE, chart_row, write_chart
from tests.wfdb_fixtures import ecg_steps, write_record

ECGS = {
    "a1": ("A", "2024-05-01T06:00"),
    "a2": ("A", "2024-05-01T09:00"),
    "a3": ("A", "2024-05-01T11:00"),
    "b1": ("B", "2024-05-01T12:00"),
    "c1": ("C", "2024-05-01T09:00"),
    "d1": ("D", ""),
}
CATH = (
    "patient_id,measured_at,mpcwp_mmhg,co_l_min\n"
    "A,2024-05-01T10:00,21,4.5\n"  # a2 is an hour before, a3 an hour after
    "A,2024-05-02T08:00,19,\n"  # a3, 21 h before
    "B,2024-05-01T11:00,12,\n"  # an ECG after it only
    "C,2024-05-04T09:00,17,\n"  # 72 h
    "D,2024-05-01T10:00,14,\n"  # its ECG has no time
    "E,2024-05-01T10:00,15,\n"  # no ECG
)


def make_site(folder: Path, columns: str = "", cells: dict[str, str] | None = None, seconds: float = 10) -> Path:
    """ECGS in a site store; `columns` and `cells` (by record) go into its labels.csv."""
    rows = [f"record,patient_id,recorded_at{columns}"]
    for seed, (name, (patient, recorded_at)) in enumerate(ECGS.items()):
        write_record(folder / "source", name, ecg_steps(seconds, 250, seed=seed), rate_hz=250)
        rows.append(f"{name},{patient},{recorded_at}{(cells or {}).get(name, ',' * columns.count(','))}")
    (folder / "source" / "labels.csv").write_text("\n".join(rows))
    ingest(folder / "source", folder / "site")
    return folder / "site"


def write_cath(folder: Path, text: str = CATH, name: str = "cath.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def wedges(index: RecordIndex) -> dict[str, float]:
    """Record -> wedge pressure, of those that have one; the rows are ECGS in order."""
    values = index.labels.get("mpcwp_mmhg", np.full(len(index), np.nan))
    return {name: float(value) for name, value in zip(ECGS, values, strict=True) if not np.isnan(value)}


def tables(site_dir: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        names = ("meta", "events", "event_values", "record_events")
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def test_import_join_and_read_back(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    report = label_site(site_dir, write_cath(tmp_path))
    assert report.imported is not None
    assert (report.imported.events, report.imported.events_new, report.imported.dropped) == (6, 6, {})
    joined = report.joined
    assert (joined.events, joined.events_joined, joined.events_passed_over) == (6, 2, 0)
    assert (joined.events_outside_window, joined.events_without_patient) == (2, 2)
    assert (joined.patients, joined.patients_without_ecg, joined.patients_labelled) == (5, 2, 1)
    index = open_store(site_dir).index
    assert wedges(index) == {"a2": 21, "a3": 19}
    assert np.nan_to_num(index.labels["co_l_min"]).tolist() == [0, 4.5, 0, 0, 0, 0]
    measured_at = [unix_seconds("2024-05-01T10:00"), unix_seconds("2024-05-02T08:00")]
    assert index.measured_at[1:3].tolist() == measured_at
    assert np.isnan(index.measured_at[[0, 3, 4, 5]]).all()


def test_other_windows_and_sides_join_the_stored_events_again(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    label_site(site_dir, write_cath(tmp_path))
    before = tables(site_dir)
    expected = [
        (72.0, "before", {"a2": 21, "a3": 19, "c1": 17}, 0),
        (1.0, "before", {"a2": 21}, 0),
        (24.0, "either", {"a2": 21, "a3": 19, "b1": 12}, 1),
        (24.0, "before", {"a2": 21, "a3": 19}, 0),
    ]
    for window_hours, side, found, after in expected:
        report = label_site(site_dir, window_hours=window_hours, side=side)  # type: ignore[arg-type]
        assert wedges(open_store(site_dir).index) == found
        assert report.joined.ecgs_labelled_after_event == after
        # What was chosen stays chosen.
        assert label_site(site_dir).settings == report.settings
    after = tables(site_dir)
    assert {**after, "meta": []} == {**before, "meta": []}
    assert set(after["meta"]) >= {("label_window_hours", "24"), ("label_side", "before")}


def test_importing_again_adds_nothing_and_a_difference_is_told(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    label_site(site_dir, write_cath(tmp_path))
    before = tables(site_dir)
    again = label_site(site_dir, write_cath(tmp_path)).imported
    assert again is not None
    assert (again.events_new, again.events_differing) == (0, 0)
    assert tables(site_dir) == before
    mended = write_cath(tmp_path, CATH.replace("21,4.5", "22,4.5").replace("E,2024-05-01T10", "E,2024-05-01T11"))
    differing = label_site(site_dir, mended).imported
    assert differing is not None
    assert (differing.events_new, differing.events_differing) == (1, 1)
    assert wedges(open_store(site_dir).index) == {"a2": 21, "a3": 19}
    replaced = label_site(site_dir, mended, replace=True)
    assert replaced.imported is not None
    assert (replaced.imported.events_new, replaced.joined.events) == (6, 6)
    assert wedges(open_store(site_dir).index) == {"a2": 22, "a3": 19}


def test_events_wait_for_ecgs_that_come_later(tmp_path: Path) -> None:
    """`join` after an ingest finds what an import after all ECGs finds, and writes nothing where nothing changed."""
    site_dir = make_site(tmp_path / "at_once")
    label_site(site_dir, write_cath(tmp_path))
    (tmp_path / "source").mkdir()
    for path in (tmp_path / "at_once" / "source").glob("a1.*"):
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source" / "labels.csv").write_bytes((tmp_path / "at_once" / "source" / "labels.csv").read_bytes())
    ingest(tmp_path / "source", tmp_path / "site")
    label_site(tmp_path / "site", tmp_path / "cath.csv")
    ingest(tmp_path / "at_once" / "source", tmp_path / "site")
    with closing(connect(tmp_path / "site")) as connection:
        join(connection)
        assert tables(tmp_path / "site")["record_events"] == tables(site_dir)["record_events"]
        changes = connection.total_changes
        join(connection)
        assert connection.total_changes == changes


def test_the_index_has_pseudonyms_only_and_forgotten_patients_stay_away(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    key = patient_key(site_dir)
    with closing(connect(site_dir)) as connection:
        connection.execute("INSERT INTO forgotten VALUES (?, '2024-06-01', '[]')", (key.pseudonym("secret-7"),))
    text = CATH.replace("E,", "secret-8,") + "secret-7,2024-05-01T10:00,15,\n"
    report = label_site(site_dir, write_cath(tmp_path, text))
    assert report.imported is not None
    assert (report.imported.events_new, report.imported.events_of_forgotten) == (6, 1)
    patients = {patient for _, patient, *_ in tables(site_dir)["events"]}
    assert key.pseudonym("secret-8") in patients
    assert key.pseudonym("secret-7") not in patients
    assert b"secret-" not in b"".join(path.read_bytes() for path in site_dir.glob(f"{INDEX_FILE}*"))
    assert "secret-" not in repr(report)


def test_the_records_own_label_goes_before_the_events(tmp_path: Path) -> None:
    own = {"a2": ",2024-05-01T09:30,25,1", "a3": ",,,0"}
    site_dir = make_site(tmp_path, ",measured_at,mpcwp_mmhg,af", own)
    label_site(site_dir, write_cath(tmp_path))
    index = open_store(site_dir).index
    assert wedges(index) == {"a2": 25, "a3": 19}
    assert index.labels["co_l_min"][1] == 4.5  # the record says nothing of it
    assert index.labels["af"][1:3].tolist() == [1, 0]
    assert index.measured_at[1] == unix_seconds("2024-05-01T09:30")
    assert index.measured_at[2] == unix_seconds("2024-05-02T08:00")  # the rhythm has no time of its own


def test_labels_stay_with_their_ecgs_when_a_patient_before_them_is_forgotten(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path, ",measured_at,mpcwp_mmhg", {"b1": ",2024-05-01T12:30,13"})
    label_site(site_dir, write_cath(tmp_path), window_hours=72)
    assert forget(site_dir, "A").events == 2
    index = open_store(site_dir).index
    assert np.nan_to_num(index.labels["mpcwp_mmhg"]).tolist() == [13, 17, 0]
    assert index.measured_at[1] == unix_seconds("2024-05-04T09:00")
    again = label_site(site_dir, write_cath(tmp_path))
    assert again.imported is not None
    assert (again.imported.events_new, again.imported.events_of_forgotten, again.joined.events) == (0, 2, 4)


def test_segments_that_begin_after_the_event_are_not_labelled(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path, seconds=60)
    cath = write_cath(tmp_path, "patient_id,measured_at,mpcwp_mmhg\nC,2024-05-01T09:00:25,20\n")
    for side, labelled in (("before", 3), ("either", 6)):
        report = label_site(site_dir, cath, side=side)  # type: ignore[arg-type]
        assert (report.joined.ecgs_labelled, report.joined.segments_labelled) == (1, labelled)
        index = open_store(site_dir).index
        chosen = ~np.isnan(index.labels["mpcwp_mmhg"])
        assert chosen.sum() == labelled
        assert side == "either" or (index.recorded_at[chosen] <= index.measured_at[chosen]).all()


def test_a_records_own_label_from_before_it_is_not_used(tmp_path: Path) -> None:
    """Up to a minute counts as the same moment; `either` uses it; without both times nothing can be seen."""
    own = {
        "a1": ",2024-05-01T05:59:00,11",
        "a2": ",2024-05-01T08:58:59,12",
        "a3": ",2024-05-01T11:00:00,13",
        "b1": ",,14",
        "d1": ",2024-05-01T11:00:00,15",
    }
    site_dir = make_site(tmp_path, ",measured_at,mpcwp_mmhg", own)
    index = open_store(site_dir).index
    assert wedges(index) == {"a1": 11, "a3": 13, "b1": 14, "d1": 15}
    assert np.isnan(index.measured_at[1])
    label_site(site_dir, side="either")
    assert wedges(open_store(site_dir).index) == {"a1": 11, "a2": 12, "a3": 13, "b1": 14, "d1": 15}
    record = EcgRecord("r", "r.hea", np.zeros((1, 1), np.float32), ("I",), 250, "P", 161.0, labels={"x": 1})
    assert late_label(record) is None
    for measured_at, labels, late in ((100.0, {"x": 1.0}, True), (101.0, {"x": 1.0}, False), (100.0, {}, False)):
        remark = late_label(EcgRecord(**{**vars(record), "measured_at": measured_at, "labels": labels}))
        assert (remark is not None and remark.noticed is Noticed.ECG_AFTER_MEASUREMENT) == late


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", "labels", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


STUDIES = {  # study -> (subject, time)
    40689238: (10000032, "2180-07-23 08:44:00"),
    44458630: (10000032, "2180-07-23 13:00:00"),
    49036311: (10000980, "2180-07-23 12:00:00"),
    45090959: (10001217, "2180-07-23 12:00:00"),
}


def make_mimic_site(folder: Path) -> Path:
    """MIMIC-IV-ECG as the archive has it, four studies of three subjects, ingested."""
    rows = []
    for study, (subject, ecg_time) in STUDIES.items():
        path = f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"
        comments = [f"<subject_id>: {subject}"]
        write_wfdb(folder / "ecg", path, ecg_steps(seed=study) // 5, 200.0, MIMIC_ORDER, comments=comments)
        rows.append({"subject_id": subject, "study_id": study, "file_name": study, "ecg_time": ecg_time, "path": path})
    write_table(folder / "ecg" / "record_list.csv", rows)
    ingest(folder / "ecg", folder / "site")
    return folder / "site"


def test_mimic_iv_through_the_command(tmp_path: Path) -> None:
    site_dir = make_mimic_site(tmp_path)
    chart = write_chart(
        tmp_path / "chartevents.csv.gz",
        [
            chart_row(10000032, "09:00", CVP, 9),  # nearer to the first ECG, but without a wedge
            chart_row(10000032, "12:00", WEDGE, 22),
            chart_row(10000032, "12:00", PA_MEAN, 30),
            chart_row(10000032, "12:00", WEDGE, 24),
            chart_row(10000032, "12:30", HEART_RATE, 24),
            chart_row(10000980, "11:00", WEDGE, 14),  # its ECG is an hour later
            chart_row(10001217, "2180-07-25 12:00:00", WEDGE, 17),  # 48 h
            chart_row(19999999, "12:00", WEDGE, 17),  # no ECG
            chart_row(10001217, "12:00", WEDGE, 999),
        ],
    )
    done = command(chart, "--site-dir", site_dir, "--summary", "--json")
    assert done.returncode == 0, done.stderr
    assert "hemofed-client:" not in done.stderr
    report = json.loads(done.stdout)
    assert report["imported"]["dropped"] == {"out_of_range": 1}
    assert (report["imported"]["rows"], report["imported"]["values_read"], report["imported"]["events"]) == (9, 8, 5)
    assert report["joined"] == {
        **{"events": 5, "events_joined": 1, "events_passed_over": 1, "events_outside_window": 2},
        **{"events_without_patient": 1, "patients": 4, "patients_without_ecg": 1},
        **{"ecgs_labelled": 1, "ecgs_labelled_after_event": 0, "segments_labelled": 1, "patients_labelled": 1},
    }
    wedge = report["labels"]["mpcwp_mmhg"]
    assert (wedge["events"], wedge["ecgs"], wedge["median"], wedge["share_above"]) == (4, 1, 23, {"15": 1, "18": 1})
    windows = {(line["side"], line["window_hours"]): line for line in report["windows"]}
    assert len(windows) == 14
    # 1 h after is 1 h away; 48 h before is not within 24.
    assert [windows["before", hours]["ecgs"] for hours in (1, 6, 24, 48)] == [0, 1, 1, 2]
    assert [windows["either", hours]["ecgs"] for hours in (1, 6, 24, 48)] == [2, 2, 2, 3]
    assert windows["either", 1]["ecgs_after_event"] == 2
    assert windows["either", 48]["share_above"] == {"15": pytest.approx(2 / 3), "18": pytest.approx(1 / 3)}
    index = open_store(site_dir).index
    assert np.nan_to_num(index.labels["mpcwp_mmhg"]).tolist() == [23, 0, 0, 0]

    shown = command("--site-dir", site_dir, "--window-hours", "48", "--side", "either", "--summary")
    assert shown.returncode == 0
    assert "recorded after their event" in shown.stdout
    for text in (shown.stdout, json.dumps(report)):
        assert not any(str(name) in text for study, (subject, _) in STUDIES.items() for name in (study, subject))
    assert command("--site-dir", site_dir, "--quiet").stdout == ""


def test_a_table_that_labels_nothing_says_why(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    strangers = write_cath(tmp_path, "patient_id,measured_at,mpcwp_mmhg\nX,2024-05-01T10:00,20\n", "x.csv")
    assert "no patient of the table" in label_site(site_dir, strangers).hint
    late = write_cath(tmp_path, "patient_id,measured_at,mpcwp_mmhg\nB,2024-05-01T11:00,20\n")
    assert "within the window" in label_site(site_dir, late).hint
    assert label_site(site_dir, late, side="either").hint == ""


@pytest.mark.parametrize(
    ("arguments", "text", "code", "said"),
    [
        (("cath.csv", "--window-hours", "-3"), CATH, ExitCode.USAGE, "1 to 168"),
        (("cath.csv", "--window-hours", "169"), CATH, ExitCode.USAGE, "1 to 168"),
        (("cath.csv", "--window-hours", "nan"), CATH, ExitCode.USAGE, "1 to 168"),
        (("cath.csv", "--side", "after"), CATH, ExitCode.USAGE, "before or either"),
        (("--replace",), CATH, ExitCode.USAGE, "name one"),
        (("absent.csv",), CATH, ExitCode.BAD_SOURCE, "no such file"),
        (("cath.csv",), "patient_id;measured_at\nA;2024-05-01\n", ExitCode.BAD_SOURCE, "commas"),
        (("cath.csv",), CATH + '"A,2024-05-09,12\n', ExitCode.BAD_SOURCE, "cannot be read"),
        (
            ("cath.csv",),
            "patient_id,measured_at,mpcwp_mmhg\nA,2024-05-01,999\n",
            ExitCode.NOTHING_STORED,
            "out_of_range 1",
        ),
        (("cath.csv",), "patient_id,measured_at\nA,2024-05-01\n", ExitCode.NOTHING_STORED, "no numbers"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(
    tmp_path: Path, arguments: tuple[str, ...], text: str, code: ExitCode, said: str
) -> None:
    site_dir = make_site(tmp_path)
    label_site(site_dir, write_cath(tmp_path, name="first.csv"))
    before = (tables(site_dir), (site_dir / SIGNAL_FILE).read_bytes())
    write_cath(tmp_path, text)
    paths = [str(tmp_path / word) if word.endswith(".csv") else word for word in arguments]
    window = () if "--window-hours" in arguments else ("--window-hours", "9")
    done = command(*paths, *window, "--site-dir", site_dir, "--quiet")
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tables(site_dir), (site_dir / SIGNAL_FILE).read_bytes()) == before


def test_folders_that_are_refused(tmp_path: Path) -> None:
    cath = write_cath(tmp_path)
    with pytest.raises(HemoFedError, match="ingest ECGs first") as caught:
        label_site(tmp_path / "nowhere", cath)
    assert caught.value.exit_code == ExitCode.BAD_SITE
    assert not (tmp_path / "nowhere").exists()
    site_dir = make_site(tmp_path)
    with hold_lock(site_dir), pytest.raises(HemoFedError, match="at work"):
        label_site(site_dir, cath)
    with hold_lock(site_dir):
        label_site(site_dir, summary=True)  # looking needs no lock
    (site_dir / KEY_FILE).unlink()
    with pytest.raises(HemoFedError, match=KEY_FILE):
        label_site(site_dir, cath)
    assert not (site_dir / KEY_FILE).exists()


@pytest.mark.parametrize("wait_s", [0.0, 0.15, 0.4])
def test_a_killed_import_leaves_the_store_as_it_was(tmp_path: Path, wait_s: float) -> None:
    """Killed while the index is being written; run again, it ends as if nothing had happened."""
    site_dir = make_site(tmp_path)
    label_site(site_dir, write_cath(tmp_path))
    before = tables(site_dir)
    rows = "".join(f"P{row % 977},2024-05-01T10:00:{row // 977:02},20\n" for row in range(40_000))
    large = write_cath(tmp_path, f"patient_id,measured_at,mpcwp_mmhg\n{rows}A,2024-05-01T10:00,21\n", "large.csv")
    process = subprocess.Popen([sys.executable, "-m", "client.cli", "labels", large, "--site-dir", site_dir, "--quiet"])
    wal = site_dir / f"{INDEX_FILE}-wal"
    while process.poll() is None and not (wal.exists() and wal.stat().st_size):
        time.sleep(0.002)
    time.sleep(wait_s)
    process.kill()
    process.wait()
    left = tables(site_dir)
    assert left == before or len(left["events"]) == 40_007  # all or nothing
    label_site(site_dir, large)
    assert len(tables(site_dir)["events"]) == 40_007
    assert wedges(open_store(site_dir).index) == {"a2": 21, "a3": 19}


def test_settings_of_a_new_store(tmp_path: Path) -> None:
    with closing(connect(tmp_path)) as connection:
        assert (settings_of(connection).window_hours, settings_of(connection).side) == (24, "before")
