"""RelCon's learned distance: how badly an ECG is rebuilt from the motifs of another (Xu et al., ICLR 2025,
arXiv:2411.18822).

Cross-attention takes the anchor as query and the candidate as keys and values: what the candidate does not have cannot
be rebuilt, wherever in time it stands. As published: three dilated convolution nets with a field of 57 samples, one
head, 10% dropout of the attention, instance norm, and reversible normalisation by the candidate's mean and SD, so that
a difference in amplitude counts. Softmax attention is that of the published settings; the paper's formula has
sparsemax. Departures: 12 leads; the middle 4 s at 62.5 Hz, so that a batch of 64 costs a second and not minutes; a
missing lead is 0 in place of partial convolutions, and left out of the error."""

from typing import cast

import torch
from scipy.signal import firwin
from torch import Tensor, nn

from shared_model.encoder import EncoderSettings
from shared_model.leads import LEADS, SAMPLING_RATE_HZ

STRIDE = 4  # 250 Hz -> 62.5 Hz
MOTIF_SAMPLES = 250  # 4 s: several beats
WIDTHS = {"small": 32, "resnet18": 64}  # the published 64
BOTTLENECK = 8  # a block's convolution sees the width over this
KERNEL = 15
DILATIONS = (1, 2)  # after a first convolution of dilation 1: a field of 1 + 14 + 14 + 28 = 57 samples
DROPOUT = 0.1
SMALLEST_SD_MV = 1e-3
LOW_PASS = torch.from_numpy(firwin(33, 25.0, fs=float(SAMPLING_RATE_HZ))).float()
ANCHORS_AT_A_TIME = 64


class MotifBlock(nn.Module):
    """A dilated convolution behind a bottleneck, and a way around both: (batch, width, time) -> the same."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        narrow = max(width // BOTTLENECK, 4)
        self.bottleneck = nn.Conv1d(width, narrow, 1)
        self.convolution = nn.Conv1d(narrow, width, KERNEL, padding=KERNEL // 2 * dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, time) -> (batch, width, time), each channel with mean 0 and SD 1."""
        return _instance_norm(nn.functional.gelu(self.convolution(self.bottleneck(x)) + x))


class MotifNet(nn.Module):
    """What stands around each sample: (batch, 12, time) -> (batch, time, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(len(LEADS), width, KERNEL, padding=KERNEL // 2)
        self.blocks = nn.Sequential(*(MotifBlock(width, dilation) for dilation in DILATIONS))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time), normalised -> (batch, time, width)."""
        features: Tensor = self.blocks(_instance_norm(nn.functional.gelu(self.first(x))))
        return features.transpose(1, 2).contiguous()  # as fused attention wants it


class MotifDistance(nn.Module):
    """The distance network. `rebuild` is trained by `motif_loss`; `distance_matrix` is what mining asks for."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = WIDTHS[settings.preset]
        self.query, self.key, self.value = MotifNet(width), MotifNet(width), MotifNet(width)
        self.output = nn.Linear(width, len(LEADS))

    def rebuild(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Each anchor from the motifs of its candidate: (batch, 12, 250) mV each, as `looked_at` gives them -> the
        same. A single candidate (1, 12, 250) serves all anchors. Attention drops out in training mode only."""
        mean, sd = candidates.mean(-1, keepdim=True), candidates.std(-1, keepdim=True).clamp(min=SMALLEST_SD_MV)
        query = self.query(torch.where(_has(anchors) & _has(candidates), (anchors - mean) / sd, 0.0))
        own = (candidates - mean) / sd
        # (candidate, 1 head, samples, width): the anchors of one candidate stand in one long row
        rows, key, value = query.reshape(len(candidates), 1, -1, query.shape[-1]), self.key(own), self.value(own)
        dropout = DROPOUT if self.training else 0.0
        found = nn.functional.scaled_dot_product_attention(rows, key[:, None], value[:, None], dropout_p=dropout)
        return cast(Tensor, self.output(found.view_as(query)).transpose(1, 2) * sd + mean)

    @torch.no_grad()
    def distance_matrix(self, ecgs: Tensor, chunk: int = ANCHORS_AT_A_TIME) -> Tensor:
        """d(a | c) for all pairs, row a the anchor, column c the candidate: (n, 12, time) mV -> (n, n) float32.

        The squared error in mV^2, summed over the leads that both have and scaled to 12, averaged over time; +inf where
        they share none. Not symmetric, and not 0 on the diagonal. Dropout is off whatever the mode.

        Args:
            ecgs: 250 Hz, 0 where missing, 4 s or more.
            chunk: anchors at a time against one candidate, so that memory does not grow with n^2.

        Raises:
            ValueError: the ECGs are shorter than 4 s.
        """
        training = self.training
        self.eval()
        try:
            ecgs = looked_at(ecgs)
            distance = ecgs.new_empty(len(ecgs), len(ecgs))
            for column in range(len(ecgs)):
                candidate = ecgs[column : column + 1]
                for row, anchors in zip(torch.split(distance, chunk), torch.split(ecgs, chunk), strict=True):
                    row[:, column] = squared_error(self.rebuild(anchors, candidate), anchors, candidate)
            return distance
        finally:
            self.train(training)


def looked_at(signals: Tensor) -> Tensor:
    """The middle 4 s, low-passed at 25 Hz and taken at 62.5 Hz: (batch, 12, time) -> (batch, 12, 250) mV.

    Raises:
        ValueError: the ECGs are shorter than 4 s.
    """
    time = signals.shape[-1]
    if time < STRIDE * MOTIF_SAMPLES:
        raise ValueError(f"{time} samples at {SAMPLING_RATE_HZ} Hz are less than the 4 s that are compared")
    kernel = LOW_PASS.to(signals.device)[None, None]
    slow = nn.functional.conv1d(signals.reshape(-1, 1, time), kernel, stride=STRIDE, padding=kernel.shape[-1] // 2)
    slow = slow.reshape(*signals.shape[:-1], slow.shape[-1])
    start = (slow.shape[-1] - MOTIF_SAMPLES) // 2
    return slow[..., start : start + MOTIF_SAMPLES]


def motif_loss(motif: MotifDistance, signals: Tensor, disturbed: Tensor) -> Tensor:
    """What trains the network: the distance of ECGs from themselves disturbed, averaged over those that share a lead.

    Args:
        signals, disturbed: (batch, 12, time) mV, 250 Hz, 0 where missing, of one length.
    """
    anchors, candidates = looked_at(signals), looked_at(disturbed)
    error = squared_error(motif.rebuild(anchors, candidates), anchors, candidates)
    usable = error.isfinite()
    return torch.where(usable, error, 0.0).sum() / usable.sum().clamp(min=1)


def squared_error(rebuilt: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    """(batch, 12, time) mV each -> (batch,) mV^2: mean over time, sum over shared leads scaled to 12, else +inf."""
    shared = (_has(anchors) & _has(candidates))[..., 0]  # (batch, lead)
    count = shared.sum(1)
    by_lead = torch.where(shared, (rebuilt - anchors).square().mean(-1), 0.0)
    return (by_lead.sum(1) * len(LEADS) / count.clamp(min=1)).masked_fill(count == 0, torch.inf)


def _has(signals: Tensor) -> Tensor:
    """(batch, 12, time) -> (batch, 12, 1) bool: whether a lead has any signal."""
    return (signals != 0).any(-1, keepdim=True)


def _instance_norm(x: Tensor) -> Tensor:
    """Each channel of each ECG to mean 0 and SD 1 over time: no statistics of a cohort, no parameters."""
    return nn.functional.instance_norm(x)
