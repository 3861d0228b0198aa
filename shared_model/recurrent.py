"""CPC's networks and loss: what comes next in an ECG, from what was (van den Oord et al. 2018, arXiv:1807.03748; for
ECGs Mehari and Strodthoff 2022, arXiv:2103.12676).

Small: four strided convolutions whose fields hardly overlap, so that the next step cannot be read off this one, and
one GRU."""

import torch
from torch import Tensor, nn

from shared_model.encoder import CLIP_MV, GAIN, PRESETS, EncoderSettings
from shared_model.leads import LEADS
from shared_model.objectives.losses import Diagnostics, of_pairs

KERNELS_AND_STRIDES = ((5, 2), (5, 4), (3, 2), (3, 2))  # 32 samples, 128 ms, a step
ANCHORS = 16  # steps of an ECG from which the future is predicted, drawn anew each time


class StepNorm(nn.LayerNorm):
    """Layer norm over the channels of one step: group norm's statistics run over all time, and would tell the past of
    the future. (batch, channel, step) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.LayerNorm`, on the channel axis."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class RecurrentEncoder(nn.Module):
    """Strided convolutions, a GRU over time, mean and maximum: (batch, 12, time) mV -> (batch, embedding_dim)."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        width = PRESETS[settings.preset].widths[-1]
        layers: list[nn.Module] = []
        channels = len(LEADS)
        for kernel, stride in KERNELS_AND_STRIDES:
            layers += [
                nn.Conv1d(channels, width, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm1d(width) if settings.norm == "batch" else StepNorm(width),
                nn.ReLU(),
            ]
            channels = width
        self.convolutions = nn.Sequential(*layers)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(settings.dropout)
        self.embedding = nn.Linear(2 * width, settings.embedding_dim)

    def local(self, x: Tensor) -> Tensor:
        """(batch, 12, time) mV, 0 where missing -> (batch, step, width), a step every 128 ms."""
        features: Tensor = self.convolutions(x.clamp(-CLIP_MV, CLIP_MV) * GAIN)
        return features.transpose(1, 2)

    def context(self, local: Tensor) -> Tensor:
        """(batch, step, width) -> (batch, step, width): what has been seen up to each step."""
        hidden: Tensor = self.recurrence(local)[0]
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time) float32, mV, 250 Hz, 0 where missing -> (batch, embedding_dim)."""
        hidden = self.dropout(self.context(self.local(x)))
        return self.embedding(torch.cat([hidden.mean(1), hidden.amax(1)], 1))  # type: ignore[no-any-return]


class FuturePredictors(nn.Module):
    """One linear map from context to local features for every step ahead; thrown away after pretraining."""

    def __init__(self, settings: EncoderSettings, horizon: int) -> None:
        super().__init__()
        width = PRESETS[settings.preset].widths[-1]
        self.ahead = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(horizon))


def cpc_loss(
    encoder: nn.Module, predictors: nn.Module, signals: Tensor, generator: torch.Generator, temperature: float = 0.1
) -> tuple[Tensor, Diagnostics]:
    """InfoNCE of every predicted step against that step of the batch's other ECGs and the other drawn steps of its own,
    averaged over steps ahead, ECGs and drawn places.

    Similarity is the cosine over a temperature, as in our other contrastive losses, where the source takes the plain
    product.

    Args:
        encoder: a RecurrentEncoder.
        predictors: FuturePredictors.
        signals: (batch, 12, time) mV.
        temperature: what cosines are divided by.

    Raises:
        ValueError: the ECGs are shorter than the horizon.
    """
    local = encoder.local(signals).float()  # type: ignore[operator]
    context = encoder.context(local).float()  # type: ignore[operator]
    ahead = list(predictors.ahead)  # type: ignore[arg-type]
    last = local.shape[1] - len(ahead)
    if last < 1:
        raise ValueError(f"{local.shape[1]} steps of 128 ms are too few to predict {len(ahead)} of them")
    draw = torch.rand(last, generator=generator, device=generator.device).to(local.device)
    places = draw.argsort()[: min(ANCHORS, last)]
    losses = []
    for steps, predict in enumerate(ahead, 1):
        predicted = nn.functional.normalize(predict(context[:, places]).float(), dim=-1).flatten(0, 1)
        truth = nn.functional.normalize(local[:, places + steps], dim=-1).flatten(0, 1)
        with torch.autocast(local.device.type, enabled=False):  # bfloat16 has two digits: too few for near cosines
            logits = predicted @ truth.T / temperature
            losses.append(nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device)))
    pooled = nn.functional.normalize(context.mean(1).detach(), dim=-1)
    usable = torch.ones(len(signals), dtype=torch.bool, device=signals.device)
    return torch.stack(losses).mean(), of_pairs(pooled @ pooled.T, usable)
