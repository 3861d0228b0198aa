"""The kernels measure what a slow version measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.signal_measures import COLUMNS, measure
from shared_model.leads import MISSING
from tests.quality_fixtures import ALL, clean_mv, clean_steps, slow_measures


def assert_same(steps: np.ndarray, recorded: np.ndarray) -> None:
    measures = measure(steps, recorded)
    table, products = slow_measures(steps, recorded)
    for edge in (1e-6, -1e-6):
        other = slow_measures(steps, recorded, edge)[0]
        table = np.where(np.isclose(measures.table, other, rtol=1e-9, atol=1e-9), other, table)
    np.testing.assert_allclose(measures.table, table, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(measures.products, products, rtol=1e-4, atol=1e-4 * max(1.0, products.max()))


@st.composite
def disturbed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A clean ECG of 1 to 11 s with anything done to some of its leads."""
    samples = draw(st.integers(250, 2750))
    signal = clean_mv(samples / 250)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for lead in draw(st.lists(st.integers(0, 11), max_size=6)):
        start, end = sorted(random.integers(0, samples + 1, 2))
        kind = draw(st.sampled_from(["missing", "hold", "rail", "noise", "offset", "spikes", "scale", "few"]))
        if kind == "missing":
            signal[lead, start:end] = np.nan
        elif kind == "hold":
            signal[lead, start:end] = signal[lead, min(start, samples - 1)]
        elif kind == "rail":
            signal[lead] = np.clip(signal[lead] * 5, -2, 2.5)
        elif kind == "noise":
            signal[lead, start:end] += random.normal(0, 2, end - start)
        elif kind == "offset":
            signal[lead, start:end] += random.uniform(-35, 35)
        elif kind == "spikes":
            signal[lead, random.integers(0, samples, 12)] += 20
        elif kind == "scale":
            signal[lead] *= random.choice([0.0, 0.01, 10])
        else:
            signal[lead, random.integers(0, samples, 30)] = np.nan
    steps = np.clip(np.rint(signal * 1000), -32767, 32767)
    recorded = np.array(draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    steps[~recorded] = np.nan
    return np.where(np.isnan(steps), MISSING, steps).astype(np.int16), recorded


@settings(max_examples=150, deadline=None)
@given(disturbed())
def test_kernels_equal_the_slow_version(ecg: tuple[np.ndarray, np.ndarray]) -> None:
    assert_same(*ecg)


def test_extremes() -> None:
    for steps in (
        np.full((12, 2500), MISSING),
        np.zeros((12, 2500), np.int16),
        np.where(np.arange(2500) % 2, np.int16(32767), np.int16(-32767)) * np.ones((12, 1), np.int16),
    ):
        assert_same(steps, ALL)
        assert_same(steps, ~ALL)


def test_what_a_measure_is_called() -> None:
    signal = clean_mv()
    time_s = np.arange(2500) / 250
    signal[6] += 0.3 * np.sin(2 * np.pi * 50 * time_s)
    signal[7] += 0.2 * time_s
    measures = measure(np.rint(signal * 1000).astype(np.int16), ALL)
    assert measures.column("noise_mv")[6] == pytest.approx(0.3, rel=0.1)
    assert measures.column("wander_mv")[7] == pytest.approx(0.2 * 9, rel=0.05)  # middle of the last second to the first
    assert measures.column("span_mv")[11] == pytest.approx(1.3, rel=0.05)
    assert measures.column("upright")[11] > 0.9
    assert measures.column("upright")[6] < 0
    assert len(COLUMNS) == measures.table.shape[1]


@pytest.mark.parametrize("shape", [(11, 2500), (12, 249)])
def test_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="12 leads of at least 250 samples"):
        measure(np.zeros(shape, np.int16), ALL)


def test_the_input_stays_as_it_was() -> None:
    steps = clean_steps()
    before = steps.copy()
    measure(steps, ALL)
    np.testing.assert_array_equal(steps, before)
