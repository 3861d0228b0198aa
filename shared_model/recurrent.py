"""CPC's networks and loss: what comes next in an ECG, from what was (van den Oord et al. 2018, arXiv:1807.03748; for
ECGs Mehari and Strodthoff 2022, arXiv:2103.12676).

Four layers and a recurrent net, and negatives from the same ECG alone, as in the second source; but small: a GRU in
place of two LSTM layers, the preset's last width in place of 512. Departures: a step is 64 ms at 250 Hz (there: one
sample at 100 Hz) and shares no sample with the next one, so that what comes next cannot be read off what is; layer norm
in place of batch norm; cosine similarity over a temperature, as in our other contrastive losses, in place of the plain
product."""

from typing import cast

import torch
from torch import Tensor, nn

from shared_model.encoder import CLIP_MV, GAIN, PRESETS, EncoderSettings
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from shared_model.objectives.losses import Diagnostics, of_pairs
from shared_model.objectives.similarity import full_precision, product

STRIDES = (4, 2, 2, 1)  # each also its layer's kernel, so that fields do not overlap
STEP_SAMPLES = 16  # their product: 64 ms
PLACES = 48  # steps of an ECG from which the future is predicted, drawn anew each time


class StepNorm(nn.LayerNorm):
    """Layer norm over the channels of one step: group norm's statistics run over all time and would tell the past of
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
        for channels, stride in zip((len(LEADS), width, width, width), STRIDES, strict=True):
            layers += [
                # With a bias: the norm behind it would otherwise take the voltage away, and lift noise to a QRS.
                nn.Conv1d(channels, width, stride, stride),
                nn.BatchNorm1d(width) if settings.norm == "batch" else StepNorm(width),
                nn.ReLU(),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.embedding = nn.Linear(width, context_dim(settings))
        self.dropout = nn.Dropout(settings.dropout)
        self.embedding_dim = settings.embedding_dim

    def local(self, x: Tensor) -> Tensor:
        """(batch, 12, time) mV, 0 where missing -> (batch, time // 16, width): a step sees its own 64 ms alone."""
        features: Tensor = self.convolutions(x.clamp(-CLIP_MV, CLIP_MV) * GAIN)
        return features.transpose(1, 2)

    def context(self, local: Tensor) -> Tensor:
        """(batch, step, width) -> (batch, step, context_dim): what has been seen up to and with each step.

        The linear layer is in here, so that the future is predicted through it: were it behind the pooling, pretraining
        would never touch it.
        """
        return cast(Tensor, self.embedding(self.recurrence(local)[0]))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 12, time) float32, mV, 250 Hz, 0 where missing, 64 ms or more -> (batch, embedding_dim)."""
        context = self.dropout(self.context(self.local(x)))
        return torch.cat([context.mean(1), context.amax(1)], 1)[:, : self.embedding_dim]


class FuturePredictors(nn.Module):
    """One linear map from context to local features for every step ahead (W_k of the first source, eq. 3); thrown away
    after pretraining."""

    def __init__(self, settings: EncoderSettings, horizon: int) -> None:
        super().__init__()
        width = PRESETS[settings.preset].widths[-1]
        self.ahead = nn.ModuleList(nn.Linear(context_dim(settings), width, bias=False) for _ in range(horizon))


def context_dim(settings: EncoderSettings) -> int:
    """Numbers that a step is summed up in: mean and maximum of them over time make the embedding."""
    return (settings.embedding_dim + 1) // 2


def cpc_loss(
    encoder: nn.Module, predictors: nn.Module, signals: Tensor, generator: torch.Generator, temperature: float = 0.1
) -> tuple[Tensor, Diagnostics]:
    """InfoNCE (van den Oord et al. 2018, eq. 4) of what stands k steps after a place, averaged over k = 1 to the
    horizon, places and ECGs.

    At most 48 places are drawn, the same in all ECGs. The negatives of a prediction are what stands k steps after the
    other places of its own ECG. Other ECGs would be told apart by whose they are, which says nothing of what comes
    next: with them, on simulated ECGs, a linear map read heart rate and voltage from the context worse than from an
    untrained network. Where a single place is left there is nothing to tell apart, and the loss is 0.

    Args:
        encoder: a RecurrentEncoder.
        predictors: FuturePredictors.
        signals: (batch, 12, time) mV, 250 Hz, 0 where missing.
        generator: draws the places, on its own device.
        temperature: what cosines are divided by.

    Raises:
        HemoFedError: the ECGs are not longer than the horizon.
    """
    network, ahead = cast(RecurrentEncoder, encoder), list(cast(FuturePredictors, predictors).ahead)
    local = network.local(signals)
    context = network.context(local)
    last = local.shape[1] - len(ahead)
    if last < 1:
        raise HemoFedError(
            f"objective: horizon {len(ahead)} needs ECGs of more than {len(ahead)} steps of 64 ms, and these have "
            f"{local.shape[1]}; lower horizon",
            ExitCode.BAD_STUDY,
        )
    places = torch.rand(last, generator=generator, device=generator.device).argsort()[:PLACES].to(local.device)
    itself = torch.arange(len(places), device=local.device).repeat(len(signals))
    losses = []
    for steps, predict in enumerate(ahead, 1):
        predicted, came = _unit(predict(context[:, places])), _unit(local[:, places + steps])
        with torch.autocast(signals.device.type, enabled=False):
            logits = predicted @ came.mT / temperature  # (batch, place, place)
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), itself))
    whole = _unit(context.detach().mean(1))
    usable = torch.full((len(signals),), len(places) > 1, device=signals.device)
    return torch.stack(losses).mean(), of_pairs(product(whole, whole), usable)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(full_precision(vectors), dim=-1)
