"""How one heart's ECG differs from one recording to the next: changes that leave what it says about the heart.

Every function takes signals (batch, 12, time) float32, mV, 250 Hz, 0 where missing, and draws from a generator,
so that a CPU generator gives the same on every device. Interference is added on the eight independent leads and
derived for the rest, so that Einthoven's and Goldberger's equations hold for what is added; rotation likewise.
What is missing stays exactly 0: a lead, or a stretch of GAP_SAMPLES zeros.
"""

import math

import torch
from torch import Tensor

from shared_model.leads import INDEPENDENT_LEADS, LEAD_VECTORS, LEADS, SAMPLING_RATE_HZ

CROP_SHARE = 0.9  # 9 of 10 s
GAIN_RANGE = 0.1  # calibration and body habitus: +-10%
NOISE_MV = 0.01  # of the order of an electrocardiograph's own noise (IEC 60601-2-25 allows 0.03 mV peak to valley)
WANDER_MV = 0.15  # breathing and electrode drift reach 15% of a QRS of 1 mV (Friesen 1990, doi:10.1109/10.43620)
WANDER_HZ = (0.05, 0.5)  # from the high pass of a diagnostic ECG (Kligfield 2007) to 30 breaths a minute
WANDER_SINES = 3  # enough for no two to look alike
HUM_MV = 0.02  # what is left behind a recorder's notch filter: visible on paper as a thick line (0.2 mm)
HUM_HZ = (50.0, 60.0)
ROTATION_DEG = 8.0  # breathing, posture and electrode placement; a new axis deviation would be another ECG
DROP_SHARE = 0.1  # one lead of twelve, on average
WARP_SHARE = 0.1  # speed of time within +-10%: what breathing does to a sinus rhythm
WARP_WAVES = 3  # half periods of 10, 5 and 3.3 s in 10 s: rates change over breaths, not within a beat
STRONG_CROP_SHARE = 0.5  # 5 s holds several beats, and two views of one ECG overlap by chance only
GAP_SAMPLES = 25  # 100 ms of exact zeros is no heart; single zeros are signal

INDEPENDENT = [LEADS.index(lead) for lead in INDEPENDENT_LEADS]
# Rows in the order of LEADS, columns I, II, V1..V6. Einthoven and Goldberger (Kligfield et al., Circulation 2007).
FROM_INDEPENDENT = torch.zeros(12, 8)
FROM_INDEPENDENT[INDEPENDENT, range(8)] = 1.0
FROM_INDEPENDENT[2:6, :2] = torch.tensor([[-1.0, 1.0], [-0.5, -0.5], [1.0, -0.5], [-0.5, 1.0]])  # III, aVR, aVL, aVF
DOWER = torch.from_numpy(LEAD_VECTORS).float()
# Least squares from the eight leads to the dipole: Edenbrandt and Pahlm, J Electrocardiol 1988;21:361.
INVERSE_DOWER = torch.linalg.pinv(DOWER)


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
    return torch.where(signals != 0, signals + scale_mv * noise, signals)


def electrode_noise(signals: Tensor, generator: torch.Generator, scale_mv: float = NOISE_MV) -> Tensor:
    """White Gaussian noise with SD `scale_mv` in each independent lead, and by Einthoven up to 1.4 times that in a
    derived one."""
    return _mixed(signals, present_samples(signals), _noise(signals, generator, scale_mv))


def baseline_wander(signals: Tensor, generator: torch.Generator, scale_mv: float = WANDER_MV) -> Tensor:
    """Slow drift: sines of WANDER_HZ, in step in all leads, of which each has its own share and sign.

    At most `scale_mv` in an independent lead and, by Einthoven, twice that in a derived one.
    """
    return _mixed(signals, present_samples(signals), _wander(signals, generator, scale_mv))


def mains_hum(signals: Tensor, generator: torch.Generator, scale_mv: float = HUM_MV) -> Tensor:
    """A sine of 50 or 60 Hz, at most `scale_mv` in an independent lead and twice that in a derived one."""
    return _mixed(signals, present_samples(signals), _hum(signals, generator, scale_mv))


def vcg_rotation(signals: Tensor, generator: torch.Generator, max_deg: float = ROTATION_DEG) -> Tensor:
    """The heart's dipole turned by up to `max_deg` degrees about a random axis (after 3KG: Gopal et al. 2021,
    arXiv:2106.04452).

    The dipole is the inverse Dower transform of the eight independent leads. Only what the turn changes is added,
    so that what no dipole explains is kept. An ECG with a gap in one of the eight stays as it is.
    """
    return rotate_vcg(signals, *_draw_turn(signals, generator, max_deg))


def rotate_vcg(signals: Tensor, axis: Tensor, angle_deg: Tensor) -> Tensor:
    """Turn each ECG's dipole by angle_deg (batch,) about axis (batch, 3), of any length, right-handed in x left,
    y down, z back; see `vcg_rotation`."""
    there = present_samples(signals)
    return _mixed(signals, there, _turn(signals, there, axis, angle_deg))


def lead_dropout(signals: Tensor, generator: torch.Generator, share: float = DROP_SHARE) -> Tensor:
    """Each lead missing (0) with probability `share`, but never all that an ECG has.

    Leads are drawn one by one. A loose limb electrode takes several with it, which is not imitated: to learn to do
    without a lead, any pattern will do.
    """
    there = signals.abs().amax(2) > 0  # (batch, lead)
    draw = _uniform(there.shape, generator, signals.device)
    keep = draw >= share
    last = torch.where(there, draw, -1.0).argmax(1, keepdim=True)  # of the leads that are there the last to go
    return signals * keep.scatter(1, last, True)[:, :, None].float()


def time_warp(signals: Tensor, generator: torch.Generator, share: float = WARP_SHARE) -> Tensor:
    """Time that runs faster and slower by at most `share`, smoothly, alike in all leads; both ends stay in place.

    Linear interpolation; a gap moves along, and its edge may lie between two samples.
    """
    batch, leads, time = signals.shape
    source = warped_times(time, batch, generator, share).to(signals.device)  # (batch, time), samples
    before = source.floor().clamp(0, time - 2)
    weight = (source - before)[:, None]
    index = before.long()[:, None].expand(batch, leads, time)
    left, right = signals.gather(2, index), signals.gather(2, index + 1)
    return torch.lerp(left, right, weight)


def warped_times(time: int, batch: int, generator: torch.Generator, share: float = WARP_SHARE) -> Tensor:
    """Where each sample is taken from, (batch, time) in samples: t + sum over k of c_k sin(pi k t / T).

    Its slope is 1 + sum of c_k (pi k / T) cos(...), within 1 +- `share` because |c_k| <= share T / (pi k K).
    """
    draw = 2 * _uniform((batch, WARP_WAVES), generator, generator.device) - 1
    k = torch.arange(1, WARP_WAVES + 1, device=generator.device)
    last = time - 1
    size = draw * share * last / (math.pi * k * WARP_WAVES)  # (batch, wave)
    t = torch.arange(time, device=generator.device)
    return t + size @ torch.sin(math.pi / last * k[:, None] * t)


def augment(signals: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, gain and noise for supervised training: (batch, 12, 2500) mV -> (batch, 12, 2250) mV."""
    return random_noise(random_gain(random_crop(signals, generator), generator), generator)


def strong_augment(signals: Tensor, generator: torch.Generator) -> Tensor:
    """A crop, disturbed, for two views of one ECG (SimCLR; Chen et al. 2020, arXiv:2002.05709): (batch, 12, 2500) mV ->
    (batch, 12, 1250) mV."""
    return disturb(random_crop(signals, generator, STRONG_CROP_SHARE), generator)  # cropped first: the rest costs half


def disturb(signals: Tensor, generator: torch.Generator) -> Tensor:
    """All that differs between two recordings but the time they begin: (batch, 12, time) mV, the same shape. In the
    order in which it happens: heart, then body, then recorder, then archive."""
    views = time_warp(signals, generator)
    there = present_samples(views)
    turn = _turn(views, there, *_draw_turn(views, generator, ROTATION_DEG))
    wander, hum = _wander(views, generator, WANDER_MV), _hum(views, generator, HUM_MV)
    views = _mixed(views, there, turn, wander, hum, _noise(views, generator, NOISE_MV))
    return lead_dropout(random_gain(views, generator), generator)


def present_samples(signals: Tensor) -> Tensor:
    """(batch, lead, time) bool, False for exact zeros in or beside a block of GAP_SAMPLES that is all zero.

    Gaps of twice GAP_SAMPLES are found whatever their place; single zeros within a trace are signal.
    """
    moving = signals != 0
    batch, leads, time = signals.shape
    padded = torch.nn.functional.pad(moving, (0, -time % GAP_SAMPLES))
    blocks = padded.reshape(batch, leads, -1, GAP_SAMPLES)
    block = blocks.any(3)
    before = torch.nn.functional.pad(block[:, :, :-1], (1, 0), value=True)
    after = torch.nn.functional.pad(block[:, :, 1:], (0, 1), value=True)
    signal = (block & before & after)[:, :, :, None]
    there: Tensor = (blocks | signal).flatten(2)[:, :, :time]
    return there


Part = tuple[Tensor, Tensor]
"""What is added: sources (batch, source, time) mV and how much of each enters a lead (batch, 12, source)."""


def _mixed(signals: Tensor, there: Tensor, *parts: Part) -> Tensor:
    """signals + the sum of mixing @ sources, where there is a signal; one product, whatever the number of parts."""
    mixing, sources = (torch.cat(both, dim) for both, dim in zip(zip(*parts, strict=True), (2, 1), strict=True))
    return torch.where(there, torch.baddbmm(signals, mixing, sources), 0.0)


def _noise(signals: Tensor, generator: torch.Generator, scale_mv: float) -> Part:
    shape = (len(signals), len(INDEPENDENT), signals.shape[2])
    noise = torch.randn(shape, generator=generator, device=generator.device).to(signals.device)
    return scale_mv * FROM_INDEPENDENT.to(signals.device).expand(len(signals), -1, -1), noise


def _wander(signals: Tensor, generator: torch.Generator, scale_mv: float) -> Part:
    draw = _uniform((len(signals), WANDER_SINES), generator, signals.device)
    return _sines(signals, generator, WANDER_HZ[0] + (WANDER_HZ[1] - WANDER_HZ[0]) * draw, scale_mv)


def _hum(signals: Tensor, generator: torch.Generator, scale_mv: float) -> Part:
    american = _uniform((len(signals), 1), generator, signals.device) < 0.5
    return _sines(signals, generator, torch.where(american, HUM_HZ[1], HUM_HZ[0]), scale_mv)


def _sines(signals: Tensor, generator: torch.Generator, frequency_hz: Tensor, scale_mv: float) -> Part:
    """Sines of frequency_hz (batch, sine), together at most `scale_mv` in an independent lead."""
    batch, sines = frequency_hz.shape
    size = scale_mv / sines * (2 * _uniform((batch, len(INDEPENDENT), sines), generator, signals.device) - 1)
    phase = 2 * math.pi * _uniform((batch, sines, 1), generator, signals.device)
    t_s = torch.arange(signals.shape[2], device=signals.device) / SAMPLING_RATE_HZ
    waves = torch.sin(2 * math.pi * frequency_hz[:, :, None] * t_s + phase)  # (batch, sine, time)
    return FROM_INDEPENDENT.to(signals.device) @ size, waves


def _draw_turn(signals: Tensor, generator: torch.Generator, max_deg: float) -> tuple[Tensor, Tensor]:
    axis = torch.randn((len(signals), 3), generator=generator, device=generator.device).to(signals.device)
    return axis, max_deg * (2 * _uniform((len(signals),), generator, signals.device) - 1)


def _turn(signals: Tensor, there: Tensor, axis: Tensor, angle_deg: Tensor) -> Part:
    """What turning the dipole changes; nothing where one of the eight leads has a gap."""
    device = signals.device
    whole = there.all(2)[:, INDEPENDENT].all(1)
    change = _rotation(axis, angle_deg * whole) - torch.eye(3, device=device)  # (batch, 3, 3)
    to_leads = FROM_INDEPENDENT.to(device) @ DOWER.to(device)  # (12, 3)
    return to_leads @ change @ INVERSE_DOWER.to(device), signals[:, INDEPENDENT]  # (batch, 12, 8), (batch, 8, time)


def _rotation(axis: Tensor, angle_deg: Tensor) -> Tensor:
    """Rodrigues' formula: (batch, 3), (batch,) -> (batch, 3, 3)."""
    x, y, z = torch.nn.functional.normalize(axis, dim=1).unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
    angle = torch.deg2rad(angle_deg)[:, None, None]
    return torch.eye(3, device=axis.device) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
