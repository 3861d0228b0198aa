"""The loops of the ECG path that numpy would walk several times: compiled, single-threaded, without the GIL."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.signal import firwin

SMALLEST_TAP = 1e-9
"""A half-band filter's zeros come out of firwin as 1e-18; they are left out."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit, kept on the disk between runs where there is a place to write to (a container may have none)."""
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        kernel = numba.njit(nogil=True, error_model="numpy")(function)
    return kernel


@compiled
def scaled(steps, places, baseline, gain, factor, invalid):  # type: ignore[no-untyped-def]
    """Interleaved int16 (time, channel) to float32 (lead, time): (step - baseline) / gain * factor in float64, as
    wfdb computes it, then rounded once. `invalid` and what is not finite become NaN. The other arguments are
    (channel,) arrays, `places` the channel of each lead, `factor` one a lead."""
    leads, length = len(places), len(steps)
    signal = np.empty((leads, length), np.float32)
    row = np.empty(length, np.int16)
    for lead in range(leads):
        place = places[lead]
        for time in range(length):
            row[time] = steps[time, place]
        zero, per_unit, millivolt = baseline[place], gain[place], factor[lead]
        for time in range(length):
            value = np.float32((row[time] - zero) / per_unit * millivolt)
            unknown = (row[time] == invalid) | (not np.isfinite(value))
            signal[lead, time] = np.float32(np.nan) if unknown else value
    return signal


@lru_cache(maxsize=32)
def decimation_filter(down: int) -> NDArray[np.float32]:
    """The low-pass of `scipy.signal.resample_poly(signal, 1, down)`: 20 * down + 1 taps, Kaiser window of beta 5."""
    taps: NDArray[np.float32] = firwin(20 * down + 1, 1 / down, window=("kaiser", 5.0)).astype(np.float32)
    taps[np.abs(taps) < SMALLEST_TAP] = 0
    return taps


@compiled
def decimated(signal, taps, down):  # type: ignore[no-untyped-def]
    """Every `down`-th sample of (lead, time) float32 after the symmetric FIR `taps`: (lead, ceil(time / down)).

    The signal is continued past its ends along the line through its first and last sample, so that an offset or a
    drift does not ring at the edges. The filter runs over the samples of one phase at a time, which are neighbours in
    memory. A NaN spreads to all samples that it touches.
    """
    leads, length = signal.shape
    count, half = (length + down - 1) // down, len(taps) // 2
    padded = np.empty((count + len(taps) // down + 1) * down, np.float32)
    phase = np.empty(len(padded) // down, np.float32)
    output = np.zeros((leads, count), np.float32)
    for lead in range(leads):
        first = np.float64(signal[lead, 0])
        slope = (np.float64(signal[lead, length - 1]) - first) / max(length - 1, 1)
        for time in range(-half, 0):
            padded[time + half] = first + slope * time
        padded[half : half + length] = signal[lead]
        for time in range(length, len(padded) - half):
            padded[time + half] = first + slope * time
        row = output[lead]
        for start in range(down):
            for step in range(len(phase)):
                phase[step] = padded[step * down + start]
            for tap in range(start, len(taps), down):
                weight = taps[tap]
                if weight != 0:
                    along = phase[tap // down : tap // down + count]
                    for step in range(count):
                        row[step] += weight * along[step]
    return output


@compiled
def rounded(signal, per_unit, largest, missing):  # type: ignore[no-untyped-def]
    """float32 (n,) to int16: times `per_unit`, rounded half to even, clipped to +-`largest`, NaN to `missing`."""
    steps = np.empty(len(signal), np.int16)
    for place in range(len(signal)):
        value = np.rint(signal[place] * per_unit)
        if np.isnan(value):
            steps[place] = missing
        else:
            steps[place] = np.int16(min(max(value, -largest), largest))
    return steps


@compiled
def extremes(signal):  # type: ignore[no-untyped-def]
    """Of each lead of (lead, time) float32: its least and largest sample (NaN: none) and how many are NaN."""
    leads = len(signal)
    least, largest, missing = np.empty(leads, np.float32), np.empty(leads, np.float32), np.zeros(leads, np.int64)
    for lead in range(leads):
        low, high, absent = np.float32(np.inf), np.float32(-np.inf), 0
        for value in signal[lead]:
            low = value if value < low else low  # false for NaN
            high = value if value > high else high
            absent += value != value
        least[lead], largest[lead] = (low, high) if low <= high else (np.nan, np.nan)
        missing[lead] = absent
    return least, largest, missing
