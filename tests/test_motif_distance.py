"""RelCon's distance: against loops, what is missing, what amplitude does, and that it learns whose an ECG is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_model import motif_distance
from shared_model.encoder import EncoderSettings
from shared_model.motif_distance import (
    MOTIF_SAMPLES,
    MotifDistance,
    MotifNet,
    looked_at,
    motif_loss,
    squared_error,
)
from shared_model.objectives.augmentations import disturb
from tests.twins import draw_twins


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 1, preset: str = "small") -> MotifDistance:
    torch.manual_seed(seed)
    return MotifDistance(EncoderSettings.model_validate({"preset": preset}))


@pytest.fixture(scope="module")
def twins() -> tuple[Tensor, Tensor]:
    return draw_twins(48)


# ---- what is looked at


def test_the_middle_is_looked_at_slowly_and_without_aliases() -> None:
    seconds = torch.arange(2500) / 250
    slow, fast = (torch.sin(2 * math.pi * f * seconds).expand(1, 12, 2500) for f in (5.0, 55.0))
    start = (625 - MOTIF_SAMPLES) // 2
    torch.testing.assert_close(looked_at(slow), slow[..., ::4][..., start : start + 250], atol=0.01, rtol=0)
    assert float(looked_at(fast).abs().max()) < 0.01  # would come out at 7.5 Hz
    for time in (1250, 2250, 2500):
        assert looked_at(torch.randn(2, 12, time)).shape == (2, 12, 250)
    with pytest.raises(ValueError, match="4 s"):
        looked_at(torch.randn(2, 12, 999))


def test_the_field_of_the_published_settings_is_57_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motif_distance, "_instance_norm", lambda x: x)  # its statistics run over all time
    x = torch.randn(1, 12, 250, generator=seeded(0)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(MotifNet(64)(x)[0, 125].sum(), x)
    assert gradient.abs().sum((0, 1)).nonzero()[:, 0].tolist() == list(range(125 - 28, 125 + 29))


# ---- the distance


def slow_attention(motif: MotifDistance, anchor: Tensor, candidate: Tensor) -> Tensor:
    """One anchor from one candidate, (12, 250) each, by the formulas."""
    mean, sd = candidate.mean(-1, keepdim=True), candidate.std(-1, keepdim=True)
    mine, theirs = (anchor - mean) / sd, (candidate - mean) / sd
    query, key, value = motif.query(mine[None])[0], motif.key(theirs[None])[0], motif.value(theirs[None])[0]
    rows = []
    for sample in range(len(query)):
        weight = (key @ query[sample] / math.sqrt(query.shape[1])).softmax(0)
        rows.append(motif.output(weight @ value))
    return torch.stack(rows, 1) * sd + mean


@pytest.mark.parametrize("preset", ["small", "resnet18"])
def test_the_matrix_equals_a_loop_over_pairs_and_chunks_do_not_matter(
    twins: tuple[Tensor, Tensor], preset: str
) -> None:
    motif, ecgs = network(preset=preset).eval(), twins[0][:4]
    whole = motif.distance_matrix(ecgs)
    assert whole.dtype == torch.float32
    with torch.no_grad():
        for i, anchor in enumerate(looked_at(ecgs)):
            for j, candidate in enumerate(looked_at(ecgs)):
                error = (slow_attention(motif, anchor, candidate) - anchor).square()
                assert float(whole[i, j]) == pytest.approx(float(error.mean(-1).sum()), rel=1e-3)
        one_by_one = motif.rebuild(looked_at(ecgs), looked_at(ecgs).roll(1, 0))
        expected = squared_error(one_by_one, looked_at(ecgs), looked_at(ecgs).roll(1, 0))
    torch.testing.assert_close(expected, whole[torch.arange(4), torch.arange(4).roll(1)], rtol=1e-4, atol=1e-5)
    for chunk in (1, 3, 100):
        torch.testing.assert_close(motif.distance_matrix(ecgs, chunk), whole, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole, whole.T, rtol=1e-3)


def test_dropout_is_on_in_training_alone_and_never_in_the_matrix(twins: tuple[Tensor, Tensor]) -> None:
    motif, ecgs = network().train(), twins[0][:4]
    assert torch.equal(motif.distance_matrix(ecgs), motif.distance_matrix(ecgs))
    assert motif.training
    assert float(motif_loss(motif, ecgs, ecgs)) != float(motif_loss(motif, ecgs, ecgs))
    motif.eval()
    assert float(motif_loss(motif, ecgs, ecgs)) == float(motif_loss(motif, ecgs, ecgs))
    motif.distance_matrix(ecgs)
    assert not motif.training


def test_none_and_one_ecg_have_a_matrix() -> None:
    motif = network()
    assert motif.distance_matrix(torch.zeros(0, 12, 2500)).shape == (0, 0)
    assert motif.distance_matrix(torch.randn(1, 12, 2500, generator=seeded(0))).isfinite().all()


def test_the_candidates_amplitude_and_offset_count(twins: tuple[Tensor, Tensor]) -> None:
    motif, ecgs = network().eval(), looked_at(twins[0][:6])
    with torch.no_grad():
        rebuilt = motif.rebuild(ecgs, ecgs)
        louder = motif.rebuild(2 * ecgs + 0.1, 2 * ecgs + 0.1)
        torch.testing.assert_close(louder, 2 * rebuilt + 0.1, rtol=1e-2, atol=1e-3)  # all is relative to the candidate
        far = squared_error(motif.rebuild(ecgs, 4 * ecgs + 1), ecgs, 4 * ecgs + 1)
        assert (far > squared_error(rebuilt, ecgs, ecgs)).all()


# ---- missing leads


def test_missing_leads_are_left_out_and_the_rest_is_scaled_to_twelve(twins: tuple[Tensor, Tensor]) -> None:
    motif, ecgs = network().eval(), twins[0][:3].clone()
    ecgs[0, :6], ecgs[1, 6:] = 0, 0
    distance = motif.distance_matrix(ecgs)
    assert math.isinf(distance[0, 1])
    assert math.isinf(distance[1, 0])
    assert distance[[0, 2, 0, 2, 1], [0, 2, 2, 0, 2]].isfinite().all()
    slow = looked_at(ecgs)
    with torch.no_grad():
        error = (motif.rebuild(slow[2:], slow[:1]) - slow[2:]).square().mean(-1)[0]
    assert float(distance[2, 0]) == pytest.approx(2 * float(error[6:].sum()), rel=1e-4)


def test_what_the_other_has_in_a_missing_lead_does_not_matter(twins: tuple[Tensor, Tensor]) -> None:
    motif, lacking = network().eval(), looked_at(twins[0][:1]).clone()
    lacking[:, 3] = 0
    others = looked_at(twins[0][1:2])
    changed = others.clone()
    changed[:, 3] = 5 * changed[:, 3] + 1
    with torch.no_grad():
        as_anchors = [squared_error(motif.rebuild(x, lacking), x, lacking) for x in (others, changed)]
    assert torch.equal(*as_anchors)


@settings(deadline=None, max_examples=25)
@given(leads=st.integers(0, 2**12 - 1), other=st.integers(0, 2**12 - 1), seed=st.integers(0, 2**31))
def test_the_error_equals_a_loop(leads: int, other: int, seed: int) -> None:
    rebuilt, anchor, candidate = torch.randn(3, 1, 12, 20, generator=seeded(seed))
    for lead in range(12):
        anchor[:, lead] *= leads >> lead & 1
        candidate[:, lead] *= other >> lead & 1
    shared = [lead for lead in range(12) if (leads & other) >> lead & 1]
    errors = [sum(float(v) ** 2 for v in (rebuilt - anchor)[0, lead]) / 20 for lead in shared]
    expected = 12 * sum(errors) / len(errors) if errors else math.inf
    assert float(squared_error(rebuilt, anchor, candidate)) == pytest.approx(expected, rel=1e-4)


# ---- training


@pytest.mark.parametrize("preset", ["small", "resnet18"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_reach_every_parameter_also_with_blank_leads(preset: str, batch: int) -> None:
    motif = network(preset=preset)
    x = 0.3 * torch.randn(batch, 12, 2250, generator=seeded(0))
    x[:, 2] = 0
    motif_loss(motif, x, disturb(x, seeded(1))).backward()
    for name, parameter in motif.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.any() for name, p in motif.named_parameters() if name.endswith("weight"))


def test_a_batch_that_shares_no_lead_gives_loss_and_gradient_0() -> None:
    motif = network()
    loss = motif_loss(motif, torch.randn(2, 12, 2500), torch.zeros(2, 12, 2500))
    loss.backward()
    assert float(loss) == 0
    assert all(not p.grad.any() for p in motif.parameters())


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_it_learns_whose_an_ecg_is(twins: tuple[Tensor, Tensor], seed: int) -> None:
    """Of ECGs it has not seen the disturbed copy, and even another ECG of the same heart, becomes the nearest for most;
    before training it is for few."""
    motif, (ecgs, others) = network(seed), twins
    copies = disturb(ecgs[32:], seeded(seed))

    def nearest(second: Tensor) -> float:
        distance = motif.distance_matrix(torch.cat([ecgs[32:], second]))[:16, 16:]
        return float((distance.argmin(1) == torch.arange(16)).float().mean())

    before = nearest(copies), nearest(others[32:])
    optimizer, generator, losses = torch.optim.AdamW(motif.parameters(), lr=1e-3), seeded(seed), []
    motif.train()
    for _ in range(50):
        loss = motif_loss(motif, ecgs[:32], disturb(ecgs[:32], generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert max(before) < 0.5
    assert min(nearest(copies), nearest(others[32:])) > 0.5
