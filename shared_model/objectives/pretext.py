"""What is trained beside the encoder in pretraining and thrown away after it: projectors, boundaries, predictors."""

import math

import torch
from torch import Tensor, nn

from shared_model.encoder import EncoderSettings, weights_from
from shared_model.motif_distance import MotifDistance
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.reconstruction import Decoder
from shared_model.recurrent import FuturePredictors
from shared_model.time_frequency import TimeFrequencyProjectors

PROJECTION_DIM = 128


class Scalar(nn.Module):
    """One trained number, as a module, so that it travels by name like any weight. Of shape (1,)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))

    def forward(self) -> Tensor:
        """The number, of shape ()."""
        return self.value[0]


def build_pretext(objective: ObjectiveSettings, encoder: EncoderSettings, seed: int) -> nn.ModuleDict:
    """The parts that the objective's row asks for, often none; their weights follow from `seed` alone."""
    parts: dict[str, nn.Module] = {}
    with weights_from(seed):
        if objective.method.projector:
            width = encoder.embedding_dim
            parts["projector"] = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION_DIM))
        if objective.learn_temperature:
            parts["log_inverse_temperature"] = Scalar(-math.log(objective.temperature))
        if objective.method.loss == "margin":
            parts["beta"] = Scalar(objective.beta)
        if objective.method.loss == "tf_c":
            parts["projectors"] = TimeFrequencyProjectors(encoder)
        if objective.method.loss == "cpc":
            parts["predictors"] = FuturePredictors(encoder, objective.horizon)
        if objective.method.loss == "masked_reconstruction":
            parts["decoder"] = Decoder(encoder)
    return nn.ModuleDict(parts)


def build_distance(encoder: EncoderSettings, seed: int) -> MotifDistance:
    """RelCon's distance network; its weights follow from `seed` alone."""
    with weights_from(seed):
        return MotifDistance(encoder)
