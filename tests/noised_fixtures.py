"""Noisy counts of made-up test patients, with a noise sampler that shares nothing with the one under test."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtri

from shared_model.noised import NOISED_BINS, noised_bins


def two_geometrics(
    generator: np.random.Generator, scale: float, size: tuple[int, ...], sites: int = 1
) -> NDArray[np.int64]:
    """Discrete Laplace noise as the difference of two geometric variables, summed over sites (negative binomials).

    Its floating-point generator is no protection: for tests alone.
    """
    stop = -math.expm1(-1 / scale)
    return generator.negative_binomial(sites, stop, size) - generator.negative_binomial(sites, stop, size)


def binormal_scores(
    generator: np.random.Generator, patients: int, auroc: float, prevalence: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(calibrated probabilities, outcomes) of patients whose scores have this AUROC."""
    separation = float(ndtri(auroc)) * math.sqrt(2)
    outcomes = generator.random(patients) < prevalence
    ratio = separation * (generator.normal(size=patients) + separation * (outcomes - 0.5))
    return expit(ratio + math.log(prevalence / (1 - prevalence))), outcomes


def table_of(probabilities: NDArray[np.float64], outcomes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Exact counts `(2, NOISED_BINS)`."""
    bins = noised_bins(probabilities)
    rows = [np.bincount(bins[outcomes == condition], minlength=NOISED_BINS) for condition in (False, True)]
    return np.stack(rows).astype(np.int64)
