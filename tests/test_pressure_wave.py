"""Pressures measured from a waveform: known means, artefact by its kind, and real tracings with their monitor."""

import csv

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from client.records.pressure_wave import MOST_MISSING, Artefact, Pressures, Refused, measure_pressures
from tests.pressure_fixtures import pressure_mmhg
from tests.realdata import REAL_DATA, needs_real_data

RATE_HZ = 125
EXAMPLES = settings(max_examples=60, deadline=None)


def artefact_of(pressure: np.ndarray, rate_hz: float = RATE_HZ) -> Artefact | None:
    try:
        measure_pressures(pressure, rate_hz)
    except Refused as refused:
        return refused.artefact
    return None


@EXAMPLES
@given(
    mean=st.floats(3, 60),
    pulse=st.floats(4, 60),
    beat_s=st.floats(0.45, 1.4),
    rate_hz=st.sampled_from([60.0, 125.0, 240.0, 500.0, 1000.0]),
    wedge=st.booleans(),
    breathing=st.floats(0, 3),
)
def test_the_known_mean_is_measured(
    mean: float, pulse: float, beat_s: float, rate_hz: float, wedge: bool, breathing: float
) -> None:
    pressure = pressure_mmhg(
        mean, pulse_mmhg=pulse, beat_s=beat_s, rate_hz=rate_hz, wedge=wedge, breathing_mmhg=breathing
    )
    measured = measure_pressures(pressure, rate_hz)
    # Half a beat too many or too few at 10 beats, and the part of a breath that is left over.
    assert abs(measured.mean_mmhg - mean) < 0.02 * pulse + 0.25 * breathing + 0.05
    assert measured.diastolic_mmhg < measured.mean_mmhg < measured.systolic_mmhg
    assert measured.heart_rate_bpm == pytest.approx(60 / beat_s, rel=0.05)
    # The filter of 12 Hz takes a little off a narrow peak.
    assert measured.systolic_mmhg - measured.diastolic_mmhg == pytest.approx(pulse, rel=0.2, abs=2 * breathing)


def test_irregular_beats_are_averaged_over_time() -> None:
    """Atrial fibrillation: the mean of the beats weighted by their lengths is the mean over time."""
    random = np.random.default_rng(0)
    lengths = random.uniform(0.5, 1.1, 60)
    pressure = pressure_mmhg(30, beat_s=lengths, seconds=30)
    assert measure_pressures(pressure, RATE_HZ).mean_mmhg == pytest.approx(30, abs=0.5)


def test_breathing_is_averaged_over() -> None:
    """The digital mean: neither the end-expiratory 28 nor the inspiratory 16 mmHg of this tracing."""
    pressure = pressure_mmhg(22, breathing_mmhg=6, seconds=16)
    assert measure_pressures(pressure, RATE_HZ).mean_mmhg == pytest.approx(22, abs=0.7)


def flushed(pressure: np.ndarray) -> None:
    pressure[600:700] = 90


def zeroed(pressure: np.ndarray) -> None:
    pressure[600:700] = 0


def off(pressure: np.ndarray) -> None:
    pressure[:] = 12


def gone(pressure: np.ndarray) -> None:
    pressure[:300] = np.nan


def at_bag_pressure(pressure: np.ndarray) -> None:
    pressure[600:800] = 300 + np.arange(200) % 2


def square(pressure: np.ndarray) -> None:
    pressure[:] = 10 + 30 * (np.arange(len(pressure)) % 60 < 30)


def damped(pressure: np.ndarray) -> None:
    pressure[:] = 18 + (pressure - 18) * 0.08


def noise(pressure: np.ndarray) -> None:
    pressure[:] = np.random.default_rng(0).normal(18, 5, len(pressure))


def pulled_back(pressure: np.ndarray) -> None:
    pressure[len(pressure) // 2 :] += 12


def clipped(pressure: np.ndarray) -> None:
    np.minimum(pressure, np.percentile(pressure, 75), out=pressure)


def cut_below(pressure: np.ndarray) -> None:
    np.maximum(pressure, np.percentile(pressure, 25), out=pressure)


@pytest.mark.parametrize("wedge", [True, False])
@pytest.mark.parametrize(
    ("damage", "artefact"),
    [
        (flushed, Artefact.STILL),
        (zeroed, Artefact.STILL),
        (off, Artefact.STILL),
        (clipped, Artefact.CLIPPED),
        (cut_below, Artefact.CLIPPED),
        (gone, Artefact.MISSING),
        (at_bag_pressure, Artefact.OUT_OF_RANGE),
        (square, Artefact.SQUARE),
        (damped, Artefact.DAMPED),
        (noise, Artefact.NO_RHYTHM),
        (pulled_back, Artefact.UNSTEADY),
    ],
)
def test_artefact_is_refused_by_its_kind(damage, artefact: Artefact, wedge: bool) -> None:  # type: ignore[no-untyped-def]
    pressure = pressure_mmhg(18, wedge=wedge, pulse_mmhg=14)
    assert artefact_of(pressure) is None
    damage(pressure)
    assert artefact_of(pressure) == artefact


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_too_short(samples: int) -> None:
    assert artefact_of(pressure_mmhg(18)[:samples]) == Artefact.TOO_SHORT


def test_a_rate_without_beats_is_the_callers_mistake() -> None:
    for rate_hz in (0, 10, np.nan):
        with pytest.raises(ValueError, match="at least 50 Hz"):
            measure_pressures(pressure_mmhg(18), rate_hz)


BURSTS = st.lists(
    st.tuples(st.integers(0, 1874), st.integers(1, 250), st.sampled_from([np.nan, 0.0, 90.0, 300.0, -50.0, np.inf])),
    min_size=1,
    max_size=4,
)


@EXAMPLES
@given(bursts=BURSTS, wedge=st.booleans())
def test_bursts_are_refused_or_do_not_show(bursts: list[tuple[int, int, float]], wedge: bool) -> None:
    """Nothing between: whatever of NaN, flush, zero and rail lies on a tracing, a mean that is given is right."""
    pressure = pressure_mmhg(20, wedge=wedge, pulse_mmhg=12)
    for start, length, value in bursts:
        pressure[start : start + length] = value
    if np.mean(~np.isfinite(pressure)) > MOST_MISSING:
        assert artefact_of(pressure) is not None
    try:
        measured = measure_pressures(pressure, RATE_HZ)
    except Refused:
        return
    assert abs(measured.mean_mmhg - 20) < 1


@EXAMPLES
@given(pressure=st.lists(st.floats(width=32), min_size=0, max_size=400), repeat=st.integers(1, 8))
def test_whatever_the_samples_it_is_a_number_or_a_refusal(pressure: list[float], repeat: int) -> None:
    try:
        measured = measure_pressures(np.array(pressure * repeat, float), RATE_HZ)
    except Refused:
        return
    assert np.isfinite([measured.mean_mmhg, measured.systolic_mmhg, measured.diastolic_mmhg]).all()
    assert measured.beats >= 5


def measured_windows() -> tuple[list[tuple[dict[str, str], Pressures]], list[tuple[str, Artefact]]]:
    """What became of each window of mimic-pap-dev: measured, or (kind, artefact)."""
    measured, refused = [], []
    folder = REAL_DATA / "mimic-pap-dev"
    with (folder / "numerics.csv").open() as file:
        for row in csv.DictReader(file):
            record = wfdb.rdrecord(str(folder / row["record"]))
            try:
                measured.append((row, measure_pressures(record.p_signal[:, 0], record.fs)))
            except Refused as reason:
                refused.append((row["kind"], reason.artefact))
    return measured, refused


@needs_real_data
def test_real_pulmonary_artery_pressures_agree_with_their_monitor() -> None:
    measured, refused = measured_windows()
    assert {row["kind"] for row, _ in measured} == {"clean"}  # every artefact window is refused
    assert sum(kind != "clean" for kind, _ in refused) == 9
    # "Clean" in the table is a mean near the monitor's: 20 of the 129 hold a flush, a zeroing or a clipped stretch.
    assert len(measured) >= 105
    errors = np.array(
        [
            (
                found.mean_mmhg - float(row["pap_mean_mmHg"]),
                found.systolic_mmhg - float(row["pap_sys_mmHg"]),
                found.diastolic_mmhg - float(row["pap_dia_mmHg"]),
            )
            for row, found in measured
        ]
    )
    median, high = np.percentile(np.abs(errors), [50, 95], axis=0)
    assert (median <= [1, 1, 1]).all()
    assert (high <= [3, 5, 5]).all()
