"""What the wedge reading records, and the best that anyone could do: the exact posterior of a high reading.

Two ceilings. The *oracle* knows every property of the ECG exactly, but not the pressure: no network that sees
the signal alone can beat it on average. The *noise ceiling* knows the pressure itself; the reading alone
limits it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from simulation.circulation import (
    ATRIAL_FIBRILLATION,
    EFFECTS,
    Circulation,
    FloatArray,
    Population,
    draw_circulation,
    expected_without_pressure,
    pressure_mmhg,
    pressure_prior,
)

WedgeConvention = Literal["end_expiratory", "digital_mean"]
CONVENTION_OFFSET_MMHG: dict[WedgeConvention, float] = {"end_expiratory": 0.0, "digital_mean": -3.0}
"""The digital mean over the respiratory cycle reads about 3 mmHg lower (2 to 4.4; Ryan, Am Heart J 2012)."""
FIBRILLATION_NOISE_FACTOR = 1.3
RECORDED_RANGE_MMHG = (1.0, 60.0)
ELEVATED_MMHG = 18.0


@dataclass(frozen=True)
class WedgeReading:
    """How a hospital reads the wedge: a convention, and an error 1.3 times as wide in atrial fibrillation."""

    noise_sd_mmhg: float = 2.5
    convention: WedgeConvention = "end_expiratory"

    def noise_sd(self, atrial_fibrillation: NDArray[np.bool_]) -> FloatArray:
        """mmHg, one an ECG."""
        return self.noise_sd_mmhg * np.where(atrial_fibrillation, FIBRILLATION_NOISE_FACTOR, 1.0)


def recorded_wedge(rng: np.random.Generator, circulation: Circulation, reading: WedgeReading) -> FloatArray:
    """The pressure written in the chart: true + convention + error, a whole number of mmHg from 1 to 60."""
    error = reading.noise_sd(circulation.atrial_fibrillation) * rng.standard_normal(len(circulation))
    exact = circulation.mpcwp_mmhg + CONVENTION_OFFSET_MMHG[reading.convention] + error
    return np.clip(np.rint(exact), *RECORDED_RANGE_MMHG)


@dataclass(frozen=True)
class Posterior:
    """A grid over z for each ECG with weights that sum to 1: what the ECG says of the pressure."""

    z: FloatArray
    """(ecg, node)"""
    weight: FloatArray
    """(ecg, node)"""
    step: FloatArray
    """(ecg,) distance of two nodes."""

    def probability_recorded(
        self, threshold_mmhg: float, reading: WedgeReading, atrial_fibrillation: NDArray[np.bool_]
    ) -> FloatArray:
        """P(recorded mPCWP > threshold). Rounding to whole mmHg moves the limit to floor(threshold) + 0.5."""
        limit = np.floor(threshold_mmhg) + 0.5 - CONVENTION_OFFSET_MMHG[reading.convention]
        pressure = np.interp(self.z, _TABLE_Z, _TABLE_MMHG)
        noise_sd = np.maximum(reading.noise_sd(atrial_fibrillation), 1e-6)[:, None]
        above: FloatArray = special.ndtr((pressure - limit) / noise_sd)
        return _mean_over_nodes(self.weight, above)

    def probability_latent(self, threshold_mmhg: float) -> FloatArray:
        """P(true mPCWP > threshold); a cell of the grid that holds the threshold counts in part."""
        z_at_threshold = np.interp(threshold_mmhg, _TABLE_MMHG, _TABLE_Z)
        above = np.clip((self.z - z_at_threshold) / self.step[:, None] + 0.5, 0.0, 1.0)
        return _mean_over_nodes(self.weight, above)


def posterior(circulation: Circulation, population: Population, nodes: int = 121) -> Posterior:
    """The exact posterior of z given every property of each ECG on its own, by quadrature.

    Given z and the demographics the features are independent and Gaussian, so that prior and features give a
    normal distribution in closed form; the log-odds of atrial fibrillation is not Gaussian and is multiplied
    in on a grid of `nodes` points over +-6 of its SD. In fibrillation the P wave is absent and tells nothing
    more.
    """
    mean, variance = pressure_prior(circulation.age_years, population)
    fibrillation = circulation.atrial_fibrillation
    demographics = (circulation.age_years, circulation.female, circulation.race)
    slope = population.slopes(EFFECTS)
    residual_sd = np.array([effect.residual_sd for effect in EFFECTS])
    hidden = np.outer(fibrillation, [effect.needs_p_wave for effect in EFFECTS])
    excess = circulation.features - expected_without_pressure(EFFECTS, *demographics, fibrillation)
    precision = 1 / variance + np.sum(np.where(hidden, 0.0, (slope / residual_sd) ** 2), axis=1)
    pull = mean / variance + np.sum(np.where(hidden, 0.0, slope * excess / residual_sd**2), axis=1)

    grid = np.linspace(-6.0, 6.0, nodes)
    sd = 1 / np.sqrt(precision)
    z = (pull / precision)[:, None] + sd[:, None] * grid
    log_odds = expected_without_pressure((ATRIAL_FIBRILLATION,), *demographics)
    log_odds = log_odds + population.slopes((ATRIAL_FIBRILLATION,)) * z
    probability = np.interp(log_odds, _TABLE_LOG_ODDS, _TABLE_FIBRILLATION)
    weight = np.exp(-0.5 * grid**2) * np.where(fibrillation[:, None], probability, 1 - probability)
    return Posterior(z, weight / weight.sum(axis=1, keepdims=True), sd * (grid[1] - grid[0]))


def oracle_probability(
    circulation: Circulation,
    population: Population,
    reading: WedgeReading,
    threshold_mmhg: float = ELEVATED_MMHG,
    ecgs_at_a_time: int = 5_000,
) -> FloatArray:
    """P(recorded mPCWP > threshold | every property of the ECG, age, sex, race), one an ECG."""
    parts = [
        posterior(part, population).probability_recorded(threshold_mmhg, reading, part.atrial_fibrillation)
        for part in _parts(circulation, ecgs_at_a_time)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


@dataclass(frozen=True)
class Ceilings:
    """How well the best possible reader does, on fresh patients with one ECG each."""

    oracle_auroc: float
    """The headline: P(recorded > threshold | the ECG's properties) against the recorded label."""
    oracle_auroc_latent: float
    """P(true > threshold | the ECG's properties) against the true label."""
    noise_ceiling_auroc: float
    """The true pressure against the recorded label: what the reading error alone takes away."""
    prevalence: float
    """Share of recorded labels above the threshold."""
    patients: int


def oracle_auroc(
    population: Population = Population(),
    reading: WedgeReading = WedgeReading(),
    threshold_mmhg: float = ELEVATED_MMHG,
    patients: int = 50_000,
    seed: int = 0,
) -> Ceilings:
    """Draw `patients` fresh patients with one ECG each and measure both ceilings on them."""
    rng = np.random.default_rng([seed, patients])
    circulation = draw_circulation(rng, _one_ecg_each(population), patients)
    label = recorded_wedge(rng, circulation, reading) > threshold_mmhg
    of_recorded = oracle_probability(circulation, population, reading, threshold_mmhg)
    of_latent = np.concatenate(
        [posterior(part, population).probability_latent(threshold_mmhg) for part in _parts(circulation, 5_000)]
    )
    return Ceilings(
        oracle_auroc=auroc(of_recorded, label),
        oracle_auroc_latent=auroc(of_latent, circulation.mpcwp_mmhg > threshold_mmhg),
        noise_ceiling_auroc=auroc(circulation.mpcwp_mmhg, label),
        prevalence=float(label.mean()),
        patients=patients,
    )


def noise_ceiling_auroc(
    population: Population = Population(),
    reading: WedgeReading = WedgeReading(),
    threshold_mmhg: float = ELEVATED_MMHG,
    patients: int = 200_000,
    seed: int = 0,
) -> float:
    """AUROC of the *true* pressure as a score for the *recorded* label, by simulation.

    It is below 1 only because the reading errs: a reader who knew the true pressure would score this much.
    The convention moves the label's threshold, and with it this figure, but not the order of the scores.
    """
    rng = np.random.default_rng([seed, patients])
    circulation = draw_circulation(rng, _one_ecg_each(population), patients)
    return auroc(circulation.mpcwp_mmhg, recorded_wedge(rng, circulation, reading) > threshold_mmhg)


def auroc(score: FloatArray, label: NDArray[np.bool_]) -> float:
    """Mann-Whitney: P(positive scores above negative), ties count half. NaN if one class is absent."""
    positive = int(label.sum())
    negative = len(label) - positive
    if positive == 0 or negative == 0:
        return float("nan")
    rank_sum = float(stats.rankdata(score)[label].sum())
    return (rank_sum - positive * (positive + 1) / 2) / (positive * negative)


def _mean_over_nodes(weight: FloatArray, value: FloatArray) -> FloatArray:
    mean: FloatArray = np.einsum("nz,nz->n", weight, value)
    return mean


def _one_ecg_each(population: Population) -> Population:
    return replace(population, ecgs_per_patient=(1.0,))


def _parts(circulation: Circulation, size: int) -> list[Circulation]:
    """Consecutive parts, so that the grid of nodes never holds more than `size` ECGs."""
    return [circulation.take(slice(start, start + size)) for start in range(0, len(circulation), size)]


def _fibrillation_table() -> tuple[FloatArray, FloatArray]:
    """P(atrial fibrillation) by log-odds, averaged over patients by Gauss-Hermite quadrature."""
    log_odds = np.linspace(-20.0, 20.0, 8_001)
    node, weight = np.polynomial.hermite_e.hermegauss(61)
    probability = special.expit(log_odds[:, None] + ATRIAL_FIBRILLATION.residual_sd * node) @ weight / weight.sum()
    return log_odds, probability


_TABLE_LOG_ODDS, _TABLE_FIBRILLATION = _fibrillation_table()
_TABLE_Z = np.linspace(-8.0, 8.0, 3_201)
_TABLE_MMHG = pressure_mmhg(_TABLE_Z)
