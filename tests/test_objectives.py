"""The weak augmentations, the pretraining step of triplet rows, and the `[objective]` table."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.objectives.augmentations import augment, random_crop, random_gain, random_noise
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.losses import Diagnostics, summarise
from shared_model.objectives.mining import mine
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.objectives.step import Batch, Parts, pretraining_step
from tests.twins import draw_twins


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ecgs(count: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(count, 12, 2500, generator=seeded(seed))


@pytest.fixture(scope="module")
def twins() -> tuple[Tensor, Tensor]:
    return draw_twins(16)


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
