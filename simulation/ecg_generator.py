"""From a circulation to a 12-lead ECG: each beat a sum of Gaussian wavelets on a dipole that moves.

`draw_anatomy` draws what differs between bodies and says nothing about pressure; `synthesise` draws beats and
noise. The eight independent leads (I, II, V1..V6) are made first, noise and device filter included; III, aVR,
aVL and aVF are then computed from them, so that Einthoven's and Goldberger's equations hold exactly.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import signal as scipy_signal
from scipy.spatial.transform import Rotation

from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEAD_VECTORS
from simulation.circulation import REFERENCE_AGE_YEARS, Circulation, FloatArray
from simulation.ecg_noise import add_electrode_artefacts, draw_background

Signal = NDArray[np.float32]

DURATION_S = 10.0
DEFAULT_SAMPLING_RATE_HZ = 500.0
DIPOLE_MV = {
    "p_right": (0.045, 0.090, -0.050),
    "p_left": (0.060, 0.070, 0.030),
    "q": (-0.10, -0.06, -0.20),
    "r": (1.00, 0.75, 0.32),
    "s": (-0.02, -0.12, 0.62),
    "late": (-0.22, -0.12, 0.08),
    "t_rise": (0.14, 0.105, -0.11),
    "t_fall": (0.27, 0.200, -0.21),
}
"""Dipole of each wavelet at its peak, mV, in a heart at rest. Amplitudes are those of a textbook ECG."""
WAVES = (*DIPOLE_MV, "ectopic_qrs", "ectopic_s", "ectopic_t")
P_WAVES = slice(0, 2)
QRS_WAVES = slice(2, 6)
T_WAVES = slice(6, 8)
POSITION_SHARE = ((P_WAVES, 0.4), (QRS_WAVES, 1.0), (T_WAVES, 0.6))
"""How far each part follows the heart's position: a sinus P stays upright in II with most QRS axes."""

QRS_CENTRE = (-0.27, 0.0, 0.23, 0.40)
QRS_WIDTH = (0.075, 0.105, 0.110, 0.085)
"""Centre against the R peak and SD of q, r, s and late, in QRS durations."""
QRS_ONSET = -0.44
T_CENTRE = (0.66, 0.78)
T_WIDTH = (0.085, 0.060)
"""Centre against the QRS onset and SD of the two T wavelets, in QT intervals."""
P_CENTRE = (0.31, 0.69)
P_WIDTH = 0.15
"""Centre against the P onset and SD of the two P lobes, in P durations."""
ECTOPIC_CENTRE_S = (0.0, 0.070, 0.300)
ECTOPIC_WIDTH_S = (0.028, 0.032, 0.055)
ECTOPIC_RATIO = (1.0, -0.45, -0.35)

BUNDLE_BRANCH_BLOCK_MS = 120.0
RIGHT_BLOCK_LATE_MV = (-0.50, -0.08, -0.55)
LEFT_BLOCK_LATE_MV = (0.60, 0.15, 0.50)
LEFT_BLOCK_Q_MV = (0.12, 0.06, 0.10)
LEFT_BLOCK_T_TURN_DEG = 110.0

MAX_BEATS = 48
SHORTEST_RR_S = 0.33
SINUS, FIBRILLATION, ECTOPIC = 0, 1, 2


@dataclass(frozen=True)
class Acquisition:
    """The recorder. Frequencies in Hz; None leaves a filter out; gain is the device's calibration error."""

    sampling_rate_hz: float = DEFAULT_SAMPLING_RATE_HZ
    high_pass_hz: float | None = None
    low_pass_hz: float | None = None
    mains_hz: float = 60.0
    noise_scale: float = 1.0
    amplitude_gain: float = 1.0

    @property
    def samples(self) -> int:
        """Samples in ten seconds."""
        return round(DURATION_S * self.sampling_rate_hz)


@dataclass(frozen=True)
class Anatomy:
    """What differs between bodies and is no sign of pressure; one entry an ECG, alike in a patient."""

    position_deg: FloatArray
    """(ecg, 3): turn of the heart in the frontal plane (positive: to the right), sideways, and forward."""
    lead_vectors: FloatArray
    """(ecg, independent lead, 3): habitus and electrode positions, overall gain included."""
    wave_gain: FloatArray
    """(ecg, p / s / late / t)"""
    block: NDArray[np.int64]
    """Kind of conduction delay where the QRS is wide: 0 left bundle branch, 1 right, 2 neither."""
    rr_variation: FloatArray
    """SD of the sinus RR interval as a share of its mean."""
    ectopic_share: FloatArray
    """Share of beats that are premature ventricular contractions; 0 in most patients."""
    ectopic_dipole_mv: FloatArray
    """(ecg, 3)"""
    wave_width: FloatArray
    """SD of the wavelets of P, QRS and T against what is usual in their intervals."""

    def take(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """The chosen ECGs, in the order given."""
        return replace(self, **{each.name: getattr(self, each.name)[chosen] for each in fields(self)})


def draw_anatomy(rng: np.random.Generator, circulation: Circulation, wave_width: float = 1.0) -> Anatomy:
    """Draw a body for each patient of `circulation` and repeat it for each of the patient's ECGs."""
    patient = circulation.patient - circulation.patient.min()
    patients = int(patient.max()) + 1
    frontal, azimuth, elevation = (rng.normal(0.0, sd, patients) for sd in (22.0, 18.0, 12.0))
    frontal -= 0.5 * (circulation.age_years[np.searchsorted(patient, np.arange(patients))] - REFERENCE_AGE_YEARS)
    gain = np.exp(rng.normal(0.0, 0.20, patients))
    lead_gain = np.repeat(gain[:, None], 8, axis=1)
    lead_gain[:, 2:] *= np.exp(rng.normal(0.0, 0.16, patients))[:, None]
    lead_vectors = LEAD_VECTORS * (1 + rng.normal(0.0, 0.10, (patients, 8, 3))) * lead_gain[:, :, None]
    direction = rng.standard_normal((patients, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    anatomy = Anatomy(
        position_deg=np.stack([np.clip(frontal, -70, 45), azimuth, elevation], axis=1),
        lead_vectors=lead_vectors,
        wave_gain=np.exp(rng.normal(0.0, (0.22, 0.30, 0.30, 0.30), (patients, 4))),
        block=rng.choice(3, patients, p=(0.40, 0.35, 0.25)),
        rr_variation=np.clip(0.022 * np.exp(rng.normal(0.0, 0.6, patients)), 0.003, 0.09),
        ectopic_share=np.where(rng.random(patients) < 0.12, rng.uniform(0.03, 0.20, patients), 0.0),
        ectopic_dipole_mv=1.5 * direction,
        wave_width=np.full(patients, wave_width),
    )
    return anatomy.take(patient)


def synthesise(
    rng: np.random.Generator,
    circulation: Circulation,
    anatomy: Anatomy,
    acquisition: Acquisition = Acquisition(),
    ecgs_at_a_time: int = 32,
) -> Signal:
    """(ecg, lead, time) float32, mV: 10 s in the order I, II, III, aVR, aVL, aVF, V1..V6.

    The same circulation and anatomy with another `rng` give a twin: same heart, other beats and noise.
    Memory beyond the result is bounded by `ecgs_at_a_time`. Raises HemoFedError below 100 Hz.
    """
    if acquisition.sampling_rate_hz < 100:
        raise HemoFedError(
            f"sampling rate {acquisition.sampling_rate_hz:g} Hz is too low for an ECG; use 100 Hz or more",
            ExitCode.USAGE,
        )
    signal = np.empty((len(circulation), 12, acquisition.samples), dtype=np.float32)
    for start in range(0, len(circulation), ecgs_at_a_time):
        part = slice(start, start + ecgs_at_a_time)
        independent = _independent_leads(rng, circulation.take(part), anatomy.take(part), acquisition)
        derive_leads(independent, signal[part])
    return signal


def derive_leads(independent: Signal, out: Signal) -> None:
    """Fill `out` (ecg, 12, time) from I, II, V1..V6 (ecg, 8, time), mV.

    Einthoven: III = II - I. Goldberger: aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2.
    """
    lead_i, lead_ii = independent[:, 0], independent[:, 1]
    half = np.float32(0.5)
    out[:, 0], out[:, 1], out[:, 6:] = lead_i, lead_ii, independent[:, 2:]
    np.subtract(lead_ii, lead_i, out=out[:, 2])
    np.multiply(lead_i + lead_ii, -half, out=out[:, 3])
    np.subtract(lead_i, lead_ii * half, out=out[:, 4])
    np.subtract(lead_ii, lead_i * half, out=out[:, 5])


def _independent_leads(
    rng: np.random.Generator, circulation: Circulation, anatomy: Anatomy, acquisition: Acquisition
) -> Signal:
    """(ecg, 8, time) float32, mV: beats, fibrillation, noise and the recorder's filter."""
    beat_time, beat_kind, beat_stretch = _draw_beats(rng, circulation, anatomy)
    centre, width = _wave_times(circulation, anatomy.wave_width)
    amplitude = _wave_amplitudes(circulation, anatomy).astype(np.float32)
    rate, samples = acquisition.sampling_rate_hz, acquisition.samples
    background = draw_background(
        rng, circulation.atrial_fibrillation, rate, samples, acquisition.mains_hz, acquisition.noise_scale
    )
    signal = background.muscle
    _compose(
        signal, rate, beat_time, beat_kind, beat_stretch, centre, width, amplitude,
        background.muscle_mv, background.waves, background.wave_mv,
    )  # fmt: skip
    add_electrode_artefacts(rng, signal, rate, acquisition.noise_scale)
    if acquisition.amplitude_gain != 1.0:
        signal *= np.float32(acquisition.amplitude_gain)
    return _device_filter(signal, acquisition)


def _draw_beats(
    rng: np.random.Generator, circulation: Circulation, anatomy: Anatomy
) -> tuple[FloatArray, NDArray[np.int64], FloatArray]:
    """(ecg, MAX_BEATS): time of each R peak in s, its kind, and the factor by which its QT is stretched."""
    count = len(circulation)
    mean_rr = _mean_rr_s(circulation)[:, None]
    fibrillation = circulation.atrial_fibrillation[:, None]
    beat = np.arange(MAX_BEATS)
    breathing = np.sin(2 * np.pi * (rng.random((count, 1)) + beat * mean_rr * rng.uniform(0.2, 0.3, (count, 1))))
    normal = rng.standard_normal((count, MAX_BEATS))
    sinus_rr = mean_rr * (1 + anatomy.rr_variation[:, None] * (breathing + 0.7 * normal))
    rr_spread = rng.uniform(0.16, 0.28, (count, 1))
    irregular_rr = mean_rr * np.exp(rr_spread * normal - 0.5 * rr_spread**2)
    rr = np.maximum(np.where(fibrillation, irregular_rr, sinus_rr), SHORTEST_RR_S)
    time = np.cumsum(rr, axis=1) - rr[:, :1] - mean_rr * (0.5 + rng.random((count, 1)))

    early = rng.random((count, MAX_BEATS)) < anatomy.ectopic_share[:, None]
    early[:, 0] = False
    early[:, 1:] &= ~early[:, :-1]
    # A premature beat leaves the next one on its old time: a full compensatory pause.
    time[:, 1:] -= np.where(early[:, 1:], 0.35 * np.diff(time, axis=1), 0.0)
    kind = np.where(early, ECTOPIC, np.where(fibrillation, FIBRILLATION, SINUS))
    previous_rr = np.diff(time, axis=1, prepend=time[:, :1] - mean_rr)
    stretch = np.sqrt(np.clip(0.7 + 0.3 * previous_rr / mean_rr, 0.5, 1.3))
    return time, kind.astype(np.int64), stretch


def _mean_rr_s(circulation: Circulation) -> FloatArray:
    return 60.0 / np.clip(circulation.feature("heart_rate"), 42.0, 150.0)


def _wave_times(circulation: Circulation, wave_width: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centre against the R peak and SD of each wavelet, s: (ecg, wave)."""
    qrs_s = np.clip(circulation.feature("qrs_duration"), 62.0, 200.0)[:, None] / 1000
    qt_s = np.clip(circulation.feature("qtc"), 340.0, 560.0)[:, None] / 1000 * np.sqrt(_mean_rr_s(circulation))[:, None]
    p_s = np.clip(circulation.feature("p_duration"), 60.0, 180.0)[:, None] / 1000
    pr_s = np.maximum(np.clip(circulation.pr_interval_ms, 110.0, 300.0)[:, None] / 1000, p_s + 0.012)
    ectopic = np.ones_like(qrs_s)
    onset = QRS_ONSET * qrs_s
    centre = [
        onset - pr_s + p_s * np.array(P_CENTRE),
        qrs_s * np.array(QRS_CENTRE),
        onset + qt_s * np.array(T_CENTRE),
        ectopic * np.array(ECTOPIC_CENTRE_S),
    ]
    width = [
        wave_width[:, None] * p_s * np.array([P_WIDTH, P_WIDTH]),
        wave_width[:, None] * qrs_s * np.array(QRS_WIDTH),
        wave_width[:, None] * qt_s * np.array(T_WIDTH),
        ectopic * np.array(ECTOPIC_WIDTH_S),
    ]
    return np.concatenate(centre, axis=1), np.concatenate(width, axis=1)


def _wave_amplitudes(circulation: Circulation, anatomy: Anatomy) -> FloatArray:
    """(ecg, independent lead, wave), mV at the peak of each wavelet."""
    count = len(circulation)
    dipole = np.repeat(np.array(list(DIPOLE_MV.values()))[None], count, axis=0)  # (ecg, wave, 3)
    wide = circulation.feature("qrs_duration") >= BUNDLE_BRANCH_BLOCK_MS
    left, right = wide & (anatomy.block == 0), wide & (anatomy.block == 1)
    dipole[left, 2], dipole[left, 5], dipole[right, 5] = (
        LEFT_BLOCK_Q_MV,
        LEFT_BLOCK_LATE_MV,
        RIGHT_BLOCK_LATE_MV,
    )
    dipole[:, 4, :] *= anatomy.wave_gain[:, 1, None]
    dipole[:, 5, :] *= anatomy.wave_gain[:, 2, None]
    dipole[:, QRS_WAVES] *= np.exp(circulation.feature("log_qrs_voltage"))[:, None, None]
    turn = circulation.feature("qrs_t_rotation") + np.where(left, LEFT_BLOCK_T_TURN_DEG, 0.0)
    t_rotation = Rotation.from_euler("y", turn[:, None], degrees=True).as_matrix()
    dipole[:, T_WAVES] = np.einsum("nij,nwj->nwi", t_rotation, dipole[:, T_WAVES])
    dipole[:, T_WAVES] *= anatomy.wave_gain[:, 3, None, None]
    for waves, share in POSITION_SHARE:
        position = Rotation.from_euler("zyx", share * anatomy.position_deg, degrees=True).as_matrix()
        dipole[:, waves] = np.einsum("nij,nwj->nwi", position, dipole[:, waves])

    # The left atrial lobe is set in V1, after the heart has turned: P terminal force is measured there.
    v1 = LEAD_VECTORS[2]
    lacking = -circulation.feature("p_terminal_v1") - dipole[:, 1] @ v1
    dipole[:, 1] += lacking[:, None] * v1 / (v1 @ v1)
    dipole[:, 0] *= anatomy.wave_gain[:, 0, None]
    ectopic = np.array(ECTOPIC_RATIO)[None, :, None] * anatomy.ectopic_dipole_mv[:, None, :]
    projected: FloatArray = np.einsum("nlj,nwj->nlw", anatomy.lead_vectors, np.concatenate([dipole, ectopic], axis=1))
    return projected


def _device_filter(signal: Signal, acquisition: Acquisition) -> Signal:
    """The recorder's causal filters, at rest on the mean level: high pass of order 1, low pass of order 2."""
    rate = acquisition.sampling_rate_hz
    sections = []
    if acquisition.high_pass_hz:
        sections.append(scipy_signal.butter(1, acquisition.high_pass_hz, "highpass", fs=rate, output="sos"))
    # Above 0.45 of the rate the recorder's anti-aliasing filter has done this already.
    if acquisition.low_pass_hz and acquisition.low_pass_hz < 0.45 * rate:
        sections.append(scipy_signal.butter(2, acquisition.low_pass_hz, "lowpass", fs=rate, output="sos"))
    if not sections:
        return signal
    cascade = np.concatenate(sections)
    level = signal.mean(axis=-1, dtype=np.float64)
    start = scipy_signal.sosfilt_zi(cascade)[:, None, None, :] * level[None, :, :, None]
    filtered, _ = scipy_signal.sosfilt(cascade, signal, axis=-1, zi=start)
    return np.asarray(filtered, dtype=np.float32)


@numba.njit(cache=True)
def _compose(  # type: ignore[no-untyped-def]
    signal, rate_hz, beat_time, beat_kind, beat_stretch, centre, width, amplitude, muscle_mv, waves, wave_mv
):  # fmt: skip
    """Turn white noise (ecg, 8, time) into ECGs, in place: scale it, add slow waves, then each wavelet.

    A wavelet is evaluated within 4 SD of its centre only, where all but 0.03% of its peak lies.
    """
    ecgs, leads, samples = signal.shape
    for n in range(ecgs):
        for lead in range(leads):
            trace = signal[n, lead]
            trace *= muscle_mv[n, lead]
            for k in range(waves.shape[1]):
                level = wave_mv[n, lead, k]
                if level != 0.0:
                    trace += level * waves[n, k]
        for beat in range(beat_time.shape[1]):
            kind = beat_kind[n, beat]
            first, last = (8, 11) if kind == 2 else ((2, 8) if kind == 1 else (0, 8))
            for wave in range(first, last):
                stretch = beat_stretch[n, beat] if 6 <= wave < 8 else 1.0
                middle = beat_time[n, beat] + centre[n, wave] * stretch
                sd = width[n, wave] * stretch
                begin = max(0, int(np.ceil((middle - 4 * sd) * rate_hz)))
                end = min(samples, int(np.floor((middle + 4 * sd) * rate_hz)) + 1)
                for t in range(begin, end):
                    offset = (t / rate_hz - middle) / sd
                    bell = np.float32(np.exp(-0.5 * offset * offset))
                    for lead in range(leads):
                        signal[n, lead, t] += amplitude[n, lead, wave] * bell
