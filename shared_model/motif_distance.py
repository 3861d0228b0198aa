"""RelCon's learned distance: how badly an ECG is rebuilt from the motifs of another (Xu et al., ICLR 2025,
arXiv:2411.18822).

Cross-attention takes the anchor as query and the candidate as keys and values, so that what cannot be found in the
candidate cannot be rebuilt, wherever in time it stands. Written from the paper's and the published settings'
description: three convolution nets with a bottleneck and a field of 57 samples, softmax attention as in the published
settings (the paper's formula has sparsemax), reversible instance normalisation by the candidate's mean and SD, so
that a difference in amplitude counts. Departures: 12 leads; the middle 4 s at 62.5 Hz, so that a batch of 64 costs
seconds and not minutes; ordinary convolutions, a missing lead being 0 and left out of the error."""

import torch
from scipy.signal import firwin
from torch import Tensor, nn

from shared_model.encoder import EncoderSettings
from shared_model.leads import LEADS, SAMPLING_RATE_HZ

STRIDE = 4  # 250 Hz -> 62.5 Hz
MOTIF_SAMPLES = 250  # 4 s: several beats
WIDTHS = {"small": 32, "resnet18": 64}  # the paper's 64
BOTTLENECK = 8  # the width over this is what the convolutions see
KERNEL = 15
DILATIONS = (1, 1, 2)  # with KERNEL a field of 57 samples
DROPOUT = 0.1
SMALLEST_SD_MV = 1e-3
LOW_PASS = torch.from_numpy(firwin(33, 25.0, fs=float(SAMPLING_RATE_HZ))).float()


class MotifNet(nn.Module):
    """Dilated convolutions in a bottleneck with a way around them: (batch, 12, time) -> (batch, time, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(width // BOTTLENECK, 4)
        self.first = nn.Conv1d(len(LEADS), narrow, KERNEL, padding=KERNEL // 2 * DILATIONS[0], dilation=DILATIONS[0])
        self.later = nn.ModuleList(
            nn.Conv1d(narrow, narrow, KERNEL, padding=KERNEL // 2 * dilation, dilation=dilation)
            for dilation in DILATIONS[1:]
        )
        self.norms = nn.ModuleList(nn.GroupNorm(narrow, narrow) for _ in DILATIONS)  # a group a channel: instance norm
        self.widen = nn.Conv1d(narrow, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time) normalised -> (batch, time, width)."""
        x = self.first(x)
        for norm, convolution in zip(self.norms, self.later, strict=False):
            x = x + convolution(nn.functional.gelu(norm(x)))
        return self.widen(nn.functional.gelu(self.norms[-1](x))).transpose(1, 2)  # type: ignore[no-any-return]


class MotifDistance(nn.Module):
    """The distance network. Inputs are (batch, 12, time) mV at 250 Hz, 0 where missing."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = WIDTHS[settings.preset]
        self.query, self.key, self.value = MotifNet(width), MotifNet(width), MotifNet(width)
        self.dropout = nn.Dropout(DROPOUT)
        self.output = nn.Linear(width, len(LEADS))

    def rebuild(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Each anchor from its candidate's motifs, both as `looked_at` gives them: (batch, 12, 250) mV. One candidate
        may stand for all anchors: (1, 12, 250)."""
        mean, sd = candidates.mean(-1, keepdim=True), candidates.std(-1, keepdim=True).clamp(min=SMALLEST_SD_MV)
        there = (candidates != 0).any(-1, keepdim=True)
        own = (candidates - mean) / sd
        query = self.query(torch.where(there, (anchors - mean) / sd, 0.0))
        key, value = self.key(own), self.value(own)
        found = nn.functional.scaled_dot_product_attention(query, key.expand_as(query), value.expand_as(query))
        return self.output(self.dropout(found)).transpose(1, 2) * sd + mean  # type: ignore[no-any-return]

    @torch.no_grad()
    def distance_matrix(self, ecgs: Tensor) -> Tensor:
        """d(a | c) for all pairs, row a the anchor, column c the candidate: (n, 12, time) mV -> (n, n) float32.

        The squared error in mV^2, averaged over time, summed over the leads that both have and scaled to 12; +inf where
        they share none. Not symmetric. One candidate at a time, so that memory grows with n only.
        """
        ecgs = looked_at(ecgs)
        columns = [_error(self.rebuild(ecgs, ecgs[c : c + 1]), ecgs, ecgs[c : c + 1]) for c in range(len(ecgs))]
        return torch.stack(columns, 1) if columns else ecgs.new_zeros(0, 0)


def looked_at(signals: Tensor) -> Tensor:
    """The middle 4 s, low-passed at 25 Hz and taken at 62.5 Hz: (batch, 12, time) -> (batch, 12, 250).

    Raises:
        ValueError: the ECGs are shorter than 4 s.
    """
    batch, leads, time = signals.shape
    if time < STRIDE * MOTIF_SAMPLES:
        raise ValueError(f"{time} samples are less than the 4 s that are compared")
    kernel = LOW_PASS.to(signals.device)[None, None]
    slow = nn.functional.conv1d(signals.reshape(-1, 1, time), kernel, stride=STRIDE, padding=kernel.shape[-1] // 2)
    slow = slow.reshape(batch, leads, -1)
    start = (slow.shape[-1] - MOTIF_SAMPLES) // 2
    return slow[..., start : start + MOTIF_SAMPLES]


def motif_loss(motif: MotifDistance, signals: Tensor, disturbed: Tensor) -> Tensor:
    """The error of rebuilding ECGs from themselves disturbed, averaged over the batch: what trains the network."""
    anchors, candidates = looked_at(signals), looked_at(disturbed)
    error = _error(motif.rebuild(anchors, candidates), anchors, candidates)
    usable = error.isfinite()
    return torch.where(usable, error, 0.0).sum() / usable.sum().clamp(min=1)


def _error(rebuilt: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    """(batch,) mV^2, mean over time, summed over shared leads and scaled to 12; +inf where there is none."""
    shared = ((anchors != 0).any(-1) & (candidates != 0).any(-1)).float()  # (batch, lead)
    by_lead = (rebuilt - anchors).square().mean(-1)
    count = shared.sum(1)
    return ((by_lead * shared).sum(1) * (len(LEADS) / count.clamp(min=1))).masked_fill(count == 0, torch.inf)
