"""Wave attributes of an ECG: rate, intervals and axes of its typical beat, as a cart's program measures them.

Intervals are global, over all leads at once (Kligfield et al., Circulation 2007;115:1306): QRS by the slope of all
leads together (after Laguna et al. 1994, doi:10.1006/cbmr.1994.1006), P and T on the combination of leads in which
the wave is largest (first principal component). Constants were chosen on drawn ECGs of one seed, on
what one make of cart measured on eight real ones, and (QUIET) on nine bundle branch blocks; docs/methods.md has the
errors on others.
"""

import math
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import savgol_filter
from torch import Tensor

from shared_model.beats import r_peaks
from shared_model.leads import LEADS, SAMPLING_RATE_HZ

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

STEP_MS = 1000 / SAMPLING_RATE_HZ
BEFORE, AFTER = 100, 160  # samples: 400 ms before R, so that PR may be 320 ms, and 640 ms after, QT 560 ms
MIN_BEATS = 3  # for a median, and for its error
SMOOTH_QRS, SMOOTH_P, SMOOTH_T = 7, 9, 11  # samples of a Savitzky-Golay filter: the faster the wave, the fewer
QRS_SHARE = 0.08  # of the steepest slope (above the quietest fifth): the QRS begins and ends below
QUIET = 5  # samples in a row: within a bundle branch block the slope may pause for less
ST_SAMPLES = 15  # no T wave is at its peak within 60 ms of the QRS
LONGEST_QT_PEAK = 140  # samples from the QRS onset to the peak of T, and 3/4 of RR
LONGEST_QT_SHARE = 0.85  # of RR: a later end is that of the next P wave
T_SMALLEST_MV = 0.05  # on the component; of a flatter T the end cannot be known
P_BEFORE, P_SHORTEST_SEARCH = 80, 15  # samples
P_SHARE = 0.15  # of the P wave's peak: it begins and ends below
P_TO_ERROR = 6.0  # peak over standard error of the typical beat: fibrillation waves differ from beat to beat

# One unit of a description. Rate, PR, QRS, QT, QTc and QRS axis: (98th - 2nd percentile) / 4.1 of 46,129 low-risk
# adults (Mason et al., J Electrocardiol 2007;40:228). The others, chosen: of like size against what is common.
UNITS = {
    "heart_rate_bpm": 12.0,
    "pr_ms": 24.0,
    "p_duration_ms": 12.0,
    "qrs_ms": 10.0,
    "qt_ms": 31.0,
    "qtc_ms": 23.0,
    "p_axis_deg": 25.0,
    "qrs_axis_deg": 32.0,
    "t_axis_deg": 32.0,
    "qrs_count": 2.0,  # 12 bpm in 10 s
    "rr_variation": 0.05,
}
# A whole turn in units where the attribute is an angle, else never reached.
TURN = torch.tensor([360 / unit if name.endswith("_deg") else torch.inf for name, unit in UNITS.items()])
MEASURED = tuple(UNITS.items())[:9]  # what carts measure too, under the same names
FEWEST_SHARED = 3


@dataclass(frozen=True)
class Waves:
    """What was measured on one ECG; NaN where it cannot be known. Axes: 0 points left (I), 90 down (aVF)."""

    heart_rate_bpm: float = math.nan
    pr_ms: float = math.nan
    p_duration_ms: float = math.nan
    qrs_ms: float = math.nan
    qt_ms: float = math.nan
    qtc_ms: float = math.nan
    """By Bazett, as carts print it: QT / sqrt(RR in s)."""
    p_axis_deg: float = math.nan
    qrs_axis_deg: float = math.nan
    t_axis_deg: float = math.nan
    qrs_count: float = math.nan
    """R peaks in 10 s."""
    rr_variation: float = math.nan
    """SD over mean of the RR intervals: high in atrial fibrillation."""


@dataclass(frozen=True)
class Span:
    """A wave in the typical beat: first and last position, in samples."""

    onset: float
    end: float


def measure_waves(signal_mv: Floats, present: Bools) -> Waves:
    """Wave attributes of one ECG: (12, 2500) float32 mV 250 Hz 0 where missing, (12, 2500) bool."""
    leads = (np.ptp(signal_mv, axis=1) > 0) & (2 * present.sum(1) >= present.shape[1])
    peaks = r_peaks(signal_mv, present)
    there = present[leads].all(0)
    rr_s = _rr_s(peaks, there)
    if len(rr_s) == 0:
        return Waves()
    mean_rr_s = float(rr_s.mean())
    rhythm = Waves(
        heart_rate_bpm=60 / mean_rr_s,
        qrs_count=float(len(peaks)),
        rr_variation=float(rr_s.std() / mean_rr_s) if len(rr_s) > 1 else math.nan,
    )
    beats = _whole_beats(signal_mv[leads], peaks, there)
    if beats.shape[1] < MIN_BEATS:
        return rhythm
    qrs, t_wave, p_wave = delineate(beats, mean_rr_s)
    full = np.full((len(LEADS), BEFORE + AFTER), np.nan)
    full[leads] = np.median(beats, axis=1)
    qt_ms = (t_wave.end - qrs.onset) * STEP_MS
    return replace(
        rhythm,
        pr_ms=(qrs.onset - p_wave.onset) * STEP_MS,
        p_duration_ms=(p_wave.end - p_wave.onset) * STEP_MS,
        qrs_ms=(qrs.end - qrs.onset) * STEP_MS,
        qt_ms=qt_ms,
        qtc_ms=qt_ms / math.sqrt(mean_rr_s),
        p_axis_deg=axis_deg(full, p_wave, p_wave.onset),
        qrs_axis_deg=axis_deg(full, qrs, qrs.onset),
        t_axis_deg=axis_deg(full, t_wave, qrs.onset),
    )


def describe_waves(signals: Tensor, present: Tensor) -> Tensor:
    """Wave attributes in the order and the units of UNITS, on the CPU: (n, 12, 2500) -> (n, len(UNITS)) float32.

    NaN where unknown. The units are clinical constants, never a cohort's SD: what one site describes means the same
    at another.
    """
    pairs = zip(signals.cpu().numpy(), present.cpu().numpy(), strict=True)
    rows = np.array([astuple(measure_waves(signal, there)) for signal, there in pairs], np.float32)
    units = np.array([*UNITS.values()], np.float32)
    return torch.from_numpy(rows.reshape(-1, len(UNITS)) / units).to(signals.device)


@torch.no_grad()
def wave_distance(described: Tensor) -> Tensor:
    """Root mean square difference over the attributes that both have: (n, len(UNITS)) -> (n, n), in units.

    Axes are angles: 350 and 10 degrees are 20 apart. +inf where fewer than FEWEST_SHARED are shared, and against a
    row of zeros, which describes nothing.
    """
    known = ~described.isnan() & (described != 0).any(1, keepdim=True)
    values = described.nan_to_num(0.0).T[:, :, None]  # (attribute, n, 1)
    shared = (known[:, None] & known[None, :]).movedim(2, 0)  # (attribute, n, n)
    apart = (values - values.mT).abs()
    turn = TURN.to(described.device)[:, None, None]
    apart = apart.remainder(turn)
    apart = torch.minimum(apart, turn - apart) * shared
    count = shared.sum(0)
    distance = (apart.square().sum(0) / count.clamp(min=1)).sqrt()
    return distance.masked_fill(count < FEWEST_SHARED, torch.inf).fill_diagonal_(0.0)


def delineate(beats: Floats, rr_s: float) -> tuple[Span, Span, Span]:
    """QRS, T and P wave of beats (lead, beat, BEFORE + AFTER) mV around their R peaks; NaN for what is not found."""
    typical = np.median(beats, axis=1)
    qrs = _qrs_span(typical)
    t_wave = _t_span(typical, qrs, rr_s)
    return qrs, t_wave, _p_span(beats, qrs, t_wave, rr_s)


def axis_deg(beat: NDArray[np.floating], span: Span, level_at: float) -> float:
    """Frontal axis of the net area over a span of a beat (12, time) mV: atan2(2/sqrt(3) aVF, I), degrees.

    Areas are above the level just before `level_at`; 2/sqrt(3) makes Goldberger's aVF as large as Einthoven's I.
    NaN without both leads.
    """
    if math.isnan(span.onset) or math.isnan(span.end):
        return math.nan
    first, last, before = int(span.onset), int(span.end) + 1, int(level_at)
    pair = beat[[LEADS.index("I"), LEADS.index("aVF")]]
    level = pair[:, max(0, before - 4) : before + 1].mean(1)
    left, down = (pair[:, first:last] - level[:, None]).sum(1).tolist()
    return math.degrees(math.atan2(2 / math.sqrt(3) * down, left))


def _rr_s(peaks: NDArray[np.int64], there: Bools) -> NDArray[np.float64]:
    """RR intervals (s) with no missing sample between."""
    missing = np.concatenate([[0], np.cumsum(~there)])
    whole = missing[peaks[1:]] == missing[peaks[:-1]]
    intervals: NDArray[np.float64] = np.diff(peaks)[whole] / SAMPLING_RATE_HZ
    return intervals


def _whole_beats(signal_mv: Floats, peaks: NDArray[np.int64], there: Bools) -> Floats:
    """(lead, beat, BEFORE + AFTER) mV, each beat's mean removed; beats with missing samples are left out."""
    peaks = peaks[(peaks >= BEFORE) & (peaks + AFTER <= signal_mv.shape[1])]
    windows = peaks[:, None] + np.arange(-BEFORE, AFTER)
    windows = windows[there[windows].all(1)]
    beats = signal_mv[:, windows]
    centred: Floats = beats - beats.mean(-1, keepdims=True)
    return centred


def _qrs_span(beat: Floats) -> Span:
    """Outward from the steepest moment to where the slope over all leads stays low."""
    slope = np.sqrt((savgol_filter(beat, SMOOTH_QRS, 3, deriv=1, axis=-1) ** 2).mean(0))
    steepest = BEFORE - 25 + int(slope[BEFORE - 25 : BEFORE + 25].argmax())
    quiet = np.quantile(slope, 0.2)
    low = slope < quiet + QRS_SHARE * (slope[steepest] - quiet)
    return Span(steepest - _first_run(low[steepest::-1]), steepest + _first_run(low[steepest:]))


def _first_run(low: Bools) -> float:
    """Where `low` is first true QUIET times in a row; NaN if nowhere."""
    runs = np.convolve(low, np.ones(QUIET, int), "valid") == QUIET
    return float(runs.argmax()) if runs.any() else math.nan


def _t_span(beat: Floats, qrs: Span, rr_s: float) -> Span:
    """From the QRS end to the end of T, as if the limb were a Gaussian's: 3 SD after the peak.

    The tangent at the steepest slope (1 SD) meets the level at 2 SD, where a tenth of the wave is still to come and
    carts read further.
    """
    nothing = Span(math.nan, math.nan)
    if math.isnan(qrs.onset + qrs.end):
        return nothing
    onset, first = int(qrs.onset), int(qrs.end) + ST_SAMPLES
    rr = rr_s * SAMPLING_RATE_HZ
    last = int(min(beat.shape[1] - 1, onset + min(0.75 * rr, LONGEST_QT_PEAK)))
    if last - first < 12:
        return nothing
    smooth = savgol_filter(beat, SMOOTH_T, 2, axis=-1)
    smooth = smooth - np.median(smooth[:, max(0, onset - 6) : onset], axis=1)[:, None]
    trace = _component(smooth[:, first:last]) @ smooth
    peak = first + int(np.abs(trace[first:last]).argmax())
    limb = (trace * np.sign(trace[peak]))[peak : int(min(beat.shape[1], onset + rr - 10))]
    fall = np.diff(limb)
    if len(fall) < 4 or fall.min() >= 0 or limb[0] < T_SMALLEST_MV:
        return nothing
    steepest = int(fall.argmin())
    height = (limb[steepest] + limb[steepest + 1]) / 2
    end = float(peak + steepest + 0.5 + 2 * height / -fall[steepest])
    return Span(qrs.end, end) if end < min(beat.shape[1], onset + LONGEST_QT_SHARE * rr) else nothing


def _p_span(beats: Floats, qrs: Span, t_wave: Span, rr_s: float) -> Span:
    """Outward from the P wave's peak, above the line that joins the ends of the search, to P_SHARE of it."""
    nothing = Span(math.nan, math.nan)
    if math.isnan(qrs.onset):
        return nothing
    end_of_last_t = 0 if math.isnan(t_wave.end) else int(t_wave.end - rr_s * SAMPLING_RATE_HZ) + 5
    first, last = max(4, int(qrs.onset) - P_BEFORE, end_of_last_t), int(qrs.onset) - 4
    if last - first < P_SHORTEST_SEARCH:
        return nothing
    windows = savgol_filter(beats[:, :, first:last], SMOOTH_P, 2, axis=-1)
    ramp = np.linspace(0, 1, last - first)
    windows = windows - windows[..., :1] * (1 - ramp) - windows[..., -1:] * ramp
    typical = np.median(windows, axis=1)
    weights = _component(typical)
    trace = weights @ typical
    peak = int(np.abs(trace).argmax())
    error = np.tensordot(weights, windows, 1).std(0, ddof=1).mean() / math.sqrt(windows.shape[1])
    if np.abs(trace[peak]) < P_TO_ERROR * error:
        return nothing
    low = trace * np.sign(trace[peak]) < P_SHARE * np.abs(trace[peak])
    return Span(first + peak - int(low[peak::-1].argmax()), first + peak + int(low[peak:].argmax()))


def _component(waves: Floats) -> NDArray[np.float64]:
    """(lead,) weights of length 1 of the lead combination in which waves (lead, time) are largest."""
    left, _, _ = np.linalg.svd(waves, full_matrices=False)
    weights: NDArray[np.float64] = left[:, 0]
    return weights
