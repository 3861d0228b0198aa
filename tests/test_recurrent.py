"""CPC: what a step sees and knows, the loss against loops, and that it teaches what comes next."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_model import recurrent
from shared_model.encoder import EncoderSettings
from shared_model.errors import HemoFedError
from shared_model.recurrent import STEP_SAMPLES, STRIDES, FuturePredictors, RecurrentEncoder, cpc_loss
from tests.twins import draw_twins

HORIZON = 12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int, time: int = 2500, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(batch, 12, time, generator=seeded(seed))


def networks(seed: int = 1, horizon: int = HORIZON, **changes: object) -> tuple[RecurrentEncoder, FuturePredictors]:
    torch.manual_seed(seed)
    chosen = EncoderSettings.model_validate(changes)
    return RecurrentEncoder(chosen), FuturePredictors(chosen, horizon)


# ---- networks


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("preset", "dim"), [("small", 128), ("small", 7), ("resnet18", 128)])
def test_shapes_and_gradients(preset: str, dim: int, norm: str) -> None:
    encoder, predictors = networks(preset=preset, norm=norm, embedding_dim=dim)
    for time in (1250, 2250, 2500):
        assert encoder(noise(2, time)).shape == (2, dim)
        assert encoder.local(noise(2, time)).shape[1] == time // 16
    loss, _ = cpc_loss(encoder, predictors, noise(3), seeded(0))
    loss.backward()  # the embedding too is trained by it: a probe of the frozen encoder would read a random map
    for part in (encoder, predictors):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    assert math.prod(STRIDES) == STEP_SAMPLES


def test_a_step_sees_its_own_samples_alone_and_the_context_what_was() -> None:
    """What the network saw of the future it need not predict: group norm over time fails here."""
    encoder, _ = networks()
    x = noise(2).requires_grad_(True)
    local = encoder.local(x)
    (gradient,) = torch.autograd.grad(local[:, 50].square().sum(), x, retain_graph=True)
    seen = gradient.abs().sum((0, 1)).nonzero()[:, 0]
    assert (int(seen.min()), int(seen.max())) == (50 * 16, 51 * 16 - 1)
    (gradient,) = torch.autograd.grad(encoder.context(local)[:, 50].square().sum(), x)
    seen = gradient.abs().sum((0, 1)).nonzero()[:, 0]
    assert int(seen.max()) == 51 * 16 - 1
    assert int(seen.min()) < 40 * 16


def test_voltage_is_seen_and_artefacts_are_clipped() -> None:
    encoder, _ = networks()
    encoder.eval()
    ecgs, others = draw_twins(8)[0], draw_twins(8)[0].roll(1, 0)
    with torch.inference_mode():
        whole, half, other = encoder(ecgs), encoder(0.5 * ecgs), encoder(others)
        assert float((whole - half).norm()) > 0.1 * float((whole - other).norm())
        assert torch.equal(encoder(ecgs.sign() * 4.0), encoder(ecgs.sign() * 400.0))


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    encoder, _ = networks()
    x = noise(2)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    torch.testing.assert_close(encoder(x)[1:], encoder(x[1:]), rtol=1e-4, atol=1e-5)


# ---- the loss


def slow_cpc_loss(
    encoder: RecurrentEncoder, predictors: FuturePredictors, x: Tensor, places: list[int], temperature: float
) -> float:
    local = encoder.local(x).detach().double()
    context = encoder.context(encoder.local(x)).detach().double()
    losses = []
    for k, predict in enumerate(predictors.ahead, 1):
        for ecg in range(len(x)):
            for place in places:
                guess = predict.weight.detach().double() @ context[ecg, place]
                alike = {
                    other: math.exp(float(torch.cosine_similarity(guess, local[ecg, other + k], dim=0)) / temperature)
                    for other in places
                }
                losses.append(-math.log(alike[place] / sum(alike.values())))
    return sum(losses) / len(losses)


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 3),
    horizon=st.integers(1, 6),
    steps=st.integers(7, 14),
    temperature=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_the_loss_equals_a_loop(batch: int, horizon: int, steps: int, temperature: float, seed: int) -> None:
    """So few steps that every place is drawn: the order in which they come does not matter."""
    encoder, predictors = networks(seed % 5, horizon)
    x = noise(batch, 16 * steps + seed % 16, seed)
    loss, seen = cpc_loss(encoder, predictors, x, seeded(seed), temperature)
    expected = slow_cpc_loss(encoder, predictors, x, list(range(steps - horizon)), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(seen.usable_share) == float(steps - horizon > 1)


def test_places_are_drawn_from_the_generator_and_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, predictors = networks()
    first, again, other = (float(cpc_loss(encoder, predictors, noise(2), seeded(seed))[0]) for seed in (1, 1, 2))
    assert first == again != other
    monkeypatch.setattr(recurrent, "PLACES", 1)
    loss, seen = cpc_loss(encoder, predictors, noise(2), seeded(1))
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(seen.usable_share) == 0
    assert all(p.grad.isfinite().all() for p in predictors.parameters())


@pytest.mark.parametrize("batch", [1, 2])
def test_blank_ecgs_and_small_batches_stay_finite(batch: int) -> None:
    encoder, predictors = networks()
    loss, _ = cpc_loss(encoder, predictors, torch.zeros(batch, 12, 2500), seeded(0))
    loss.backward()
    assert math.isfinite(float(loss))
    assert all(p.grad.isfinite().all() for p in predictors.parameters())


def test_a_horizon_beyond_the_ecg_is_told() -> None:
    encoder, predictors = networks(horizon=156)
    with pytest.raises(HemoFedError, match=r"horizon 156 .* lower horizon"):
        cpc_loss(encoder, predictors, noise(1), seeded(0))


# ---- learning


def train(ecgs: Tensor, seed: int, steps: int) -> tuple[RecurrentEncoder, FuturePredictors, list[float]]:
    encoder, predictors = networks(seed)
    generator, losses = seeded(seed), []
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictors.parameters()], lr=1e-3)
    for _ in range(steps):
        rows = torch.randperm(len(ecgs), generator=generator)[:16]
        loss, _ = cpc_loss(encoder, predictors, ecgs[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return encoder, predictors, losses


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_what_comes_next_in_hearts_it_has_not_seen(seed: int) -> None:
    """Negative control: in noise nothing can be foretold, and the loss of unseen noise stays at that of guessing."""
    ecgs = draw_twins(112)[0]
    chance = math.log(recurrent.PLACES)
    encoder, predictors, losses = train(ecgs[:96], seed, 160)
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    with torch.inference_mode():
        assert float(cpc_loss(encoder, predictors, ecgs[96:], seeded(0))[0]) < 0.85 * chance
    encoder, predictors, _ = train(noise(96), seed, 160)
    with torch.inference_mode():
        assert float(cpc_loss(encoder, predictors, noise(16, seed=7), seeded(0))[0]) > 0.97 * chance
