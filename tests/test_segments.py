"""Segments, masks, and reasons to turn a record away."""

import numpy as np
import pytest

from client.quality_policy import Finding, QualityPolicy
from client.records.record import EcgRecord, Reason, Unusable
from client.segments import cut_segments, lead_mask
from shared_model.leads import LEADS, MISSING
from tests.wfdb_fixtures import ecg_steps


def record(signal_mv: np.ndarray, rate_hz: float = 250, lead_names: tuple[str, ...] = LEADS) -> EcgRecord:
    return EcgRecord("r", "r.hea", signal_mv.astype(np.float32), lead_names, rate_hz, "p")


def ecg_mv(seconds: float, rate_hz: int = 250, leads: int = 12) -> np.ndarray:
    return ecg_steps(seconds, rate_hz, leads) / 1000


@pytest.mark.parametrize(
    ("seconds", "segments"),
    [(5, 1), (9.9, 1), (10, 1), (14.9, 1), (15, 2), (20, 2), (34, 3), (59.992, 6), (60, 6), (61, 6)],
)
def test_pieces_of_ten_seconds(seconds: float, segments: int) -> None:
    cut = cut_segments(record(ecg_mv(seconds)))
    assert cut.steps.shape == (segments, 12, 2500)
    assert cut.starts_s == tuple(10.0 * i for i in range(segments))
    stored_s = (cut.steps[:, 0] != MISSING).sum() / 250
    dropped_s = seconds - stored_s
    assert 0 <= round(dropped_s, 6) < (5 if seconds < 60 else 2)


def test_short_records_are_padded_at_the_end() -> None:
    signal = ecg_mv(7)
    cut = cut_segments(record(signal))
    np.testing.assert_array_equal(cut.steps[0, :, :1750], np.rint(signal * 1000))
    assert (cut.steps[0, :, 1750:] == MISSING).all()


def test_below_five_seconds_is_turned_away() -> None:
    with pytest.raises(Unusable) as caught:
        cut_segments(record(ecg_mv(4.9)))
    assert caught.value.reason == Reason.TOO_SHORT


def test_a_flat_lead_is_masked_and_the_others_stay() -> None:
    signal = ecg_mv(10)
    signal[7] = 0.25
    cut = cut_segments(record(signal))
    assert cut.findings[Finding.FLAT_LEAD] == cut.masked == ("V2",)
    assert cut.lead_masks == (0b1111_1111_1111 & ~(1 << 7),)
    assert (cut.steps[0, 7] == MISSING).all()
    np.testing.assert_array_equal(cut.steps[0, 0], np.rint(signal[0] * 1000))


def test_flat_i_is_not_used_to_derive() -> None:
    signal = ecg_mv(10, leads=2)
    signal[0] = 0.0
    cut = cut_segments(record(signal, lead_names=("I", "II")))
    assert cut.lead_masks == (0b10,)


def test_limb_leads_are_derived_before_rounding() -> None:
    cut = cut_segments(record(ecg_mv(10, leads=2), lead_names=("II", "I")))
    lead_ii, lead_i = np.rint(ecg_mv(10, leads=2) * 1000)
    np.testing.assert_array_equal(cut.steps[0, 2], lead_ii - lead_i)
    assert np.abs(cut.steps[0, 3] - -(lead_i + lead_ii) / 2).max() <= 0.5
    assert cut.lead_masks == (0b111111,)


def test_one_lead_is_enough() -> None:
    cut = cut_segments(record(ecg_mv(10, leads=1), lead_names=("V5",)))
    assert cut.lead_masks == (1 << LEADS.index("V5"),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda signal: np.full_like(signal, 0.3), Reason.ALL_LEADS_FLAT),
        (lambda signal: np.full_like(signal, np.nan), Reason.MOSTLY_MISSING),
        (lambda signal: np.where(np.arange(2500) < 1300, np.nan, signal), Reason.MOSTLY_MISSING),
        (lambda signal: signal * 40, Reason.IMPLAUSIBLE_AMPLITUDE),
        (lambda signal: signal + 50, Reason.IMPLAUSIBLE_AMPLITUDE),
    ],
)
def test_reasons(change: object, reason: Reason) -> None:
    with pytest.raises(Unusable) as caught:
        cut_segments(record(change(ecg_mv(10))))  # type: ignore[operator]
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "change",
    [
        lambda signal: np.where(np.arange(2500) < 1200, np.nan, signal),
        lambda signal: signal * np.where(np.arange(12) < 6, 1, 5)[:, None],  # a 7.5 mV QRS in V6
        lambda signal: signal + 12,  # an electrode offset that still fits
        lambda signal: signal + 30 * (np.arange(2500) % 250 == 100),  # pacing spikes
    ],
)
def test_what_is_unusual_yet_legitimate_is_kept(change: object) -> None:
    assert len(cut_segments(record(change(ecg_mv(10)))).steps) == 1  # type: ignore[operator]


def test_a_bad_segment_costs_only_itself() -> None:
    signal = ecg_mv(30)
    signal[:, 2500:5000] = 0.0
    cut = cut_segments(record(signal))
    assert cut.starts_s == (0.0, 20.0)
    assert cut.left_out == ("all_leads_flat",)


def test_lead_mask_has_one_bit_a_lead() -> None:
    steps = np.full((12, 2500), MISSING)
    steps[[0, 11], 5] = 1
    assert lead_mask(steps) == 1 | 1 << 11


def test_a_policy_masks_or_turns_away() -> None:
    signal = ecg_mv(10)
    signal[7, :1250] = 0.25  # flat half of the time
    assert cut_segments(record(signal)).masked == ("V2",)
    assert cut_segments(record(signal), QualityPolicy(flat_lead="accept")).masked == ()
    with pytest.raises(Unusable) as caught:
        cut_segments(record(signal), QualityPolicy(flat_lead="turn_away"))
    assert caught.value.reason == Reason.LOW_QUALITY


def test_policy_and_constant_leads_together_may_leave_nothing() -> None:
    signal = ecg_mv(10, leads=2)
    signal[0] = 0.25
    signal[1, :1250] = 0.25
    policy = QualityPolicy(flat_lead="accept", noise="mask", baseline_wander="mask")
    assert cut_segments(record(signal, lead_names=("I", "II")), policy).masked == ("I",)
    with pytest.raises(Unusable) as caught:
        cut_segments(record(signal, lead_names=("I", "II")))
    assert caught.value.reason == Reason.LOW_QUALITY


def test_every_segment_has_its_score_and_findings_are_gathered() -> None:
    signal = ecg_mv(30)
    signal[7, 2500:5000] = 0.25
    cut = cut_segments(record(signal))
    assert len(cut.qualities) == 3
    assert cut.qualities[1] < min(cut.qualities[0], cut.qualities[2]) <= 1
    assert cut.findings[Finding.FLAT_LEAD] == ("V2",)
    assert cut.lead_masks[0] == 0b1111_1111_1111 != cut.lead_masks[1]


def test_a_wrong_gain_in_one_piece_turns_the_record_away() -> None:
    time_s = np.arange(7500) / 250
    signal = np.outer(np.linspace(0.5, 1.5, 12), np.exp(-(((time_s % 1) - 0.3) ** 2) / 0.0004))
    assert len(cut_segments(record(signal)).steps) == 3
    signal[:, 2500:5000] *= 8
    with pytest.raises(Unusable) as caught:
        cut_segments(record(signal))
    assert caught.value.reason == Reason.WRONG_GAIN


@pytest.mark.parametrize("rate_hz", [0.0, float("nan"), 1e9])
def test_an_impossible_rate_or_shape_is_one_reason(rate_hz: float) -> None:
    with pytest.raises(Unusable):
        cut_segments(record(ecg_mv(10), rate_hz=rate_hz))
    with pytest.raises(Unusable):
        cut_segments(record(ecg_mv(10), lead_names=LEADS[:3]))
