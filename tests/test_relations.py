"""Distances between ECGs against loops over pairs, and whether they find an ECG's twin."""

import math

import pytest
import torch
from torch import Tensor

from shared_model.beats import DESCRIBED_SAMPLES, DESCRIPTOR_WIDTH
from shared_model.objectives.relations import RELATIONS
from tests.twins import draw_twins


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def twins() -> tuple[Tensor, Tensor]:
    return draw_twins(256)


def slow_distance(name: str, a: Tensor, b: Tensor) -> float:
    """One pair over the leads both have: a, b (lead, time)."""
    shared = [lead for lead in range(len(a)) if a[lead].any() and b[lead].any()]
    if not shared:
        return math.inf
    difference = (a[shared] - b[shared]).double()
    if name == "l1":
        return float(difference.abs().mean())
    return float((difference.square().sum() * 12 / len(shared)).sqrt())


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_raw_distances_equal_a_loop_over_pairs_also_with_missing_leads(name: str) -> None:
    ecgs = 0.3 * torch.randn(6, 12, 2500, generator=seeded(0))
    ecgs[0, 3] = 0
    ecgs[1, :6] = 0
    ecgs[2, 6:] = 0
    ecgs[3] = 0
    relation = RELATIONS[name]
    described = relation.describe(ecgs, ecgs != 0)
    assert described.shape == (6, relation.width)
    rows = described.reshape(6, 12, 625)
    expected = torch.tensor([[slow_distance(name, a, b) for b in rows] for a in rows]).fill_diagonal_(0)
    torch.testing.assert_close(relation.distance(described), expected, rtol=1e-4, atol=1e-4)


def test_median_beat_distance_equals_a_loop_over_pairs() -> None:
    described = torch.randn(5, DESCRIPTOR_WIDTH, generator=seeded(1))
    beats = described[:, :-2].reshape(5, 12, DESCRIBED_SAMPLES)
    beats[0, 4] = 0
    beats[1] = 0  # no beat was found: incomparable
    expected = torch.zeros(5, 5)
    for i in range(5):
        for j in range(5):
            rhythm = float((described[i, -2:] - described[j, -2:]).square().sum())
            expected[i, j] = math.sqrt(slow_distance("l2", beats[i], beats[j]) ** 2 + rhythm) if i != j else 0.0
    torch.testing.assert_close(RELATIONS["median_beat"].distance(described), expected, rtol=1e-4, atol=1e-4)
    assert RELATIONS["median_beat"].distance(described)[1, 2] == math.inf


@pytest.mark.parametrize("name", sorted(name for name, relation in RELATIONS.items() if not relation.learned))
def test_every_relation_is_a_distance(name: str) -> None:
    """A learned one is not symmetric: tests/test_motif_distance.py."""
    relation = RELATIONS[name]
    described = torch.randn(7, relation.width, generator=seeded(2))
    described[6] = math.nan if relation.facts else 0  # what is unknown is compared with nobody
    described.requires_grad_(True)
    distance = relation.distance(described)
    assert not distance.requires_grad
    assert (distance.diagonal()[:6] == 0).all()
    torch.testing.assert_close(distance, distance.T)
    assert (distance[6, :6] == math.inf).all()
    assert (distance[:6, :6] + torch.eye(6) > 0).all()


@pytest.mark.parametrize("name", ["l2", "median_beat"])
def test_a_duplicate_is_at_no_distance(name: str) -> None:
    described = 3 * torch.randn(1, RELATIONS[name].width, generator=seeded(3)).expand(2, -1).contiguous()
    assert RELATIONS[name].distance(described).max() < 0.1


def test_raw_description_does_not_alias() -> None:
    """40 Hz is above the Nyquist frequency of 62.5 Hz sampling: unfiltered it would come back as 22.5 Hz."""
    time_s = torch.arange(2500) / 250
    slow, fast = (torch.sin(2 * math.pi * hz * time_s).expand(1, 12, 2500) for hz in (10.0, 40.0))
    present = torch.ones(1, 12, 2500, dtype=torch.bool)
    describe = RELATIONS["l2"].describe
    assert describe(slow, present).std() > 0.65
    assert describe(fast, present).std() < 0.05


@pytest.mark.parametrize(("name", "low", "high"), [("median_beat", 0.9, 1.0), ("l1", 0.0, 0.2)])
def test_which_relation_finds_an_ecgs_twin_among_256(
    name: str, low: float, high: float, twins: tuple[Tensor, Tensor]
) -> None:
    relation = RELATIONS[name]
    described = torch.cat([relation.describe(ecgs, torch.ones_like(ecgs, dtype=torch.bool)) for ecgs in twins])
    across = relation.distance(described)[:256, 256:]
    recall = float((across.argmin(1) == torch.arange(256)).float().mean())
    assert low <= recall <= high
