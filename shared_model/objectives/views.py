"""How a batch of ECGs becomes the rows that are embedded: as they are, or changed as recordings differ."""

from collections.abc import Callable

import torch
from torch import Tensor

CROP_SHARE = 0.9  # 9 of 10 s
GAIN_RANGE = 0.1  # calibration and body habitus: +-10%
NOISE_MV = 0.01  # of the order of an electrocardiograph's own noise (IEC 60601-2-25 allows 0.03 mV peak to valley)


def as_is(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG001
    """One view, unchanged: distance mining compares whole ECGs of different patients."""
    return (signals,)


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


def augment(signals: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, gain and noise for supervised training: (batch, 12, 2500) mV -> (batch, 12, 2250) mV."""
    return random_noise(random_gain(random_crop(signals, generator), generator), generator)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


View = Callable[[Tensor, torch.Generator], tuple[Tensor, ...]]
VIEWS: dict[str, View] = {"as_is": as_is}
