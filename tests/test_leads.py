"""The signal contract: names, units, resampling, limb leads, steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.signal import resample_poly

from shared_model.leads import (
    LEADS,
    MISSING,
    arrange,
    canonical_lead,
    derive_limb_leads,
    millivolt_per_unit,
    resample,
    to_millivolt,
    to_steps,
)


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        *((lead, lead) for lead in LEADS),
        *((lead.upper(), lead) for lead in LEADS),
        *((lead.lower(), lead) for lead in LEADS),
        ("Lead I", "I"),
        ("ECG_lead_II", "II"),
        ("ECG lead aVF", "aVF"),
        ("MDC_ECG_LEAD_V1", "V1"),
        ("MDC_ECG_LEAD_AVR", "aVR"),
        ("C1", "V1"),
        ("c6", "V6"),
        (" V3 ", "V3"),
    ],
)
def test_known_spellings(name: str, lead: str) -> None:
    assert canonical_lead(name) == lead


@pytest.mark.parametrize(
    "name",
    [
        "",
        "V",
        "V7",
        "V0",
        "C7",
        "MLII",
        "-aVR",
        "MDC_ECG_LEAD_AVRNEG",
        "ABP",
        "IV",
        "IIII",
        "ECG",
        "vx",
        "Lead",
    ],
)
def test_other_channels_are_no_lead(name: str) -> None:
    assert canonical_lead(name) is None


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("mV", 1), ("mv", 1), ("uV", 1e-3), ("\u00b5V", 1e-3), ("\u03bcV", 1e-3), ("V", 1e3), ("mmHg", None)],
)
def test_units(unit: str, factor: float | None) -> None:
    assert millivolt_per_unit(unit) == factor


def sine(frequency_hz: float, rate_hz: float, seconds: float = 10) -> np.ndarray:
    return np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz)[None]


@pytest.mark.parametrize("rate_hz", [100, 125, 128, 240, 257, 360, 400, 500, 977.5, 1000])
def test_a_10_hz_sine_stays(rate_hz: float) -> None:
    output = resample(sine(10, rate_hz), rate_hz, 250)
    assert output.dtype == np.float32
    assert output.shape == (1, 2500)
    middle = slice(50, -50)
    np.testing.assert_allclose(output[0, middle], sine(10, 250)[0, middle], atol=0.01)


@pytest.mark.parametrize(("frequency_hz", "rate_hz"), [(200, 500), (150, 500), (400, 1000), (180, 400)])
def test_what_lies_above_half_the_rate_vanishes(frequency_hz: float, rate_hz: int) -> None:
    tone = sine(frequency_hz, rate_hz)
    output = resample(tone, rate_hz, 250)
    assert np.abs(output[0, 50:-50]).max() < 0.01
    # Negative control: without the filter the tone comes back as another one.
    positions = np.arange(2500) * rate_hz / 250
    aliased = np.interp(positions, np.arange(tone.shape[1]), tone[0])
    assert np.abs(aliased[50:-50]).max() > 0.3


def test_an_offset_does_not_ring_at_the_edges() -> None:
    constant = np.full((1, 5000), 1.7)
    np.testing.assert_allclose(resample(constant, 500, 250), 1.7, atol=1e-6)
    zero_padded = resample_poly(constant, 1, 2, axis=-1)
    assert np.abs(zero_padded - 1.7).max() > 0.1  # the control: zero padding does ring


def test_missing_samples_stay_missing_and_do_not_spread() -> None:
    signal = sine(5, 500)
    whole = resample(signal, 500, 250)
    signal[0, 1000:1100] = np.nan
    output = resample(signal, 500, 250)
    assert np.isnan(output[0, 500:550]).all()
    assert np.isnan(output).sum() == 50
    away = np.r_[0:480, 570:2500]
    np.testing.assert_allclose(output[0, away], whole[0, away], atol=2e-3)


def test_an_all_missing_lead_stays_missing_beside_others() -> None:
    output = resample(np.vstack([sine(5, 500), np.full((1, 5000), np.nan)]), 500, 250)
    assert np.isnan(output[1]).all()
    assert not np.isnan(output[0]).any()


@pytest.mark.parametrize("length", [1, 2, 7, 999, 1001])
def test_length_is_rounded_up(length: int) -> None:
    assert resample(np.ones((2, length)), 500, 250).shape == (2, -(-length // 2))


def test_arrange_by_name_not_by_place() -> None:
    names = ("V1", "aVR", "aVF", "aVL", "I", "V1")  # MIMIC's order of aVF and aVL; V1 twice
    arranged = arrange(np.arange(6.0)[:, None].repeat(3, axis=1), names)
    found = {lead: arranged[place, 0] for place, lead in enumerate(LEADS) if not np.isnan(arranged[place, 0])}
    assert found == {"V1": 0, "aVR": 1, "aVF": 2, "aVL": 3, "I": 4}


@given(hnp.arrays(np.int16, (2, 20), elements=st.integers(-5000, 5000)))
def test_limb_leads_follow_exactly_from_i_and_ii(steps: np.ndarray) -> None:
    signal = np.full((12, 20), np.nan, np.float32)
    signal[:2] = steps / 1000
    absent = np.array([False] * 2 + [True] * 10)
    derived = derive_limb_leads(signal, absent)
    lead_i, lead_ii = steps.astype(float) / 1000
    augmented = [-(lead_i + lead_ii) / 2, lead_i - lead_ii / 2, lead_ii - lead_i / 2]
    expected = [lead_i, lead_ii, lead_ii - lead_i, *augmented]
    np.testing.assert_allclose(derived[:6], expected, atol=2e-6)
    assert np.isnan(derived[6:]).all()


def test_recorded_limb_leads_are_not_overwritten() -> None:
    signal = np.ones((12, 4), np.float32)
    np.testing.assert_array_equal(derive_limb_leads(signal, np.zeros(12, bool)), signal)


@given(hnp.arrays(np.float32, (3, 10), elements=st.floats(-32.75, 32.75, width=32)))
def test_steps_are_within_half_a_microvolt(signal_mv: np.ndarray) -> None:
    back, present = to_millivolt(to_steps(signal_mv))
    assert present.all()
    assert np.abs(back.astype(np.float64) - signal_mv).max() <= 0.000502  # half a step, and float32


@given(hnp.arrays(np.int16, 30, elements=st.integers(-32768, 32767)))
def test_steps_survive_millivolt(steps: np.ndarray) -> None:
    signal_mv, present = to_millivolt(steps)
    signal_mv[~present] = np.nan
    np.testing.assert_array_equal(to_steps(signal_mv), steps)


def test_missing_and_out_of_range_steps() -> None:
    steps = to_steps(np.array([np.nan, 40.0, -40.0, np.inf, 0.0]))
    np.testing.assert_array_equal(steps, [MISSING, 32767, -32767, 32767, 0])
    signal_mv, present = to_millivolt(steps)
    assert present.tolist() == [False, True, True, True, True]
    assert signal_mv[0] == 0
    assert signal_mv.dtype == np.float32
