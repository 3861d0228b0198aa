"""One step of pretraining: single precision where bfloat16 would not do, and no setting without effect."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_model.encoder import EncoderSettings
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.pretext import build_pretext
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings, settings_of
from shared_model.objectives.step import Batch, Parts, pretraining_step

ECGS = 12


class Plain(nn.Module):
    """Stands for all encoders: numbers of the signal itself, computed without a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., torch.linspace(0, x.shape[-1] - 1, 9).long()].flatten(1) - 0.01

    def time(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def frequency(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def local(self, x: Tensor) -> Tensor:
        return x[..., ::32].transpose(1, 2)

    def context(self, local: Tensor) -> Tensor:
        return local.cumsum(1)


class Nothing(nn.Module):
    """Projectors and predictors that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.time = self.frequency = nn.Identity()
        self.ahead = nn.ModuleList([nn.Identity(), nn.Identity()])


def signals_of(ecgs: int) -> Tensor:
    """Hearts that beat: spikes of different rate and size, and noise."""
    generator = torch.Generator().manual_seed(0)
    rate_hz = 1 + torch.rand(ecgs, 1, 1, generator=generator)
    size_mv = 0.5 + torch.rand(ecgs, 12, 1, generator=generator)
    since_beat_s = (torch.arange(2500) / 250 * rate_hz).remainder(1) / rate_hz
    spikes = (-0.5 * ((since_beat_s - 0.1) / 0.015).square()).exp()
    return size_mv * spikes + 0.01 * torch.randn(ecgs, 12, 2500, generator=generator)


def loss_of(settings: ObjectiveSettings, bfloat16: bool = False) -> float:
    signals = signals_of(ECGS)
    relation = settings.relation
    if relation.facts:
        # rows i and i + n / 2 belong together; there are two classes
        some = torch.arange(ECGS, dtype=torch.float64) % (2 if relation.name == "same_class" else ECGS // 2)
        described = some[:, None].repeat(1, len(relation.facts)) * (3.0 if relation.name == "label" else 1.0)
    else:
        described = relation.describe(signals, torch.ones_like(signals, dtype=torch.bool))
    pretext: dict[str, nn.Module] = dict(build_pretext(settings, EncoderSettings(), seed=0).named_children())
    pretext |= {"projector": nn.Identity(), "projectors": Nothing(), "predictors": Nothing()}
    plain = Plain()
    parts = Parts(plain, plain, pretext, lambda e: e.sum(1), lambda x: torch.cdist(x[..., 9], x[..., 9]))
    batch = Batch(signals, described, torch.arange(ECGS), lambda output: output.square().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        loss, _ = pretraining_step(settings, parts, batch, torch.Generator().manual_seed(1))
    return loss.item()


NEEDED: dict[str, dict[str, Any]] = {"good_views_rhythm": {"group_column": "rhythm"}}
TRAINING = sorted(
    name
    for name, row in METHODS.items()
    if row.pretrains and row.relation in RELATIONS and row.loss != "masked_reconstruction"  # it looks inside an encoder
)


@pytest.mark.parametrize("name", TRAINING)
def test_the_loss_is_computed_in_single_precision_whatever_the_networks_run_in(name: str) -> None:
    """Under autocast a matrix product of embeddings comes in bfloat16, and a difference of cosines over 0.07 is lost.
    Rank-N-Contrast's distances, differences of large squares, were zero or far too large."""
    settings = ObjectiveSettings(name=name, **NEEDED.get(name, {}))
    expected = loss_of(settings)
    assert expected > 0
    assert loss_of(settings, bfloat16=True) == pytest.approx(expected, rel=1e-6)


OTHER: dict[str, Any] = {
    "margin": 0.9,
    "embedding_distance": "squared_l2",
    "reduction": "all",
    "beta": 0.7,
    "angle_degrees": 30.0,
    "temperature": 0.5,
    "consistency_weight": 0.7,
    "consistency_margin": 3.0,
    "task_weight": 2.0,
}


@pytest.mark.parametrize("name", TRAINING)
def test_no_setting_that_a_row_looks_at_is_without_effect(name: str) -> None:
    """CPC once ignored the temperature that a study gave."""
    for key in sorted(settings_of(METHODS[name]) & set(OTHER)):
        usual = {"name": name, **NEEDED.get(name, {})}
        assert loss_of(ObjectiveSettings(**usual, **{key: OTHER[key]})) != loss_of(ObjectiveSettings(**usual)), key
