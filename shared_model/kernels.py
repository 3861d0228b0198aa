"""The loops of the ECG path that numpy would walk several times: compiled, single-threaded, without the GIL."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

SMALLEST_TAP = 1e-9
"""The zeros of the sinc come out as 1e-18; they are left out."""


def compiled(function: Callable[..., Any], fastmath: bool | set[str] = False) -> Callable[..., Any]:
    """numba.njit, kept on the disk between runs where there is a place to write to (a container may have none)."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        kernel = numba.njit(**options)(function)
    return kernel


@compiled
def scaled(
    steps: NDArray[np.int16],
    places: NDArray[np.int64],
    baseline: NDArray[np.float64],
    gain: NDArray[np.float64],
    factor: NDArray[np.float64],
    invalid: np.int16,
) -> NDArray[np.float32]:
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


def decimate(signal: NDArray[np.float32], down: int) -> NDArray[np.float32]:
    """Every `down`-th sample of (lead, time) after the low-pass of `scipy.signal.resample_poly(signal, 1, down)`.

    That is a symmetric FIR of 20 * down + 1 taps, a Kaiser window of beta 5. The signal is continued past its ends
    along the line through its first and last sample, so that an offset or a drift does not ring at the edges. A NaN
    spreads to all samples that it touches. Returns (lead, ceil(time / down)).
    """
    decimated: NDArray[np.float32] = _decimated(signal, *_grouped_taps(down), 10 * down, down)
    return decimated


@lru_cache(maxsize=32)
def _grouped_taps(down: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The filter's taps in groups of four of one phase: (group,) phase, (group, 4) places among its samples, weights.

    The zeros of the filter are left out; a group that is not full is filled up with weights of 0.
    """
    middle = 10 * down
    lowpass = np.sinc(np.arange(-middle, middle + 1) / down) * np.kaiser(2 * middle + 1, 5.0)
    taps = (lowpass / lowpass.sum()).astype(np.float32)
    phases, places, weights = [], [], []
    for phase in range(down):
        used = [tap for tap in range(phase, len(taps), down) if abs(taps[tap]) > SMALLEST_TAP]
        for start in range(0, len(used), 4):
            four = used[start : start + 4]
            empty = 4 - len(four)
            phases.append(phase)
            places.append([tap // down for tap in [*four, *[four[0]] * empty]])
            weights.append([*taps[four], *[0.0] * empty])
    return np.array(phases), np.array(places), np.array(weights, np.float32)


@compiled
def _decimated(
    signal: NDArray[np.float32],
    phases: NDArray[np.int64],
    places: NDArray[np.int64],
    weights: NDArray[np.float32],
    half: int,
    down: int,
) -> NDArray[np.float32]:
    leads, length = signal.shape
    count = (length + down - 1) // down
    width = count + 2 * half // down + 1
    samples = np.empty((down, width), np.float32)  # of each phase, neighbours in memory
    output = np.zeros((leads, count), np.float32)
    for lead in range(leads):
        _by_phase(signal[lead], half, samples)
        row = output[lead]
        for group in range(len(phases)):
            along, place, weight = samples[phases[group]], places[group], weights[group]
            a, b, c, d = weight[0], weight[1], weight[2], weight[3]
            one, two = along[place[0] : place[0] + count], along[place[1] : place[1] + count]
            three, four = along[place[2] : place[2] + count], along[place[3] : place[3] + count]
            for step in range(count):
                row[step] += a * one[step] + b * two[step] + c * three[step] + d * four[step]
    return output


@compiled
def _by_phase(signal: NDArray[np.float32], half: int, samples: NDArray[np.float32]) -> None:
    """One lead, continued past its ends along its line, into (phase, step) `samples`."""
    length, (down, width) = signal.size, samples.shape
    first = np.float64(signal[0])
    slope = (np.float64(signal[length - 1]) - first) / max(length - 1, 1)
    before = half // down
    whole = length // down  # steps that the signal has in all phases
    if down == 2:  # the common case: with a stride known beforehand it is vectorised, six times as fast
        even, odd = samples[0, before:], samples[1, before:]
        for step in range(whole):
            even[step], odd[step] = signal[2 * step], signal[2 * step + 1]
    else:
        for phase in range(down):
            along = samples[phase, before:]
            for step in range(whole):
                along[step] = signal[step * down + phase]
    for phase in range(down):
        for step in range(before):
            samples[phase, step] = first + slope * (step * down + phase - half)
        for step in range(before + whole, width):
            time = step * down + phase - half
            samples[phase, step] = signal[time] if time < length else first + slope * time


@compiled
def rounded(
    signal: NDArray[np.floating], per_unit: np.float32, largest: np.float32, missing: np.int16
) -> NDArray[np.int16]:
    """float32 (n,) to int16: times `per_unit`, rounded half to even, clipped to +-`largest`, NaN to `missing`."""
    steps = np.empty(len(signal), np.int16)
    for place in range(len(signal)):
        value = np.rint(signal[place] * per_unit)
        if np.isnan(value):
            steps[place] = missing
        else:
            steps[place] = np.int16(min(max(value, -largest), largest))
    return steps
