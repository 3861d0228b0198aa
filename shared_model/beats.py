"""R peaks and the median beat of a 12-lead ECG: a heart's look, freed of phase and rhythm.

Detection follows Pan and Tompkins 1985 (doi:10.1109/TBME.1985.325532) in its ideas (band-pass, energy,
refractory time, adaptive threshold) on the mean over all leads, so that one bad lead decides nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, find_peaks, sosfiltfilt

from shared_model.leads import LEADS, SAMPLING_RATE_HZ

LEAD_COUNT = len(LEADS)
BEFORE, AFTER = 63, 113  # the beat runs from -252 to +448 ms around the R peak: 176 samples at 250 Hz
BEAT_SAMPLES = BEFORE + AFTER
DESCRIBED_SAMPLES = BEAT_SAMPLES // 2  # 88 samples at 125 Hz
DESCRIPTOR_WIDTH = LEAD_COUNT * DESCRIBED_SAMPLES + 2

QRS_BAND_HZ = (8.0, 30.0)  # above T waves and f waves, below muscle
ENVELOPE_MS = 80  # about one QRS
REFRACTORY_S = 0.26  # 230 beats/min
THRESHOLD = 0.35  # of the typical highest envelope of a 2 s block
T_WAVE_S, T_WAVE_SHARE = 0.36, 0.5  # a peak this soon and this much lower than the one before is a T wave
QRS_HALF = 22  # samples; +-88 ms around the peak is compared between beats
MIN_BEAT_CORRELATION = 0.7  # with the typical QRS: ectopic beats and artefacts lie below

FALLBACK_RR_S = 0.8
RR_WEIGHT, RR_CV_WEIGHT = 15.0, 15.0  # mV a second, mV: see `describe_beats`

QRS_FILTER = butter(2, QRS_BAND_HZ, "bandpass", fs=SAMPLING_RATE_HZ, output="sos")

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class MedianBeat:
    """The typical beat of one ECG.

    Attributes:
        beat: (12, 176) float32, mV, 250 Hz, each lead's mean removed; 0 in missing leads or without any beat.
        rr_mean_s: mean time between R peaks in seconds; 0.8 where fewer than two were found.
        rr_cv: SD over mean of those times; 0 where fewer than three R peaks were found. High in AF.
        beats_used: how many beats entered the median; 0 flags a record without a usable beat.
    """

    beat: Floats
    rr_mean_s: float
    rr_cv: float
    beats_used: int


def median_beat(signal_mv: Floats, present: Bools) -> MedianBeat:
    """The median of the similar beats of one ECG, aligned at their QRS.

    Args:
        signal_mv: (12, 2500) float32, mV, 250 Hz, 0 where missing.
        present: (12, 2500) bool, False where a sample is missing.
    """
    leads, times = _usable(signal_mv, present)
    filtered = _band_passed(signal_mv[leads])
    peaks = _detect(filtered, times)
    rr_mean_s, rr_cv = _rhythm(peaks, times)
    beat = np.zeros((LEAD_COUNT, BEAT_SAMPLES), np.float32)
    used = _alike(filtered, peaks, times)
    if len(used):
        windows = used[:, None] + np.arange(-BEFORE, AFTER)  # (beat, 176)
        beats = signal_mv[leads][:, windows]  # (lead, beat, 176)
        beats = beats - beats.mean(-1, keepdims=True)  # removes what wander shifts from beat to beat
        beat[leads] = np.median(beats, axis=1)
    return MedianBeat(beat, rr_mean_s, rr_cv, len(used))


def r_peaks(signal_mv: Floats, present: Bools) -> NDArray[np.int64]:
    """Sample numbers of the R peaks of one ECG, ascending. Arguments as for `median_beat`."""
    leads, times = _usable(signal_mv, present)
    return _detect(_band_passed(signal_mv[leads]), times)


def describe_beats(signals_mv: Floats, present: Bools) -> Floats:
    """One row an ECG, between which Euclidean distance is meaningful: median beat, heart rate, irregularity.

    The columns are the beat at 125 Hz (12 leads x 88 samples, mV), then RR_WEIGHT * mean RR (s), then
    RR_CV_WEIGHT * coefficient of variation of RR. The beat alone cannot see atrial fibrillation, the last two
    can. An ECG without a detectable beat has an all-zero beat, which no real beat has: relations treat it as
    incomparable. No entry is ever NaN.

    Args:
        signals_mv: (n, 12, 2500) float32, mV, 250 Hz, 0 where missing.
        present: (n, 12, 2500) bool.

    Returns:
        (n, DESCRIPTOR_WIDTH) float32.
    """
    rows = np.zeros((len(signals_mv), DESCRIPTOR_WIDTH), np.float32)
    for row, signal, there in zip(rows, signals_mv, present, strict=True):
        typical = median_beat(signal, there)
        halved = typical.beat.reshape(LEAD_COUNT, DESCRIBED_SAMPLES, 2).mean(-1)
        row[:-2] = halved.ravel()
        row[-2:] = RR_WEIGHT * typical.rr_mean_s, RR_CV_WEIGHT * typical.rr_cv
    return rows


def _usable(signal_mv: Floats, present: Bools) -> tuple[Bools, Bools]:
    """Leads (12,) that move and are there half of the time; times (2500,) at which all of these are."""
    moving = np.ptp(signal_mv, axis=1) > 0
    there = present.sum(1) * 2 >= present.shape[1]
    leads = np.logical_and(moving, there)
    return leads, np.logical_and(present[leads].all(0), leads.any())


def _band_passed(signal_mv: Floats) -> Floats:
    filtered: Floats = sosfiltfilt(QRS_FILTER, signal_mv, axis=-1).astype(np.float32)
    return filtered


def _detect(filtered: Floats, times: Bools) -> NDArray[np.int64]:
    """R peaks from the band-passed usable leads (lead, time)."""
    if len(filtered) == 0:
        return np.zeros(0, np.int64)
    magnitude = np.abs(filtered)
    # Each lead counts alike, whatever its gain; a noisy one only lifts the floor.
    scale = np.sqrt((magnitude**2).mean(1, keepdims=True))
    width = ENVELOPE_MS * SAMPLING_RATE_HZ // 1000
    envelope = uniform_filter1d((magnitude / np.maximum(scale, 1e-6)).mean(0), width)
    envelope = envelope * times
    blocks = np.array_split(envelope, max(1, len(envelope) // (2 * SAMPLING_RATE_HZ)))
    highest = [block.max() for block in blocks if block.max() > 0]
    if not highest:
        return np.zeros(0, np.int64)
    threshold = THRESHOLD * float(np.median(highest))
    peaks, _ = find_peaks(envelope, height=threshold, distance=int(REFRACTORY_S * SAMPLING_RATE_HZ))
    return _without_t_waves(peaks.astype(np.int64), envelope)


def _without_t_waves(peaks: NDArray[np.int64], envelope: Floats) -> NDArray[np.int64]:
    kept: list[int] = []
    for peak in peaks.tolist():
        soon = kept and peak - kept[-1] < T_WAVE_S * SAMPLING_RATE_HZ
        if soon and envelope[peak] < T_WAVE_SHARE * envelope[kept[-1]]:
            continue
        kept.append(peak)
    return np.array(kept, np.int64)


def _rhythm(peaks: NDArray[np.int64], times: Bools) -> tuple[float, float]:
    """Mean RR (s) and its coefficient of variation, over peaks with no missing sample between."""
    missing = np.concatenate([[0], np.cumsum(~times)])
    rr_s = np.diff(peaks)[missing[peaks[1:]] == missing[peaks[:-1]]] / SAMPLING_RATE_HZ if len(peaks) > 1 else []
    if len(rr_s) == 0:
        return FALLBACK_RR_S, 0.0
    mean = float(np.mean(rr_s))
    return mean, float(np.std(rr_s) / mean) if len(rr_s) > 1 else 0.0


def _alike(filtered: Floats, peaks: NDArray[np.int64], times: Bools) -> NDArray[np.int64]:
    """The peaks whose beat is whole and whose QRS resembles the median QRS over all leads.

    The envelope's peak is the centre of the QRS's energy. Aligning beats by cross-correlation on top of it
    did not make two recordings of one heart any more alike, so it is left out.
    """
    missing = np.concatenate([[0], np.cumsum(~times)])
    low, high = peaks - BEFORE, peaks + AFTER
    whole = (low >= 0) & (high <= len(times))
    whole[whole] = missing[high[whole]] == missing[low[whole]]
    peaks = peaks[whole]
    if len(peaks) == 0:
        return peaks
    complexes = filtered[:, peaks[:, None] + np.arange(-QRS_HALF, QRS_HALF + 1)]  # (lead, beat, time)
    template = np.median(complexes, axis=1)  # (lead, time)
    product = np.einsum("lbt,lt->b", complexes, template)
    energy = np.einsum("lbt,lbt->b", complexes, complexes) * (template**2).sum()
    similar: NDArray[np.int64] = peaks[product >= MIN_BEAT_CORRELATION * np.sqrt(energy)]
    return similar
