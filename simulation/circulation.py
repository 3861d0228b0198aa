"""The circulation behind each simulated ECG: patient, filling pressure, and what it does to the heart.

A latent z (standard normal in the reference population) sets the mean pulmonary capillary wedge pressure
(mPCWP) and moves eight properties of the ECG. The directions are published (`Effect.source`); the sizes are
chosen together, so that the oracle of `simulation.oracle` lies a little above what networks are reported to
reach. They are a stated assumption, never evidence about patients.
"""

import math
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

FloatArray = NDArray[np.float64]

RACES = ("white", "black", "hispanic", "asian", "other")
"""Self-reported race, as written in labels.csv."""

MPCWP_MEAN_MMHG = 15.7
MPCWP_SD_MMHG = 8.1
MPCWP_RANGE_MMHG = (2.0, 50.0)

PATIENT_SHARE_OF_PRESSURE = 0.65
"""Share of the variance of z that all ECGs of one patient have in common."""
PATIENT_SHARE_OF_RESIDUAL = 0.80
"""The same for what is left of each ECG feature once pressure and demographics are taken out."""
AGE_PRESSURE_CORRELATION = 0.15
REFERENCE_AGE_YEARS = 63.0
REFERENCE_AGE_SD_YEARS = 14.0
AGE_RANGE_YEARS = (18.0, 95.0)

EFFECT_SCALE = 1.2
"""Multiplies every effect of pressure; set once so that the oracle AUROC lies between 0.82 and 0.88."""


@dataclass(frozen=True)
class Effect:
    """One property of the ECG: mean + effect_scale * effect_per_sd * z + demographics + N(0, residual_sd).

    For atrial fibrillation the same sum is a log-odds, and `residual_sd` is the spread between patients.
    """

    feature: str
    unit: str
    mean: float
    effect_per_sd: float
    residual_sd: float
    source: str
    per_decade: float = 0.0
    """Change for each ten years of age above 63."""
    female: float = 0.0
    black: float = 0.0
    asian: float = 0.0
    in_fibrillation: float = 0.0
    needs_p_wave: bool = False
    """The property cannot be seen in atrial fibrillation."""


EFFECTS: tuple[Effect, ...] = (
    Effect(
        "p_duration", "ms", 108.0, 5.0, 13.0,
        "longer: > 110 ms has odds ratio 2.5-2.7 for a large left atrium (Truong, PMC2937190); women 4 ms "
        "shorter (ELSA-Brasil); rises with age (Lifelines); longer in Black people (NHANES III)",
        per_decade=1.5, female=-4.0, black=3.0, needs_p_wave=True,
    ),
    Effect(
        "p_terminal_v1", "mV", 0.045, 0.015, 0.035,
        "deeper: r = 0.49 with left atrial size (Chirife, Br Heart J 1975); follows exercise wedge pressure",
        per_decade=0.002, needs_p_wave=True,
    ),
    Effect(
        "log_qrs_voltage", "ln", 0.0, -0.07, 0.24,
        "lower: low voltage in 34% of NYHA IV, 22% of NYHA I-III (Kamath, Am Heart J 2006); oedema (Madias)",
        per_decade=-0.02, black=0.08,
    ),
    Effect(
        "qrs_duration", "ms", 96.0, 5.5, 15.0,
        "longer: >= 120 ms in 31% of 25,171 with heart failure (Lund, SwedeHF); women 6 ms shorter "
        "(ELSA-Brasil)",
        per_decade=0.5, female=-7.0,
    ),
    Effect(
        "qtc", "ms", 428.0, 8.5, 24.0,
        "longer: 409, 422, 434 ms by grade of diastolic dysfunction (Namdar, PLoS One 2013); women +8-11 ms",
        per_decade=2.5, female=8.0,
    ),
    Effect(
        "heart_rate", "bpm", 74.0, 4.0, 13.0,
        "faster: higher resting rate precedes HFpEF (MESA); women +3 bpm (ELSA-Brasil)",
        female=3.0, in_fibrillation=12.0,
    ),
    Effect(
        "qrs_t_rotation", "deg", 0.0, 14.0, 36.0,
        "wider: abnormal QRS-T angle precedes HFrEF and HFpEF (MESA); T vector turns to the front and right",
    ),
)  # fmt: skip

ATRIAL_FIBRILLATION = Effect(
    "atrial_fibrillation", "log-odds", -2.3, 0.75, 1.7,
    "more often: 53-65% of 41,446 in SwedeHF; rarer in Black people, odds ratio 3.8 (PMC2882251), here 2.2",
    per_decade=0.45, female=-0.15, black=-0.8,
)  # fmt: skip

PR_INTERVAL = Effect(
    "pr_interval", "ms", 166.0, 0.0, 21.0,
    "no effect of pressure here; women 6 ms shorter (ELSA-Brasil), Black +7 ms (PMC3825808), Asian +5 ms, "
    "rises with age (Lifelines)",
    per_decade=3.0, female=-6.0, black=7.0, asian=5.0, needs_p_wave=True,
)  # fmt: skip

FEATURES = tuple(effect.feature for effect in EFFECTS)
MOVED_BY_PRESSURE = (*FEATURES, ATRIAL_FIBRILLATION.feature)


def _default_race_mix() -> MappingProxyType[str, float]:
    return MappingProxyType({"white": 0.72, "black": 0.12, "hispanic": 0.08, "asian": 0.05, "other": 0.03})


@dataclass(frozen=True)
class Population:
    """Whom a hospital sees. The defaults are the reference population, in which z is standard normal."""

    age_mean_years: float = REFERENCE_AGE_YEARS
    age_sd_years: float = REFERENCE_AGE_SD_YEARS
    female_share: float = 0.42
    race_mix: MappingProxyType[str, float] = field(default_factory=_default_race_mix)
    pressure_shift: float = 0.0
    """Added to z: how much sicker (or fitter) these patients are, in SD."""
    effect_scale: float = EFFECT_SCALE
    absent_effects: tuple[str, ...] = ()
    """Properties of the ECG that pressure does not move in these patients."""
    ecgs_per_patient: tuple[float, ...] = (0.40, 0.25, 0.20, 0.15)
    """Probability of 1, 2, 3, ... ECGs."""

    def slopes(self, effects: tuple[Effect, ...]) -> FloatArray:
        """How far pressure moves each property, per SD of z."""
        moved = [0.0 if effect.feature in self.absent_effects else effect.effect_per_sd for effect in effects]
        return self.effect_scale * np.array(moved)


@dataclass(frozen=True)
class Circulation:
    """Parallel arrays, one entry an ECG, those of a patient together and in order of time."""

    patient: NDArray[np.int64]
    """0 .. patients - 1."""
    elapsed_days: FloatArray
    """Since the patient's first ECG."""
    age_years: FloatArray
    female: NDArray[np.bool_]
    race: NDArray[np.int64]
    """Index in RACES."""
    pressure_z: FloatArray
    mpcwp_mmhg: FloatArray
    """The true pressure; no hospital ever knows it."""
    atrial_fibrillation: NDArray[np.bool_]
    features: FloatArray
    """(ecg, feature) in the order of FEATURES, as drawn; the signal clips what no heart could do."""
    pr_interval_ms: FloatArray

    def __len__(self) -> int:
        return len(self.patient)

    def feature(self, name: str) -> FloatArray:
        """One column of `features` by name."""
        return self.features[:, FEATURES.index(name)]

    def take(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """The chosen ECGs, in the order given."""
        return replace(self, **{each.name: getattr(self, each.name)[chosen] for each in fields(self)})

    def with_feature(self, name: str, values: float | FloatArray) -> Self:
        """A copy in which one feature is set: for experiments that change one thing."""
        features = self.features.copy()
        features[:, FEATURES.index(name)] = values
        return replace(self, features=features)


def pressure_mmhg(z: FloatArray) -> FloatArray:
    """True mPCWP of a latent z: gamma (mean 15.7, SD 8.1 mmHg in the reference population), 2 to 50 mmHg."""
    shape = (MPCWP_MEAN_MMHG / MPCWP_SD_MMHG) ** 2
    scale = MPCWP_SD_MMHG**2 / MPCWP_MEAN_MMHG
    quantile: FloatArray = np.clip(stats.gamma.ppf(special.ndtr(z), shape, scale=scale), *MPCWP_RANGE_MMHG)
    return quantile


def pressure_prior(age_years: FloatArray, population: Population) -> tuple[FloatArray, float]:
    """Mean (one an ECG) and variance of z for a patient of this age in this population."""
    standard_age = (age_years - REFERENCE_AGE_YEARS) / REFERENCE_AGE_SD_YEARS
    return (
        population.pressure_shift + AGE_PRESSURE_CORRELATION * standard_age,
        1 - AGE_PRESSURE_CORRELATION**2,
    )


def expected_without_pressure(
    effects: tuple[Effect, ...],
    age_years: FloatArray,
    female: NDArray[np.bool_],
    race: NDArray[np.int64],
    atrial_fibrillation: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """(ecg, effect): the mean of each property at z = 0, given who the patient is and the rhythm."""
    columns = [
        effect.mean
        + effect.per_decade * (age_years - REFERENCE_AGE_YEARS) / 10
        + effect.female * female
        + effect.black * (race == RACES.index("black"))
        + effect.asian * (race == RACES.index("asian"))
        + (0.0 if atrial_fibrillation is None else effect.in_fibrillation * atrial_fibrillation)
        for effect in effects
    ]
    return np.stack(columns, axis=1)


def draw_circulation(rng: np.random.Generator, population: Population, patients: int) -> Circulation:
    """Draw `patients` patients and all their ECGs."""
    count = rng.choice(np.arange(1, len(population.ecgs_per_patient) + 1), patients, p=population.ecgs_per_patient)
    patient = np.repeat(np.arange(patients), count)
    order = np.arange(len(patient)) - np.repeat(np.cumsum(count) - count, count)
    elapsed_days = _elapsed_days(rng, order)

    first_age = np.clip(rng.normal(population.age_mean_years, population.age_sd_years, patients), *AGE_RANGE_YEARS)
    age_years = np.floor(first_age[patient] + elapsed_days / 365.25)
    female = (rng.random(patients) < population.female_share)[patient]
    share = np.array([population.race_mix.get(race, 0.0) for race in RACES])
    race = rng.choice(len(RACES), patients, p=share / share.sum())[patient]

    z = _draw_pressure_z(rng, population, patient, age_years)
    fibrillation = _draw_fibrillation(rng, population, patient, age_years, female, race, z)
    scaled = population.slopes(EFFECTS)
    residual_sd = np.array([effect.residual_sd for effect in EFFECTS])
    features = expected_without_pressure(EFFECTS, age_years, female, race, fibrillation)
    features += z[:, None] * scaled + residual_sd * _draw_residual(rng, patient, len(EFFECTS))
    pr_interval = expected_without_pressure((PR_INTERVAL,), age_years, female, race)[:, 0]
    pr_interval += PR_INTERVAL.residual_sd * _draw_residual(rng, patient, 1)[:, 0]
    return Circulation(
        patient,
        elapsed_days,
        age_years,
        female,
        race,
        z,
        pressure_mmhg(z),
        fibrillation,
        features,
        pr_interval,
    )


def _elapsed_days(rng: np.random.Generator, order: NDArray[np.int64]) -> FloatArray:
    """Days since the first ECG: gaps are log-normal with a median of 60 days, one day at least."""
    gap = np.where(order == 0, 0.0, np.maximum(1.0, 60 * np.exp(rng.normal(0.0, 1.0, len(order)))))
    total = np.cumsum(gap)
    start = np.maximum.accumulate(np.where(order == 0, total, 0.0))
    return total - start


def _draw_pressure_z(
    rng: np.random.Generator, population: Population, patient: NDArray[np.int64], age_years: FloatArray
) -> FloatArray:
    """sqrt(0.65) patient + sqrt(0.35) ECG; the patient's part holds the correlation with age."""
    between = math.sqrt(PATIENT_SHARE_OF_PRESSURE - AGE_PRESSURE_CORRELATION**2)
    within = math.sqrt(1 - PATIENT_SHARE_OF_PRESSURE)
    mean, _ = pressure_prior(age_years, population)
    of_patient = rng.standard_normal(int(patient[-1]) + 1)[patient]
    return mean + between * of_patient + within * rng.standard_normal(len(patient))


def _draw_fibrillation(
    rng: np.random.Generator,
    population: Population,
    patient: NDArray[np.int64],
    age_years: FloatArray,
    female: NDArray[np.bool_],
    race: NDArray[np.int64],
    z: FloatArray,
) -> NDArray[np.bool_]:
    log_odds = expected_without_pressure((ATRIAL_FIBRILLATION,), age_years, female, race)[:, 0]
    log_odds += population.slopes((ATRIAL_FIBRILLATION,)) * z
    log_odds += ATRIAL_FIBRILLATION.residual_sd * rng.standard_normal(int(patient[-1]) + 1)[patient]
    return np.asarray(rng.random(len(patient)) < special.expit(log_odds))


def _draw_residual(rng: np.random.Generator, patient: NDArray[np.int64], width: int) -> FloatArray:
    """(ecg, width) standard normal, four fifths of its variance shared by a patient's ECGs."""
    between = rng.standard_normal((int(patient[-1]) + 1, width))[patient]
    within = rng.standard_normal((len(patient), width))
    residual: FloatArray = (
        np.sqrt(PATIENT_SHARE_OF_RESIDUAL) * between + np.sqrt(1 - PATIENT_SHARE_OF_RESIDUAL) * within
    )
    return residual
