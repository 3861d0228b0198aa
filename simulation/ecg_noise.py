"""What a recorder picks up besides: muscle, breathing, mains, loose electrodes, a fibrillating atrium.

All of it is added to the eight independent leads (I, II, V1..V6) before the others are derived.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

LEADS = 8
V1 = 2
MUSCLE_MV = 0.012
"""SD at 500 Hz; the same spectral density at every rate."""
WANDER_MV = 0.05
MAINS_MV = 0.006
FIBRILLATION_MV = 0.035
"""Amplitude of an f-wave outside V1, where it is largest."""
ARTEFACT_SHARE = 0.06
"""Share of ECGs with a loose electrode on one lead."""
WANDER_WAVES = 3


@dataclass(frozen=True)
class Background:
    """White noise, and slow waves with the amplitude each has in each lead."""

    muscle: Float32Array
    """(ecg, 8, time) standard normal"""
    muscle_mv: Float32Array
    """(ecg, 8)"""
    waves: Float32Array
    """(ecg, wave, time): three of breathing, one of mains, two of the fibrillating atrium; amplitude 1"""
    wave_mv: Float32Array
    """(ecg, 8, wave)"""


def draw_background(
    rng: np.random.Generator,
    atrial_fibrillation: NDArray[np.bool_],
    sampling_rate_hz: float,
    samples: int,
    mains_hz: float,
    noise_scale: float,
) -> Background:
    """Draw for each ECG. `noise_scale` multiplies muscle, wander and mains; the f-waves are signal."""
    count = len(atrial_fibrillation)
    density = noise_scale * np.sqrt(sampling_rate_hz / 500)
    muscle_mv = MUSCLE_MV * density * np.exp(rng.normal(0, 0.45, (count, 1)) + rng.normal(0, 0.2, (count, LEADS)))
    quality = np.exp(rng.normal(0, 0.5, (count, 1, 1)))
    wander_mv = noise_scale * WANDER_MV * quality * rng.normal(0, 1, (count, LEADS, WANDER_WAVES))
    mains_level = np.exp(rng.normal(0, 0.7, (count, 1, 1)))
    mains_mv = noise_scale * MAINS_MV * mains_level * rng.normal(0, 1, (count, LEADS, 1))
    fibrillation_mv = (
        FIBRILLATION_MV * np.exp(rng.normal(0, 0.4, (count, 1, 1))) * rng.normal(0.8, 0.3, (count, LEADS, 2))
    )
    fibrillation_mv[:, V1] *= 1.8
    fibrillation_mv *= atrial_fibrillation[:, None, None]
    return Background(
        muscle=rng.standard_normal((count, LEADS, samples), dtype=np.float32),
        muscle_mv=muscle_mv.astype(np.float32),
        waves=_slow_waves(rng, count, sampling_rate_hz, samples, mains_hz),
        wave_mv=np.concatenate([wander_mv, mains_mv, fibrillation_mv], axis=2).astype(np.float32),
    )


def _slow_waves(
    rng: np.random.Generator, count: int, sampling_rate_hz: float, samples: int, mains_hz: float
) -> Float32Array:
    """(ecg, 6, time): sines of random phase; the f-waves drift in phase, so that they never repeat."""
    frequency = np.concatenate(
        [
            rng.uniform(0.05, 0.5, (count, WANDER_WAVES)),
            np.full((count, 1), mains_hz),
            rng.uniform(5.0, 6.5, (count, 1)),
            rng.uniform(6.5, 8.5, (count, 1)),
        ],
        axis=1,
    )
    time_s = np.arange(samples) / sampling_rate_hz
    turns = frequency[:, :, None] * time_s + rng.random((count, frequency.shape[1], 1))
    drift_hz = rng.uniform(0.3, 0.9, (count, 2, 1))
    turns[:, -2:] += 0.35 * np.sin(2 * np.pi * (drift_hz * time_s + rng.random((count, 2, 1))))
    turns -= np.floor(turns)
    waves: Float32Array = np.sin(np.float32(2 * np.pi) * turns.astype(np.float32))
    return waves


def add_electrode_artefacts(
    rng: np.random.Generator, signal: Float32Array, sampling_rate_hz: float, noise_scale: float
) -> None:
    """In some ECGs one lead jumps and settles with a time constant of about half a second; in place, mV."""
    count, leads, samples = signal.shape
    for ecg in np.flatnonzero(rng.random(count) < ARTEFACT_SHARE):
        begin = int(rng.integers(0, samples))
        jump_mv, settle_s = noise_scale * rng.normal(0, 0.4), rng.uniform(0.2, 0.8)
        time_s = np.arange(samples - begin) / sampling_rate_hz
        signal[ecg, rng.integers(0, leads), begin:] += jump_mv * np.exp(-time_s / settle_s)
