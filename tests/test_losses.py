"""Losses on triplets and their health figures, against explicit loops and pytorch-metric-learning."""

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import AngularLoss, MarginLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch import Tensor

from shared_model.objectives.losses import (
    Diagnostics,
    angular_loss,
    collapse_warning,
    margin_loss,
    summarise,
    triplet_loss,
)
from shared_model.objectives.mining import Triplets, mine

MODES = ("farthest", "random", "beyond_nearest")
BETA = torch.tensor(1.1)
Loss = Callable[[Tensor, Triplets], tuple[Tensor, Diagnostics]]
LOSSES: dict[str, Loss] = {
    "triplet": lambda e, t: triplet_loss(e, t, 0.3),
    "triplet, squared L2": lambda e, t: triplet_loss(e, t, 0.3, "squared_l2"),
    "margin": lambda e, t: margin_loss(e, t, BETA.to(e), 0.2),
    "angular": lambda e, t: angular_loss(e, t, 45.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_triplets(batch: int, seed: int, mode: str = "beyond_nearest") -> Triplets:
    """Mined among random places; where there are more than three, the last is compared with nobody: not usable."""
    places = torch.rand(batch, 3, generator=seeded(seed))
    distance = torch.cdist(places, places)
    if batch > 3:
        distance[-1] = math.inf
    return mine(distance, torch.zeros(batch, batch, dtype=torch.bool), mode, seeded(seed))


def triples(triplets: Triplets) -> list[tuple[int, int, int]]:
    found = []
    for a in range(len(triplets.positive)):
        if triplets.usable[a]:
            found += [(a, int(triplets.positive[a]), n) for n in triplets.negatives[a].nonzero()[:, 0].tolist()]
    return found


def unit(embeddings: Tensor) -> Tensor:
    return embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)


# ---- against loops


def slow_triplet_loss(embeddings: Tensor, triplets: Triplets, margin: float, distance: str, reduction: str) -> float:
    hinges = []
    u, e = unit(embeddings), embeddings.double()
    for a, p, n in triples(triplets):
        if distance == "cosine":
            to_positive, to_negative = 1 - u[a] @ u[p], 1 - u[a] @ u[n]
        else:
            to_positive, to_negative = ((e[a] - e[k]).square().sum() for k in (p, n))
        hinges.append(max(0.0, float(to_positive - to_negative) + margin))
    kept = [hinge for hinge in hinges if hinge > 0] if reduction == "violating" else hinges
    return sum(kept) / len(kept) if kept else 0.0


def slow_margin_loss(embeddings: Tensor, triplets: Triplets, beta: float, margin: float) -> float:
    u = unit(embeddings)
    pulls = {(a, p): float((u[a] - u[p]).norm()) - beta + margin for a, p, _ in triples(triplets)}
    pushes = {(a, n): beta - float((u[a] - u[n]).norm()) + margin for a, _, n in triples(triplets)}
    kept = [value for value in [*pulls.values(), *pushes.values()] if value > 0]
    return sum(kept) / len(kept) if kept else 0.0


def slow_angular_loss(embeddings: Tensor, triplets: Triplets, degrees: float) -> float:
    u, tangent = unit(embeddings), math.tan(math.radians(degrees)) ** 2
    sums: dict[int, float] = {}
    for a, p, n in triples(triplets):
        exponent = 4 * tangent * float((u[a] + u[p]) @ u[n]) - 2 * (1 + tangent) * float(u[a] @ u[p])
        sums[a] = sums.get(a, 1.0) + math.exp(exponent)
    return sum(math.log(value) for value in sums.values()) / len(sums) if sums else 0.0


@pytest.mark.parametrize("reduction", ["violating", "all"])
@pytest.mark.parametrize("distance", ["cosine", "squared_l2"])
@pytest.mark.parametrize("mode", MODES)
def test_triplet_loss_equals_a_loop(mode: str, distance: str, reduction: str) -> None:
    for seed in range(5):
        embeddings = torch.randn(12, 5, generator=seeded(seed))
        triplets = some_triplets(12, seed, mode)
        loss, seen = triplet_loss(embeddings, triplets, 0.3, distance, reduction)
        expected = slow_triplet_loss(embeddings, triplets, 0.3, distance, reduction)
        assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert 0 <= float(seen.violating_share) <= 1


@pytest.mark.parametrize("beta", [0.3, 1.2, 1.9])
@pytest.mark.parametrize("mode", MODES)
def test_margin_loss_equals_a_loop(mode: str, beta: float) -> None:
    for seed in range(5):
        embeddings, triplets = torch.randn(12, 5, generator=seeded(seed)), some_triplets(12, seed, mode)
        loss, _ = margin_loss(embeddings, triplets, torch.tensor(beta), 0.2)
        assert float(loss) == pytest.approx(slow_margin_loss(embeddings, triplets, beta, 0.2), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("degrees", [20.0, 45.0, 60.0])
@pytest.mark.parametrize("mode", MODES)
def test_angular_loss_equals_a_loop(mode: str, degrees: float) -> None:
    for seed in range(5):
        embeddings, triplets = torch.randn(12, 5, generator=seeded(seed)), some_triplets(12, seed, mode)
        loss, _ = angular_loss(embeddings, triplets, degrees)
        assert float(loss) == pytest.approx(slow_angular_loss(embeddings, triplets, degrees), rel=1e-4, abs=1e-6)


# ---- against pytorch-metric-learning


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("reduction", ["violating", "all"])
def test_triplet_loss_equals_pytorch_metric_learning(normalised: bool, reduction: str) -> None:
    embeddings = torch.randn(16, 8, generator=seeded(4))
    triplets = some_triplets(16, 4)
    indices = tuple(torch.tensor(triples(triplets)).T)
    reducer = AvgNonZeroReducer() if reduction == "violating" else MeanReducer()
    squared = LpDistance(normalize_embeddings=normalised, p=2, power=2)
    # On unit vectors squared L2 is twice the cosine distance: margin 0.6 is ours of 0.3, the loss twice ours.
    factor = 2.0 if normalised else 1.0
    oracle = TripletMarginLoss(0.3 * factor, distance=squared, reducer=reducer)
    expected = oracle(embeddings, torch.zeros(16), indices_tuple=indices) / factor
    ours, _ = triplet_loss(embeddings, triplets, 0.3, "cosine" if normalised else "squared_l2", reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.8, 1.2])
def test_margin_loss_and_the_gradient_of_beta_equal_pytorch_metric_learning(beta: float) -> None:
    """With one negative an anchor; with more, it counts a positive once for each of them."""
    embeddings, triplets = torch.randn(16, 8, generator=seeded(5)), some_triplets(16, 5, "random")
    oracle = MarginLoss(margin=0.2, beta=beta, learn_beta=True)
    expected = oracle(embeddings, torch.zeros(16), indices_tuple=tuple(torch.tensor(triples(triplets)).T))
    expected.backward()
    trained = torch.tensor(beta, requires_grad=True)
    ours, _ = margin_loss(embeddings, triplets, trained, 0.2)
    ours.backward()
    torch.testing.assert_close(ours, expected.squeeze(), rtol=1e-5, atol=1e-6)
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, oracle.beta.grad.squeeze(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degrees", [30.0, 45.0])
def test_angular_loss_equals_pytorch_metric_learning(degrees: float) -> None:
    """It takes every ECG of another class as a negative, and leaves negatives at their own length: give it length 1."""
    embeddings = torch.nn.functional.normalize(torch.randn(16, 8, generator=seeded(6)), dim=1)
    label = torch.arange(16) % 3
    different = label[:, None] != label[None, :]
    positive = (torch.arange(16) + 3) % 15  # of the same class
    positive[15] = 0
    assert (label[positive] == label).all()
    triplets = Triplets(positive, different, torch.ones(16, dtype=torch.bool))
    indices = torch.arange(16), positive, torch.arange(16), different.int().argmax(1)  # pairs: its negatives by label
    expected = AngularLoss(alpha=degrees)(embeddings, label, indices_tuple=indices)
    ours, _ = angular_loss(7 * embeddings, triplets, degrees)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- gradients


@every_loss
@pytest.mark.parametrize("kind", ["equal", "zero", "two"])
def test_gradients_are_finite_at_duplicates_and_zeros(kind: str, loss: Loss) -> None:
    embeddings = {
        "equal": torch.ones(6, 4),
        "zero": torch.zeros(6, 4),
        "two": torch.eye(2, 4).repeat(3, 1),
    }[kind].requires_grad_(True)
    value, _ = loss(embeddings, some_triplets(6, 1))
    value.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert value > 0


@every_loss
def test_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    embeddings = torch.randn(7, 3, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    triplets = some_triplets(7, 3)
    assert torch.autograd.gradcheck(lambda e: loss(e, triplets)[0], (embeddings,))


@every_loss
@pytest.mark.parametrize(("batch", "teaches"), [(1, False), (2, False), (3, True)])
def test_a_batch_too_small_for_triplets_teaches_nothing(batch: int, teaches: bool, loss: Loss) -> None:
    embeddings = torch.randn(batch, 4, generator=seeded(0), requires_grad=True)
    value, seen = loss(embeddings, some_triplets(batch, 0, "random"))
    value.backward()
    assert embeddings.grad is not None
    assert bool(value > 0) == bool(embeddings.grad.any()) == bool(seen.usable_share > 0) == teaches
    assert summarise([seen])["skipped_batches"] == (not teaches)


@every_loss
def test_anchors_that_are_not_usable_feel_no_force_of_their_own(loss: Loss) -> None:
    """The last ECG is nobody's: neither the loss nor a gradient knows it."""
    places = torch.rand(6, 3, generator=seeded(1))
    distance = torch.cdist(places, places)
    distance[-1] = distance[:, -1] = math.inf
    triplets = mine(distance, torch.zeros(6, 6, dtype=torch.bool), "beyond_nearest", seeded(0))
    embeddings = torch.randn(6, 4, generator=seeded(2), requires_grad=True)
    value, _ = loss(embeddings, triplets)
    value.backward()
    assert embeddings.grad is not None
    assert not embeddings.grad[-1].any()
    assert embeddings.grad[:-1].any()
    without = Triplets(triplets.positive[:5], triplets.negatives[:5, :5], triplets.usable[:5])
    torch.testing.assert_close(loss(embeddings[:5], without)[0], value)


@every_loss
def test_under_autocast_it_is_that_of_full_precision(loss: Loss) -> None:
    embeddings, triplets, losses = torch.randn(16, 32, generator=seeded(1)), some_triplets(16, 0), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(loss(embeddings, triplets)[0])
    assert losses[0] == losses[1]


# ---- health


@every_loss
def test_diagnostics_tell_spread_from_collapse_and_hubs_from_none(loss: Loss) -> None:
    spread, alike = torch.eye(20), torch.ones(20, 20) + 0.01 * torch.eye(20)
    triplets = some_triplets(20, 0)
    hub = Triplets(torch.zeros(20, dtype=torch.long), triplets.negatives, triplets.usable)
    ring = Triplets(torch.arange(20).roll(1), triplets.negatives, triplets.usable)
    _, healthy = loss(spread, ring)
    _, sick = loss(alike, hub)
    assert float(healthy.mean_cosine) == pytest.approx(0, abs=1e-6)
    assert float(sick.mean_cosine) == pytest.approx(1, abs=1e-3)
    assert float(healthy.hub_share) == pytest.approx(1 / 19)
    assert float(sick.hub_share) == 1.0
    assert (float(healthy.max_in_degree), float(sick.max_in_degree)) == (1.0, 19.0)
    assert float(sick.violating_share) == 1.0
    assert float(sick.usable_share) == pytest.approx(19 / 20)


def diagnostics(violating: float, cosine: float, usable: float = 1.0) -> Diagnostics:
    return Diagnostics(*(torch.tensor(value) for value in (violating, cosine, 0.2, 5.0, usable)))


@pytest.mark.parametrize(
    ("violating", "cosine", "warned"),
    [
        (0.7, 0.6, True),
        (0.7, 0.1, False),
        (0.1, 0.6, False),
        (0.1, 0.0, False),
        (math.nan, 0.1, False),
        (math.nan, 0.7, False),
        (math.nan, 0.999, True),
        (math.nan, math.nan, False),
    ],
)
def test_collapse_is_warned_of_and_health_is_not(violating: float, cosine: float, warned: bool) -> None:
    warning = collapse_warning(summarise([diagnostics(violating, cosine)]))
    assert (warning is not None) == warned
    assert warning is None or "nan" not in warning


def test_summary_leaves_skipped_batches_out_of_the_means() -> None:
    summary = summarise([diagnostics(0.2, 0.1), diagnostics(0.4, 0.3), diagnostics(0.0, 0.9, usable=0.0)])
    assert summary["violating_share"] == pytest.approx(0.3)
    assert summary["mean_cosine"] == pytest.approx(0.2)
    assert summary["usable_share"] == pytest.approx(2 / 3)
    assert summary["skipped_batches"] == 1
    assert collapse_warning(summarise([])) is None
    assert set(summary) == {field.name for field in fields(Diagnostics)} | {"skipped_batches"}
