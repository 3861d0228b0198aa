"""Masked reconstruction: parts of an ECG are hidden and told from the rest (masked autoencoders: He et al., CVPR 2022,
arXiv:2111.06377).

Each ECG is looked at alone, so that under differential privacy the loss is one patient's own without a bank.
Departures: a convolutional encoder sees the gaps as zeros, where the source's transformer leaves hidden patches out;
half of the time is hidden, in all leads at once, where images bear three quarters; what is rebuilt is the ECG at 62.5
Hz.
"""

from typing import cast

import torch
from torch import Tensor, nn

from shared_model.encoder import PRESETS, Encoder, EncoderSettings
from shared_model.leads import LEADS
from shared_model.objectives.losses import Diagnostics, of_pairs
from shared_model.objectives.relations import describe_raw
from shared_model.objectives.similarity import unit_and_cosine

HIDDEN_SHARE = 0.5
PATCH = 100  # samples, 0.4 s: longer than a QRS, shorter than most beats
STRIDE = 4  # 250 Hz -> 62.5 Hz
SAMPLES_A_STEP = 8  # an encoder's step is 32 samples: its strides are 4 and three times 2


class Decoder(nn.Module):
    """From the encoder's steps and the whole ECG's embedding to the ECG at 62.5 Hz; thrown away after pretraining.

    The embedding is given to every step: were it left out, pretraining would never touch the encoder's last layer.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = PRESETS[settings.preset].widths[-1] + settings.embedding_dim
        self.steps = nn.Conv1d(width, len(LEADS) * SAMPLES_A_STEP, 1)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """(batch, width, step), (batch, embedding_dim) -> (batch, 12, 8 * step) mV."""
        whole = embedding[:, :, None].expand(-1, -1, features.shape[-1])
        rebuilt = self.steps(torch.cat([features, whole], 1))  # (batch, 96, step)
        batch, _, steps = rebuilt.shape
        by_lead = rebuilt.reshape(batch, len(LEADS), SAMPLES_A_STEP, steps).transpose(2, 3)
        return cast(Tensor, by_lead.reshape(batch, len(LEADS), steps * SAMPLES_A_STEP))


class Reconstructor(nn.Module):
    """Encoder and decoder as one network: (batch, 12, time) mV with gaps -> ((batch, 12, time / 4), embeddings)."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, signals: Tensor) -> tuple[Tensor, Tensor]:
        """The ECG rebuilt at 62.5 Hz, and its embedding."""
        features = self.encoder.features(signals)
        embedding = self.encoder.summary(features)
        return self.decoder(features, embedding)[..., : -(-signals.shape[-1] // STRIDE)], embedding


def hidden_patches(batch: int, time: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Which samples are hidden: (batch, time) bool, whole patches of 0.4 s, half of them, at least one."""
    patches = -(-time // PATCH)
    order = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(1)
    hidden = (order < max(1, round(HIDDEN_SHARE * patches))).to(device)
    return hidden.repeat_interleave(PATCH, 1)[:, :time]


def reconstruction_error(rebuilt: Tensor, signals: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden samples that are there, for each ECG: -> (batch,), in mV^2.

    Args:
        rebuilt: (batch, 12, time / 4) mV.
        signals: (batch, 12, time) mV, 0 where missing.
        hidden: (batch, time) bool.
    """
    wanted = describe_raw(signals, signals).reshape(len(signals), len(LEADS), -1)
    asked = hidden[:, None, ::STRIDE] & (signals != 0).any(2, keepdim=True)
    squared = (rebuilt.float() - wanted).square() * asked
    return squared.sum((1, 2)) / asked.sum((1, 2)).clamp(min=1)


def masked_reconstruction(
    network: Reconstructor, signals: Tensor, generator: torch.Generator
) -> tuple[Tensor, Diagnostics]:
    """The mean error over a batch, of ECGs of which half of the time is hidden.

    Args:
        signals: (batch, 12, time) mV, 250 Hz, 0 where missing.
    """
    hidden = hidden_patches(len(signals), signals.shape[-1], generator, signals.device)
    rebuilt, embedding = network(signals.masked_fill(hidden[:, None], 0.0))
    error = reconstruction_error(rebuilt, signals, hidden)
    _, cosine = unit_and_cosine(embedding.detach())
    return error.mean(), of_pairs(cosine, (signals != 0).any(2).any(1))
