"""Pressures from an invasive waveform of the right heart, as a person reads them off a strip.

The mean is the digital mean: over time, over whole beats, over all of respiration. It is what monitors show as the
mean; the end-expiratory mean that guidelines read off by hand is mostly higher in a patient who breathes alone and
lower in one who is ventilated. A whole strip is refused rather than mended, because the annotated interval is the
only one there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, find_peaks, sosfiltfilt

LOWEST_RATE_HZ = 50.0
# Right-heart pressures are within; beyond are catheter whip, knocks and the line's own 300 mmHg.
LOWEST_MMHG, HIGHEST_MMHG = -20.0, 150.0
MOST_MISSING = 0.05
# A transducer open to a patient never stands still for so long; one that is flushed, zeroed, clipped or off does.
# After a flush or a zeroing damping and reference are others, so what is left of the interval is not joined.
STILL_S = 0.3
# Beats cut at the range of the recorder stand at the very same value, one after the other.
CLIPPED_S, CLIPPED_SHARE = 0.08, 1 / 3
# A catheter that carries 12 Hz rises from 10% to 90% in 0.35 / 12 Hz = 29 ms: half a pulse within 10 ms is a square.
SQUARE_S, SQUARE_SHARE = 0.01, 0.5
LONGEST_BEAT_S, SHORTEST_BEAT_S = 2.0, 0.33
FEWEST_BEATS = 5
# Of the interval, in beats that are whole and alike.
LEAST_COVERED = 0.6
# A beat unlike the interval's typical one is an ectopic, a knock or two beats in one.
MOST_UNLIKE = 2.0
LEAST_PULSE_MMHG = 2.0
# Correlation of the pulse with itself a beat later. 15 s of white noise through the filter reaches 0.19.
LEAST_RHYTHM = 0.2
MOST_DRIFT_MMHG = 8.0
# A fluid-filled catheter carries no more than this; monitors filter pressures at 12 Hz for display.
HIGHEST_HZ = 12.0
LOWEST_HZ = 0.5


class Artefact(StrEnum):
    """Why an interval gives no pressure."""

    TOO_SHORT = "too short"
    MISSING = "samples missing"
    OUT_OF_RANGE = "out of range"
    STILL = "still"
    CLIPPED = "clipped"
    SQUARE = "square"
    DAMPED = "damped"
    NO_RHYTHM = "no rhythm"
    FEW_BEATS = "too few whole beats"
    UNSTEADY = "unsteady"


class Refused(Exception):
    """An interval is artefact. The text is one line that says what was seen."""

    def __init__(self, artefact: Artefact, detail: str) -> None:
        super().__init__(f"{artefact}: {detail}")
        self.artefact = artefact


@dataclass(frozen=True)
class Pressures:
    """What an interval shows, in mmHg."""

    mean_mmhg: float
    systolic_mmhg: float
    """Mean of the beats' highest values; of a wedge tracing, of the higher of its a and v waves."""
    diastolic_mmhg: float
    """Mean of the beats' lowest values."""
    beats: int
    """Whole beats that were averaged."""
    heart_rate_bpm: float


def measure_pressures(pressure_mmhg: NDArray[np.floating], sampling_rate_hz: float) -> Pressures:
    """Mean, systolic and diastolic pressure of an interval of a pulmonary artery or wedge tracing, (time,) in mmHg.

    A beat runs from one upstroke to the next. On a wedge tracing an upstroke is that of the a or of the v wave,
    whichever is steeper; where that changes half a beat is gained or lost, which moves the mean of ten beats with
    waves of 6 mmHg by less than 0.3 mmHg.

    Raises:
        Refused: the interval is artefact.
        ValueError: the rate is too low to see a beat.
    """
    if not sampling_rate_hz >= LOWEST_RATE_HZ:
        raise ValueError(f"{sampling_rate_hz:g} Hz: a pressure waveform needs at least {LOWEST_RATE_HZ:g} Hz")
    pressure = np.asarray(pressure_mmhg, np.float64)
    usable = _usable(pressure, sampling_rate_hz)
    time = np.arange(len(pressure))
    bridged = np.interp(time, time[usable], pressure[usable])
    smooth = _low_pass(bridged, HIGHEST_HZ, sampling_rate_hz)
    upstrokes = _upstrokes(smooth, sampling_rate_hz)
    return _over_beats(bridged, smooth, usable, upstrokes, sampling_rate_hz)


def _usable(pressure: NDArray[np.float64], rate_hz: float) -> NDArray[np.bool_]:
    """Which samples can be a pressure. Refuses an interval in which no beat need be looked for."""
    if len(pressure) < FEWEST_BEATS * SHORTEST_BEAT_S * rate_hz:
        raise Refused(Artefact.TOO_SHORT, f"{len(pressure) / rate_hz:.1f} s")
    missing = np.mean(~np.isfinite(pressure))
    if missing > MOST_MISSING:
        raise Refused(Artefact.MISSING, f"{missing:.0%} of the samples")
    usable: NDArray[np.bool_] = (pressure >= LOWEST_MMHG) & (pressure <= HIGHEST_MMHG)
    if np.mean(~usable) > MOST_MISSING:
        detail = f"{np.mean(~usable):.0%} of the samples outside {LOWEST_MMHG:g} to {HIGHEST_MMHG:g} mmHg"
        raise Refused(Artefact.OUT_OF_RANGE, detail)
    changes = np.flatnonzero(pressure[1:] != pressure[:-1]) + 1  # NaN differs from itself, so a gap is no stillness
    begins = np.concatenate(([0], changes))
    lengths = np.diff(np.concatenate((begins, [len(pressure)])))
    longest = int(lengths.argmax())
    if lengths[longest] >= STILL_S * rate_hz:
        stood_s, value = lengths[longest] / rate_hz, pressure[begins[longest]]
        raise Refused(Artefact.STILL, f"{stood_s:.1f} s at {value:g} mmHg (flush, zeroing, clipping or no signal)")
    return usable


def _low_pass(signal: NDArray[np.float64], highest_hz: float, rate_hz: float) -> NDArray[np.float64]:
    filtered: NDArray[np.float64] = sosfiltfilt(butter(2, highest_hz, fs=rate_hz, output="sos"), signal)
    return filtered


def _upstrokes(smooth: NDArray[np.float64], rate_hz: float) -> NDArray[np.int64]:
    """Where the pressure rises fastest, once a beat."""
    pulse = smooth - _low_pass(smooth, LOWEST_HZ, rate_hz)
    slope = np.gradient(pulse)
    steepest = np.percentile(slope, 99)
    peaks, _ = find_peaks(slope, distance=0.6 * _period(pulse, rate_hz), height=0.3 * steepest)
    upstrokes: NDArray[np.int64] = peaks
    return upstrokes


def _period(pulse: NDArray[np.float64], rate_hz: float) -> int:
    """Samples a beat: the first lag at which the pulse resembles itself nearly as much as at any other."""
    longest = min(round(LONGEST_BEAT_S * rate_hz), len(pulse) // 2)
    likeness = np.array(
        [np.corrcoef(pulse[lag:], pulse[:-lag])[0, 1] for lag in range(round(SHORTEST_BEAT_S * rate_hz), longest)]
    )
    lags, _ = find_peaks(likeness)
    if not len(lags) or likeness[lags].max() < LEAST_RHYTHM:
        raise Refused(Artefact.NO_RHYTHM, "no beat resembles the next")
    first = lags[likeness[lags] >= 0.8 * likeness[lags].max()][0]
    return round(SHORTEST_BEAT_S * rate_hz) + int(first)


def _over_beats(
    pressure: NDArray[np.float64],
    smooth: NDArray[np.float64],
    usable: NDArray[np.bool_],
    upstrokes: NDArray[np.int64],
    rate_hz: float,
) -> Pressures:
    """Average over the beats that are whole and alike."""
    if len(upstrokes) <= FEWEST_BEATS:
        raise Refused(Artefact.FEW_BEATS, f"{max(0, len(upstrokes) - 1)} found, {FEWEST_BEATS} needed")
    beats = [slice(first, last) for first, last in pairwise(upstrokes)]
    lengths = np.diff(upstrokes)
    highest = np.array([smooth[beat].max() for beat in beats])
    lowest = np.array([smooth[beat].min() for beat in beats])
    pulses = highest - lowest
    if np.median(pulses) < LEAST_PULSE_MMHG:
        raise Refused(Artefact.DAMPED, f"beats of {np.median(pulses):.1f} mmHg, {LEAST_PULSE_MMHG:g} needed")
    _refuse_square(pressure, beats, float(np.median(pulses)), rate_hz)
    _refuse_clipped(pressure, beats, rate_hz)
    kept = np.array([usable[beat].all() for beat in beats]) & _alike(lengths) & _alike(pulses)
    covered = lengths[kept].sum() / len(pressure)
    if kept.sum() < FEWEST_BEATS or covered < LEAST_COVERED:
        raise Refused(Artefact.FEW_BEATS, f"{kept.sum()} that are alike, {covered:.0%} of the interval")
    means = np.array([pressure[beat].mean() for beat in beats])[kept]
    _refuse_unsteady(means)
    return Pressures(
        mean_mmhg=float(np.average(means, weights=lengths[kept])),
        systolic_mmhg=float(highest[kept].mean()),
        diastolic_mmhg=float(lowest[kept].mean()),
        beats=int(kept.sum()),
        heart_rate_bpm=float(60 * rate_hz / np.median(lengths[kept])),
    )


def _refuse_clipped(pressure: NDArray[np.float64], beats: Sequence[slice], rate_hz: float) -> None:
    for name, extreme in (("highest", pressure.max()), ("lowest", pressure.min())):
        standing = pressure == extreme
        share = np.mean([standing[beat].sum() >= CLIPPED_S * rate_hz for beat in beats])
        if share > CLIPPED_SHARE:
            raise Refused(Artefact.CLIPPED, f"{share:.0%} of the beats stand at the {name} value, {extreme:g} mmHg")


def _refuse_square(pressure: NDArray[np.float64], beats: Sequence[slice], pulse_mmhg: float, rate_hz: float) -> None:
    step = max(1, round(SQUARE_S * rate_hz))
    jumps = np.abs(pressure[step:] - pressure[:-step])
    share = np.median([jumps[beat].max(initial=0) for beat in beats]) / pulse_mmhg
    if share > SQUARE_SHARE:
        raise Refused(Artefact.SQUARE, f"{share:.0%} of the pulse within {step / rate_hz * 1000:.0f} ms")


def _refuse_unsteady(means_mmhg: NDArray[np.float64]) -> None:
    half = len(means_mmhg) // 2
    drift = abs(means_mmhg[half:].mean() - means_mmhg[:half].mean())
    if drift > MOST_DRIFT_MMHG:
        raise Refused(Artefact.UNSTEADY, f"its halves differ by {drift:.1f} mmHg")


def _alike(values: NDArray[np.number]) -> NDArray[np.bool_]:
    middle = np.median(values)
    alike: NDArray[np.bool_] = (values <= MOST_UNLIKE * middle) & (values >= middle / MOST_UNLIKE)
    return alike
