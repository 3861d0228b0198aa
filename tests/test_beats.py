"""R peaks and median beats: on drawn ECGs, where the truth is known, and on real ones against wfdb."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from wfdb.processing import xqrs_detect

from shared_model.beats import (
    BEFORE,
    DESCRIBED_SAMPLES,
    DESCRIPTOR_WIDTH,
    FALLBACK_RR_S,
    describe_beats,
    median_beat,
    r_peaks,
)
from shared_model.leads import LEADS, canonical_lead, resample
from tests.realdata import REAL_DATA, needs_real_data

TIME_S = np.arange(2500) / 250
PRESENT = np.ones((12, 2500), bool)
# (amplitude mV, delay s, width s) of P, Q, R, S and T
WAVES = ((0.12, -0.16, 0.03), (-0.1, -0.03, 0.008), (1.0, 0.0, 0.011), (-0.25, 0.03, 0.01), (0.3, 0.28, 0.05))
LEAD_GAIN = np.array([0.7, 1.0, 0.5, -0.8, 0.3, 0.7, -0.6, 0.8, 1.0, 1.3, 1.1, 0.9])
REGULAR_S = np.arange(0.4, 9.8, 0.8)


def draw_ecg(
    beats_s: Sequence[float] | NDArray[np.float64],
    noise_mv: float = 0.02,
    wander_mv: float = 0.3,
    waves: Sequence[tuple[float, float, float]] = WAVES,
) -> NDArray[np.float32]:
    """An ECG (12, 2500) mV with an R peak at each of `beats_s`, wander and noise."""
    rng = np.random.default_rng(0)
    one = sum(
        amplitude * np.exp(-(((TIME_S - beat - delay) / width) ** 2) / 2)
        for beat in beats_s
        for amplitude, delay, width in waves
    )
    wander = wander_mv * np.sin(2 * np.pi * (0.25 * TIME_S + rng.random((12, 1))))
    noise = noise_mv * rng.standard_normal((12, 2500))
    return (LEAD_GAIN[:, None] * one + wander + noise).astype(np.float32)


def assert_peaks(found: NDArray[np.int64], expected_s: NDArray[np.float64], within_ms: float = 40) -> None:
    assert len(found) == len(expected_s)
    np.testing.assert_allclose(found / 250, expected_s, atol=within_ms / 1000)


@pytest.mark.parametrize("rate_bpm", [35, 60, 90, 150, 200])
def test_finds_every_beat_at_any_rate(rate_bpm: int) -> None:
    beats_s = np.arange(0.5, 9.6, 60 / rate_bpm)
    ecg = draw_ecg(beats_s)
    assert_peaks(r_peaks(ecg, PRESENT), beats_s)
    typical = median_beat(ecg, PRESENT)
    assert typical.rr_mean_s == pytest.approx(60 / rate_bpm, rel=0.01)
    assert typical.rr_cv < 0.02


def test_irregular_rhythm_has_a_high_rr_variation() -> None:
    rr_s = np.random.default_rng(3).uniform(0.45, 1.1, 12)
    beats_s = 0.4 + np.cumsum(rr_s)
    beats_s = beats_s[beats_s < 9.7]
    ecg = draw_ecg(beats_s)
    assert_peaks(r_peaks(ecg, PRESENT), beats_s)
    assert median_beat(ecg, PRESENT).rr_cv == pytest.approx(
        np.std(np.diff(beats_s)) / np.diff(beats_s).mean(), abs=0.02
    )


def test_ectopic_beats_are_found_but_do_not_enter_the_median() -> None:
    sinus = draw_ecg(REGULAR_S, noise_mv=0.005, wander_mv=0.0)
    ectopic = sinus.copy()
    for beat in REGULAR_S[[3, 8]]:
        bump = np.exp(-(((TIME_S - beat) / 0.05) ** 2) / 2) * np.sin(2 * np.pi * 8 * (TIME_S - beat))
        near = np.abs(TIME_S - beat) < 0.35
        ectopic[:, near] = (2.5 * LEAD_GAIN[::-1, None] * bump)[:, near].astype(np.float32)  # another axis
    clean, disturbed = median_beat(sinus, PRESENT), median_beat(ectopic, PRESENT)
    assert 0 < disturbed.beats_used < clean.beats_used
    np.testing.assert_allclose(disturbed.beat, clean.beat, atol=0.03)


def test_a_peaked_t_wave_is_no_beat() -> None:
    peaked = (*WAVES[:-1], (1.5, 0.28, 0.03))
    assert_peaks(r_peaks(draw_ecg(REGULAR_S, waves=peaked), PRESENT), REGULAR_S)


def test_median_beat_does_not_depend_on_phase() -> None:
    early, late = median_beat(draw_ecg(REGULAR_S), PRESENT), median_beat(draw_ecg(REGULAR_S + 0.137), PRESENT)
    assert np.abs(early.beat - late.beat).max() < 0.12  # a quarter of a sample on a slope of 0.3 mV a sample
    assert abs(int(np.abs(early.beat[1]).argmax()) - BEFORE) <= 2


def test_missing_and_flat_leads_stay_zero_and_harm_no_other() -> None:
    ecg, present = draw_ecg(REGULAR_S), PRESENT.copy()
    full = median_beat(ecg, PRESENT)
    ecg[0], present[0] = 0.0, False
    ecg[7] = 0.4  # flat, not missing
    partly = median_beat(ecg, present)
    assert not partly.beat[[0, 7]].any()
    kept = [lead for lead in range(12) if lead not in (0, 7)]
    np.testing.assert_allclose(partly.beat[kept], full.beat[kept], atol=0.03)


def test_one_lead_of_noise_hides_no_beat() -> None:
    ecg = draw_ecg(REGULAR_S)
    ecg[4] = np.random.default_rng(0).normal(0, 3, 2500)
    assert_peaks(r_peaks(ecg, PRESENT), REGULAR_S)


def test_padding_after_five_seconds_is_no_pause() -> None:
    ecg, present = draw_ecg(REGULAR_S), PRESENT.copy()
    ecg[:, 1250:], present[:, 1250:] = 0.0, False
    typical = median_beat(ecg, present)
    assert typical.rr_mean_s == pytest.approx(0.8, rel=0.01)
    assert typical.beats_used >= 4


def test_a_gap_in_the_middle_is_no_long_rr() -> None:
    ecg, present = draw_ecg(REGULAR_S), PRESENT.copy()
    ecg[:, 900:1700], present[:, 900:1700] = 0.0, False
    assert median_beat(ecg, present).rr_mean_s == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize("ecg", [np.zeros((12, 2500)), np.full((12, 2500), 0.7)], ids=["zero", "flat"])
def test_a_record_without_beats_is_flagged_and_never_nan(ecg: NDArray[np.float64]) -> None:
    for present in (PRESENT, ~PRESENT):
        typical = median_beat(ecg.astype(np.float32), present)
        assert typical.beats_used == 0
        assert not typical.beat.any()
        assert (typical.rr_mean_s, typical.rr_cv) == (FALLBACK_RR_S, 0.0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), gain=st.sampled_from([1e-4, 0.1, 1.0, 30.0]), missing=st.floats(0, 1))
def test_noise_with_holes_gives_finite_descriptions(seed: int, gain: float, missing: float) -> None:
    rng = np.random.default_rng(seed)
    present = rng.random((2, 12, 1)) >= missing
    present = present & (rng.random((2, 1, 2500)) >= missing / 100)
    signals = (gain * rng.standard_normal((2, 12, 2500)) * present).astype(np.float32)
    described = describe_beats(signals, np.broadcast_to(present, signals.shape))
    assert described.shape == (2, DESCRIPTOR_WIDTH)
    assert np.isfinite(described).all()


def test_description_holds_the_beat_at_half_the_rate() -> None:
    ecg = draw_ecg(REGULAR_S)
    described = describe_beats(ecg[None], PRESENT[None])[0]
    beat = median_beat(ecg, PRESENT).beat
    expected = (beat[:, ::2] + beat[:, 1::2]) / 2
    np.testing.assert_allclose(described[:-2].reshape(12, DESCRIBED_SAMPLES), expected, atol=1e-6)


def real_ecgs(count: int) -> list[NDArray[np.float32]]:
    """The first real ECGs, (12, 2500) mV at 250 Hz."""
    folder = REAL_DATA / "ptbxl-dev"
    table = pd.read_csv(folder / "ptbxl_database.csv").head(count)
    ecgs = []
    for name in table.filename_lr:
        record = wfdb.rdrecord(str(folder / name))
        order = [[canonical_lead(lead) for lead in record.sig_name].index(lead) for lead in LEADS]
        ecgs.append(resample(record.p_signal.T[order], record.fs, 250)[:, :2500])
    return ecgs


def agreement(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> float:
    """F1 of beats within 150 ms (the tolerance of ANSI/AAMI EC57), the ends of the record left out."""
    ours, theirs = (peaks[(peaks > 60) & (peaks < 2440)] for peaks in (ours, np.asarray(theirs)))
    if len(ours) == 0 or len(theirs) == 0:
        return 0.0
    near = np.abs(ours[:, None] - theirs[None, :]) <= 38
    return 2 * min(near.any(1).sum(), near.any(0).sum()) / (len(ours) + len(theirs))


@needs_real_data
def test_real_ecgs_agree_with_wfdb_xqrs_and_with_physiology() -> None:
    ecgs = real_ecgs(60)
    scores = []
    for ecg in ecgs:
        ours = r_peaks(ecg, PRESENT)
        oracles = [xqrs_detect(ecg[lead].astype(float), 250, verbose=False) for lead in (1, 6, 10)]
        scores.append(max(agreement(ours, oracle) for oracle in oracles))  # xqrs sees one lead and may fail
        typical = median_beat(ecg, PRESENT)
        assert 25 <= 60 / typical.rr_mean_s <= 200
        assert typical.beats_used >= 3
    assert np.mean(scores) > 0.99
    assert min(scores) > 0.9


@needs_real_data
def test_two_halves_of_a_real_ecg_have_the_same_beat_and_not_the_same_samples() -> None:
    ecgs = np.stack(real_ecgs(60))
    first, second = (ecgs[..., half].reshape(60, -1) for half in (slice(0, 1250), slice(1250, 2500)))
    present = np.zeros(ecgs.shape, bool)
    present[..., :1250] = True
    padded = [np.pad(part.reshape(60, 12, 1250), ((0, 0), (0, 0), (0, 1250))) for part in (first, second)]
    beats = [describe_beats(part, present) for part in padded]
    assert recall_at_1(*beats) > 0.9
    assert recall_at_1(first, second) < 0.3  # negative control: raw samples


def recall_at_1(queries: NDArray[np.float32], keys: NDArray[np.float32]) -> float:
    distance = ((queries[:, None] - keys[None, :]) ** 2).sum(-1)
    return float((distance.argmin(1) == np.arange(len(queries))).mean())
