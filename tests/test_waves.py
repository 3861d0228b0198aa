"""Wave attributes against what drawn ECGs were made from, what a cart and a cardiologist measured, and by hand."""

import csv
import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from client.ingest import ingest
from client.records.record import MEASUREMENTS
from client.schema import INDEX_FILE
from client.store import Store, open_pooled, open_store
from client.tasks import describer
from shared_model.leads import resample, to_millivolt
from shared_model.objectives.relations import RELATIONS
from shared_model.waves import (
    MEASURED,
    UNITS,
    Span,
    Waves,
    axis_deg,
    describe_waves,
    measure_waves,
    wave_distance,
)
from simulation.circulation import Population, draw_circulation
from simulation.ecg_generator import Acquisition, draw_anatomy, synthesise
from tests.federations import tiny_study
from tests.realdata import REAL_DATA, needs_real_data
from tests.twins import draw_twins
from tests.wfdb_fixtures import ecg_steps, write_record

PRESENT = np.ones((12, 2500), bool)
NAMES = list(UNITS)


# ---- what drawn ECGs were made from


@dataclass(frozen=True)
class Drawn:
    """ECGs, what was measured on them, and what they were drawn with (as the generator clips it)."""

    measured: dict[str, NDArray[np.float64]]
    truth: dict[str, NDArray[np.float64]]
    fibrillation: NDArray[np.bool_]

    def errors(self, name: str) -> NDArray[np.float64]:
        """Measured - drawn where it was measured; of P waves in sinus rhythm only."""
        error = self.measured[name] - self.truth[name]
        if name in ("pr_ms", "p_duration_ms"):
            error = error[~self.fibrillation]
        return error[np.isfinite(error)]

    def known_share(self, name: str, fibrillation: bool) -> float:
        return float(np.isfinite(self.measured[name][self.fibrillation == fibrillation]).mean())


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """300 patients of a seed on which no constant was chosen."""
    rng = np.random.default_rng(11)
    circulation = draw_circulation(rng, Population(ecgs_per_patient=(1.0,)), 300)
    signals = synthesise(rng, circulation, draw_anatomy(rng, circulation), Acquisition(sampling_rate_hz=250))
    waves = [measure_waves(signal, PRESENT) for signal in signals]
    rr_s = 60 / np.clip(circulation.feature("heart_rate"), 42, 150)
    p_ms = np.clip(circulation.feature("p_duration"), 60, 180)
    qtc_ms = np.clip(circulation.feature("qtc"), 340, 560)
    truth = {
        "heart_rate_bpm": 60 / rr_s,
        "pr_ms": np.maximum(np.clip(circulation.pr_interval_ms, 110, 300), p_ms + 12),
        "p_duration_ms": p_ms,
        "qrs_ms": np.clip(circulation.feature("qrs_duration"), 62, 200),
        "qt_ms": qtc_ms * np.sqrt(rr_s),
        "qtc_ms": qtc_ms,
    }
    measured = {name: np.array([getattr(wave, name) for wave in waves], np.float64) for name in NAMES}
    return Drawn(measured, truth, circulation.atrial_fibrillation)


BOUNDS = {  # median and 95th centile of the absolute error
    "heart_rate_bpm": (1, 10),  # a mean over 10 s is not the mean that was drawn, least of all in fibrillation
    "pr_ms": (5, 15),
    "p_duration_ms": (10, 25),
    "qrs_ms": (10, 15),
    "qt_ms": (20, 35),
    "qtc_ms": (20, 40),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_intervals_are_those_that_were_drawn(name: str, drawn: Drawn) -> None:
    errors = np.abs(drawn.errors(name))
    median, high = BOUNDS[name]
    assert np.median(errors) <= median
    assert np.quantile(errors, 0.95) <= high
    # A constant, the cohort's median, would do worse.
    truth = drawn.truth[name]
    assert np.median(np.abs(drawn.errors(name) - np.median(drawn.errors(name)))) < 0.7 * np.median(
        np.abs(truth - np.median(truth))
    )


def test_what_is_known_and_what_is_not(drawn: Drawn) -> None:
    for name in ("heart_rate_bpm", "qrs_ms", "qrs_axis_deg", "qrs_count"):
        assert np.isfinite(drawn.measured[name]).all()
    assert drawn.known_share("pr_ms", fibrillation=False) > 0.9
    assert drawn.known_share("pr_ms", fibrillation=True) < 0.1
    assert drawn.known_share("qt_ms", fibrillation=False) > 0.95


def test_fibrillation_varies_more(drawn: Drawn) -> None:
    variation = drawn.measured["rr_variation"]
    assert np.median(variation[drawn.fibrillation]) > 2 * np.median(variation[~drawn.fibrillation])


# ---- by hand


@given(angle=st.floats(-179, 179), size=st.floats(0.01, 5), offset=st.floats(-1, 1))
def test_axis_is_the_angle_of_a_dipole_in_the_frontal_plane(angle: float, size: float, offset: float) -> None:
    """Einthoven's I is the part along 0 degrees; Goldberger's aVF is sqrt(3)/2 of the part along 90."""
    wave = size * np.exp(-0.5 * ((np.arange(260) - 110) / 5) ** 2)
    beat = np.full((12, 260), np.nan)
    beat[0] = offset + math.cos(math.radians(angle)) * wave
    beat[5] = offset + math.sqrt(3) / 2 * math.sin(math.radians(angle)) * wave
    found = axis_deg(beat, Span(90.0, 130.0), 90.0)
    assert abs((found - angle + 180) % 360 - 180) < 0.1
    beat[5] = np.nan
    assert math.isnan(axis_deg(beat, Span(90.0, 130.0), 90.0))
    assert math.isnan(axis_deg(beat, Span(math.nan, 130.0), 90.0))


@pytest.fixture(scope="module")
def twins() -> tuple[Tensor, Tensor]:
    return draw_twins(256)


def test_gain_changes_nothing_and_a_turned_electrode_pair_turns_the_axis(twins: tuple[Tensor, Tensor]) -> None:
    signal = twins[0][3].numpy()
    waves = measure_waves(signal, PRESENT)
    doubled = measure_waves(2 * signal, PRESENT)
    for name in NAMES:
        assert getattr(doubled, name) == pytest.approx(getattr(waves, name), rel=1e-3, nan_ok=True)
    swapped = signal.copy()  # right arm and left arm: I is negative, II and III, aVR and aVL change places
    swapped[[1, 2, 3, 4]] = signal[[2, 1, 4, 3]]
    swapped[0] = -signal[0]
    turned = measure_waves(swapped, PRESENT)
    assert turned.qrs_ms == waves.qrs_ms
    assert abs((turned.qrs_axis_deg + waves.qrs_axis_deg) % 360 - 180) < 1


def test_bazett(drawn: Drawn) -> None:
    measured = drawn.measured
    expected = measured["qt_ms"] / np.sqrt(60 / measured["heart_rate_bpm"])
    np.testing.assert_allclose(measured["qtc_ms"], expected, rtol=1e-5)


def test_without_a_lead_and_with_a_gap(twins: tuple[Tensor, Tensor]) -> None:
    signal = twins[0][3].numpy().copy()
    whole = measure_waves(signal, PRESENT)
    without = signal.copy()
    without[0] = 0
    waves = measure_waves(without, without != 0)
    assert math.isnan(waves.qrs_axis_deg)
    assert waves.qrs_ms == pytest.approx(whole.qrs_ms, abs=8)
    present = PRESENT.copy()
    present[:, 1000:1600] = False
    waves = measure_waves(np.where(present, signal, 0).astype(np.float32), present)
    assert waves.heart_rate_bpm == pytest.approx(whole.heart_rate_bpm, rel=0.1)
    assert waves.qrs_ms == pytest.approx(whole.qrs_ms, abs=8)


def test_of_no_ecg_nothing_is_known() -> None:
    silent = np.zeros((12, 2500), np.float32)
    for present in (PRESENT, ~PRESENT):
        assert all(map(math.isnan, vars(measure_waves(silent, present)).values()))
    assert vars(Waves()).keys() == UNITS.keys()
    assert describe_waves(torch.zeros(0, 12, 2500), torch.zeros(0, 12, 2500, dtype=torch.bool)).shape == (0, len(UNITS))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), leads=st.integers(0, 12), scale=st.sampled_from([1e-6, 0.1, 30.0]))
def test_noise_steps_and_spikes_never_stop_it(seed: int, leads: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.normal(0, scale, (12, 2500)) * (rng.random((12, 1)) < 0.7)
    signal[:, rng.integers(0, 2500, 9)] += rng.normal(0, 20 * scale, (12, 9))
    signal[leads:] = np.round(signal[leads:])
    present = np.repeat(rng.random((12, 50)) < 0.9, 50, axis=1)
    waves = measure_waves(np.where(present, signal, 0).astype(np.float32), present)
    durations = [waves.p_duration_ms, waves.qrs_ms, waves.qt_ms]
    assert all(math.isnan(value) or 0 <= value <= 1040 for value in durations)
    assert not any(map(math.isinf, vars(waves).values()))


# ---- real ECGs


def chapman() -> list[tuple[dict[str, str], Waves]]:
    """Eight ECGs: what the cart measured, and what is measured here."""
    folder = REAL_DATA / "chapman-denoised-dev"
    with (folder / "diagnostics.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = []
    for row in rows:
        signal = resample(loadmat(folder / f"{row['FileName']}.mat")["val"].T / 1000, 500, 250)
        pairs.append((row, measure_waves(signal[:, :2500], PRESENT)))
    return pairs


@needs_real_data
def test_a_carts_own_measurements() -> None:
    pairs = chapman()
    assert len(pairs) == 8

    def errors(column: str, name: str) -> NDArray[np.float64]:
        return np.array([getattr(waves, name) - float(row[column]) for row, waves in pairs])

    assert np.abs(errors("VentricularRate", "heart_rate_bpm")).max() < 2
    assert (errors("QRSCount", "qrs_count") == 0).all()
    for column, name, median, largest in (
        ("QRSDuration", "qrs_ms", 12, 40),  # the largest: a bundle branch block with slow ends
        ("QTInterval", "qt_ms", 20, 40),
        ("RAxis", "qrs_axis_deg", 8, 20),
        ("TAxis", "t_axis_deg", 8, 20),
    ):
        error = np.abs(errors(column, name))
        assert np.isfinite(error).sum() >= 7
        assert np.nanmedian(error) <= median
        assert np.nanmax(error) <= largest
    fibrillating = [math.isnan(waves.pr_ms) for row, waves in pairs if row["Rhythm"] == "AFIB"]
    assert fibrillating == [True] * 4
    assert [math.isnan(waves.pr_ms) for row, waves in pairs if row["Rhythm"] != "AFIB"] == [False] * 4


@needs_real_data
def test_a_cardiologists_marks() -> None:
    """LUDB record 1: median over leads and beats of the marked intervals."""
    path = str(REAL_DATA / "ludb-dev" / "1")
    record = wfdb.rdrecord(path)
    spans: dict[str, list[tuple[int, int]]] = {"p": [], "N": [], "t": []}
    pr_ms = []
    for lead in record.sig_name:
        marks = wfdb.rdann(path, lead)
        waves = [
            (marks.symbol[k], marks.sample[k - 1], marks.sample[k + 1])
            for k in range(1, len(marks.symbol) - 1)
            if marks.symbol[k] in spans and marks.symbol[k - 1] == "(" and marks.symbol[k + 1] == ")"
        ]
        for kind, onset, end in waves:
            spans[kind].append((onset, end))
        pr_ms += [(b[1] - a[1]) * 2 for a, b in pairwise(waves) if a[0] == "p" and b[0] == "N"]
    found = measure_waves(resample(record.p_signal.T, 500, 250)[:, :2500], PRESENT)

    def marked_ms(kind: str) -> float:
        return float(np.median([(end - onset) * 2 for onset, end in spans[kind]]))

    assert found.pr_ms == pytest.approx(np.median(pr_ms), abs=15)
    assert found.qrs_ms == pytest.approx(marked_ms("N"), abs=15)
    assert found.p_duration_ms == pytest.approx(marked_ms("p"), abs=20)


# ---- description and distance


def test_a_description_is_in_fixed_units(twins: tuple[Tensor, Tensor]) -> None:
    signals = twins[0][:3]
    described = describe_waves(signals, torch.ones_like(signals, dtype=torch.bool))
    assert described.dtype == torch.float32
    for row, signal in zip(described.tolist(), signals.numpy(), strict=True):
        waves = measure_waves(signal, PRESENT)
        expected = [getattr(waves, name) / unit for name, unit in UNITS.items()]
        assert row == pytest.approx(expected, rel=1e-5, nan_ok=True)


def slow_distance(a: list[float], b: list[float]) -> float:
    squares = []
    for x, y, (name, unit) in zip(a, b, UNITS.items(), strict=True):
        if math.isnan(x) or math.isnan(y):
            continue
        apart = abs(x - y) * unit
        if name.endswith("_deg"):
            apart = math.degrees(math.acos(max(-1.0, min(1.0, math.cos(math.radians(apart))))))
        squares.append((apart / unit) ** 2)
    return math.sqrt(sum(squares) / len(squares)) if len(squares) >= 3 else math.inf


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), missing=st.floats(0, 0.9))
def test_distance_equals_a_loop_over_pairs(seed: int, missing: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    described = 6 * torch.randn(7, len(UNITS), generator=generator)
    described[torch.rand(described.shape, generator=generator) < missing] = math.nan
    rows = described.tolist()
    expected = torch.tensor([[slow_distance(a, b) for b in rows] for a in rows]).fill_diagonal_(0.0)
    torch.testing.assert_close(wave_distance(described), expected, rtol=1e-3, atol=2e-3)


def test_axes_are_angles_and_other_attributes_are_not() -> None:
    described = torch.zeros(2, len(UNITS)) + 1
    for name, apart in (("qrs_axis_deg", 20), ("qt_ms", 340)):
        place, pair = NAMES.index(name), described.clone()
        pair[0, place], pair[1, place] = 350 / UNITS[name], 10 / UNITS[name]
        expected = apart / UNITS[name] / math.sqrt(len(UNITS))
        assert float(wave_distance(pair)[0, 1]) == pytest.approx(expected, rel=1e-4)


def test_attributes_find_an_ecgs_twin_among_256(twins: tuple[Tensor, Tensor]) -> None:
    """0.85 on a first look; by chance it is 0.004."""
    relation = RELATIONS["wave_attributes"]
    described = torch.cat([relation.describe(ecgs, torch.ones_like(ecgs, dtype=torch.bool)) for ecgs in twins])
    across = relation.distance(described)[:256, 256:]
    assert float((across.argmin(1) == torch.arange(256)).float().mean()) > 0.7


# ---- at a site


@pytest.fixture(scope="module")
def site_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ECGs, of which the archive measured some things on two."""
    folder = tmp_path_factory.mktemp("waves")
    for ecg in range(4):
        write_record(folder / "source", f"r{ecg}", ecg_steps(seed=ecg))
    ingest(folder / "source", folder / "site")
    with closing(sqlite3.connect(folder / "site" / INDEX_FILE)) as connection, connection:
        values = [(1, "heart_rate_bpm", 72.0), (1, "qrs_axis_deg", -30.0), (3, "heart_rate_bpm", 61.0)]
        connection.executemany("INSERT INTO measurements VALUES (?, ?, ?)", values)
    return folder / "site"


def test_measurements_of_a_store_and_of_two(site_dir: Path) -> None:
    names = ("qrs_axis_deg", "heart_rate_bpm", "pr_ms")
    nan = math.nan
    expected = np.array([[nan, nan, nan], [-30, 72, nan], [nan, nan, nan], [nan, 61, nan]], np.float32)
    found = open_store(site_dir).measurements(names)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    pooled = open_pooled([site_dir, site_dir]).measurements(names)
    np.testing.assert_array_equal(pooled, np.concatenate([expected, expected]))
    assert open_store(site_dir).measurements(()).shape == (4, 0)


def test_measurements_skip_the_gap_of_a_forgotten_row_and_what_an_ingest_adds_meanwhile(tmp_path: Path) -> None:
    for ecg in range(3):
        write_record(tmp_path / "source", f"r{ecg}", ecg_steps(seed=ecg))
    ingest(tmp_path / "source", tmp_path / "site")
    with closing(sqlite3.connect(tmp_path / "site" / INDEX_FILE)) as connection, connection:
        connection.execute("INSERT INTO measurements SELECT row, 'qt_ms', 400 + row FROM records")
        connection.execute("DELETE FROM measurements WHERE row = 1")
        connection.execute("DELETE FROM records WHERE row = 1")
        connection.commit()
        store = open_store(tmp_path / "site")
        connection.execute("INSERT INTO measurements VALUES (7, 'qt_ms', 407)")
        connection.commit()
    np.testing.assert_array_equal(store.measurements(("qt_ms",)), [[400], [402]])


def described_at(store: Store) -> NDArray[np.float32]:
    rows = store.index.row
    signals, present = map(torch.from_numpy, to_millivolt(store.read(rows)))
    return describer(store, tiny_study(objective={"name": "ssl_dml_wave_attributes"}), store.site_dir)(
        rows, signals, present
    ).numpy()


def test_what_the_archive_measured_comes_first_and_the_rest_is_computed(site_dir: Path) -> None:
    store = open_store(site_dir)
    described = described_at(store)
    computed = describe_waves(*map(torch.from_numpy, to_millivolt(store.read(store.index.row)))).numpy()
    expected = computed.copy()
    rate, axis = NAMES.index("heart_rate_bpm"), NAMES.index("qrs_axis_deg")
    expected[1, rate], expected[1, axis], expected[3, rate] = 72 / 12, -30 / 32, 61 / 12
    np.testing.assert_allclose(described, expected, rtol=1e-6)
    assert not np.array_equal(described, computed, equal_nan=True)
    pooled = described_at(open_pooled([site_dir, site_dir]))
    np.testing.assert_allclose(pooled, np.concatenate([expected, expected]), rtol=1e-6)
    cached = np.load(next((site_dir / "derived").glob("wave_attributes-*.npy")))
    np.testing.assert_array_equal(cached, computed)  # a later measurement is not frozen into the cache


def test_measured_names_are_the_archives_and_lie_first() -> None:
    assert [name for name, _ in MEASURED] == NAMES[: len(MEASURED)]
    assert {name for name, _ in MEASURED} <= MEASUREMENTS.keys()
    assert RELATIONS["wave_attributes"].measured == MEASURED
    assert all(not relation.measured or relation.cached for relation in RELATIONS.values())
