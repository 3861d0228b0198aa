"""The 1-D ResNet that turns a 12-lead ECG into an embedding: the paper's size, and a small one for a laptop.

Residual network: He et al. 2016 (doi:10.1109/CVPR.2016.90), in one dimension as in SSL-DML. Group norm (Wu
and He 2018, arXiv:1803.08494) is the default: batch-norm statistics are the usual failure under site shift. The first
convolution has a bias and no norm: group norm divides each ECG by its own spread and would take the voltage away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shared_model.leads import LEADS

CLIP_MV = 4.0  # paced spikes and loose electrodes reach far beyond; QRS complexes do not
GAIN = 2.0  # brings a QRS of 0.5 mV to about 1

Norm = Literal["group", "batch"]
NORM_LAYERS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d)


class EncoderSettings(BaseModel):
    """Size and normalisation of the encoder. `dropout` is inside the residual blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: Literal["resnet18", "small"] = "small"
    norm: Norm = "group"
    embedding_dim: int = Field(default=128, ge=2)
    dropout: float = Field(default=0.2, ge=0, lt=1)


@dataclass(frozen=True)
class Preset:
    """Widths of the four stages and what differs around them."""

    widths: tuple[int, int, int, int]
    blocks_per_stage: int
    stem_stride: int
    max_pool: bool  # after the stem
    mean_and_max: bool  # pool over time by mean and maximum, else by mean alone


PRESETS = {
    "resnet18": Preset((64, 128, 256, 512), 2, stem_stride=2, max_pool=True, mean_and_max=False),  # 8.80 M
    "small": Preset((16, 32, 64, 128), 1, stem_stride=4, max_pool=False, mean_and_max=True),  # 0.28 M
}
STEM_KERNEL, KERNEL = 15, 7


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Group norm with at most 8 groups of at least 4 channels, or batch norm."""
    return nn.BatchNorm1d(channels) if norm == "batch" else nn.GroupNorm(min(8, channels // 4), channels)


class Block(nn.Module):
    """Two convolutions and a shortcut: (batch, channels_in, time) -> (batch, channels_out, time / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        pad = KERNEL // 2
        self.conv1 = nn.Conv1d(channels_in, channels_out, KERNEL, stride, pad, bias=False)
        self.norm1 = norm_layer(norm, channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(channels_out, channels_out, KERNEL, 1, pad, bias=False)
        self.norm2 = norm_layer(norm, channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv1d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, norm_layer(norm, channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, time) -> (batch, channels_out, ceil(time / stride))."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(self.dropout(y)))
        return torch.relu(y + self.shortcut(x))


class Encoder(nn.Module):
    """ECG -> embedding. Shapes in comments are for 2500 samples: resnet18 | small.

    The input stays in millivolt: a z-score per ECG would delete the QRS voltage, which carries the label.
    It is clipped at +-4 mV so that one artefact cannot own the convolutions.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        preset = PRESETS[settings.preset]
        first, last = preset.widths[0], preset.widths[-1]
        self.stem = nn.Conv1d(len(LEADS), first, STEM_KERNEL, preset.stem_stride, STEM_KERNEL // 2)
        self.max_pool = nn.MaxPool1d(3, 2, 1) if preset.max_pool else nn.Identity()
        blocks = []
        channels = first
        for stage, width in enumerate(preset.widths):
            for block in range(preset.blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(channels, width, stride, settings.norm, settings.dropout))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.mean_and_max = preset.mean_and_max
        self.embedding = nn.Linear(last * (2 if preset.mean_and_max else 1), settings.embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time) float32, mV, 250 Hz, 0 where missing -> (batch, embedding_dim)."""
        return self.summary(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What is seen when: (batch, 12, time) mV -> (batch, last width, time / 32)."""
        x = x.clamp(-CLIP_MV, CLIP_MV) * GAIN  # (batch, 12, 2500)
        x = torch.relu(self.stem(x))  # (batch, 64, 1250) | (batch, 16, 625)
        x = self.max_pool(x)  # (batch, 64, 625) | (batch, 16, 625)
        return self.blocks(x)  # type: ignore[no-any-return]  # (batch, 512, 79) | (batch, 128, 79)

    def summary(self, features: Tensor) -> Tensor:
        """The embedding of features: (batch, last width, step) -> (batch, embedding_dim)."""
        pooled = features.mean(-1)  # (batch, 512) | (batch, 128)
        if self.mean_and_max:
            pooled = torch.cat([pooled, features.amax(-1)], 1)  # (batch, 256)
        return self.embedding(pooled)  # type: ignore[no-any-return]


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Networks made inside follow from `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build_encoder(settings: EncoderSettings, seed: int) -> Encoder:
    """An encoder whose weights follow from `seed` alone."""
    with weights_from(seed):
        encoder = Encoder(settings)
        for module in encoder.modules():
            if isinstance(module, nn.Conv1d):
                # fan_out in 1-D is kernel * channels_out (He et al. 2015, eq. 14): the kernel is not squared
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder


def norm_parameter_names(module: nn.Module) -> frozenset[str]:
    """Names in `state_dict()` of normalisation layers' parameters and buffers: what FedBN keeps at the site.

    Source: Li et al. 2021, FedBN (arXiv:2102.07623).
    """
    return frozenset(
        f"{name}.{entry}"
        for name, layer in module.named_modules()
        if isinstance(layer, NORM_LAYERS)
        for entry in layer.state_dict()
    )


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights decay, biases and normalisation layers do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
