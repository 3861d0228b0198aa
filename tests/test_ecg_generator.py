"""The simulated circulation, its oracle, and the ECG drawn from it."""

from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import integrate, special, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from shared_model.errors import HemoFedError
from simulation.circulation import (
    ATRIAL_FIBRILLATION,
    EFFECTS,
    FEATURES,
    MOVED_BY_PRESSURE,
    RACES,
    Circulation,
    Population,
    draw_circulation,
    expected_without_pressure,
    pressure_mmhg,
)
from simulation.ecg_generator import ECTOPIC, Acquisition, Anatomy, _draw_beats, draw_anatomy, synthesise
from simulation.oracle import (
    WedgeReading,
    auroc,
    noise_ceiling_auroc,
    oracle_auroc,
    oracle_probability,
    recorded_wedge,
)

ONE_ECG = Population(ecgs_per_patient=(1.0,))
II, V1 = 1, 6


@pytest.fixture(scope="module")
def reference() -> Circulation:
    return draw_circulation(np.random.default_rng(1), ONE_ECG, 60_000)


def hearts(patients: int, seed: int = 2) -> tuple[Circulation, Anatomy]:
    """Hearts in sinus rhythm without ectopic beats, heart in its usual place, textbook features."""
    rng = np.random.default_rng(seed)
    circulation = draw_circulation(rng, ONE_ECG, patients)
    textbook = np.tile([effect.mean for effect in EFFECTS], (patients, 1))
    circulation = replace(
        circulation,
        features=textbook,
        atrial_fibrillation=np.zeros(patients, dtype=bool),
        pr_interval_ms=np.full(patients, 180.0),
    )
    anatomy = draw_anatomy(rng, circulation)
    still = replace(
        anatomy,
        position_deg=np.zeros((patients, 3)),
        ectopic_share=np.zeros(patients),
        rr_variation=np.full(patients, 0.01),
    )
    return circulation, still


def clean(circulation: Circulation, anatomy: Anatomy, seed: int = 3) -> np.ndarray:
    return synthesise(np.random.default_rng(seed), circulation, anatomy, Acquisition(noise_scale=0.0))


def r_peaks(lead: np.ndarray, rate_hz: float = 500.0) -> np.ndarray:
    """Sample of each R peak in a lead without noise: the steepest local maxima of the squared slope."""
    energy = np.convolve(np.gradient(lead) ** 2, np.ones(25), mode="same")
    candidates = np.flatnonzero(energy > 0.3 * np.quantile(energy, 0.99))
    groups = np.split(candidates, np.flatnonzero(np.diff(candidates) > 0.15 * rate_hz) + 1)
    return np.array([group[np.argmax(np.abs(lead[group]))] for group in groups])


def p_wave_ms(ecg: np.ndarray) -> float:
    """Width at a tenth of its height of the P wave before the third R peak in lead II."""
    peak = r_peaks(ecg[II])[2]
    before = ecg[II, peak - 140 : peak - 27]  # 280 to 54 ms before R
    return 2.0 * np.count_nonzero(before > 0.1 * before.max())


# The circulation


def test_pressure_has_the_stated_distribution(reference: Circulation) -> None:
    pressure = reference.mpcwp_mmhg
    assert pressure.mean() == pytest.approx(15.7, abs=0.2)
    assert pressure.std() == pytest.approx(8.1, abs=0.2)
    assert stats.skew(pressure) > 0.7
    assert pressure.min() >= 2.0
    assert pressure.max() <= 50.0


def test_pressure_is_the_quantile_of_a_gamma() -> None:
    z = np.linspace(-2.0, 2.5, 50)
    gamma = stats.gamma((15.7 / 8.1) ** 2, scale=8.1**2 / 15.7)
    np.testing.assert_allclose(gamma.cdf(pressure_mmhg(z)), special.ndtr(z), rtol=1e-9)
    np.testing.assert_array_equal(pressure_mmhg(np.array([-9.0, 9.0])), [2.0, 50.0])


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.feature)
def test_each_feature_follows_pressure_as_its_row_says(reference: Circulation, effect) -> None:
    who = (reference.age_years, reference.female, reference.race, reference.atrial_fibrillation)
    excess = (reference.features - expected_without_pressure(EFFECTS, *who))[:, FEATURES.index(effect.feature)]
    fit = stats.linregress(reference.pressure_z, excess)
    assert fit.slope == pytest.approx(Population().effect_scale * effect.effect_per_sd, rel=0.06)
    assert np.std(excess - fit.slope * reference.pressure_z) == pytest.approx(effect.residual_sd, rel=0.03)
    assert np.sign(fit.slope) == (-1 if effect.feature == "log_qrs_voltage" else 1)


def test_no_single_feature_gives_the_pressure_away(reference: Circulation) -> None:
    correlation = [np.corrcoef(reference.features[:, k], reference.mpcwp_mmhg)[0, 1] for k in range(len(FEATURES))]
    assert max(np.abs(correlation)) < 0.47


def test_fibrillation_is_more_frequent_with_pressure_and_age(reference: Circulation) -> None:
    fibrillation = reference.atrial_fibrillation
    assert 0.12 < fibrillation.mean() < 0.30
    assert fibrillation[reference.mpcwp_mmhg > 18].mean() > 1.6 * fibrillation[reference.mpcwp_mmhg <= 18].mean()
    assert fibrillation[reference.age_years > 75].mean() > 1.5 * fibrillation[reference.age_years < 55].mean()


def test_without_effects_the_ecg_knows_nothing() -> None:
    nothing = oracle_auroc(Population(effect_scale=0.0), patients=20_000)
    assert nothing.oracle_auroc < 0.57  # age alone is left
    assert nothing.noise_ceiling_auroc > 0.95


def test_an_absent_effect_leaves_its_property_alone_and_takes_from_the_oracle() -> None:
    drawn = draw_circulation(np.random.default_rng(6), Population(absent_effects=("qrs_t_rotation",)), 20_000)
    assert abs(np.corrcoef(drawn.feature("qrs_t_rotation"), drawn.pressure_z)[0, 1]) < 0.02
    assert np.corrcoef(drawn.feature("qrs_duration"), drawn.pressure_z)[0, 1] > 0.2
    whole, without, none = (
        oracle_auroc(Population(absent_effects=absent), patients=20_000).oracle_auroc
        for absent in ((), ("qrs_t_rotation", "p_duration"), MOVED_BY_PRESSURE)
    )
    assert none < 0.57 < without < whole - 0.01


def test_patients_share_most_of_what_their_ecgs_show() -> None:
    drawn = draw_circulation(np.random.default_rng(4), Population(), 20_000)
    first = np.flatnonzero(np.diff(drawn.patient) == 0)
    z = np.corrcoef(drawn.pressure_z[first], drawn.pressure_z[first + 1])[0, 1]
    assert z == pytest.approx(0.65, abs=0.03)
    count = np.bincount(drawn.patient)
    np.testing.assert_allclose(np.bincount(count)[1:] / 20_000, (0.40, 0.25, 0.20, 0.15), atol=0.015)
    assert np.all(np.diff(drawn.elapsed_days)[first] >= 1)
    assert np.all(drawn.elapsed_days[np.r_[True, np.diff(drawn.patient) > 0]] == 0)


def test_shift_moves_prevalence(reference: Circulation) -> None:
    shifted = draw_circulation(np.random.default_rng(1), replace(ONE_ECG, pressure_shift=0.8), 20_000)
    assert (shifted.mpcwp_mmhg > 18).mean() > (reference.mpcwp_mmhg > 18).mean() + 0.2


# The wedge reading and the ceilings


def test_reading_error_convention_and_rounding(reference: Circulation) -> None:
    rng = np.random.default_rng(5)
    recorded = recorded_wedge(rng, reference, WedgeReading())
    error = recorded - reference.mpcwp_mmhg
    inside = (reference.mpcwp_mmhg > 12) & (reference.mpcwp_mmhg < 40)
    sinus = inside & ~reference.atrial_fibrillation
    assert np.array_equal(recorded, np.rint(recorded))
    assert recorded.min() >= 1
    assert recorded.max() <= 60
    assert error[sinus].std() == pytest.approx(np.hypot(2.5, np.sqrt(1 / 12)), rel=0.02)
    assert error[inside & reference.atrial_fibrillation].std() == pytest.approx(3.25, rel=0.05)
    digital = recorded_wedge(rng, reference, WedgeReading(convention="digital_mean"))
    assert (digital - reference.mpcwp_mmhg)[inside].mean() == pytest.approx(-3.0, abs=0.05)


def test_noise_ceiling_falls_with_noise() -> None:
    ceilings = [noise_ceiling_auroc(reading=WedgeReading(sd), patients=40_000) for sd in (0.0, 2.5, 5.0)]
    # Whole mmHg only: 18.0 to 18.5 is read as 18, so that even a perfect reading keeps the order.
    assert ceilings[0] == pytest.approx(1.0)
    assert ceilings[1] == pytest.approx(0.975, abs=0.005)  # 0.975 at SD 2.5 in an independent simulation
    assert ceilings[2] < 0.92


def test_oracle_lies_where_the_issue_asks() -> None:
    ceilings = oracle_auroc(patients=50_000)
    assert 0.82 <= ceilings.oracle_auroc <= 0.88
    assert ceilings.oracle_auroc < ceilings.oracle_auroc_latent < ceilings.noise_ceiling_auroc
    assert ceilings.prevalence == pytest.approx(0.32, abs=0.03)


def test_oracle_is_calibrated_and_no_fitted_model_beats_it(reference: Circulation) -> None:
    label = recorded_wedge(np.random.default_rng(6), reference, WedgeReading()) > 18
    predicted = oracle_probability(reference, ONE_ECG, WedgeReading())
    for decile in np.array_split(np.argsort(predicted), 10):
        expected, error = (
            predicted[decile].mean(),
            np.sqrt(predicted[decile].var() + 0.25) / np.sqrt(len(decile)),
        )
        assert label[decile].mean() == pytest.approx(expected, abs=4 * error)

    hidden = np.array([effect.needs_p_wave for effect in EFFECTS])
    fibrillation = reference.atrial_fibrillation[:, None]
    seen = np.where(fibrillation & hidden, reference.features.mean(axis=0), reference.features)
    race = reference.race[:, None] == np.arange(len(RACES))
    inputs = np.column_stack([seen, seen * fibrillation, fibrillation, reference.age_years, reference.female, race])
    inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-9)
    half = len(reference) // 2
    fitted = LogisticRegression(max_iter=500).fit(inputs[:half], label[:half]).decision_function(inputs[half:])
    gap = auroc(predicted[half:], label[half:]) - auroc(fitted, label[half:])
    assert -0.001 < gap < 0.01


def test_oracle_equals_brute_force_integration() -> None:
    circulation = draw_circulation(np.random.default_rng(7), ONE_ECG, 12)
    population, reading = ONE_ECG, WedgeReading()
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    for n in range(12):
        one = circulation.take(np.array([n]))
        who = (one.age_years, one.female, one.race)
        mean = expected_without_pressure(EFFECTS, *who, one.atrial_fibrillation)[0]
        log_odds = expected_without_pressure((ATRIAL_FIBRILLATION,), *who)[0, 0]

        def joint(z: float, one=one, mean=mean, log_odds=log_odds) -> float:
            density = stats.norm.pdf(z, 0.15 * (one.age_years[0] - 63) / 14, np.sqrt(1 - 0.15**2))
            slope = population.effect_scale * ATRIAL_FIBRILLATION.effect_per_sd
            chance = special.expit(log_odds + slope * z + 1.7 * node) @ weight / weight.sum()
            density *= chance if one.atrial_fibrillation[0] else 1 - chance
            for k, effect in enumerate(EFFECTS):
                if not (one.atrial_fibrillation[0] and effect.needs_p_wave):
                    centre = mean[k] + population.effect_scale * effect.effect_per_sd * z
                    density *= stats.norm.pdf(one.features[0, k], centre, effect.residual_sd)
            return float(density)

        def above(z: float, one=one, joint=joint) -> float:
            sd = 2.5 * (1.3 if one.atrial_fibrillation[0] else 1.0)
            return joint(z) * float(special.ndtr((pressure_mmhg(np.array(z)) - 18.5) / sd))

        whole = integrate.quad(joint, -6, 6, epsabs=0, epsrel=1e-8)[0]
        part = integrate.quad(above, -6, 6, epsabs=0, epsrel=1e-8)[0]
        assert oracle_probability(one, population, reading)[0] == pytest.approx(part / whole, abs=2e-5)


def test_auroc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(8)
    label, score = rng.random(500) < 0.3, np.round(rng.random(500), 1)
    assert auroc(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert np.isnan(auroc(score, np.ones(500, dtype=bool)))


# The signal


@pytest.mark.parametrize("rate_hz", [250.0, 257.0, 500.0, 1000.0])
def test_leads_obey_einthoven_and_goldberger_exactly(rate_hz: float) -> None:
    rng = np.random.default_rng(9)
    circulation = draw_circulation(rng, Population(), 30)
    acquisition = Acquisition(rate_hz, high_pass_hz=0.05, low_pass_hz=40.0, amplitude_gain=1.1)
    ecg = synthesise(rng, circulation, draw_anatomy(rng, circulation), acquisition)
    assert ecg.shape == (len(circulation), 12, round(10 * rate_hz))
    assert ecg.dtype == np.float32
    assert np.isfinite(ecg).all()
    lead_i, lead_ii, lead_iii, avr, avl, avf = (ecg[:, k] for k in range(6))
    half = np.float32(0.5)
    np.testing.assert_array_equal(lead_iii, lead_ii - lead_i)
    np.testing.assert_array_equal(avr, -(lead_i + lead_ii) * half)
    np.testing.assert_array_equal(avl, lead_i - lead_ii * half)
    np.testing.assert_array_equal(avf, lead_ii - lead_i * half)


def test_same_seed_same_bytes_and_chunks_do_not_leak() -> None:
    circulation, anatomy = hearts(6)
    first, again, other = (synthesise(np.random.default_rng(s), circulation, anatomy) for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert not np.array_equal(first, other)
    drawn, repeated = (draw_circulation(np.random.default_rng(5), Population(), 40) for _ in range(2))
    for each in fields(Circulation):
        np.testing.assert_array_equal(getattr(drawn, each.name), getattr(repeated, each.name))


def test_memory_limit_does_not_change_shape_or_hearts() -> None:
    circulation, anatomy = hearts(7)
    quiet = Acquisition(noise_scale=0.0)
    for at_a_time in (1, 3, 100):
        ecg = synthesise(np.random.default_rng(1), circulation, anatomy, quiet, at_a_time)
        assert ecg.shape == (7, 12, 5000)
        assert np.all(np.ptp(ecg[:, II], axis=1) > 0.2)


def test_twins_share_the_heart_and_not_the_beats() -> None:
    circulation, anatomy = hearts(20)
    twins = [clean(circulation, anatomy, seed) for seed in (1, 2)]
    assert not np.allclose(twins[0], twins[1], atol=0.05)
    beats = [
        np.stack([ecg[:, peak - 150 : peak + 250] for ecg in twin for peak in r_peaks(ecg[II])[2:3]]) for twin in twins
    ]
    distance = np.abs(beats[0][:, None] - beats[1][None]).mean(axis=(2, 3))
    assert np.mean(np.argmin(distance, axis=1) == np.arange(20)) >= 0.9


def test_p_duration_is_drawn() -> None:
    circulation, anatomy = hearts(12)
    short, long = (clean(circulation.with_feature("p_duration", ms), anatomy) for ms in (90.0, 130.0))
    widening = [p_wave_ms(b) - p_wave_ms(a) for a, b in zip(short, long, strict=True)]
    assert np.median(widening) == pytest.approx(40.0, abs=12.0)


def test_p_terminal_force_is_drawn() -> None:
    circulation, anatomy = hearts(12)
    textbook = replace(anatomy, lead_vectors=np.median(anatomy.lead_vectors, axis=0, keepdims=True).repeat(12, axis=0))
    for depth_mv in (0.02, 0.08):
        ecg = clean(circulation.with_feature("p_terminal_v1", depth_mv), textbook)
        peak = r_peaks(ecg[0, II])[2]
        assert -ecg[0, V1, peak - 100 : peak - 30].min() == pytest.approx(depth_mv, rel=0.25)


def test_qrs_voltage_is_drawn() -> None:
    circulation, anatomy = hearts(12)
    low, high = (clean(circulation.with_feature("log_qrs_voltage", v), anatomy) for v in (-0.3, 0.3))
    ratio = np.ptp(high[:, V1:], axis=2) / np.ptp(low[:, V1:], axis=2)
    assert np.median(ratio) == pytest.approx(np.exp(0.6), rel=0.05)


def test_heart_rate_is_drawn() -> None:
    circulation, anatomy = hearts(12)
    for rate_bpm in (55.0, 75.0, 110.0):
        ecg = clean(circulation.with_feature("heart_rate", rate_bpm), anatomy)
        measured = [60 * 500 / np.diff(r_peaks(one[II])).mean() for one in ecg]
        assert np.median(measured) == pytest.approx(rate_bpm, rel=0.03)


def test_qt_follows_rate_and_qtc() -> None:
    circulation, anatomy = hearts(12)

    def t_end_ms(qtc_ms: float, rate_bpm: float) -> float:
        """After R, where the T wave in V5 last holds a tenth of its height."""
        ecg = clean(circulation.with_feature("qtc", qtc_ms).with_feature("heart_rate", rate_bpm), anatomy)
        ends = []
        for one in ecg:
            peak = r_peaks(one[II])[2]
            wave = np.abs(one[10, peak + 60 : peak + int(240 * np.sqrt(60 / rate_bpm))])
            ends.append(60 + np.flatnonzero(wave > 0.1 * wave.max())[-1])
        return 2.0 * float(np.median(ends))

    assert t_end_ms(460, 60) - t_end_ms(400, 60) == pytest.approx(55, abs=15)
    assert t_end_ms(420, 60) - t_end_ms(420, 90) == pytest.approx(420 * (1 - np.sqrt(60 / 90)), abs=20)


def test_t_wave_turns_from_v6_to_v1() -> None:
    circulation, anatomy = hearts(12)
    still, turned = (clean(circulation.with_feature("qrs_t_rotation", deg), anatomy) for deg in (0.0, 80.0))
    for before, after in zip(still, turned, strict=True):
        t_wave = slice(r_peaks(before[II])[2] + 110, r_peaks(before[II])[2] + 170)
        assert after[11, t_wave].mean() < before[11, t_wave].mean()
        assert after[V1, t_wave].mean() > before[V1, t_wave].mean()


def test_fibrillation_has_no_p_wave_and_no_rhythm() -> None:
    circulation, anatomy = hearts(40)
    fibrillating = replace(circulation, atrial_fibrillation=np.ones(40, dtype=bool))
    spread = [
        np.median([np.std(np.diff(r_peaks(one[II]))) / np.diff(r_peaks(one[II])).mean() for one in clean(c, anatomy)])
        for c in (circulation, fibrillating)
    ]
    assert spread[0] < 0.03
    assert spread[1] > 0.12

    def beat_at_p(c: Circulation) -> float:
        """Height of the averaged P wave in II: f-waves average out, P waves do not."""
        heights = []
        for one in clean(c, anatomy):
            peaks = [p for p in r_peaks(one[II])[1:-1] if p > 150]
            heights.append(np.ptp(np.mean([one[II, p - 110 : p - 40] for p in peaks], axis=0)))
        return float(np.median(heights))

    assert beat_at_p(fibrillating) < 0.5 * beat_at_p(circulation)


def test_ectopic_beats_are_early_wide_and_followed_by_a_full_pause() -> None:
    circulation, anatomy = hearts(10)
    ectopic = replace(anatomy, ectopic_share=np.full(10, 0.2))
    time_s, kind, _ = _draw_beats(np.random.default_rng(3), circulation, ectopic)
    mean_rr_s = 60 / 74
    before, after = time_s[:, 1:-1] - time_s[:, :-2], time_s[:, 2:] - time_s[:, 1:-1]
    early = kind[:, 1:-1] == ECTOPIC
    assert 0.1 < early.mean() < 0.25
    assert np.all(before[early] < 0.75 * mean_rr_s)
    np.testing.assert_allclose((before + after)[early], 2 * mean_rr_s, rtol=0.15)

    # The same draws without ectopy: what differs is the ectopic beat, larger and slower than a sinus QRS.
    difference = clean(circulation, ectopic) - clean(circulation, anatomy)
    n, beat = np.argwhere((kind == ECTOPIC) & (time_s > 1) & (time_s < 9))[0]
    around = slice(int(time_s[n, beat] * 500) - 40, int(time_s[n, beat] * 500) + 40)
    height = np.abs(difference[n, :, around]).max(axis=1)
    widest = int(np.argmax(height))
    assert height[widest] > 0.5
    assert np.count_nonzero(np.abs(difference[n, widest, around]) > 0.1 * height[widest]) * 2 > 100  # ms


def test_bundle_branch_block_shows_in_v1() -> None:
    circulation, anatomy = hearts(10)
    wide = circulation.with_feature("qrs_duration", 140.0)
    left, right, neither = (clean(wide, replace(anatomy, block=np.full(10, kind)))[:, V1] for kind in (0, 1, 2))
    assert np.median(right.max(axis=1)) > 1.5 * np.median(neither.max(axis=1))  # R'
    assert np.median(left.min(axis=1)) < np.median(neither.min(axis=1))  # QS


def test_textbook_ecg_looks_like_one() -> None:
    """R grows and S shrinks from V1 to V5, P is upright in II and down in aVR, T goes with QRS, all in mV."""
    circulation, anatomy = hearts(60)
    ecg = clean(circulation, anatomy)
    positive, negative = np.median(ecg.max(axis=2), axis=0), np.median(ecg.min(axis=2), axis=0)
    assert np.all(np.diff(positive[6:10]) > 0)
    assert positive[6] < 0.4 < 0.8 < positive[10] < 2.5
    assert negative[6] < -0.5
    assert negative[11] > -0.4
    assert 0.4 < positive[II] < 2.0
    assert negative[3] < -0.3
    sokolow_mv = -ecg[:, 6].min(axis=1) + ecg[:, 10:].max(axis=(1, 2))
    assert np.mean(sokolow_mv) == pytest.approx(2.15, abs=0.4)
    for one in ecg:
        peak = r_peaks(one[II])[2]
        assert one[II, peak - 100 : peak - 50].max() > 0.03
        assert one[3, peak - 100 : peak - 50].min() < -0.03
        assert one[10, peak + 90 : peak + 190].max() > 0.05


def test_noise_is_where_it_was_put() -> None:
    circulation, anatomy = hearts(30)

    def power(acquisition: Acquisition, low_hz: float, high_hz: float) -> float:
        ecg = synthesise(np.random.default_rng(1), circulation, anatomy, acquisition)[:, :2]
        spectrum = np.abs(np.fft.rfft(ecg, axis=2)) ** 2
        frequency = np.fft.rfftfreq(ecg.shape[2], 1 / acquisition.sampling_rate_hz)
        return float(spectrum[..., (frequency >= low_hz) & (frequency <= high_hz)].mean())

    assert power(Acquisition(mains_hz=50), 49.5, 50.5) > 3 * power(Acquisition(mains_hz=60), 49.5, 50.5)
    assert power(Acquisition(), 100, 240) > 100 * power(Acquisition(noise_scale=0.0), 100, 240)
    assert power(Acquisition(low_pass_hz=40.0), 100, 240) < 0.1 * power(Acquisition(), 100, 240)
    assert power(Acquisition(high_pass_hz=1.0), 0.1, 0.4) < 0.5 * power(Acquisition(), 0.1, 0.4)


def test_a_rate_that_holds_no_ecg_is_refused() -> None:
    circulation, anatomy = hearts(2)
    with pytest.raises(HemoFedError, match="100 Hz or more"):
        synthesise(np.random.default_rng(1), circulation, anatomy, Acquisition(sampling_rate_hz=40))
