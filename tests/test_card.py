"""The data card: its figures against a slow reading of the same store, and against what evaluation lets out."""

import io
import json
import math
import random
import re
import sqlite3
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from client import evaluation
from client.card import DataCard, card_of, data_card, in_bins, without_lead
from client.card_labels import ANY_ECG, read_label_table
from client.card_screen import blocks, card_screen
from client.ingest import ingest
from client.schema import INDEX_FILE, connect
from client.site import SiteSettings, write_site
from client.spread import histogram_of, spread_of
from client.store import ROW_BYTES, SIGNAL_FILE, RecordIndex, open_store
from shared_model.disclosure import Suppressed, protect
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from shared_model.subgroups import age_bands, attributes_of, restrict_levels
from tests.wfdb_fixtures import write_record

YEAR_2020 = 1577836800.0


def make_store(folder: Path, patients: int, seed: int = 0, minimum_cell: int = 11) -> Path:
    """A store whose index is written by hand; its signals are a hole in a file."""
    folder.mkdir(exist_ok=True)
    write_site(folder, SiteSettings(name="north", disclosure="clear", minimum_cell=minimum_cell))
    chance = random.Random(seed)
    with closing(connect(folder)) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO archives VALUES (1, '/nowhere')")
        connection.execute("INSERT INTO ingests VALUES (1, 1, 'wfdb', '[]', '2024', '2024')")
        connection.execute("INSERT INTO ingests VALUES (2, 1, 'cinc', '[]', '2025', NULL)")
        for patient in range(patients):
            add_patient(connection, patient, chance)
        away = [(1, f"t{n}.hea", "duplicate", f"the same signal as p{n % 3}; remove", 1, None) for n in range(8)]
        away.append((1, "u.hea", "too_short", "3 s", 1, None))
        connection.executemany("INSERT INTO turned_away VALUES (?, ?, ?, ?, ?, ?)", away)
        connection.execute("INSERT INTO remarks VALUES (1, 'r0.hea', 'flat_leads', 'V1', 1, NULL)")
        connection.execute("INSERT INTO events VALUES (1, 'a', 1.0, 'x'), (2, 'a', 2.0, 'x'), (3, 'b', 2.0, 'x')")
        connection.execute("INSERT INTO event_values VALUES (1, 'pcwp', 9), (1, 'co', 4), (2, 'pcwp', 12)")
        connection.execute("INSERT INTO record_events VALUES (0, 1)")
        connection.execute("INSERT INTO forgotten VALUES ('f', '2025', '[]')")
        (rows,) = connection.execute("SELECT count(*) FROM records").fetchone()
        connection.execute("COMMIT")
    with (folder / SIGNAL_FILE).open("wb") as file:
        file.truncate(rows * ROW_BYTES)
    return folder


def add_patient(connection: sqlite3.Connection, patient: int, chance: random.Random) -> None:
    """One to seven records of one or two ECGs, most with labels."""
    one_of = chance.choice
    who = {"patient": f"{patient:032x}", "split": one_of([0, 1, 2, 2])}
    who |= {"age_years": one_of([None, chance.uniform(10, 95)])}
    who |= {"sex": one_of(["female", "male", "male"]), "race": one_of(["white", "white", "black", "rare", "unknown"])}
    for record in range(one_of([1, 1, 2, 7])):
        at = one_of([None, YEAR_2020 + chance.uniform(-4e7, 4e7)])
        values = {"mpcwp_mmhg": round(chance.gauss(17, 5), 1), "af": one_of([0.0, 0.0, 1.0]), "co": chance.gauss(5, 1)}
        known = {name: value for name, value in values.items() if chance.random() < 0.8}
        for segment in range(one_of([1, 2])):
            entry = {"archive": 1, "record_id": f"p{patient}r{record}", "segment": segment, **who, "content": b""}
            entry |= {"recorded_at": at, "measured_at": at and at + 60, "source_rate_hz": one_of([250.0, 500.0])}
            entry |= {"lead_mask": one_of([0xFFF, 0xFFD, 0x003]), "source": f"p{patient}r{record}.hea", "ingest": 1}
            entry |= {"device": one_of(["cart", "unknown"]), "quality": one_of([None, chance.random()])}
            names = ", ".join(entry)
            row = connection.execute(
                f"INSERT INTO records (row, {names}) SELECT ifnull(max(row) + 1, 0), {', '.join('?' * len(entry))} "
                "FROM records RETURNING row",
                tuple(entry.values()),
            ).fetchone()[0]
            connection.executemany("INSERT INTO labels VALUES (?, ?, ?)", [(row, *item) for item in known.items()])
            heart_rate = (row, "heart_rate_bpm", chance.gauss(75, 9))
            connection.execute("INSERT INTO measurements VALUES (?, ?, ?)", heart_rate)


@pytest.fixture(scope="module")
def site_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("north"), patients=400)


@pytest.fixture(scope="module")
def card(site_dir: Path) -> DataCard:
    return data_card(site_dir)


@pytest.fixture(scope="module")
def index(site_dir: Path) -> RecordIndex:
    return open_store(site_dir).index


def patients_with(index: RecordIndex, values: list[str]) -> dict[str, int]:
    """The slow and obvious count: a set of patients for each value."""
    return {value: len({p for p, v in zip(index.patient, values, strict=True) if v == value}) for value in set(values)}


def test_counts_are_those_of_the_index(card: DataCard, index: RecordIndex) -> None:
    assert (card.ecgs, card.records, card.patients) == (len(index), len(set(index.record.tolist())), 400)
    assert card.patients_by_sex == patients_with(index, index.sex.tolist())
    assert card.patients_by_race == patients_with(index, index.race.tolist())
    splits = [("train", "validation", "test")[split] for split in index.split]
    assert card.patients_by_split == patients_with(index, splits)
    assert card.ecgs_by_source_rate_hz == Counter(f"{rate:g}" for rate in index.source_rate_hz)
    masks = index.lead_mask.tolist()
    assert card.ecgs_without_lead == {
        lead: missing for bit, lead in enumerate(LEADS) if (missing := sum(not mask >> bit & 1 for mask in masks))
    }


def test_records_of_a_patient_and_their_years(card: DataCard, index: RecordIndex) -> None:
    per_patient = Counter(p for p, s in zip(index.patient.tolist(), index.segment, strict=True) if s == 0)
    assert card.records_per_patient is not None
    assert card.records_per_patient.median == statistics.median(per_patient.values())
    assert card.records_per_patient.maximum == max(per_patient.values())
    tallied = Counter(per_patient.values())
    assert card.patients_by_records == {"1": tallied[1], "2": tallied[2], "3": 0, "4": 0, "5": 0, "6-10": tallied[7]}
    years = Counter(
        "unknown" if math.isnan(at) else str(np.datetime64(int(at), "s").astype("datetime64[Y]"))
        for at, segment in zip(index.recorded_at.tolist(), index.segment, strict=True)
        if segment == 0
    )
    assert card.records_by_year == dict(years)
    assert list(card.records_by_year)[-1] == "unknown"


def test_ages_are_those_of_the_first_ecg(card: DataCard, index: RecordIndex) -> None:
    first = dict(reversed(list(zip(index.patient.tolist(), index.age_years, strict=True))))
    assert card.patients_by_age == Counter(age_bands(list(first.values())).tolist())
    assert card.ages is not None
    assert sum(card.ages.counts) == sum(not math.isnan(age) for age in first.values())


def test_labels(card: DataCard, index: RecordIndex) -> None:
    assert next(iter(card.labels)) == "mpcwp_mmhg"
    assert set(card.labels) == set(index.labels)
    for name, label in card.labels.items():
        values = index.labels[name]
        known = ~np.isnan(values)
        assert label.ecgs == card.ecgs_labelled[name] == known.sum()
        assert label.patients == len(set(index.patient[known].tolist())) == sum(label.patients_by_split.values())
        assert label.spread.median == pytest.approx(statistics.median(values[known].tolist()))
        assert (label.spread.minimum, label.spread.maximum) == (values[known].min(), values[known].max())
    assert card.labels["co"].above == {}
    assert card.labels["af"].histogram is None
    wedge = index.labels["mpcwp_mmhg"]
    assert {name: above.ecgs for name, above in card.labels["mpcwp_mmhg"].above.items()} == {
        "15": (wedge > 15).sum(),
        "18": (wedge > 18).sum(),
    }
    above = card.labels["mpcwp_mmhg"].above["18"]
    assert above.share_of_patients == above.patients / card.labels["mpcwp_mmhg"].patients


def test_what_else_is_counted(card: DataCard) -> None:
    assert card.turned_away == {"duplicate": 8, "too_short": 1}
    assert (card.duplicates.records, card.duplicates.groups) == (8, 3)
    assert card.noticed == {"flat_leads": 1}
    assert [(each.format, each.finished_at) for each in card.ingests] == [("wfdb", "2024"), ("cinc", None)]
    assert (card.events.events, card.events.patients, card.events.joined_ecgs) == (3, 2, 1)
    assert card.events.values == {"co": 1, "pcwp": 2}
    assert card.forgotten_patients == 1
    assert card.quality is not None
    assert card.quality.count + card.quality_not_assessed == card.ecgs
    assert card.ecgs_measured == {"heart_rate_bpm": card.ecgs}


# --- what evaluation would withhold


def withheld_by_evaluation(index: RecordIndex, name: str, threshold: float, minimum_cell: int) -> dict[str, Suppressed]:
    """What the tier `clear` withholds of a scored test split, by the code that a study runs."""
    values = index.labels[name].astype(np.float64)
    chosen = (index.split == 2) & ~np.isnan(values)
    attributes = attributes_of(index.sex[chosen], index.age_years[chosen], index.race[chosen])
    scores = evaluation.Scores(
        patients=index.patient[chosen],
        patient_keys=index.patient_keys,
        recorded_at=index.recorded_at[chosen],
        measured_at=index.measured_at[chosen],
        attributes=restrict_levels(attributes, {"race": ("asian", "black", "hispanic", "white")}),
        outcomes=(values[chosen] > threshold).astype(np.float64),
        probabilities=np.random.default_rng(1).random(chosen.sum()),
    )
    _, suppressed = protect(evaluation.count(scores, replicates=0).histograms, minimum_cell)
    return suppressed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minimum_cell", [3, 11])
def test_what_would_be_withheld_is_what_evaluation_withholds(tmp_path: Path, seed: int, minimum_cell: int) -> None:
    site_dir = make_store(tmp_path, patients=(100, 250, 500, 900)[seed], seed=seed, minimum_cell=minimum_cell)
    card, index = data_card(site_dir), open_store(site_dir).index
    targets = {"mpcwp_mmhg > 15": ("mpcwp_mmhg", 15), "mpcwp_mmhg > 18": ("mpcwp_mmhg", 18), "af": ("af", 0.5)}
    for target, (name, threshold) in targets.items():
        expected = withheld_by_evaluation(index, name, threshold, minimum_cell)
        assert {group: said.reason for group, said in card.withheld[target].items()} == {
            group: said.reason for group, said in expected.items()
        }
    assert {ANY_ECG, "mpcwp_mmhg > 15", "mpcwp_mmhg > 18", "af", "co"} <= set(card.withheld)


def test_a_minimum_of_one_withholds_less(tmp_path: Path) -> None:
    few = data_card(make_store(tmp_path / "a", 900, minimum_cell=1)).withheld[ANY_ECG]
    many = data_card(make_store(tmp_path / "b", 900, minimum_cell=100)).withheld[ANY_ECG]
    assert few == {}
    assert "race=other" in many
    assert many["race=other"].positives is None
    assert 0 < many["race=other"].patients < 100


# --- how it is computed


def statements(site_dir: Path) -> int:
    seen: list[str] = []
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        connection.set_trace_callback(seen.append)
        card_of(connection, SiteSettings(name="a", disclosure="clear"), read_label_table(connection))
    return len(seen)


def test_the_number_of_statements_does_not_grow_with_the_store(tmp_path: Path) -> None:
    few, many = (statements(make_store(tmp_path / str(patients), patients)) for patients in (20, 300))
    assert few == many


@settings(deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1), st.sampled_from([None, 2.0, 5.0]))
def test_a_histogram_holds_every_value_once(values: list[float], width: float | None) -> None:
    histogram, spread = histogram_of(np.array(values), width), spread_of(np.array(values))
    assert histogram is not None
    assert spread is not None
    assert sum(histogram.counts) == len(values)
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.edges[0] <= spread.minimum + 1e-6
    assert histogram.edges[-1] >= spread.maximum - 1e-6
    assert width is not None or len(histogram.counts) <= 42


def test_nothing_known_is_none() -> None:
    assert histogram_of(np.array([math.nan])) is spread_of(np.array([])) is None
    assert without_lead({0xFFF: 3}) == {}
    between = dict.fromkeys(("2", "3", "4", "5", "6-10", "11-20", "21-50"), 0)
    assert in_bins(np.array([1, 60])) == {"1": 1, **between, "51 or more": 1}


def test_a_store_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    site_dir = make_store(tmp_path, 5)
    with (site_dir / SIGNAL_FILE).open("r+b") as file:
        file.truncate(ROW_BYTES)
    with pytest.raises(HemoFedError, match="holds 1 of") as caught:
        data_card(site_dir)
    assert caught.value.exit_code == ExitCode.BAD_SITE


# --- the screen and the command


def shown(card: DataCard, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(card_screen(card))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_says_the_main_things(card: DataCard, width: int) -> None:
    text = shown(card, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) <= 60
    for said in ("female", "mpcwp_mmhg", "too_short", "duplicates turned away", f"{card.ecgs:,}", "Quality"):
        assert said in text, said


def test_markup_in_a_source_is_text(tmp_path: Path) -> None:
    site_dir = make_store(tmp_path, 5)
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection, connection:
        connection.execute("UPDATE records SET device = '[red]x[/red] [/nowhere]'")
    assert "[red]x[/red]" in shown(data_card(site_dir), 120)


def test_blocks_show_what_is_not_zero() -> None:
    assert blocks((0, 1, 1000)) == " \u2581\u2588"
    assert blocks(()) == ""


def test_the_command_keeps_its_keys(tmp_path: Path) -> None:
    write_record(tmp_path / "source", "a", comments=["patient_id: 1", "Sex: Female", "Age: 50"])
    ingest(tmp_path / "source", tmp_path / "site")
    ended = subprocess.run(
        [sys.executable, "-m", "client.cli", "check", "--site-dir", tmp_path / "site", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    earlier = {"site", "disclosure", "ecgs", "records", "patients", "patients_by_split", "patients_by_sex"}
    earlier |= {"patients_by_race", "ecgs_by_source_rate_hz", "ecgs_labelled", "turned_away", "noticed"}
    assert earlier <= told.keys()
    assert told == json.loads(json.dumps(asdict(data_card(tmp_path / "site"))))


def test_matplotlib_and_torch_are_not_loaded_for_the_screen() -> None:
    code = "import sys, client.cli, client.card, client.card_screen; print({'torch', 'matplotlib'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "set()", ended.stderr


def test_the_document_names_each_key_and_no_other() -> None:
    document = (Path(__file__).parents[1] / "docs" / "data-card.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", document, flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in fields(DataCard))
