"""Which ECG becomes whose positive and negative, against an explicit loop and pytorch-metric-learning."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor

from shared_model.objectives.mining import Triplets, mine

MODES = ("farthest", "random", "beyond_nearest", "semihard", "softhard")
PICKED = ("farthest", "random", "semihard", "softhard")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nobody(batch: int) -> Tensor:
    return torch.zeros(batch, batch, dtype=torch.bool)


def distances(batch: int, seed: int, kind: str = "places") -> Tensor:
    """Of places in space, of labels in whole mmHg (which tie), or of two classes."""
    if kind == "places":
        places = torch.rand(batch, 3, generator=seeded(seed))
        return torch.cdist(places, places)
    label = torch.randint(6 if kind == "labels" else 2, (batch,), generator=seeded(seed)).float()
    return (label[:, None] - label[None, :]).abs()


def cosine_distance(embeddings: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    return 1 - unit @ unit.T


def between(embeddings: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return cosine_distance(embeddings)
    return (embeddings[:, None] - embeddings[None, :]).square().sum(-1)


@dataclass(frozen=True)
class Rules:
    positives: str
    negatives: str
    farthest_k: int
    nearest_share: float
    margin: float
    apart: str = "cosine"


def allowed_positives(d: Tensor, hard: Tensor, i: int, others: list[int], rules: Rules) -> set[int]:
    if rules.positives == "nearest":
        return {min(others, key=lambda j: float(d[i, j]))} if others else set()
    same = [j for j in others if d[i, j] == 0]
    different = [j for j in others if d[i, j] > 0]
    if rules.negatives == "softhard" and different:
        nearest_negative = min(float(hard[i, j]) for j in different)
        return {j for j in same if hard[i, j] > nearest_negative} or set(same)
    return set(same)


def allowed_negatives(d: Tensor, hard: Tensor, i: int, p: int, others: list[int], rules: Rules) -> set[int]:
    rest = [j for j in others if d[i, j] > d[i, p]]
    match rules.negatives:
        case "random":
            return set(rest)
        case "farthest":
            return {j for j in rest if sum(bool(d[i, other] > d[i, j]) for other in rest) < rules.farthest_k}
        case "beyond_nearest":
            skipped = max(1, math.ceil(np.float32(rules.nearest_share) * np.float32(len(others))))
            return set(sorted(others, key=lambda j: float(d[i, j]))[skipped:]) & set(rest)
        case "semihard":
            beyond = [j for j in rest if hard[i, j] > hard[i, p]]
            inside = {j for j in beyond if hard[i, j] < hard[i, p] + rules.margin}
            if inside or not rest:
                return inside
            return {min(beyond, key=lambda j: float(hard[i, j])) if beyond else max(rest, key=lambda j: hard[i, j])}
        case "softhard":
            same = [float(hard[i, j]) for j in others if d[i, j] == 0]
            return {j for j in rest if same and float(hard[i, j]) < max(same)} or set(rest)
    raise KeyError(rules.negatives)


@settings(deadline=None, max_examples=300)
@given(
    batch=st.integers(1, 20),
    records=st.integers(1, 24),
    kind=st.sampled_from(("places", "labels", "classes")),
    rules=st.builds(
        Rules,
        positives=st.sampled_from(("nearest", "random")),
        negatives=st.sampled_from(MODES),
        farthest_k=st.integers(1, 5),
        nearest_share=st.floats(0, 0.875, width=32),
        margin=st.floats(0.01, 1),
        apart=st.sampled_from(("cosine", "squared_l2")),
    ),
    seed=st.integers(0, 2**31),
)
def test_mining_equals_a_loop(batch: int, records: int, kind: str, rules: Rules, seed: int) -> None:
    distance = distances(batch, seed, kind)
    distance[torch.rand(batch, batch, generator=seeded(seed)) < 0.1] = math.inf
    record = torch.randint(records, (batch,), generator=seeded(seed + 1))
    same_record = record[:, None] == record[None, :]
    embeddings = torch.randn(batch, 3, generator=seeded(seed + 2))
    hard = between(embeddings, rules.apart)
    triplets = mined(distance, same_record, rules, embeddings, seed)
    for i in range(batch):
        others = [j for j in range(batch) if j != i and not same_record[i, j] and math.isfinite(distance[i, j])]
        chosen = set(triplets.negatives[i].nonzero()[:, 0].tolist())
        positive = int(triplets.positive[i])
        positives = allowed_positives(distance, hard, i, others, rules)
        if not triplets.usable[i]:
            # whatever the positive, nothing is left to push away from
            assert not chosen
            assert not any(allowed_negatives(distance, hard, i, p, others, rules) for p in positives)
            continue
        assert positive in positives
        pool = allowed_negatives(distance, hard, i, positive, others, rules)
        assert chosen == pool if rules.negatives == "beyond_nearest" else (chosen <= pool and len(chosen) == 1)


def mined(distance: Tensor, same_record: Tensor, rules: Rules, embeddings: Tensor, seed: int) -> Triplets:
    return mine(
        distance,
        same_record,
        rules.negatives,
        seeded(seed),
        rules.farthest_k,
        rules.nearest_share,
        positives=rules.positives,
        embeddings=embeddings,
        margin=rules.margin,
        embedding_distance=rules.apart,
    )


def shares(drawn: list[Tensor], pool: list[int]) -> Tensor:
    return torch.stack(drawn).float().mean(0)[pool]


@pytest.mark.parametrize("mode", ["farthest", "random", "softhard"])
def test_negatives_are_drawn_uniformly_and_again_under_the_same_seed(mode: str) -> None:
    distance, embeddings = distances(8, 0), torch.randn(8, 3, generator=seeded(3))
    generator, rules = seeded(1), Rules("nearest", mode, 3, 0.1, 0.3)
    drawn = [mine(distance, nobody(8), mode, generator, 3, embeddings=embeddings).negatives for _ in range(600)]
    for i in range(8):
        others = [j for j in range(8) if j != i]
        p = min(others, key=lambda j: float(distance[i, j]))
        pool = sorted(allowed_negatives(distance, cosine_distance(embeddings), i, p, others, rules))
        share = shares([each[i] for each in drawn], pool)
        assert (share - 1 / len(pool)).abs().max() < 0.09  # 4 SD of a share from 600 draws
    first, again = (mined(distance, nobody(8), rules, embeddings, 7) for _ in range(2))
    assert torch.equal(first.negatives, again.negatives)


def test_random_positives_are_drawn_uniformly_from_the_class_and_again_under_the_same_seed() -> None:
    distance, generator = distances(8, 5, "classes"), seeded(1)
    drawn = [mine(distance, nobody(8), "random", generator, positives="random").positive for _ in range(600)]
    for i in range(8):
        pool = [j for j in range(8) if j != i and distance[i, j] == 0]
        assert pool
        share = shares([torch.nn.functional.one_hot(each[i], 8) for each in drawn], pool)
        assert (share - 1 / len(pool)).abs().max() < 0.09
        assert float(share.sum()) == pytest.approx(1)
    first, again = (mine(distance, nobody(8), "random", seeded(7), positives="random") for _ in range(2))
    assert torch.equal(first.positive, again.positive)


def test_segments_of_one_record_are_never_paired() -> None:
    distance = distances(6, 3)
    distance[0, 1] = distance[1, 0] = 0.0  # two segments of one record are the nearest of all
    same_record, embeddings = nobody(6), torch.randn(6, 3, generator=seeded(0))
    assert mine(distance, same_record, "random", seeded(0)).positive[0] == 1
    same_record[0, 1] = same_record[1, 0] = True
    for mode in MODES:
        triplets = mine(distance, same_record, mode, seeded(0), embeddings=embeddings)
        assert triplets.positive[0] != 1
        assert not triplets.negatives[0, 1]


@pytest.mark.parametrize("margin", [0.05, 0.3])
def test_semihard_negatives_are_among_those_of_pytorch_metric_learning(margin: float) -> None:
    """On unit vectors squared L2 is twice the cosine distance: its margin is twice ours."""
    label = torch.randint(2, (20,), generator=seeded(0))
    embeddings = torch.randn(20, 4, generator=seeded(1))
    oracle = TripletMarginMiner(2 * margin, "semihard", distance=LpDistance(normalize_embeddings=True, p=2, power=2))
    found: dict[tuple[int, int], set[int]] = {}
    for a, p, n in zip(*(index.tolist() for index in oracle(embeddings, label)), strict=True):
        found.setdefault((a, p), set()).add(n)
    distance = (label[:, None] != label[None, :]).float()
    inside = 0
    for seed in range(20):
        rules = Rules("random", "semihard", 1, 0.1, margin)
        triplets = mined(distance, nobody(20), rules, embeddings, seed)
        assert triplets.usable.all()
        for a, (p, n) in enumerate(zip(triplets.positive.tolist(), triplets.negatives.int().argmax(1), strict=True)):
            if (a, p) in found:
                assert int(n) in found[a, p]
                inside += 1
    assert 50 < inside < 400  # both the rule and its fallback were met


@pytest.mark.parametrize("kind", ["tied", "one class", "one patient", "alone", "incomparable"])
@pytest.mark.parametrize("positives", ["nearest", "random"])
@pytest.mark.parametrize("mode", MODES)
def test_where_nothing_is_farther_than_the_positive_there_is_no_triplet(mode: str, positives: str, kind: str) -> None:
    batch = 1 if kind == "alone" else 5
    distance = {"tied": torch.full((5, 5), 3.0), "incomparable": torch.full((5, 5), math.inf)}.get(
        kind, torch.zeros(batch, batch)
    )
    same_record = torch.ones(5, 5, dtype=torch.bool) if kind == "one patient" else nobody(batch)
    embeddings = torch.randn(batch, 3, generator=seeded(0))
    triplets = mined(distance, same_record, Rules(positives, mode, 2, 0.1, 0.3), embeddings, 0)
    assert not triplets.usable.any()
    assert not triplets.negatives.any()


@pytest.mark.parametrize("mode", ["semihard", "softhard"])
def test_modes_that_look_at_embeddings_ask_for_them(mode: str) -> None:
    with pytest.raises(ValueError, match="embeddings"):
        mine(distances(4, 0), nobody(4), mode, seeded(0))


def test_hard_modes_choose_harder_negatives_than_chance() -> None:
    distance, embeddings = distances(40, 0, "classes"), torch.randn(40, 3, generator=seeded(1))
    hard = cosine_distance(embeddings)
    nearness = {}
    for mode in ("random", "semihard", "softhard"):
        rules = Rules("random", mode, 1, 0.1, 0.3)
        found = [mined(distance, nobody(40), rules, embeddings, seed) for seed in range(30)]
        gaps = [hard[t.negatives] - hard.gather(1, t.positive[:, None])[t.usable, 0] for t in found]
        nearness[mode] = float(torch.cat(gaps).mean())
    assert nearness["softhard"] < nearness["random"]
    assert 0 < nearness["semihard"] < 0.3  # farther than the positive, by less than the margin
