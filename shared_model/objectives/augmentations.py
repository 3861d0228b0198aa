"""Ways in which two recordings of one heart differ: gain, noise, wander, mains, electrode placement, lost leads, rate.

All take (batch, 12, time) float32, mV, 250 Hz, 0 where missing, and draw from the generator on its own device, so
that a CPU generator gives the same everywhere. A sample that is exactly 0 is missing and stays 0. What an electrode
picks up is added on its leads so that Einthoven's and Goldberger's laws still hold between the limb leads."""

import math

import torch
from torch import Tensor

from shared_model.leads import LEADS, SAMPLING_RATE_HZ

CROP_SHARE = 0.9  # 9 of 10 s
GAIN_RANGE = 0.1  # calibration and body habitus: +-10%
NOISE_MV = 0.01  # of the order of an electrocardiograph's own noise (IEC 60601-2-25 allows 0.03 mV peak to valley)
STRONG_GAIN_RANGE = 0.2
STRONG_NOISE_MV = 0.03  # muscle of a patient at rest
WANDER_HZ = (0.05, 0.5)  # breathing and electrode drift, below the heart rate
WANDER_MV = 0.15
WANDER_SINES = 3
MAINS_HZ = (50.0, 60.0)
MAINS_MV = 0.03
ROTATION_DEGREES = 10.0  # posture and breathing turn the heart's axis by about this much
DROPOUT_LEADS = 3
DROPOUT_SHARE = 0.5  # of ECGs that lose leads at all
WARP_RANGE = 0.1

# Electrode potentials to leads: columns RA, LA, LL, V1 to V6. A disturbance at an electrode reaches all of its leads.
_RA, _LA, _LL = 0, 1, 2
_LIMB = {
    "I": (-1.0, 1.0, 0.0),
    "II": (-1.0, 0.0, 1.0),
    "III": (0.0, -1.0, 1.0),
    "aVR": (1.0, -0.5, -0.5),
    "aVL": (-0.5, 1.0, -0.5),
    "aVF": (-0.5, -0.5, 1.0),
}
ELECTRODES = 9


def _electrodes_to_leads() -> Tensor:
    matrix = torch.zeros(len(LEADS), ELECTRODES)
    for row, lead in enumerate(LEADS):
        if lead in _LIMB:
            matrix[row, :3] = torch.tensor(_LIMB[lead])
        else:
            matrix[row, :3] = -1 / 3  # Wilson's central terminal
            matrix[row, 2 + int(lead[1])] = 1.0
    return matrix


LEAD_FIELD = _electrodes_to_leads()
# Dower's matrix (Dower et al. 1980, doi:10.1016/S0022-0736(80)80046-X, as in Edenbrandt and Pahlm 1988): X, Y, Z to the
# eight independent leads.
DOWER = {
    "I": (0.632, -0.235, 0.059),
    "II": (0.235, 1.066, -0.132),
    "V1": (-0.515, 0.157, -0.917),
    "V2": (0.044, 0.164, -1.387),
    "V3": (0.882, 0.098, -1.277),
    "V4": (1.213, 0.127, -0.601),
    "V5": (1.125, 0.127, -0.086),
    "V6": (0.831, 0.076, 0.230),
}


def _dower_to_twelve() -> Tensor:
    one, two = (torch.tensor(DOWER[lead]) for lead in ("I", "II"))
    derived = {
        "III": two - one,
        "aVR": -(one + two) / 2,
        "aVL": one - two / 2,
        "aVF": two - one / 2,
    }
    return torch.stack([torch.tensor(DOWER[lead]) if lead in DOWER else derived[lead] for lead in LEADS])


FROM_VECTOR = _dower_to_twelve()  # (12, 3)
INDEPENDENT = [LEADS.index(lead) for lead in DOWER]
TO_VECTOR = torch.linalg.pinv(FROM_VECTOR[INDEPENDENT])  # (3, 8): least squares, so that a dipole comes back exactly


def random_crop(signals: Tensor, generator: torch.Generator, share: float = CROP_SHARE) -> Tensor:
    """A window of `share` of the time at a random start, drawn for each ECG: (batch, lead, share * time)."""
    batch, leads, time = signals.shape
    length = int(time * share)
    start = _uniform((batch, 1, 1), generator, signals.device)
    index = (start * (time - length + 1)).long() + torch.arange(length, device=signals.device)
    return signals.gather(2, index.expand(batch, leads, length))


def random_gain(signals: Tensor, generator: torch.Generator, share: float = GAIN_RANGE) -> Tensor:
    """One factor in 1 +- `share` for each ECG, the same for all its leads, so that Einthoven's law holds."""
    draw = _uniform((len(signals), 1, 1), generator, signals.device)
    return signals * (1 + share * (2 * draw - 1))


def random_noise(signals: Tensor, generator: torch.Generator, scale_mv: float = NOISE_MV) -> Tensor:
    """White Gaussian noise with SD `scale_mv`; samples that are exactly 0 are missing and stay so."""
    noise = torch.randn(signals.shape, generator=generator, device=generator.device).to(signals.device)
    return signals + scale_mv * noise * (signals != 0)


def baseline_wander(signals: Tensor, generator: torch.Generator, largest_mv: float = WANDER_MV) -> Tensor:
    """Three slow sines of 0.05 to 0.5 Hz, each of its own size and phase at each electrode, together at most
    `largest_mv` there."""
    batch, (low, high) = len(signals), WANDER_HZ
    frequency_hz = low + (high - low) * _uniform((batch, WANDER_SINES, 1), generator, signals.device)
    size_mv = largest_mv / WANDER_SINES * _uniform((batch, ELECTRODES, WANDER_SINES), generator, signals.device)
    phase = 2 * math.pi * _uniform((batch, ELECTRODES, WANDER_SINES), generator, signals.device)
    angle = 2 * math.pi * frequency_hz * _seconds(signals)  # (batch, sine, time)
    # sin(angle + phase) by the addition theorem: a small product in place of a sine for every electrode and sample.
    wave = (size_mv * phase.cos()) @ angle.sin() + (size_mv * phase.sin()) @ angle.cos()
    return _at_electrodes(signals, wave)


def mains_hum(signals: Tensor, generator: torch.Generator, largest_mv: float = MAINS_MV) -> Tensor:
    """Hum of 50 or 60 Hz in phase at all electrodes of an ECG, at most `largest_mv` at each, uniform from 0."""
    which = (2 * _uniform((len(signals), 1), generator, signals.device)).long()
    frequency_hz = torch.tensor(MAINS_HZ, device=signals.device)[which]
    phase = 2 * math.pi * _uniform((len(signals), 1), generator, signals.device)
    amplitude_mv = largest_mv * _uniform((len(signals), ELECTRODES, 1), generator, signals.device)
    wave = (2 * math.pi * frequency_hz * _seconds(signals) + phase).sin()
    return _at_electrodes(signals, amplitude_mv * wave[:, None])


def vcg_rotation(signals: Tensor, generator: torch.Generator, largest_degrees: float = ROTATION_DEGREES) -> Tensor:
    """The heart turned by up to `largest_degrees` about each axis of the vectorcardiogram (3KG: Gopal et al. 2021,
    arXiv:2106.04452).

    The vector is estimated by Dower's matrix; what turning it changes is added to the ECG, so that what no dipole
    explains stays as it is. A missing lead counts as 0 in the estimate, and stays missing."""
    angles = math.radians(largest_degrees) * (2 * _uniform((len(signals), 3), generator, signals.device) - 1)
    turned = _rotations(angles) - torch.eye(3, device=signals.device)
    to_vector, from_vector = TO_VECTOR.to(signals.device), FROM_VECTOR.to(signals.device)
    mixing = from_vector @ turned @ to_vector  # (batch, 12, 8)
    changed: Tensor = (mixing @ signals[:, INDEPENDENT]) * (signals != 0)
    return signals + changed


def lead_dropout(signals: Tensor, generator: torch.Generator, most: int = DROPOUT_LEADS) -> Tensor:
    """In half of the ECGs one to `most` leads become 0, that is missing; never all that are there.

    Each lead is lost for itself, as when a channel is not exported: a lost electrode would take several limb leads.
    """
    batch, leads = len(signals), signals.shape[1]
    loses = _uniform((batch, 1), generator, signals.device) < DROPOUT_SHARE
    count = 1 + (most * _uniform((batch, 1), generator, signals.device)).long()
    rank = _uniform((batch, leads), generator, signals.device).argsort(1).argsort(1)
    lost = loses & (rank < count)
    there = (signals != 0).any(-1)
    lost &= (there & ~lost).any(1, keepdim=True)
    return signals * ~lost[..., None]


def time_warp(signals: Tensor, generator: torch.Generator, largest: float = WARP_RANGE) -> Tensor:
    """Time runs faster or slower by up to `largest`, changing smoothly over the ECG; length and rate stay.

    The local speed is 1 + largest * (a + b sin(one slow turn)) / 2, with a and b uniform in +-1; what lies before the
    middle moves away from or towards it. Values between samples are linear; past the ends the last sample is kept.
    """
    batch, leads, time = signals.shape
    constant, swing, phase = (2 * _uniform((3, batch, 1), generator, signals.device) - 1).unbind(0)
    place = torch.linspace(-1, 1, time, device=signals.device)
    speed = 1 + largest * (constant + swing * (math.pi * (place + phase)).sin()) / 2
    warped = speed.cumsum(1)
    source = (warped - warped[:, time // 2, None] + time // 2).clamp(0, time - 1)
    left = source.floor().long().clamp(max=time - 2)
    share = (source - left)[:, None]
    index = left[:, None].expand(batch, leads, time)
    before, after = signals.gather(2, index), signals.gather(2, index + 1)
    return torch.where((before == 0) | (after == 0), 0.0, before + share * (after - before))


def augment(signals: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, gain and noise for supervised training: (batch, 12, 2500) mV -> (batch, 12, 2250) mV."""
    return random_noise(random_gain(random_crop(signals, generator), generator), generator)


def strong_augment(signals: Tensor, generator: torch.Generator) -> Tensor:
    """All of the above, as SimCLR and its kin use them: (batch, 12, time) mV, the same shape."""
    signals = vcg_rotation(time_warp(signals, generator), generator)
    signals = random_gain(signals, generator, STRONG_GAIN_RANGE)
    signals = mains_hum(baseline_wander(signals, generator), generator)
    return lead_dropout(random_noise(signals, generator, STRONG_NOISE_MV), generator)


def _at_electrodes(signals: Tensor, disturbance_mv: Tensor) -> Tensor:
    """Add (batch, 9, time) mV at the electrodes to the leads they make."""
    return signals + (LEAD_FIELD.to(signals.device) @ disturbance_mv) * (signals != 0)


def _rotations(angles: Tensor) -> Tensor:
    """Rotation matrices about x, then y, then z: (batch, 3) radians -> (batch, 3, 3)."""
    generators = torch.zeros(3, 3, 3, device=angles.device)
    generators[0, 1, 2], generators[0, 2, 1] = -1, 1
    generators[1, 2, 0], generators[1, 0, 2] = -1, 1
    generators[2, 0, 1], generators[2, 1, 0] = -1, 1
    about = [torch.linalg.matrix_exp(angles[:, axis, None, None] * generators[axis]) for axis in range(3)]
    turned: Tensor = about[2] @ about[1] @ about[0]
    return turned


def _seconds(signals: Tensor) -> Tensor:
    return torch.arange(signals.shape[-1], device=signals.device) / SAMPLING_RATE_HZ


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
