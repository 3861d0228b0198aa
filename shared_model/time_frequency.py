"""TF-C's networks and loss: an ECG and its spectrum should land in one place (Zhang et al., NeurIPS 2022,
arXiv:2206.08496).

Written from the paper's text. The two encoders are our residual networks in place of the paper's; the spectrum is the
logarithm of each lead's magnitude up to 50 Hz.
"""

import torch
from torch import Tensor, nn

from shared_model.encoder import Encoder, EncoderSettings
from shared_model.leads import SAMPLING_RATE_HZ
from shared_model.objectives.contrastive import info_nce
from shared_model.objectives.losses import Diagnostics

HIGHEST_HZ = 50.0  # mains lies at and above it, and little of a QRS
SPECTRUM_SAMPLES = 500  # what 10 s give: shorter ECGs are brought to it, so that one place is one frequency
CHANGED_SHARE = 0.1  # of the frequencies, in the augmented spectrum: the paper changes a few
ADDED_SHARE = 0.1  # of the largest component
PROJECTION_DIM = 128


class TimeFrequencyEncoder(nn.Module):
    """Two encoders of half the embedding each: (batch, 12, time) mV -> (batch, embedding_dim)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        half = settings.embedding_dim // 2
        self.time = Encoder(settings.model_copy(update={"embedding_dim": settings.embedding_dim - half}))
        self.frequency = Encoder(settings.model_copy(update={"embedding_dim": half}))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time) float32, mV, 250 Hz, 0 where missing -> (batch, embedding_dim): time, then frequency."""
        return torch.cat([self.time(x), self.frequency(spectrum(x))], 1)


class TimeFrequencyProjectors(nn.Module):
    """From each domain's embedding into the space that both share; thrown away after pretraining."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        half = settings.embedding_dim // 2
        self.time = _projector(settings.embedding_dim - half)
        self.frequency = _projector(half)


def _projector(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, PROJECTION_DIM), nn.ReLU(), nn.Linear(PROJECTION_DIM, PROJECTION_DIM))


def spectrum(x: Tensor) -> Tensor:
    """log(1 + magnitude) of each lead from 0 to 50 Hz: (batch, 12, time) mV -> (batch, 12, 500), 0 where a lead is
    missing. The magnitude is that of a sine of 1 mV times ten, which brings a QRS to about 1."""
    with torch.autocast(x.device.type, enabled=False):
        magnitude = torch.fft.rfft(x.float(), dim=-1).abs() * (20.0 / x.shape[-1])
    kept = round(magnitude.shape[-1] * HIGHEST_HZ / (SAMPLING_RATE_HZ / 2))
    magnitude = magnitude[..., :kept]
    if kept != SPECTRUM_SAMPLES:
        magnitude = nn.functional.interpolate(magnitude, SPECTRUM_SAMPLES, mode="linear", align_corners=False)
    logarithm: Tensor = magnitude.log1p()
    return logarithm


def augmented_spectrum(spectra: Tensor, generator: torch.Generator) -> Tensor:
    """Some components removed, and some raised to a share of the lead's largest (the paper's section 4.2)."""
    draw = torch.rand(spectra.shape, generator=generator, device=generator.device).to(spectra.device)
    raised = ADDED_SHARE * spectra.amax(-1, keepdim=True) * (draw > 1 - CHANGED_SHARE)
    return torch.maximum(spectra * (draw >= CHANGED_SHARE), raised)


def tf_c_loss(
    encoder: nn.Module,
    projectors: nn.Module,
    signals: Tensor,
    augmented: Tensor,
    generator: torch.Generator,
    temperature: float = 0.2,
    consistency_weight: float = 0.2,
    consistency_margin: float = 1.0,
) -> tuple[Tensor, Diagnostics]:
    """lambda (L_T + L_F) + (1 - lambda) L_C: contrast within time and within frequency, and consistency between them.

    L_C is the mean of max(0, S(z_T, z_F) - S(pair) + delta) over the three pairs with an augmented side, S the NT-Xent
    loss of a pair of views: time and spectrum of one ECG should lie nearer than their augmentations. Negatives are the
    batch's other ECGs.

    Args:
        encoder: a TimeFrequencyEncoder.
        projectors: TimeFrequencyProjectors.
        signals, augmented: (batch, 12, time) mV.
        temperature, consistency_weight, consistency_margin: tau, lambda and delta of the paper.
    """
    spectra = spectrum(signals)
    changed = augmented_spectrum(spectra, generator)
    time, time_2 = encoder.time(torch.cat([signals, augmented])).float().chunk(2)  # type: ignore[operator]
    frequency, frequency_2 = encoder.frequency(torch.cat([spectra, changed])).float().chunk(2)  # type: ignore[operator]
    z_time, z_time_2 = projectors.time(torch.cat([time, time_2])).float().chunk(2)  # type: ignore[operator]
    z_frequency, z_frequency_2 = (
        projectors.frequency(  # type: ignore[operator]
            torch.cat([frequency, frequency_2])
        )
        .float()
        .chunk(2)
    )
    with torch.autocast(signals.device.type, enabled=False):  # bfloat16 has two digits: too few for near cosines
        in_time, seen = two_views(time, time_2, temperature)
        in_frequency, _ = two_views(frequency, frequency_2, temperature)
        between, _ = two_views(z_time, z_frequency, temperature)
        pairs = ((z_time, z_frequency_2), (z_time_2, z_frequency), (z_time_2, z_frequency_2))
        apart = [(between - two_views(*pair, temperature)[0] + consistency_margin).relu() for pair in pairs]
    consistency = torch.stack(apart).mean()
    loss = consistency_weight * (in_time + in_frequency) + (1 - consistency_weight) * consistency
    return loss * (len(signals) > 1), seen


def two_views(one: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Diagnostics]:
    """NT-Xent between two views of the same ECGs: (batch, width) each."""
    rows = torch.arange(len(one), device=one.device).repeat(2)
    distance = (rows[:, None] != rows[None, :]).float()
    itself = torch.eye(len(rows), dtype=torch.bool, device=one.device)
    return info_nce(torch.cat([one, other]), distance, itself, temperature)
