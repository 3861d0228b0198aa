"""TF-C's networks and loss: an ECG and its spectrum should land in one place (Zhang et al., NeurIPS 2022,
arXiv:2206.08496).

Exact: NT-Xent within time and within frequency on the embeddings, consistency on the projections, and how they are
weighed. Departures: our residual networks, and projectors without batch norm; the spectrum is the logarithm of each
lead's magnitude up to 50 Hz. The consistency of the paper (its eq. 3) and that of its code differ: see `tf_c_loss`."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from shared_model.encoder import PRESETS, STEM_KERNEL, Block, Encoder, EncoderSettings, norm_layer
from shared_model.leads import LEADS, SAMPLES, SAMPLING_RATE_HZ
from shared_model.objectives.losses import Diagnostics, of_pairs
from shared_model.objectives.similarity import unit_and_cosine

HIGHEST_HZ = 50.0  # mains lies at and above it, and little of a QRS
FREQUENCIES = int(HIGHEST_HZ * SAMPLES / SAMPLING_RATE_HZ)  # 500, every 0.1 Hz
MAGNITUDE_OF_1_MV = 10.0  # before the logarithm, of a sine: brings the harmonics of a QRS to about 1
CHANGED_SHARE = 0.1  # of the components is removed, and as many are raised; as in the published code
RAISED_TO = 0.1  # of the lead's largest component, at most; as in the published code
PLACES = 16  # what the strides leave of FREQUENCIES
PROJECTION_DIM = 128


class FrequencyEncoder(nn.Module):
    """A residual network over frequency: (batch, 12, 500) -> (batch, embedding_dim).

    Unlike over time there is no pooling: a line's place is its frequency, and pooling would forget it.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        first, *later = PRESETS[settings.preset].widths
        # With a bias: the norm behind it would otherwise take the voltage away.
        self.stem = nn.Conv1d(len(LEADS), first, STEM_KERNEL, 4, STEM_KERNEL // 2)  # (batch, first, 125)
        self.stem_norm = norm_layer(settings.norm, first)
        blocks = [
            Block(channels_in, channels_out, 2, settings.norm, settings.dropout)
            for channels_in, channels_out in pairwise((first, *later))
        ]
        self.blocks = nn.Sequential(*blocks)  # (batch, last, 16)
        self.embedding = nn.Linear(later[-1] * PLACES, settings.embedding_dim)

    def forward(self, spectra: Tensor) -> Tensor:
        """(batch, 12, 500), as `spectrum` gives them -> (batch, embedding_dim)."""
        x = torch.relu(self.stem_norm(self.stem(spectra)))
        return cast(Tensor, self.embedding(self.blocks(x).flatten(1)))


class TimeFrequencyEncoder(nn.Module):
    """Two encoders of half the embedding each: (batch, 12, time) mV -> (batch, embedding_dim)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        half = settings.embedding_dim // 2
        self.time = Encoder(settings.model_copy(update={"embedding_dim": settings.embedding_dim - half}))
        self.frequency = FrequencyEncoder(settings.model_copy(update={"embedding_dim": half}))

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
    """log(1 + magnitude) of each lead, every 0.1 Hz from 0 to below 50 Hz: (batch, 12, time) mV -> (batch, 12, 500).

    A shorter ECG is continued by its mean to 10 s, so that one place is one frequency whatever the length; a longer one
    is cut. A sine of 1 mV has magnitude 10. A missing lead stays 0; a lead's mean is left out, as carts do.
    """
    with torch.autocast(x.device.type, enabled=False):  # no transform in bfloat16
        x = x[..., :SAMPLES].float()
        magnitude = torch.fft.rfft(x - x.mean(-1, keepdim=True), n=SAMPLES).abs()[..., :FREQUENCIES]
        logarithm: Tensor = (magnitude * (2 * MAGNITUDE_OF_1_MV / x.shape[-1])).log1p()
    return logarithm


def augmented_spectrum(spectra: Tensor, generator: torch.Generator) -> Tensor:
    """A tenth of the components removed, another tenth raised to up to a tenth of the lead's largest (the paper's
    section 4): (batch, 12, 500) -> the same."""
    draw, height = torch.rand((2, *spectra.shape), generator=generator, device=generator.device).to(spectra.device)
    raised = RAISED_TO * height * spectra.amax(-1, keepdim=True)
    changed = torch.where(draw < CHANGED_SHARE, 0.0, spectra)
    return torch.where(draw > 1 - CHANGED_SHARE, torch.maximum(spectra, raised), changed)


def tf_c_loss(
    encoder: nn.Module,
    projectors: nn.Module,
    signals: Tensor,
    augmented: Tensor,
    generator: torch.Generator,
    temperature: float = 0.2,
    consistency_weight: float = 0.2,
    consistency_margin: float | None = None,
) -> tuple[Tensor, Diagnostics]:
    """lambda (L_T + L_F) + (1 - lambda) L_C (eq. 4), averaged over the ECGs; a single ECG gives loss 0 and gradient 0.

    L_T and L_F (eq. 1, 2) are the NT-Xent of an ECG with its augmented view, and of its spectrum with the augmented
    spectrum. Without a margin L_C is the NT-Xent of an ECG with its spectrum, which is what the published code trains.
    With one it is `margin_consistency`, the paper's: that can be met by pushing augmented views away, and on simulated
    ECGs it is: an ECG's NT-Xent with its spectrum ends above that of chance. Negatives are the batch's other ECGs, also
    those of the same patient.

    Args:
        encoder: a TimeFrequencyEncoder.
        projectors: TimeFrequencyProjectors.
        signals, augmented: (batch, 12, time) mV, of one length.
        generator: changes the spectra, on its own device.
        temperature, consistency_weight, consistency_margin: tau, lambda and delta of the paper.
    """
    network, project = cast(TimeFrequencyEncoder, encoder), cast(TimeFrequencyProjectors, projectors)
    spectra = spectrum(signals)
    in_time = network.time(torch.cat([signals, augmented]))  # (2 * batch, half)
    in_frequency = network.frequency(torch.cat([spectra, augmented_spectrum(spectra, generator)]))
    contrast = nt_xent(*_halves(in_time), temperature) + nt_xent(*_halves(in_frequency), temperature)
    time, frequency = project.time(in_time), project.frequency(in_frequency)
    if consistency_margin is None:
        consistency = nt_xent(_halves(time)[0], _halves(frequency)[0], temperature)
    else:
        consistency = margin_consistency(time, frequency, temperature, consistency_margin)
    loss = (consistency_weight * contrast + (1 - consistency_weight) * consistency).mean()
    several = len(signals) > 1
    usable = torch.full((len(signals),), several, device=signals.device)
    cosine = unit_and_cosine(torch.cat([in_time, in_frequency], 1)[: len(signals)].detach())[1]
    return loss * several, of_pairs(cosine, usable)


def margin_consistency(time: Tensor, frequency: Tensor, temperature: float, margin: float) -> Tensor:
    """max(0, S(z_T, z_F) - S(pair) + margin), summed over the three pairs with an augmented side (eq. 3), S being the
    NT-Xent of a pair: an ECG should lie nearer to its spectrum than either lies to the other's augmented view.

    The paper writes no maximum; without it the loss would fall for ever by pushing augmented views away.

    Args:
        time, frequency: (2 * batch, width): projections, first of the ECGs, then of the augmented ones.

    Returns:
        (batch,) float32.
    """
    (time, time_2), (frequency, frequency_2) = _halves(time), _halves(frequency)
    between = nt_xent(time, frequency, temperature)
    pairs = ((time, frequency_2), (time_2, frequency), (time_2, frequency_2))
    apart = [(between - nt_xent(one, other, temperature) + margin).relu() for one, other in pairs]
    return torch.stack(apart).sum(0)


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """NT-Xent of every ECG, the mean of its two views: (batch, width) and (batch, width) -> (batch,) float32.

    -log(exp(s / t) of the two views / sum of exp(s / t) over all other rows), s the cosine (Chen et al. 2020,
    arXiv:2002.05709, eq. 1).
    """
    cosine = unit_and_cosine(torch.cat([one, other]))[1] / temperature
    itself = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    loss = cosine.masked_fill(itself, -torch.inf).logsumexp(1) - cosine.diagonal(len(one)).repeat(2)
    return loss.view(2, -1).mean(0)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    half = len(rows) // 2
    return rows[:half], rows[half:]
