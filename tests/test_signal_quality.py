"""Each fault is found, by name and lead; what is unusual but real is not."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.quality_policy import Finding, QualityPolicy, apply_policy
from client.signal_quality import assess
from shared_model.leads import LEADS, MISSING, resample, to_steps
from tests.quality_fixtures import ALL, bump, clean_mv, clean_steps, with_electrodes

TIME_S = np.arange(2500) / 250
LIMB = LEADS[:6]
Change = Callable[[np.ndarray], object]


def changed(change: Change) -> np.ndarray:
    signal = clean_mv()
    change(signal)
    return to_steps(signal)


def clip(signal: np.ndarray, lead: int) -> None:
    signal[lead] = np.clip(3 * signal[lead], -1.5, 1.5)


def test_a_clean_ecg_has_no_finding() -> None:
    quality = assess(clean_steps(), ALL)
    assert quality.findings == {}
    assert quality.score > 0.95
    assert quality.recorded == LEADS
    assert quality.explained() == ()


@pytest.mark.parametrize(
    ("finding", "leads", "change"),
    [
        (Finding.FLAT_LEAD, ("V2",), lambda x: x[7].fill(0.4)),
        (Finding.FLAT_LEAD, ("V2",), lambda x: x[7, :1000].fill(0.4)),
        (Finding.FLAT_LEAD, ("V3",), lambda x: np.multiply(x[8], 0.001, out=x[8])),
        (Finding.MISSING_SAMPLES, ("V4",), lambda x: x[9, :1300].fill(np.nan)),
        (Finding.MISSING_SAMPLES, ("V4",), lambda x: x[9].fill(np.nan)),
        (Finding.CLIPPED, ("V4",), lambda x: clip(x, 9)),
        (Finding.OFF_SCALE, ("V1",), lambda x: np.add(x[6, :300], 14, out=x[6, :300])),
        (Finding.NOISE, ("V5",), lambda x: np.add(x[10], 0.15 * np.sin(100 * np.pi * TIME_S), out=x[10])),
        (Finding.NOISE, ("V5",), lambda x: np.add(x[10], 0.15 * np.sin(120 * np.pi * TIME_S), out=x[10])),
        (
            Finding.NOISE,
            ("V5",),
            lambda x: np.add(x[10, :1000], np.random.default_rng(0).normal(0, 0.2, 1000), out=x[10, :1000]),
        ),
        (Finding.BASELINE_WANDER, ("V6",), lambda x: np.add(x[11], np.sin(np.pi * TIME_S / 4), out=x[11])),
    ],
)
def test_a_fault_of_one_lead(finding: Finding, leads: tuple[str, ...], change: Change) -> None:
    quality = assess(changed(change), ALL)
    assert quality.findings[finding] == leads
    assert set(quality.findings) <= {finding, Finding.BASELINE_WANDER}  # a rail or a square is also a wander
    assert quality.score < 0.8
    assert any(line.startswith(f"{finding} in {leads[0]}: ") for line in quality.explained())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[7, :500].fill(0.4),
        lambda x: x[9, :1200].fill(np.nan),
        lambda x: np.add(x[10], 0.05 * np.sin(100 * np.pi * TIME_S), out=x[10]),
        lambda x: np.add(x[10, :500], np.random.default_rng(0).normal(0, 0.2, 500), out=x[10, :500]),
        lambda x: np.add(x[11], 0.5 * np.sin(np.pi * TIME_S / 4), out=x[11]),
    ],
)
def test_half_a_fault_lowers_the_score_only(change: Change) -> None:
    quality = assess(changed(change), ALL)
    assert quality.findings == {}
    assert quality.score < assess(clean_steps(), ALL).score


def atrial_fibrillation() -> np.ndarray:
    random = np.random.default_rng(1)
    beats = np.cumsum(random.uniform(0.4, 1.1, 30))
    qrs = sum(np.exp(-((TIME_S - beat) ** 2) / 0.0003) for beat in beats)
    waves = 0.08 * np.sin(2 * np.pi * 6 * TIME_S + np.cumsum(random.normal(0, 0.05, 2500)))
    return derived(qrs + waves, 1.4 * qrs + waves, clean_mv()[6:])


def derived(one: np.ndarray, two: np.ndarray, chest: np.ndarray) -> np.ndarray:
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.vstack([limb, chest])


def low_voltage() -> np.ndarray:
    return clean_mv(noise_mv=0) * 0.2 + clean_mv(noise_mv=0.005) - clean_mv(noise_mv=0)


def tall() -> np.ndarray:
    signal = clean_mv()
    signal[6:] *= 4
    return signal


def ventricular_tachycardia() -> np.ndarray:
    wave = 2 * np.sin(2 * np.pi * 3 * TIME_S)
    return derived(wave, 0.9 * wave, -np.outer(np.linspace(1, 0.5, 6), wave))


def ventricular_fibrillation() -> np.ndarray:
    random = np.random.default_rng(2)
    one, two, *chest = (0.5 * np.sin(2 * np.pi * 5 * TIME_S + np.cumsum(random.normal(0, 0.1, 2500))) for _ in range(8))
    return derived(one, two, np.array(chest))


def paced() -> np.ndarray:
    """Spikes of one sample at 500 Hz, as a cart resamples them, unipolar: up to 20 mV in a chest lead."""
    spikes = np.zeros((12, 5000))
    spikes[:, 100::400] = [[1], [2], [1], [-1.5], [0], [1.5], *([20],) * 6]
    return clean_mv() + resample(spikes, 500, 250)


@pytest.mark.parametrize(
    "signal",
    [
        clean_mv() + 15,
        tall(),
        low_voltage(),
        atrial_fibrillation(),
        ventricular_tachycardia(),
        ventricular_fibrillation(),
        paced(),
        resample(resample(clean_mv(), 250, 100), 100, 250),
        clean_mv() * np.where(bump(TIME_S, 0.3, 0.02) > 0.1, 1, 0.3),  # small P and T
        clean_mv(5),
    ],
    ids=["offset", "tall", "low voltage", "AF", "VT", "VF", "paced", "100 Hz", "flat T", "5 s"],
)
def test_what_is_unusual_but_real_is_stored_whole(signal: np.ndarray) -> None:
    quality = assess(to_steps(signal), ALL)
    assert set(quality.findings) <= {Finding.SHORT_DURATION}
    assert apply_policy(QualityPolicy(), quality) == ()
    assert quality.score > 0.8


@pytest.mark.parametrize("names", [("I", "II"), ("V1",), ("II",), ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")])
def test_fewer_leads(names: tuple[str, ...]) -> None:
    recorded = np.array([lead in names for lead in LEADS])
    steps = np.where(recorded[:, None], clean_steps(), MISSING)
    quality = assess(steps, recorded)
    assert quality.findings == {}
    assert quality.recorded == names
    assert quality.score > 0.95


def test_a_short_ecg_says_so() -> None:
    assert assess(clean_steps(9.9), ALL).findings == {Finding.SHORT_DURATION: ()}


def test_no_lead_at_all_has_the_score_zero() -> None:
    assert assess(np.full((12, 2500), MISSING), ~ALL).score == 0
    assert assess(np.full((12, 2500), MISSING), ALL).score == pytest.approx(0, abs=1e-9)
    assert assess(np.zeros((12, 2500), np.int16), ALL).score == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("factor", "found"), [(1, False), (3, False), (5, True)])
@pytest.mark.parametrize("eight_leads", [False, True])
def test_a_wrong_gain_shows_in_the_sum_of_the_qrs(factor: int, found: bool, eight_leads: bool) -> None:
    """The fixture's sum is 15.5 mV; derived leads count, or an ECG of eight leads would pass."""
    recorded = np.array([lead in ("I", "II") or lead[0] == "V" for lead in LEADS]) if eight_leads else ALL
    steps = np.where(recorded[:, None], to_steps(clean_mv() * factor), MISSING)
    assert (Finding.WRONG_GAIN in assess(steps, recorded).findings) == found


TURNED = [("LA", "RA", "LL"), ("LL", "LA", "RA"), ("LL", "RA", "LA"), ("LA", "LL", "RA")]


@pytest.mark.parametrize("electrodes", TURNED)
def test_exchanged_electrodes_fit_each_other_but_not_the_chest_leads(electrodes: tuple[str, str, str]) -> None:
    assert assess(with_electrodes(clean_steps(), *electrodes), ALL).findings == {Finding.LIMB_LEAD_REVERSAL: LIMB}


@pytest.mark.parametrize("electrodes", [("LL", "LA", "LL"), ("RA", "LL", "LL")])
def test_an_arm_electrode_on_the_right_leg_makes_a_lead_flat(electrodes: tuple[str, str, str]) -> None:
    """The legs have the same potential, so II (right arm) or III (left arm) is flat."""
    found = assess(with_electrodes(clean_steps(), *electrodes), ALL).findings
    assert found[Finding.FLAT_LEAD] in (("II",), ("III",))
    with_noise = with_electrodes(clean_steps(), *electrodes)
    with_noise[[1, 2]] += (30 * bump(TIME_S, 0.3, 0.02)).astype(np.int16)  # legs that differ by a little
    assert Finding.LIMB_LEAD_REVERSAL in assess(with_noise, ALL).findings


def test_left_arm_and_left_leg_exchanged_is_not_seen() -> None:
    assert assess(with_electrodes(clean_steps(), "RA", "LL", "LA"), ALL).findings == {}


def test_dextrocardia_is_not_called_a_reversal() -> None:
    """I is upside down, and the chest leads get smaller towards V6, which is negative."""
    steps = with_electrodes(clean_steps(), "LA", "RA", "LL")
    steps[6:] = (-np.array([1, 0.9, 0.7, 0.5, 0.4, 0.3])[:, None] * clean_steps()[11]).astype(np.int16)
    assert Finding.LIMB_LEAD_REVERSAL not in assess(steps, ALL).findings


@settings(max_examples=60, deadline=None)
@given(st.permutations(["RA", "LA", "LL"]), st.integers(0, 2**32 - 1))
def test_any_set_of_electrodes_is_consistent(electrodes: list[str], seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = (clean_steps() + random.normal(0, 1, (12, 1)) * random.normal(0, 300, 2500)).astype(np.int16)
    found = assess(with_electrodes(steps, *electrodes), ALL).findings
    assert Finding.INCONSISTENT_LIMB_LEADS not in found


@pytest.mark.parametrize(
    ("order", "wrong"),
    [
        ((0, 1, 2, 3, 5, 4), ("aVL", "aVF")),  # MIMIC-IV-ECG's order taken for the usual one
        ((0, 1, 2, 4, 3, 5), ("aVR", "aVL")),
        ((1, 0, 2, 3, 4, 5), ("III", "aVL", "aVF")),
    ],
)
def test_leads_exchanged_in_the_file_contradict_each_other(order: tuple[int, ...], wrong: tuple[str, ...]) -> None:
    steps = clean_steps()
    steps[:6] = steps[list(order)]
    assert assess(steps, ALL).findings == {Finding.INCONSISTENT_LIMB_LEADS: wrong}


def test_limb_leads_that_are_derived_later_are_not_compared() -> None:
    steps = clean_steps()
    steps[2:6] = MISSING
    assert assess(steps, np.array([not 2 <= lead <= 5 for lead in range(12)])).findings == {}


def test_offset_and_filter_of_a_lead_do_not_make_it_inconsistent() -> None:
    signal = clean_mv()
    signal[:6] += np.array([0, 3, -2, 1, 5, -4])[:, None] + 0.1 * np.sin(np.outer(np.arange(1, 7), TIME_S))
    assert assess(to_steps(signal), ALL).findings == {}


def test_one_large_artefact_does_not_decide_how_leads_relate() -> None:
    steps = clean_steps()
    steps[[0, 10, 11], 400:406] += np.array([[9000], [-9000], [-9000]], np.int16)
    assert Finding.LIMB_LEAD_REVERSAL not in assess(steps, ALL).findings


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=12, max_size=12))
def test_anything_is_judged(seed: int, recorded: list[bool]) -> None:
    random = np.random.default_rng(seed)
    steps = random.integers(-32768, 32768, (12, 1500)).astype(np.int16) // int(random.integers(1, 5000))
    quality = assess(steps.astype(np.int16), np.array(recorded))
    assert 0 <= quality.score <= 1
    assert all(set(leads) <= set(quality.recorded) for leads in quality.findings.values())
    assert all(len(line.splitlines()) == 1 for line in quality.explained())
