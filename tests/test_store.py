"""The site store: reading, split, pseudonyms, caches, site.toml."""

import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ingest import ingest
from client.pseudonym import KEY_FILE, TEST, TRAIN, VALIDATION, PatientKey, parse_shares, patient_key
from client.schema import INDEX_FILE
from client.site import SITE_FILE, SiteSettings, load_site, write_site
from client.store import SIGNAL_FILE, Store, open_pooled, open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from tests.wfdb_fixtures import ecg_steps, write_record

PATIENTS, ECGS = 12, 30


def make_site(folder: Path, seed: int = 0, key: bytes | None = None) -> Path:
    """30 ECGs of 12 patients at 250 Hz, so that the stored steps are the written ones."""
    source = folder / f"source{seed}"
    rows = ["record,patient_id,sex,age_years,recorded_at,measured_at,mpcwp_mmhg"]
    for ecg in range(ECGS):
        write_record(source, f"r{ecg:02}", ecg_steps(rate_hz=250, seed=100 * seed + ecg), rate_hz=250)
        wedge = "" if ecg % 5 == 4 else str(10 + ecg % 12)
        rows.append(
            f"r{ecg:02},patient{ecg % PATIENTS},F,{40 + ecg},2024-01-{1 + ecg:02}T08:00,2024-01-31T08:00,{wedge}"
        )
    (source / "labels.csv").write_text("\n".join(rows))
    ingest(source, folder / f"site{seed}", patient_key=key)
    return folder / f"site{seed}"


@pytest.fixture(scope="module")
def site_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def store(site_dir: Path) -> Store:
    return open_store(site_dir)


@settings(max_examples=30)
@given(rows=st.lists(st.integers(0, ECGS - 1), max_size=70))
def test_rows_come_in_the_order_asked_for(store: Store, rows: list[int]) -> None:
    steps = store.read(np.array(rows, np.int64))
    assert steps.shape == (len(rows), 12, 2500)
    for row, found in zip(rows, steps, strict=True):
        np.testing.assert_array_equal(found, ecg_steps(rate_hz=250, seed=row))


@pytest.mark.parametrize("row", [-1, ECGS])
def test_a_row_that_is_not_there(store: Store, row: int) -> None:
    with pytest.raises(IndexError):
        store.read(np.array([0, row]))


def test_what_is_read_cannot_change_the_store(store: Store) -> None:
    store.read(np.array([0]))[:] = 7
    np.testing.assert_array_equal(store.read(np.array([0]))[0], ecg_steps(rate_hz=250, seed=0))


def test_index(store: Store) -> None:
    index = store.index
    assert len(index) == ECGS
    assert len(index.patient_keys) == PATIENTS
    np.testing.assert_array_equal(index.row, np.arange(ECGS))
    np.testing.assert_array_equal(index.patient, np.arange(ECGS) % PATIENTS)
    np.testing.assert_array_equal(np.isnan(index.labels["mpcwp_mmhg"]), np.arange(ECGS) % 5 == 4)
    assert set(index.sex) == {"female"}
    assert set(index.race) == {"unknown"}
    assert index.recorded_at[1] - index.recorded_at[0] == 86_400
    assert set(index.lead_mask) == {4095}
    assert (index.row.dtype, index.split.dtype, index.lead_mask.dtype) == (np.int64, np.uint8, np.uint16)
    _, present = to_millivolt(store.read(index.row))
    assert present.all()


def test_no_patient_is_in_two_splits(store: Store) -> None:
    pairs = set(zip(store.index.patient.tolist(), store.index.split.tolist(), strict=True))
    assert len(pairs) == PATIENTS


def test_split_is_stable_and_60_20_20() -> None:
    key = PatientKey(bytes(range(32)))
    splits = [key.split(f"p{i}") for i in range(20_000)]
    shares = np.bincount(splits) / len(splits)
    np.testing.assert_allclose(shares[[TRAIN, VALIDATION, TEST]], [0.6, 0.2, 0.2], atol=0.012)
    assert [key.split(f" p{i} ") for i in range(100)] == splits[:100]
    # The very first ones, written down: a change of the hash would move patients between splits.
    assert splits[:12] == [2, 1, 0, 0, 2, 0, 1, 1, 2, 2, 0, 0]


def test_pseudonyms_need_the_key(site_dir: Path) -> None:
    key = patient_key(site_dir)
    index = open_store(site_dir).index
    assert index.patient_keys[0] == key.pseudonym("patient0")
    assert index.patient_keys[0] != PatientKey(b"x" * 32).pseudonym("patient0")
    assert b"patient0" not in (site_dir / INDEX_FILE).read_bytes()
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)


def test_key_file_is_for_its_owner_only(site_dir: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE((site_dir / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE((site_dir / SIGNAL_FILE).stat().st_mode) == 0o600
    key = patient_key(tmp_path)
    assert patient_key(tmp_path) == key
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(HemoFedError, match="chmod 600"):
        patient_key(tmp_path)


def test_keys_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="32 bytes"):
        patient_key(tmp_path, b"short")
    patient_key(tmp_path, b"a" * 32)
    with pytest.raises(HemoFedError, match="another key"):
        patient_key(tmp_path, b"b" * 32)
    (tmp_path / KEY_FILE).write_text("")
    with pytest.raises(HemoFedError, match="not a patient key"):
        patient_key(tmp_path)


def test_derived_is_computed_once_and_again_when_the_store_grows(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)
    calls: list[int] = []
    seen: list[tuple[int, int]] = []

    def peaks(steps: np.ndarray) -> np.ndarray:
        calls.append(len(steps))
        return steps.max(axis=2).astype(np.float32)

    store = open_store(site_dir)
    table = store.derived("peaks", 12, peaks, lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(table, store.read(store.index.row).max(axis=2))
    assert isinstance(table, np.memmap)
    assert seen[-1] == (ECGS, ECGS)
    store.derived("peaks", 12, peaks)
    assert sum(calls) == ECGS
    store.derived("peaks-2", 12, peaks)
    assert sum(calls) == 2 * ECGS
    write_record(tmp_path / "source0", "new", ecg_steps(seed=999))
    ingest(tmp_path / "source0", site_dir)
    assert open_store(site_dir).derived("peaks", 12, peaks).shape == (ECGS + 1, 12)
    assert sum(calls) == 3 * ECGS + 1


def test_a_derived_cache_that_failed_leaves_nothing(tmp_path: Path) -> None:
    site_dir = make_site(tmp_path)

    def fails(steps: np.ndarray) -> np.ndarray:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        open_store(site_dir).derived("x", 1, fails)
    assert list((site_dir / "derived").iterdir()) == []


def test_pooled_sites_keep_patients_apart(tmp_path: Path) -> None:
    key = b"k" * 32  # the same key and the same patient ids at both sites
    sites = [make_site(tmp_path, seed, key) for seed in (0, 1)]
    pooled = open_pooled(sites)
    index = pooled.index
    assert len(index) == 2 * ECGS
    assert len(set(index.patient_keys)) == len(index.patient_keys) == 2 * PATIENTS
    assert set(index.patient[:ECGS]).isdisjoint(index.patient[ECGS:])
    assert set(index.record[:ECGS]).isdisjoint(index.record[ECGS:])
    np.testing.assert_array_equal(index.row, np.arange(2 * ECGS))
    rows = np.array([ECGS + 3, 3, 2 * ECGS - 1])
    steps = pooled.read(rows)
    for place, seed in enumerate((103, 3, 129)):
        np.testing.assert_array_equal(steps[place], ecg_steps(rate_hz=250, seed=seed))
    means = pooled.derived("mean", 1, lambda s: s.mean(axis=(1, 2), keepdims=True)[:, 0].astype(np.float32))
    np.testing.assert_allclose(means[rows, 0], steps.mean(axis=(1, 2)), rtol=1e-5)
    part = open_store(sites[1]).index
    np.testing.assert_array_equal(index.labels["mpcwp_mmhg"][ECGS:], part.labels["mpcwp_mmhg"])


def test_pooled_labels_absent_at_one_site_are_nan(tmp_path: Path) -> None:
    first = make_site(tmp_path, 0)
    write_record(tmp_path / "bare", "r", ecg_steps())
    ingest(tmp_path / "bare", tmp_path / "bare_site")
    labels = open_pooled([first, tmp_path / "bare_site"]).index.labels["mpcwp_mmhg"]
    assert np.isnan(labels[-1])
    assert np.nanmin(labels) >= 10


def test_split_shares_are_the_stores_own_and_stay(tmp_path: Path) -> None:
    key = PatientKey(b"k" * 32, parse_shares("45/15/40"))
    splits = [key.split(f"p{i}") for i in range(20_000)]
    assert [round(splits.count(part) / 200) for part in (0, 1, 2)] == pytest.approx([45, 15, 40], abs=1)
    write_record(tmp_path / "source", "r0", ecg_steps(rate_hz=250), rate_hz=250)
    for split in ("45/15/40", None, "45/15/40"):
        ingest(tmp_path / "source", tmp_path / "site", split=split)
    with pytest.raises(HemoFedError, match="split 45/15/40") as caught:
        ingest(tmp_path / "source", tmp_path / "site", split="60/20/20")
    assert caught.value.exit_code == ExitCode.BAD_SITE


@pytest.mark.parametrize("text", ["60/20", "60/20/30", "100/0/0", "a/b/c", "", "-20/60/60"])
def test_split_shares_that_are_refused(text: str) -> None:
    with pytest.raises(HemoFedError, match="60/20/20"):
        parse_shares(text)


def test_stores_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="hemofed-client ingest"):
        open_store(tmp_path)
    site_dir = make_site(tmp_path)
    signals = (site_dir / SIGNAL_FILE).read_bytes()
    (site_dir / SIGNAL_FILE).write_bytes(signals[:-1])
    with pytest.raises(HemoFedError, match="29 of 30"):
        open_store(site_dir)
    (site_dir / SIGNAL_FILE).write_bytes(signals)
    with sqlite3.connect(site_dir / INDEX_FILE) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    connection.close()
    with pytest.raises(HemoFedError, match="schema version 99"):
        open_store(site_dir)
    (site_dir / INDEX_FILE).write_bytes(b"not a database, though long enough to be read as one" * 20)
    with pytest.raises(HemoFedError, match="the index cannot be used"):
        open_store(site_dir)


def test_site_settings_round_trip(tmp_path: Path) -> None:
    settings_written = SiteSettings(name="St Elsewhere-1", disclosure="masked", threads=2, simulated=True)
    write_site(tmp_path, settings_written)
    assert load_site(tmp_path) == settings_written
    defaults = SiteSettings(name="x", disclosure="clear")
    assert (defaults.minimum_cell, defaults.count_rounding, defaults.device) == (11, 5, "auto")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ('name = "x"\n', "disclosure is not set"),
        ('name = "x"\ndisclosure = "open"\n', "disclosure"),
        (
            'name = "x"\ndisclosure = "clear"\nminimumcell = 3\n',
            "key 'minimumcell'; allowed keys: name, disclosure",
        ),
        ('name = "x"\ndisclosure = \n', "not TOML"),
        ('name = "x"\ndisclosure = "clear"\ndevice = "tpu"\n', "device"),
    ],
)
def test_site_settings_fail_closed(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / SITE_FILE).write_text(text)
    with pytest.raises(HemoFedError, match=said) as caught:
        load_site(tmp_path)
    assert str(tmp_path / SITE_FILE) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.exit_code == ExitCode.BAD_SITE
