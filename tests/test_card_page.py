"""The data card's page: what it shows, what it keeps to itself, and that a browser agrees."""

import re
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.card import data_card, open_index
from client.card_labels import read_label_table
from client.card_page import write_card_page, write_private
from client.forget import forget
from client.gallery import found_in, on_paper, random_rows, refused_ecgs, refused_records, stored_ecgs, worst_rows
from client.ingest import ingest
from client.records import open_archive
from client.records.options import ReaderOptions
from client.records.record import Archive, EcgRecord, TurnedAway
from client.schema import INDEX_FILE
from client.site import load_site, write_site
from client.store import open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, MISSING
from tests.archive_fixtures import ARCHIVES
from tests.browser import Page, asked_for, browse, measured_widths, needs_browser
from tests.clinical_fixtures import write_muse, write_scg_rhc
from tests.realdata import REAL_DATA, needs_real_data
from tests.wfdb_fixtures import ecg_steps, write_record

HOSTILE = '"><script>document.title="owned"</script><img src=x> {{ 7*7 }}'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty whole records of fifteen patients, and one of each of five faults."""
    folder = tmp_path_factory.mktemp("page") / "source"
    rows = ["record,mpcwp_mmhg,device_note"]
    for number in range(30):
        comments = [f"patient_id: patient-{number // 2}", f"Age: {30 + number}", "Sex: Female"]
        write_record(folder, f"r{number:02}", ecg_steps(seed=number), comments=comments)
        rows.append(f"r{number:02},{8 + number / 2},")
    (folder / "labels.csv").write_text("\n".join(rows))
    write_record(folder, "twin", ecg_steps(seed=3), comments=["patient_id: other"])
    write_record(folder, "short", ecg_steps(3), comments=["patient_id: other"])
    write_record(folder, "flat", np.full((12, 5000), 90, np.int16), comments=["patient_id: other"])
    offset = ecg_steps(seed=99) + 20000
    write_record(folder, "offset", offset.astype(np.int16), gain="200(0)/mV", comments=["patient_id: other"])
    header = write_record(folder, "cut", ecg_steps(seed=98))
    header.with_suffix(".dat").write_bytes(b"cut")
    return folder


@pytest.fixture(scope="module")
def site_dir(source: Path) -> Path:
    folder = source.parent / "site"
    ingest(source, folder, name="north", patient_key=bytes(32))  # a random split shows a small count now and then
    with closing(sqlite3.connect(folder / INDEX_FILE)) as connection, connection:
        connection.execute("UPDATE records SET quality = 1.0 / (1 + row)")
        connection.execute("UPDATE records SET quality = NULL WHERE row < 4")  # as an older release left them
        connection.execute("INSERT INTO measurements SELECT row, 'heart_rate_bpm', 60 + row FROM records")
    return folder


@pytest.fixture(scope="module")
def page(site_dir: Path) -> str:
    write_card_page(site_dir, site_dir.parent / "card.html")
    return (site_dir.parent / "card.html").read_text(encoding="utf-8")


# --- the gallery


def test_random_rows_are_the_same_for_one_seed_and_others_for_another(site_dir: Path) -> None:
    with open_index(site_dir) as connection:
        rows = [random_rows(connection, 8, seed) for seed in (1, 1, 2)]
        assert random_rows(connection, 99, 1) == list(range(30))
    assert rows[0] == rows[1] != rows[2]
    assert len(set(rows[0])) == 8


def test_the_worst_are_those_of_lowest_quality(site_dir: Path) -> None:
    with open_index(site_dir) as connection:
        assert worst_rows(connection, 3) == [29, 28, 27]
        assert 0 not in worst_rows(connection, 99)  # never assessed


def test_a_stored_ecg_is_drawn_as_it_is_stored(site_dir: Path) -> None:
    with open_index(site_dir) as connection:
        table = read_label_table(connection)
        plain, named = (stored_ecgs(site_dir, connection, table, [7], shown)[0] for shown in (False, True))
    steps = open_store(site_dir).read(np.array([7]))[0]
    assert plain.signal_mv is not None
    np.testing.assert_allclose(plain.signal_mv, np.where(steps == MISSING, np.nan, steps / 1000), atol=1e-6)
    assert (plain.title, named.title) == ("Row 7", "Row 7: r07 (r07.hea)")
    for said in ("female", "37 years", "from 500 Hz", "quality 0.12", "mpcwp_mmhg 11.5"):
        assert said in plain.caption


def test_what_was_turned_away_is_read_again_from_its_source(site_dir: Path) -> None:
    with open_index(site_dir) as connection:
        refused = refused_records(connection, 12, seed=1)
        shown = {each.title.partition(",")[0]: each for each in refused_ecgs(site_dir, connection, refused)}
    assert set(shown) == {"twin.hea", "short.hea", "flat.hea", "offset.hea", "cut.hea"}
    assert shown["cut.hea"].signal_mv is None
    assert "truncated" in shown["cut.hea"].caption
    assert shown["short.hea"].remark == "3.0 s"
    short = shown["short.hea"].signal_mv
    assert short is not None
    assert np.isnan(short[:, 750:]).all()
    assert not np.isnan(short[:, :750]).any()
    offset = shown["offset.hea"]
    assert "offsets of up to 100 mV removed" in offset.remark
    assert offset.signal_mv is not None
    assert np.abs(np.median(offset.signal_mv, axis=1)).max() < 0.1


def test_reasons_take_turns(tmp_path: Path) -> None:
    for number in range(20):
        write_record(tmp_path / "source", f"short{number}", ecg_steps(2))
    write_record(tmp_path / "source", "flat", np.zeros((12, 5000), np.int16))
    ingest(tmp_path / "source", tmp_path / "site")
    with open_index(tmp_path / "site") as connection:
        reasons = [each.reason for each in refused_records(connection, 4, seed=1)]
    assert reasons == ["too_short", "all_leads_flat", "too_short", "too_short"]


def test_a_source_that_is_gone_or_changed_is_said(tmp_path: Path) -> None:
    header = write_record(tmp_path / "source", "short", ecg_steps(2))
    ingest(tmp_path / "source", tmp_path / "site")
    with open_index(tmp_path / "site") as connection:
        refused = refused_records(connection, 4, seed=1)
        header.rename(header.with_name("renamed.hea"))
        (gone,) = refused_ecgs(tmp_path / "site", connection, refused)
        (tmp_path / "source").rename(tmp_path / "elsewhere")
        (lost,) = refused_ecgs(tmp_path / "site", connection, refused)
    assert gone.signal_mv is lost.signal_mv is None
    assert "not found again" in gone.remark
    assert "not there any more" in lost.remark


def test_a_forgotten_patient_is_not_drawn_even_from_the_source(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a", ecg_steps(seed=1), comments=["patient_id: gone"])
    write_record(tmp_path / "source", "short", ecg_steps(2), comments=["patient_id: gone"])
    write_record(tmp_path / "source", "stay", ecg_steps(3), comments=["patient_id: stay"])
    ingest(tmp_path / "source", tmp_path / "site")
    with open_index(tmp_path / "site") as connection:
        refused = refused_records(connection, 4, seed=1)  # as if noted before the patient was known
    forget(tmp_path / "site", "gone")
    with open_index(tmp_path / "site") as connection:
        shown = {each.title.partition(",")[0]: each for each in refused_ecgs(tmp_path / "site", connection, refused)}
        assert [each.source for each in refused_records(connection, 4, seed=1)] == ["stay.hea"]
    assert shown["short.hea"].signal_mv is None
    assert "forgotten" in shown["short.hea"].remark
    assert shown["stay.hea"].signal_mv is not None


@pytest.mark.parametrize("format_name", ARCHIVES)
def test_a_record_of_each_format_is_found_again_without_reading_the_rest(tmp_path: Path, format_name: str) -> None:
    ARCHIVES[format_name].write(tmp_path)
    options = ARCHIVES[format_name].options
    items = [
        item for item in open_archive(tmp_path, format_name, options).items if isinstance(item, EcgRecord | TurnedAway)
    ]
    assert len(items) == 3
    for item in items:
        archive, done = open_archive(tmp_path, format_name, options), []

        def counted(reading: object, done: list[object] = done) -> object:
            done.append(reading)
            return reading

        again = found_in(Archive(archive.count, map(counted, archive.readings)), [item.source])  # type: ignore[arg-type]
        assert type(again[item.source]) is type(item)


@pytest.mark.parametrize(("write", "format_name"), [(write_muse, "muse-xml"), (write_scg_rhc, "scg-rhc")])
def test_what_hospitals_export_is_found_again(tmp_path: Path, write, format_name: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path if format_name == "scg-rhc" else tmp_path / "a.xml")
    (item,) = [
        item for item in open_archive(tmp_path, format_name, ReaderOptions()).items if isinstance(item, EcgRecord)
    ]
    assert set(found_in(open_archive(tmp_path, format_name, ReaderOptions()), [item.source])) == {item.source}


def test_only_the_wanted_readings_are_done(source: Path) -> None:
    done: list[str] = []
    archive = open_archive(source, "wfdb", ReaderOptions())

    def noted(reading):  # type: ignore[no-untyped-def]
        def read(*arguments: object) -> object:
            done.append(str(arguments[1]))
            return reading.func(*arguments)

        return type(reading)(read, *reading.args)

    found = found_in(Archive(archive.count, map(noted, archive.readings)), ["short.hea", "r07.hea"])
    assert set(found) == {"short.hea", "r07.hea"}
    assert sorted(done) == ["r07", "short"]


texts = st.text(st.characters(codec="ascii", exclude_characters=",", categories=["L", "N", "P"]), min_size=1)


@given(
    where=st.lists(texts.filter(lambda text: not text.startswith("-")), max_size=3),
    rate=st.none() | st.sampled_from([250.0, 360.0, 500.0, 257.5]),
    unit=st.sampled_from(["", "mV", "uV"]),
    variable=st.sampled_from(["", "val", "ECG.data", "my data"]),
    axis=st.sampled_from(["", "lead-time", "time-lead"]),
    leads=st.sampled_from([(), ("I", "II"), LEADS]),
)
def test_options_come_back_from_the_index(where, rate, unit, variable, axis, leads) -> None:  # type: ignore[no-untyped-def]
    options = ReaderOptions(tuple(where), rate, unit, variable, axis, leads)
    assert ReaderOptions.from_selection(options.selection()) == options


def test_an_option_of_another_release_is_refused() -> None:
    with pytest.raises(HemoFedError, match="no such option"):
        ReaderOptions.from_selection(["--colour blue"])


def test_what_runs_over_other_leads_is_brought_back_and_said() -> None:
    signal = np.zeros((12, 2500), np.float32)
    assert on_paper(signal)[1] == ""
    signal[0], signal[1, 100], signal[2] = 30.0, 9.0, np.nan
    drawn, said = on_paper(signal)
    assert "offsets of up to 30 mV" in said
    assert "peaks of 9 mV cut off at 4 mV" in said
    assert np.nanmax(np.abs(drawn)) == 4
    assert np.isnan(drawn[2]).all()
    assert on_paper(np.full((12, 2500), np.nan, np.float32))[1] == ""


# --- the page, read as text


def test_the_page_says_what_is_there_and_that_it_must_stay(page: str) -> None:
    said = Page(page).words
    for phrase in (
        "STAYS IN THE HOSPITAL",
        "small counts are not suppressed",
        "30 ECGs of 10 s from 30 records of 15 patients; 5 records turned away",
        "drawn with seed 1",
        "25 mm/s and 10 mm/mV",
        "twin.hea, in ",
        "duplicate: the same signal as r03",
        "it cannot be drawn (truncated)",
        "mpcwp_mmhg > 18: everything withheld",
        "not assessed",
    ):
        assert phrase in said, phrase
    assert "SIMULATED" not in said


def test_no_pseudonym_and_no_record_name_of_a_stored_ecg_is_on_the_page(site_dir: Path, page: str) -> None:
    index = open_store(site_dir).index
    assert not [key for key in index.patient_keys if key in page]
    assert "patient-" not in page
    stored = set(re.findall(r"r\d\d\.hea", page))
    assert stored == set()
    write_card_page(site_dir, site_dir.parent / "named.html", show_ids=True)
    named = (site_dir.parent / "named.html").read_text(encoding="utf-8")
    assert re.findall(r"r\d\d\.hea", named)
    assert not [key for key in index.patient_keys if key in named]


def test_the_page_is_well_formed_and_can_be_read_aloud(page: str) -> None:
    parsed = Page(page)
    ids = parsed.values("id")
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    assert set(" ".join(parsed.values("aria-labelledby")).split()) <= set(ids)
    assert {link.removeprefix("#") for link in parsed.values("href") if link != "data:,"} <= set(ids)
    assert parsed.tags.count("svg") == parsed.values("role").count("img")
    assert parsed.tags.count("svg") == 6 + 1 + 8 + 8 + 4  # charts, label, random, lowest quality, turned away
    assert parsed.tags.count("h1") == 1
    tables = parsed.tags.count("table")
    assert tables == parsed.tags.count("caption") > 10


def test_the_page_asks_for_nothing(page: str) -> None:
    assert asked_for(page) == []
    assert "script" not in Page(page).tags
    assert "default-src 'none'" in page


def test_only_the_owner_can_read_the_page(site_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.html"
    path.write_text("an older one, open to all")
    path.chmod(0o644)
    write_card_page(site_dir, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["card.html"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="cannot be written") as caught:
        write_private(tmp_path / "absent" / "card.html", "x")
    assert caught.value.exit_code == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


def hostile_page(folder: Path, text: str = HOSTILE) -> str:
    write_record(folder / "source", "a", comments=["patient_id: 1"])
    write_record(folder / "source", "short", ecg_steps(2))
    ingest(folder / "source", folder / "site")
    with closing(sqlite3.connect(folder / "site" / INDEX_FILE)) as connection, connection:
        connection.execute("UPDATE records SET device = ?, race = ?, source = ?", (text,) * 3)
        connection.execute("UPDATE turned_away SET detail = ?, source = ?", (text,) * 2)
        connection.execute("INSERT INTO labels VALUES (0, ?, 3.5)", (text,))
        connection.execute("INSERT INTO remarks VALUES (1, 'x', ?, 'x', 1, NULL)", (text,))
    write_card_page(folder / "site", folder / "card.html", show_ids=True)
    return (folder / "card.html").read_text(encoding="utf-8")


def test_texts_of_the_source_stay_texts(tmp_path: Path) -> None:
    parsed = Page(hostile_page(tmp_path))
    assert not {"script", "img"} & set(parsed.tags)
    assert "{{ 7*7 }}" in parsed.words


def test_a_simulated_site_says_so_and_an_empty_store_has_a_page(site_dirs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_card_page(site_dirs["alpha"], tmp_path / "simulated.html")
    assert "SIMULATED HOSPITAL" in (tmp_path / "simulated.html").read_text()
    write_record(tmp_path / "source", "short", ecg_steps(2))
    ingest(tmp_path / "source", tmp_path / "site")
    assert write_card_page(tmp_path / "site", tmp_path / "empty.html").ecgs == 0
    assert "No record has a label" in Page((tmp_path / "empty.html").read_text()).words


def test_the_rule_of_a_masked_site_is_explained(site_dir: Path, tmp_path: Path) -> None:
    settings = load_site(site_dir)
    try:
        write_site(site_dir, settings.model_copy(update={"disclosure": "masked"}))
        write_card_page(site_dir, tmp_path / "masked.html")
    finally:
        write_site(site_dir, settings)
    assert "the centre applies the same rule to the sum" in Page((tmp_path / "masked.html").read_text()).words


@needs_real_data
def test_real_records_that_were_turned_away(tmp_path: Path) -> None:
    ingest(REAL_DATA / "cinc2011-dev", tmp_path / "site")
    ingest(REAL_DATA / "wfdb-awkward-dev", tmp_path / "site")
    card = data_card(tmp_path / "site")
    with open_index(tmp_path / "site") as connection:
        shown = refused_ecgs(tmp_path / "site", connection, refused_records(connection, 99, seed=1))
    assert len(shown) == sum(card.turned_away.values())
    for each in shown:
        kinds = ("all_leads_flat", "implausible", "too_short", "duplicate", "mostly", "low_quality")
        drawable = each.caption.startswith(kinds)
        assert (each.signal_mv is not None) == drawable, each.title


# --- the command, and a real browser


def test_the_command_writes_the_page(site_dir: Path, tmp_path: Path) -> None:
    arguments = ["check", "--site-dir", site_dir, "--html", tmp_path / "card.html", "--seed", "4", "--quiet"]
    ended = subprocess.run(
        [sys.executable, "-m", "client.cli", *arguments], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert "drawn with seed 4" in Page((tmp_path / "card.html").read_text()).words


@needs_browser
def test_a_browser_shows_the_page_and_complains_of_nothing(page: str, tmp_path: Path) -> None:
    path = tmp_path / "card.html"
    path.write_text(page, encoding="utf-8")
    dom, complaints = browse(path, tmp_path / "profile")
    assert complaints == []
    assert Page(dom).tags.count("svg") == Page(page).tags.count("svg")


@needs_browser
def test_a_browser_takes_hostile_texts_for_text(tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", hostile_page(tmp_path)), encoding="utf-8")
    dom, complaints = browse(path, tmp_path / "profile")
    assert complaints == []
    assert "<title>owned" not in dom


@needs_browser
@pytest.mark.parametrize("word", ["", "Unbreakable" * 12])
def test_the_page_fits_a_phone_and_a_desk(page: str, word: str, tmp_path: Path) -> None:
    for each in measured_widths(hostile_page(tmp_path, word) if word else page, tmp_path):
        assert each["scroll"] <= each["inner"], each
        assert each["wide"] == [], each
