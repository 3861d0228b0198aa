"""Mining, losses and the pretraining step against explicit loops and pytorch-metric-learning."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch import Tensor

from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.objectives.augmentations import augment, random_crop, random_gain, random_noise
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.losses import Diagnostics, collapse_warning, summarise, triplet_loss
from shared_model.objectives.mining import Triplets, mine
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.objectives.step import Batch, Parts, pretraining_step
from tests.twins import draw_twins

MODES = ("farthest", "random", "beyond_nearest")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ecgs(count: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(count, 12, 2500, generator=seeded(seed))


def distances(batch: int, seed: int) -> Tensor:
    places = torch.rand(batch, 3, generator=seeded(seed))
    return torch.cdist(places, places)


@pytest.fixture(scope="module")
def twins() -> tuple[Tensor, Tensor]:
    return draw_twins(16)


# ---- mining


def slow_mine(distance: Tensor, same_record: Tensor, mode: str, k: int, share: float) -> list[tuple[int, set[int]]]:
    """For each anchor its positive (-1: none) and the set its negatives are drawn from."""
    rows = []
    for i in range(len(distance)):
        others = [j for j in range(len(distance)) if j != i and not same_record[i, j] and math.isfinite(distance[i, j])]
        others.sort(key=lambda j: float(distance[i, j]))
        if not others:
            rows.append((-1, set()))
            continue
        skipped = max(1, math.ceil(share * len(others)))
        pool = {"farthest": others[1:][-k:], "random": others[1:], "beyond_nearest": others[skipped:]}[mode]
        rows.append((others[0], set(pool)))
    return rows


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 24),
    records=st.integers(1, 24),
    mode=st.sampled_from(MODES),
    k=st.integers(1, 5),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
def test_mining_equals_a_loop(batch: int, records: int, mode: str, k: int, share: float, seed: int) -> None:
    distance = distances(batch, seed)
    distance[torch.rand(batch, batch, generator=seeded(seed)) < 0.1] = math.inf
    record = torch.randint(records, (batch,), generator=seeded(seed + 1))
    same_record = record[:, None] == record[None, :]
    triplets = mine(distance, same_record, mode, seeded(seed), k, float(np.float32(share)))
    expected = slow_mine(distance, same_record, mode, k, float(np.float32(share)))
    for i, (positive, pool) in enumerate(expected):
        chosen = set(triplets.negatives[i].nonzero()[:, 0].tolist())
        assert bool(triplets.usable[i]) == bool(pool)
        if not pool:
            assert not chosen
            continue
        assert int(triplets.positive[i]) == positive
        assert chosen == pool if mode == "beyond_nearest" else (chosen <= pool and len(chosen) == 1)


@pytest.mark.parametrize("mode", ["farthest", "random"])
def test_negatives_are_drawn_uniformly_and_again_under_the_same_seed(mode: str) -> None:
    distance, nobody = distances(8, 0), torch.zeros(8, 8, dtype=torch.bool)
    generator = seeded(1)
    drawn = torch.stack([mine(distance, nobody, mode, generator, farthest_k=3).negatives for _ in range(600)])
    pools = slow_mine(distance, nobody, mode, 3, 0.1)
    for i, (_, pool) in enumerate(pools):
        share = drawn[:, i].float().mean(0)[sorted(pool)]
        assert (share - 1 / len(pool)).abs().max() < 0.09  # 4 SD of a share from 600 draws
    first, again = (mine(distance, nobody, mode, seeded(7)).negatives for _ in range(2))
    assert torch.equal(first, again)


def test_segments_of_one_record_are_never_paired() -> None:
    distance = distances(6, 3)
    distance[0, 1] = distance[1, 0] = 0.0  # two segments of one record are the nearest of all
    same_record = torch.zeros(6, 6, dtype=torch.bool)
    assert mine(distance, same_record, "random", seeded(0)).positive[0] == 1
    same_record[0, 1] = same_record[1, 0] = True
    for mode in MODES:
        triplets = mine(distance, same_record, mode, seeded(0))
        assert triplets.positive[0] != 1
        assert not triplets.negatives[0, 1]


# ---- losses


def some_triplets(batch: int, seed: int, mode: str = "beyond_nearest") -> Triplets:
    return mine(distances(batch, seed), torch.zeros(batch, batch, dtype=torch.bool), mode, seeded(seed))


def slow_triplet_loss(embeddings: Tensor, triplets: Triplets, margin: float, distance: str, reduction: str) -> float:
    hinges = []
    for a in range(len(embeddings)):
        for n in triplets.negatives[a].nonzero()[:, 0].tolist():
            if not triplets.usable[a]:
                continue
            p = int(triplets.positive[a])
            if distance == "cosine":
                unit = [embeddings[k].double() / embeddings[k].double().norm() for k in (a, p, n)]
                to_positive, to_negative = 1 - unit[0] @ unit[1], 1 - unit[0] @ unit[2]
            else:
                to_positive, to_negative = ((embeddings[a] - embeddings[k]).double().square().sum() for k in (p, n))
            hinges.append(max(0.0, float(to_positive - to_negative) + margin))
    kept = [hinge for hinge in hinges if hinge > 0] if reduction == "violating" else hinges
    return sum(kept) / len(kept) if kept else 0.0


@pytest.mark.parametrize("reduction", ["violating", "all"])
@pytest.mark.parametrize("distance", ["cosine", "squared_l2"])
@pytest.mark.parametrize("mode", MODES)
def test_triplet_loss_equals_a_loop(mode: str, distance: str, reduction: str) -> None:
    for seed in range(5):
        embeddings = torch.randn(12, 5, generator=seeded(seed))
        triplets = some_triplets(12, seed, mode)
        loss, diagnostics = triplet_loss(embeddings, triplets, 0.3, distance, reduction)
        expected = slow_triplet_loss(embeddings, triplets, 0.3, distance, reduction)
        assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert 0 <= float(diagnostics.violating_share) <= 1


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("reduction", ["violating", "all"])
def test_triplet_loss_equals_pytorch_metric_learning(normalised: bool, reduction: str) -> None:
    embeddings = torch.randn(16, 8, generator=seeded(4))
    triplets = some_triplets(16, 4)
    anchor, negative = triplets.negatives.nonzero(as_tuple=True)
    indices = (anchor, triplets.positive[anchor], negative)
    reducer = AvgNonZeroReducer() if reduction == "violating" else MeanReducer()
    squared = LpDistance(normalize_embeddings=normalised, p=2, power=2)
    # On unit vectors squared L2 is twice the cosine distance: margin 0.6 is ours of 0.3, the loss twice ours.
    factor = 2.0 if normalised else 1.0
    oracle = TripletMarginLoss(0.3 * factor, distance=squared, reducer=reducer)
    expected = oracle(embeddings, torch.zeros(16), indices_tuple=indices) / factor
    ours, _ = triplet_loss(embeddings, triplets, 0.3, "cosine" if normalised else "squared_l2", reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "squared_l2"])
@pytest.mark.parametrize("kind", ["equal", "zero", "two"])
def test_gradients_are_finite_at_duplicates_and_zeros(kind: str, distance: str) -> None:
    embeddings = {
        "equal": torch.ones(6, 4),
        "zero": torch.zeros(6, 4),
        "two": torch.eye(2, 4).repeat(3, 1),
    }[kind].requires_grad_(True)
    loss, _ = triplet_loss(embeddings, some_triplets(6, 1), 0.3, distance)
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert loss > 0


def test_diagnostics_tell_spread_from_collapse_and_hubs_from_none() -> None:
    spread, alike = torch.eye(20), torch.ones(20, 20) + 0.01 * torch.eye(20)
    triplets = some_triplets(20, 0)
    hub = Triplets(torch.zeros(20, dtype=torch.long), triplets.negatives, triplets.usable)
    ring = Triplets(torch.arange(20).roll(1), triplets.negatives, triplets.usable)
    _, healthy = triplet_loss(spread, ring, 0.3)
    _, sick = triplet_loss(alike, hub, 0.3)
    assert float(healthy.mean_cosine) == pytest.approx(0, abs=1e-6)
    assert float(sick.mean_cosine) == pytest.approx(1, abs=1e-3)
    assert float(healthy.hub_share) == pytest.approx(1 / 20)
    assert float(sick.hub_share) == 1.0
    assert (float(healthy.max_in_degree), float(sick.max_in_degree)) == (1.0, 20.0)
    assert float(sick.violating_share) == 1.0


def diagnostics(violating: float, cosine: float, usable: float = 1.0) -> Diagnostics:
    return Diagnostics(*(torch.tensor(value) for value in (violating, cosine, 0.2, 5.0, usable)))


@pytest.mark.parametrize(
    ("violating", "cosine", "warned"),
    [(0.7, 0.6, True), (0.7, 0.1, False), (0.1, 0.6, False), (0.1, 0.0, False)],
)
def test_collapse_is_warned_of_and_health_is_not(violating: float, cosine: float, warned: bool) -> None:
    assert (collapse_warning(summarise([diagnostics(violating, cosine)])) is not None) == warned


def test_summary_leaves_skipped_batches_out_of_the_means() -> None:
    summary = summarise([diagnostics(0.2, 0.1), diagnostics(0.4, 0.3), diagnostics(0.0, 0.9, usable=0.0)])
    assert summary["violating_share"] == pytest.approx(0.3)
    assert summary["mean_cosine"] == pytest.approx(0.2)
    assert summary["usable_share"] == pytest.approx(2 / 3)
    assert summary["skipped_batches"] == 1
    assert collapse_warning(summarise([])) is None


# ---- views


def test_crop_takes_a_window_of_each_ecg_at_its_own_place() -> None:
    ramp = torch.arange(2500.0).expand(30, 12, 2500)
    cropped = random_crop(ramp, seeded(0))
    assert cropped.shape == (30, 12, 2250)
    assert (cropped.diff(dim=2) == 1).all()
    starts = cropped[:, 0, 0]
    assert starts.unique().numel() > 20
    assert starts.min() >= 0
    assert starts.max() <= 250
    assert (cropped == cropped[:, :1]).all()  # all leads of an ECG alike


def test_gain_is_one_factor_an_ecg_and_noise_leaves_missing_samples_missing() -> None:
    ecgs = random_ecgs(20)
    factor = random_gain(ecgs, seeded(0)) / ecgs
    assert (factor.amax((1, 2)) - factor.amin((1, 2))).max() < 1e-4
    assert 0.899 <= factor.min() < factor.max() <= 1.101
    ecgs[:, 3] = 0
    noisy = random_noise(ecgs, seeded(0))
    assert (noisy[:, 3] == 0).all()
    assert float((noisy - ecgs)[:, 0].std()) == pytest.approx(0.01, rel=0.05)


def test_augmentation_follows_from_the_seed() -> None:
    ecgs = random_ecgs(4)
    assert torch.equal(augment(ecgs, seeded(1)), augment(ecgs, seeded(1)))
    assert not torch.equal(augment(ecgs, seeded(1)), augment(ecgs, seeded(2)))


# ---- catalogue


def step(
    ecgs: Tensor, record: Tensor | None = None, seed: int = 0, **options: object
) -> tuple[Tensor, Diagnostics, torch.nn.Module]:
    objective = ObjectiveSettings.model_validate(options)
    encoder = build_encoder(EncoderSettings(), seed=1)
    codes = torch.arange(len(ecgs)) if record is None else record
    batch = Batch(ecgs, objective.relation.describe(ecgs, ecgs != 0), codes)
    torch.manual_seed(seed)  # dropout
    loss, seen = pretraining_step(objective, Parts(encoder, encoder, {}), batch, seeded(seed))
    loss.backward()
    return loss.detach(), seen, encoder


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_too_small_for_triplets_teaches_nothing_and_harms_nothing(
    batch: int, twins: tuple[Tensor, Tensor]
) -> None:
    loss, seen, encoder = step(twins[0][:batch])
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in encoder.parameters())
    assert summarise([seen])["skipped_batches"] == 1


def test_a_batch_of_one_record_teaches_nothing(twins: tuple[Tensor, Tensor]) -> None:
    loss, seen, _ = step(twins[0][:6], record=torch.zeros(6))
    assert loss == 0
    assert float(seen.usable_share) == 0
    assert step(twins[0][:6])[0] > 0  # the same six as six records do


def test_a_step_is_deterministic_under_its_seed(twins: tuple[Tensor, Tensor]) -> None:
    ecgs = twins[0][:8]
    options = {"name": "ssl_dml_l1", "negatives": "random"}
    first, again, other = (step(ecgs, seed=seed, **options) for seed in (1, 1, 2))
    assert first[0] == again[0]
    gradients = [[parameter.grad for parameter in run[2].parameters()] for run in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert first[0] != other[0]


def test_an_ecg_without_beats_is_nobodys_positive_or_negative(twins: tuple[Tensor, Tensor]) -> None:
    ecgs = twins[0][:8].clone()
    ecgs[5] = 0
    relation = RELATIONS["median_beat"]
    distance = relation.distance(relation.describe(ecgs, ecgs != 0))
    triplets = mine(distance, torch.eye(8, dtype=torch.bool), "beyond_nearest", seeded(0))
    assert triplets.usable.tolist() == [i != 5 for i in range(8)]
    assert not triplets.negatives[:, 5].any()
    assert 5 not in triplets.positive[triplets.usable].tolist()


def test_mining_under_autocast_is_that_of_full_precision() -> None:
    objective = ObjectiveSettings(name="ssl_dml_l2")
    descriptors = 5 + 0.1 * torch.randn(16, objective.relation.width, generator=seeded(0))  # near one another
    embeddings = torch.randn(16, 32, generator=seeded(1))
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoder = torch.nn.Identity()
            batch = Batch(embeddings, descriptors, torch.arange(16))
            losses.append(pretraining_step(objective, Parts(encoder, encoder, {}), batch, seeded(0))[0])
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_the_gpu_mines_as_on_the_cpu(twins: tuple[Tensor, Tensor]) -> None:
    ecgs = twins[0][:16]
    objective = ObjectiveSettings()
    descriptors = objective.relation.describe(ecgs, torch.ones_like(ecgs, dtype=torch.bool))
    losses = []
    for device in ("cpu", "cuda"):
        encoder = build_encoder(EncoderSettings(dropout=0.0), seed=1).to(device)
        batch = Batch(*(value.to(device) for value in (ecgs, descriptors, torch.arange(16))))
        loss, _ = pretraining_step(objective, Parts(encoder, encoder, {}), batch, seeded(0))
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_settings_start_from_the_row_and_refuse_what_is_unknown() -> None:
    assert ObjectiveSettings().method is METHODS["ssl_dml_median_beat"]
    assert ObjectiveSettings(name="ssl_dml_dtw", margin=1.0).margin == 1.0
    with pytest.raises(ValidationError, match=r"use one of .*ssl_dml_l1"):
        ObjectiveSettings(name="ssl_dml")
    with pytest.raises(ValidationError, match="unknown objective"):
        ObjectiveSettings.model_validate({"name": ["ssl_dml_l1"]})
    with pytest.raises(ValidationError, match="farthest"):
        ObjectiveSettings(negatives="nearest")
    with pytest.raises(ValidationError, match="margins"):
        ObjectiveSettings(margins=0.3)
