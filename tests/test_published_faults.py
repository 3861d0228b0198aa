"""Faults of the published SSL-DML code: each test holds on ours and not on the fault, rewritten beside it.

The numbers are those of the project's list of 30 faults. Here: 8, 9, 11 to 15, 18 (scale), 26, 28. Elsewhere:

- 16, 18 (decay), 19, 20, 22 to 25: test_published_faults_of_training
- 17, the schedule that was never stepped: test_study, test_training, test_rounds
- 18, decay of norms and biases: test_encoder
- 20, the test split read once and last: test_rounds
- 21, running means for metrics: test_moments; thresholds and 2x2 tables: test_statistics; ECGs for patients in the
  bootstrap: test_evaluation
- 25, aliasing: test_leads, test_relations
- 27, batches that never change: test_training
- 29, the fan of a 1-D convolution: test_encoder
- 7, labels that are bool: test_mining (two classes); 6, 28: every way of choosing negatives against a loop there

1 to 5 and 10 keep the code from starting, 30 makes it slow: neither is about what is learned or scored.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.facts import fact_table
from shared_model.dtw import pairwise_dtw
from shared_model.encoder import EncoderSettings, build_encoder, decay_groups
from shared_model.heads import build_head
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.contrastive import info_nce
from shared_model.objectives.losses import Diagnostics, angular_loss, margin_loss, triplet_loss
from shared_model.objectives.mining import Triplets, mine
from shared_model.objectives.pretext import build_pretext
from shared_model.objectives.ranking import relative_contrastive
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.objectives.views import VIEWS, View
from shared_model.study import Study
from tests.stores import memory_store

TIME_S = np.arange(625) / 62.5
ECGS = torch.randn(6, 12, 2500, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([11.5, 14.0, 19.25, 22.0, 12.75, 30.0])  # mmHg
ITSELF = torch.eye(6, dtype=torch.bool)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart(labels: Tensor) -> Tensor:
    return (labels[:, None] - labels[None, :]).abs()


def by_label(labels: Tensor) -> Triplets:
    return mine(apart(labels), torch.zeros(len(labels), len(labels), dtype=torch.bool), "farthest", seeded(0), 1)


class PublishedMargin(nn.Module):
    """Fault 8: beta is one number a class, looked up by the label, and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.2 * torch.ones(2)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        triplets = by_label(labels.float())
        return torch.stack([margin_loss(embeddings, triplets, self.beta[label], 0.2)[0] for label in labels]).mean()


class OurMargin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pretext = build_pretext(ObjectiveSettings(name="supervised_dml_margin"), EncoderSettings(), seed=1)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return margin_loss(embeddings, by_label(labels), self.pretext["beta"](), 0.2)[0]


def beta_is_trained(criterion: nn.Module, labels: Tensor) -> bool:
    """Whether an optimiser over what the criterion gives it moves something."""
    parameters = list(criterion.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    loss = criterion(torch.randn(len(labels), 8, generator=seeded(0), requires_grad=True), labels)
    if not parameters:
        return False
    optimizer = torch.optim.AdamW(decay_groups(criterion, 0.02), lr=1e-3)
    loss.backward()
    optimizer.step()
    return all(not torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


def test_08_beta_is_trained_and_is_not_looked_up_by_the_label() -> None:
    assert beta_is_trained(OurMargin(), LABELS)
    assert not beta_is_trained(PublishedMargin(), torch.tensor([0, 1, 0, 1, 1, 0]))
    with pytest.raises(IndexError):
        PublishedMargin()(torch.randn(6, 8), LABELS)


UNIT_LOSSES: Mapping[str, Callable[[Tensor], tuple[Tensor, Diagnostics]]] = {
    "triplet": lambda e: triplet_loss(e, by_label(LABELS), 0.3),
    "margin": lambda e: margin_loss(e, by_label(LABELS), torch.tensor(1.2), 0.2),
    "angular": lambda e: angular_loss(e, by_label(LABELS), 45.0),
    "info_nce": lambda e: info_nce(e, apart(LABELS), ITSELF, 0.1, radius=3.0),
    "relative": lambda e: relative_contrastive(e, apart(LABELS), ITSELF, 0.1),
}
unit_losses = pytest.mark.parametrize("loss", UNIT_LOSSES.values(), ids=list(UNIT_LOSSES))


@unit_losses
def test_09_what_is_logged_keeps_no_graph(loss: Callable[[Tensor], tuple[Tensor, Diagnostics]]) -> None:
    """The published code logged the loss itself, and with it every batch's graph."""
    value, seen = loss(torch.randn(6, 8, generator=seeded(0), requires_grad=True))
    assert value.requires_grad
    assert not any(getattr(seen, field.name).requires_grad for field in fields(Diagnostics))


def mined_positive(distance: Tensor) -> list[int]:
    nobody = torch.zeros(distance.shape, dtype=torch.bool)
    return mine(distance, nobody, "farthest", torch.Generator().manual_seed(0)).positive.tolist()


def published_positive(distance: Tensor) -> list[int]:
    """Fault 11: argpartition(-2)[-2:] holds the two LARGEST distances; one of them became the positive."""
    return [int(np.argpartition(row, -2)[-2:][0]) for row in distance.numpy()]


def is_nearest_other(positive: list[int], distance: Tensor) -> bool:
    others = distance.clone().fill_diagonal_(torch.inf)
    return positive == others.argmin(1).tolist()


def test_11_the_positive_is_the_nearest_and_not_the_second_farthest() -> None:
    places = torch.rand(20, 2, generator=torch.Generator().manual_seed(1))
    distance = torch.cdist(places, places)
    assert is_nearest_other(mined_positive(distance), distance)
    assert not is_nearest_other(published_positive(distance), distance)


def two_ecgs_apart_by(shift_s: float) -> NDArray[np.float32]:
    """(2, 12, 625) mV at 62.5 Hz: the same 12 leads of narrow QRS and wide T, the second later."""
    beats = np.arange(0.7, 9.0, 0.9)[:, None, None]
    gain = np.linspace(-0.8, 1.4, 12)[:, None]
    series = []
    for late in (0.0, shift_s):
        since = TIME_S - beats - late
        series.append(gain * (np.exp(-((since / 0.03) ** 2)) + 0.3 * np.exp(-(((since - 0.3) / 0.06) ** 2))).sum(0))
    return np.stack(series).astype(np.float32)


def shift_is_forgiven(distance: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> bool:
    pair = two_ecgs_apart_by(0.2)
    return bool(distance(pair)[0, 1] < 0.25 * np.linalg.norm(pair[0] - pair[1]))


def warp_over_leads(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fault 12: arrays (12, 2500) given to a library that takes the first axis as time."""
    return pairwise_dtw(np.ascontiguousarray(x.transpose(0, 2, 1)))


def test_12_dtw_warps_over_time_and_not_over_leads() -> None:
    assert shift_is_forgiven(pairwise_dtw)
    assert not shift_is_forgiven(warp_over_leads)


def published_euclidean(x: Tensor) -> Tensor:
    """Fault 13: the mean absolute difference, under the name Euclidean."""
    return (x[:, None] - x[None, :]).abs().mean(-1)


def is_euclidean(distance: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    return torch.allclose(distance(x), torch.linalg.vector_norm(x[:, None] - x[None, :], dim=-1), rtol=1e-4, atol=1e-3)


def test_13_l2_is_euclidean_and_l1_goes_by_its_own_name() -> None:
    x = RELATIONS["l2"].describe(ECGS, torch.ones(ECGS.shape, dtype=torch.bool))
    assert is_euclidean(RELATIONS["l2"].distance, x)
    assert not is_euclidean(published_euclidean, x)
    torch.testing.assert_close(RELATIONS["l1"].distance(x), published_euclidean(x), rtol=1e-4, atol=1e-6)


class PublishedProjection(nn.Module):
    """Fault 14: the projection is made inside `forward`: new random weights at each call, never trained."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(x.shape[1], 128)(x)  # type: ignore[no-any-return]


def has_fixed_trained_projection(module: nn.Module, x: Tensor) -> bool:
    module.eval()
    output = module(x)
    same = torch.equal(output, module(x))
    trained = [parameter for parameter in module.parameters() if parameter.shape[0] == 128 and parameter.ndim == 2]
    if not trained:
        return False
    output.sum().backward()
    return same and all(parameter.grad is not None for parameter in trained)


def test_14_the_projection_is_one_trained_layer() -> None:
    assert has_fixed_trained_projection(build_encoder(EncoderSettings(), seed=1), ECGS)
    assert not has_fixed_trained_projection(PublishedProjection(), ECGS[:, 0])


class PublishedHead(nn.Module):
    """Fault 15: dropout is made inside `forward`, where it is always in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(128, 128), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(nn.Dropout(0.3)(torch.relu(self.hidden(x)))).squeeze(-1)  # type: ignore[no-any-return]


def scores_are_repeatable(head: nn.Module) -> bool:
    embedding = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    head.eval()
    with torch.inference_mode():
        return torch.equal(head(embedding), head(embedding))


def test_15_dropout_is_off_at_evaluation() -> None:
    head = build_head(EncoderSettings(), seed=1)
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules())
    assert scores_are_repeatable(head)
    assert not scores_are_repeatable(PublishedHead())


def published_triplet(embeddings: Tensor) -> tuple[Tensor, Diagnostics]:
    """Fault 18: embeddings of any length, so that a margin of 0.2 has no scale and decay shrinks them for free."""
    return triplet_loss(embeddings, by_label(LABELS), 0.2, "squared_l2", "all")


def is_blind_to_length(loss: Callable[[Tensor], tuple[Tensor, Diagnostics]]) -> bool:
    embeddings = torch.randn(6, 8, generator=seeded(0))
    return torch.allclose(loss(embeddings)[0], loss(0.01 * embeddings)[0], rtol=1e-4)


@unit_losses
def test_18_shrinking_the_embeddings_gains_nothing(loss: Callable[[Tensor], tuple[Tensor, Diagnostics]]) -> None:
    assert is_blind_to_length(loss)
    assert not is_blind_to_length(published_triplet)


def published_views(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Fault 26: np.flip(frame) turns time and leads round; without its option the two views are one."""
    return signals.flip(1, 2), signals.flip(1, 2)


def ramp() -> tuple[Tensor, Tensor]:
    """A heart that grows for 10 s, so that time has a direction: gain of each lead, and (16, 12, 2500) mV."""
    limb, chest = [0.6, 1.0, 0.4, -0.8, 0.1, 0.7], [-0.4, -0.2, 0.3, 1.0, 1.1, 0.9]
    gain = torch.tensor(limb + chest)
    return gain, (gain[:, None] * torch.linspace(-1.0, 1.0, 2500)).repeat(16, 1, 1)


def keep_time_and_leads(view: View) -> bool:
    """Whether every lead of every view still grows as its own lead does."""
    gain, signals = ramp()
    for changed in view(signals, seeded(0)):
        since = torch.arange(changed.shape[-1]) - (changed.shape[-1] - 1) / 2
        growth = changed @ since  # (ecg, lead)
        there = (changed != 0).float().mean(-1) > 0.5
        agreement = (growth * gain * there).sum(1) / (growth * there).norm(dim=1) / (gain * there).norm(dim=1)
        if agreement.min() < 0.7:
            return False
    return True


def views_differ(view: View) -> bool:
    first, second = view(ramp()[1], seeded(0))
    return bool((first - second).abs().amax((1, 2)).min() > 0)


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_26_views_keep_time_and_leads_and_differ(name: str) -> None:
    assert keep_time_and_leads(VIEWS[name])
    assert name == "as_is" or views_differ(VIEWS[name])
    assert not keep_time_and_leads(published_views)
    assert not keep_time_and_leads(lambda signals, generator: (signals.flip(1),))
    assert not keep_time_and_leads(lambda signals, generator: (signals.flip(2),))
    assert not views_differ(published_views)


def pairs_a_patients_ecgs(code: NDArray[np.float64]) -> bool:
    """Whether CMSC takes the two ECGs of the first patient, and not the third patient's, for a pair."""
    distance = RELATIONS[METHODS["cmsc"].relation].distance(torch.from_numpy(code))
    return bool(distance[0, 1] == 0 and distance[0, 2] > 0)


def test_26_ecgs_of_one_patient_are_a_pair() -> None:
    store = memory_store(patient=[7, 7, 3])
    assert pairs_a_patients_ecgs(fact_table(Study(name="x"), store.index, RELATIONS[METHODS["cmsc"].relation].facts))
    assert not pairs_a_patients_ecgs(store.index.row[:, None].astype(np.float64))  # the number in the data set


def published_npair(labels: Tensor) -> list[int]:
    """Fault 28: only the very same label is a positive."""
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(len(labels), dtype=torch.bool)
    return same.any(1).nonzero()[:, 0].tolist()


def test_28_labels_on_a_scale_have_positives() -> None:
    assert by_label(LABELS).usable.all()
    assert published_npair(LABELS) == []


def our_negatives(labels: Tensor) -> list[int | None]:
    triplets = by_label(labels)
    return [int(row.int().argmax()) if row.any() else None for row in triplets.negatives]


def published_negatives(labels: Tensor) -> list[int | None]:
    """Fault 28: the farthest label, which is the anchor's own where all tie."""
    return [int(row.argmax()) for row in apart(labels)]


def are_farther_than_the_positive(negatives: list[int | None], labels: Tensor) -> bool:
    distance = apart(labels)
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
    return all(n is None or bool(n != a and distance[a, n] > nearest[a]) for a, n in enumerate(negatives))


def test_28_where_labels_tie_nobody_is_its_own_negative() -> None:
    tied, some = torch.full((5,), 18.0), torch.tensor([18.0, 18.0, 21.0, 9.0, 9.0])
    for labels in (tied, some):
        assert are_farther_than_the_positive(our_negatives(labels), labels)
    assert our_negatives(tied) == [None] * 5
    assert None not in our_negatives(some)
    assert not are_farther_than_the_positive(published_negatives(tied), tied)
