"""labels.csv and patients' ids: rows out of line, implausible values, spellings of an id, and a key that is gone."""

import hmac
import re
import sqlite3
import unicodedata
from contextlib import closing
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.card_screen import section
from client.event_table import Cells
from client.forget import forget
from client.gallery import refused_ecgs, refused_records
from client.ingest import ingest
from client.label_command import label_site
from client.labels import import_events
from client.plain_text import printable, shown
from client.pseudonym import KEY_FILE, PatientKey, patient_key, plain_patient_id, read_patient_key
from client.records import open_archive
from client.records.labels_csv import read_labels
from client.records.options import ReaderOptions
from client.records.plausible import RANGES
from client.records.record import EcgRecord, Noticed, Remark, unix_seconds
from client.schema import INDEX_FILE, connect
from client.store import open_store
from shared_model.errors import ExitCode, HemoFedError
from tests.archive_fixtures import ARCHIVES
from tests.wfdb_fixtures import ecg_steps, write_record

KEY = PatientKey(bytes(range(32)))
HEADER = "record,patient_id,mpcwp_mmhg,mpap_mmhg,co\n"


def labels_of(path: Path, text: str) -> tuple[dict[str, dict[str, float]], list[Remark]]:
    path.write_text(text)
    table = read_labels(path)
    return {name: dict(row.labels) for name, row in table.rows.items()}, list(table.remarks)


@pytest.mark.parametrize(("row", "cells"), [("r0,P0,12,5,25,4", 6), ("r0,P0,12", 3)])
def test_a_row_out_of_line_gives_no_label(tmp_path: Path, row: str, cells: int) -> None:
    path = tmp_path / "labels.csv"
    labels, remarks = labels_of(path, f"{HEADER}{row}\nr1,P1,12.5,25,4\n\n")
    assert labels == {"r0": {}, "r1": {"mpcwp_mmhg": 12.5, "mpap_mmhg": 25, "co": 4}}
    assert [remark.noticed for remark in remarks] == [Noticed.TEXT_LABEL]
    assert remarks[0].source == "labels.csv line 2"
    assert f"{cells} cells, but the header has 5" in remarks[0].detail
    assert read_labels(path).rows["r0"].patient_id == "P0"


def test_a_row_out_of_line_does_not_make_a_text_column_a_label(tmp_path: Path) -> None:
    text = "record,mpcwp_mmhg,ward\nr0,12,5,CCU\nr1,14,CCU\n"
    labels, remarks = labels_of(tmp_path / "labels.csv", text)
    assert labels == {"r0": {}, "r1": {"mpcwp_mmhg": 14}}
    assert {remark.noticed for remark in remarks} == {Noticed.TEXT_LABEL, Noticed.TEXT_COLUMN}


@pytest.mark.parametrize("column", [*RANGES, "co"])
def test_the_ranges_of_labels_csv_are_those_of_event_tables(tmp_path: Path, column: str) -> None:
    cells = Cells(labels=(column,))
    values = [-1e300, -10.5, -10, 0, 0.4, 0.5, 1, 3, 20, 20.5, 60, 61, 100, 101, 151, 1e300]
    rows = "".join(f"r{place},{value!r}\n" for place, value in enumerate(values))
    labels, remarks = labels_of(tmp_path / "labels.csv", f"record,{column}\n{rows}")
    assert [bool(labels[f"r{place}"]) for place in range(len(values))] == [cells.plausible(0, v) for v in values]
    assert {remark.noticed for remark in remarks} == {Noticed.ABSURD_LABEL}
    assert not labels["r0"]
    assert not labels["r15"]
    stored = np.array([value for row in labels.values() for value in row.values()], np.float32)
    assert np.isfinite(stored).all()


def test_a_wedge_of_zero_was_not_measured(tmp_path: Path) -> None:
    labels, _ = labels_of(tmp_path / "labels.csv", "record,mpcwp_mmhg\nr0,0\nr1,1\n")
    assert labels == {"r0": {}, "r1": {"mpcwp_mmhg": 1}}


ORDINARY = st.from_regex(r"[A-Za-z0-9_\-:/]([A-Za-z0-9_\-:/ .]*[A-Za-z0-9_\-:/])?", fullmatch=True).filter(
    lambda text: re.fullmatch(r"[0-9]+\.0", text) is None
)


@given(ORDINARY)
def test_pseudonyms_of_ordinary_ids_are_what_they_were(patient_id: str) -> None:
    was = hmac.digest(KEY.secret, f"patient\0{patient_id}".encode(), "sha256")[:16].hex()
    assert KEY.pseudonym(patient_id) == was
    assert plain_patient_id(patient_id) == patient_id


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cf"])),
    st.sampled_from(["\u200b", "\ufeff", "\u00ad", "\u200e"]),
    st.sampled_from(["", " ", "\t", "\u00a0"]),
)
def test_spellings_of_an_id_are_one_patient(patient_id: str, invisible: str, blank: str) -> None:
    spelled = blank + unicodedata.normalize("NFD", patient_id) + invisible + blank
    assert KEY.pseudonym(spelled) == KEY.pseudonym(patient_id)
    assert KEY.split(spelled) == KEY.split(patient_id)
    plain = plain_patient_id(patient_id)
    assert plain_patient_id(plain) == plain


@given(st.integers(0))
def test_a_whole_number_with_a_decimal_is_the_number(number: int) -> None:
    assert plain_patient_id(f"{number}.0") == str(number)


@pytest.mark.parametrize(
    ("one", "other"),
    [("17", "017"), ("17.5", "17"), ("17.00", "17"), ("A17.0", "A17"), ("-17.0", "-17"), ("a", "A"), ("1 7", "17")],
)
def test_other_ids_stay_different(one: str, other: str) -> None:
    assert KEY.pseudonym(one) != KEY.pseudonym(other)


def make_site(folder: Path, labels: str) -> Path:
    (folder / "source").mkdir()
    (folder / "source" / "labels.csv").write_text(labels, encoding="utf-8")
    for seed, name in enumerate(("r0", "r1", "r2")):
        write_record(folder / "source", name, ecg_steps(10, 250, seed=seed), rate_hz=250)
    ingest(folder / "source", folder / "site")
    return folder / "site"


def test_tables_and_forget_find_a_patient_however_spelled(tmp_path: Path) -> None:
    records = "".join(f"r{place},{who},2024-05-01T09:00\n" for place, who in enumerate(("17", "17.0", "Zo\u00eb")))
    site_dir = make_site(tmp_path, f"record,patient_id,recorded_at\n{records}")
    assert len(open_store(site_dir).index.patient_keys) == 2
    table = tmp_path / "cath.csv"
    rows = "".join(f"{who},2024-05-01T10:00,20\n" for who in ("17.0", "17", "\u200bZoe\u0308", "\u200b"))
    table.write_text(f"patient_id,measured_at,mpcwp_mmhg\n{rows}", encoding="utf-8")
    report = label_site(site_dir, table)
    assert report.imported is not None
    assert (report.imported.events, report.imported.dropped) == (2, {"no_patient": 1})
    assert report.joined.patients_labelled == 2
    forget(site_dir, " 17.0")
    assert len(open_store(site_dir).index.patient_keys) == 1


def test_reading_a_key_never_makes_one(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="restore it from a backup") as caught:
        read_patient_key(tmp_path)
    assert caught.value.exit_code == ExitCode.BAD_SITE
    assert not list(tmp_path.iterdir())
    key = patient_key(tmp_path)
    assert read_patient_key(tmp_path) == key
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(HemoFedError, match="chmod 600"):
        read_patient_key(tmp_path)


def test_drawing_what_was_refused_makes_no_key(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "short", ecg_steps(1, 250), rate_hz=250)
    site_dir = make_site_beside(tmp_path)
    forget(site_dir, "17")
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        refused = refused_records(connection, 5, seed=0)
        assert [each.source for each in refused] == ["short.hea"]
        assert len(refused_ecgs(site_dir, connection, refused)) == 1
        (site_dir / KEY_FILE).unlink()
        with pytest.raises(HemoFedError, match="restore it from a backup"):
            refused_ecgs(site_dir, connection, refused)
    assert not (site_dir / KEY_FILE).exists()


def make_site_beside(folder: Path) -> Path:
    write_record(folder / "source", "r0", ecg_steps(10, 250), rate_hz=250, comments=["patient_id: 17"])
    ingest(folder / "source", folder / "site")
    return folder / "site"


def test_a_table_of_a_header_only_is_no_error_where_that_is_allowed(tmp_path: Path) -> None:
    site_dir = make_site_beside(tmp_path)
    empty, broken = tmp_path / "labels.csv", tmp_path / "broken.csv"
    empty.write_text("patient_id,measured_at,mpcwp_mmhg\n")
    broken.write_text("patient_id,measured_at,mpcwp_mmhg\n17,yesterday,20\n")
    with closing(connect(site_dir)) as connection:
        counts = import_events(connection, KEY, empty, empty_ok=True)
        assert (counts.rows, counts.events, counts.events_new, counts.values_read) == (0, 0, 0, 0)
        for path, allowed in ((empty, False), (broken, False), (broken, True)):
            with pytest.raises(HemoFedError, match="gives a measurement") as caught:
                import_events(connection, KEY, path, empty_ok=allowed)
            assert caught.value.exit_code == ExitCode.NOTHING_STORED


@pytest.mark.parametrize("format_name", ["ptbxl", "code15"])
def test_archives_with_tables_of_their_own_read_labels_csv(tmp_path: Path, format_name: str) -> None:
    whole = ARCHIVES[format_name].write(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "record,recorded_at,measured_at,mpcwp_mmhg,mi\n"
        f"{whole.record_id},2024-05-01T09:00,2024-05-01T10:00,21,0\nnobody,,,9,\n{whole.record_id},,,30,\n"
    )
    items = list(open_archive(tmp_path, format_name, ReaderOptions()).items)
    (record,) = (item for item in items if isinstance(item, EcgRecord) and item.record_id == whole.record_id)
    assert dict(record.labels) == {**whole.labels, "mpcwp_mmhg": 21, "mi": 0}
    assert (record.recorded_at, record.measured_at) == tuple(
        unix_seconds(f"2024-05-01T{hour}:00") for hour in ("09", "10")
    )
    assert (record.patient_id, record.age_years, record.sex) == (whole.patient_id, whole.age_years, whole.sex)
    noticed = {item.noticed: item.source for item in items if isinstance(item, Remark)}
    assert noticed[Noticed.LABEL_WITHOUT_RECORD] == "labels.csv: nobody"
    assert noticed[Noticed.REPEATED_LABEL_ROW] == "labels.csv line 4"


@given(st.text(st.characters()))
def test_printable_text_has_nothing_that_steers_a_terminal(text: str) -> None:
    safe = printable(text)
    assert not {unicodedata.category(character) for character in safe} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(safe) == safe
    if text.isascii() and text.isprintable():
        assert safe == text


def test_names_in_tables_are_shown_as_they_are_and_steer_nothing() -> None:
    name = "wedge [bold]\x1b[31m\u202e\n\u00e9"
    assert printable(name) == r"wedge [bold]\x1b[31m\u202e\né"
    console = Console(file=StringIO(), width=100)
    table = section("Noticed", [(name, "1")])
    assert table is not None
    console.print(table, shown(name))
    assert isinstance(console.file, StringIO)
    said = console.file.getvalue()
    assert said.count(r"wedge [bold]\x1b[31m\u202e\né") == 2
    assert "\x1b" not in said
