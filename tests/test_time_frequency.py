"""TF-C: spectra against closed forms, losses against loops, and that ECG and spectrum come to agree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_model.encoder import EncoderSettings
from shared_model.objectives.augmentations import disturb
from shared_model.objectives.contrastive import info_nce
from shared_model.time_frequency import (
    CHANGED_SHARE,
    TimeFrequencyEncoder,
    TimeFrequencyProjectors,
    augmented_spectrum,
    margin_consistency,
    nt_xent,
    spectrum,
    tf_c_loss,
)
from tests.twins import draw_twins

LENGTHS = (1250, 2250, 2500)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int, time: int = 2500, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(batch, 12, time, generator=seeded(seed))


def networks(seed: int = 1, **changes: object) -> tuple[TimeFrequencyEncoder, TimeFrequencyProjectors]:
    torch.manual_seed(seed)
    chosen = EncoderSettings.model_validate(changes)
    return TimeFrequencyEncoder(chosen), TimeFrequencyProjectors(chosen)


def sine(frequency_hz: float, amplitude_mv: float, time: int = 2500) -> Tensor:
    seconds = torch.arange(time) / 250
    return (amplitude_mv * torch.sin(2 * math.pi * frequency_hz * seconds)).expand(1, 12, time).clone()


# ---- the spectrum


@pytest.mark.parametrize("time", LENGTHS)
def test_a_sine_stands_at_its_frequency_with_its_amplitude_whatever_the_length(time: int) -> None:
    for frequency_hz, amplitude_mv in ((1.2, 0.1), (8.0, 1.0), (40.0, 0.02)):
        line = spectrum(sine(frequency_hz, amplitude_mv, time))[0, 3]
        assert int(line.argmax()) == pytest.approx(10 * frequency_hz, abs=1)
        assert float(line.max()) == pytest.approx(math.log1p(10 * amplitude_mv), rel=0.03)


@pytest.mark.parametrize("time", LENGTHS)
def test_the_spectrum_is_numpys(time: int) -> None:
    x = noise(2, time)
    magnitude = np.abs(np.fft.rfft(x.double().numpy() - x.double().numpy().mean(-1, keepdims=True), 2500))
    expected = np.log1p(magnitude[..., :500] * 20 / time)
    np.testing.assert_allclose(spectrum(x).numpy(), expected, atol=1e-5)


def test_offset_mains_and_missing_leads_leave_nothing() -> None:
    x = noise(2)
    torch.testing.assert_close(spectrum(x + 0.7), spectrum(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spectrum(x + sine(60.0, 0.5)), spectrum(x), atol=1e-3, rtol=1e-3)
    x[:, 4] = 0
    assert (spectrum(x)[:, 4] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_the_components_is_removed_and_a_tenth_raised(seed: int) -> None:
    spectra = spectrum(noise(8, seed=seed))
    changed = augmented_spectrum(spectra, seeded(seed))
    removed, raised = (changed == 0) & (spectra > 0), changed > spectra
    assert float(removed.float().mean()) == pytest.approx(CHANGED_SHARE, abs=0.006)  # 4 SD of 48,000 draws
    assert 0 < float(raised.float().mean()) < CHANGED_SHARE
    assert torch.equal(changed[~removed & ~raised], spectra[~removed & ~raised])
    assert (changed <= torch.maximum(spectra, 0.1 * spectra.amax(-1, keepdim=True))).all()
    assert torch.equal(changed, augmented_spectrum(spectra, seeded(seed)))


# ---- losses


def slow_nt_xent(one: Tensor, other: Tensor, temperature: float) -> list[float]:
    rows = [row.double() / row.double().norm() for row in torch.cat([one, other])]
    batch = len(one)

    def of_row(i: int) -> float:
        similar = [math.exp(float(rows[i] @ rows[j]) / temperature) for j in range(2 * batch)]
        return -math.log(similar[(i + batch) % (2 * batch)] / sum(s for j, s in enumerate(similar) if j != i))

    return [(of_row(i) + of_row(i + batch)) / 2 for i in range(batch)]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 8), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 2**31))
def test_nt_xent_equals_a_loop_and_the_other_info_nce(batch: int, temperature: float, seed: int) -> None:
    one, other = torch.randn(2, batch, 5, generator=seeded(seed))
    ours = nt_xent(one, other, temperature)
    assert ours.tolist() == pytest.approx(slow_nt_xent(one, other, temperature), rel=1e-4, abs=1e-5)
    ecg = torch.arange(batch).repeat(2)
    distance = (ecg[:, None] != ecg[None, :]).float()
    expected, _ = info_nce(torch.cat([one, other]), distance, torch.eye(2 * batch, dtype=torch.bool), temperature)
    torch.testing.assert_close(ours.mean(), expected, rtol=1e-4, atol=1e-5)


def slow_consistency(time: Tensor, frequency: Tensor, temperature: float, margin: float) -> list[float]:
    n = len(time) // 2
    between = slow_nt_xent(time[:n], frequency[:n], temperature)
    total = [0.0] * n
    for a, b in ((time[:n], frequency[n:]), (time[n:], frequency[:n]), (time[n:], frequency[n:])):
        for i, pair in enumerate(slow_nt_xent(a, b, temperature)):
            total[i] += max(0.0, between[i] - pair + margin)
    return total


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 6), margin=st.floats(0, 2), seed=st.integers(0, 2**31))
def test_margin_consistency_equals_a_loop(batch: int, margin: float, seed: int) -> None:
    time, frequency = torch.randn(2, 2 * batch, 5, generator=seeded(seed))
    ours = margin_consistency(time, frequency, 0.2, margin)
    assert ours.tolist() == pytest.approx(slow_consistency(time, frequency, 0.2, margin), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("margin", [None, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_the_loss_is_put_together_as_equation_4_says(margin: float | None, weight: float) -> None:
    encoder, projectors = networks()
    encoder.eval()
    x, y = noise(4), noise(4, seed=9)
    spectra = spectrum(x)
    h = encoder.time(x), encoder.time(y), encoder.frequency(spectra)
    h = (*h, encoder.frequency(augmented_spectrum(spectra, seeded(3))))
    z = [net(part).detach() for net, part in zip((projectors.time,) * 2 + (projectors.frequency,) * 2, h, strict=True)]
    contrast = np.add(slow_nt_xent(h[0], h[1], 0.3), slow_nt_xent(h[2], h[3], 0.3))
    if margin is None:
        consistency = slow_nt_xent(z[0], z[2], 0.3)
    else:
        consistency = slow_consistency(torch.cat(z[:2]), torch.cat(z[2:]), 0.3, margin)
    expected = weight * contrast.mean() + (1 - weight) * np.mean(consistency)
    loss, seen = tf_c_loss(encoder, projectors, x, y, seeded(3), 0.3, weight, margin)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    assert float(seen.usable_share) == 1.0
    assert torch.equal(loss, tf_c_loss(encoder, projectors, x, y, seeded(3), 0.3, weight, margin)[0])


# ---- networks


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("preset", "dim"), [("small", 128), ("small", 7), ("resnet18", 128)])
def test_shapes_and_gradients(preset: str, dim: int, norm: str) -> None:
    encoder, projectors = networks(preset=preset, norm=norm, embedding_dim=dim)
    for time in LENGTHS:
        assert encoder(noise(2, time)).shape == (2, dim)
    loss, _ = tf_c_loss(encoder, projectors, noise(3), noise(3, seed=5), seeded(0))
    loss.backward()
    for part in (encoder, projectors):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    assert all(value.dtype == torch.float32 for value in projectors.state_dict().values())


@pytest.mark.parametrize("margin", [None, 1.0])
def test_a_single_ecg_teaches_nothing_and_two_do(margin: float | None) -> None:
    encoder, projectors = networks()
    for batch in (1, 2):
        loss, seen = tf_c_loss(
            encoder, projectors, noise(batch), noise(batch, seed=3), seeded(0), consistency_margin=margin
        )
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])
        assert gradients.isfinite().all()
        assert float(seen.usable_share) == batch - 1
        assert (float(loss) != 0) == (batch == 2) == bool(gradients.any())


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    encoder, _ = networks()
    x = noise(2)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    torch.testing.assert_close(encoder(x)[1:], encoder(x[1:]), rtol=1e-4, atol=1e-5)


def test_frequency_knows_where_a_line_stands_and_how_high() -> None:
    """Pooling over frequency would make both alike: convolutions do not know where they are."""
    encoder, _ = networks()
    encoder.eval()
    with torch.inference_mode():
        one, moved, lower = (encoder.frequency(spectrum(sine(f, a))) for f, a in ((8.0, 1.0), (16.0, 1.0), (8.0, 0.5)))
        assert float((one - moved).norm()) > 0.1 * float(one.norm())
        assert float((one - lower).norm()) > 0.01 * float(one.norm())


# ---- learning


def apart(encoder: TimeFrequencyEncoder, projectors: TimeFrequencyProjectors, ecgs: Tensor) -> float:
    """NT-Xent of ECGs with their own spectra."""
    encoder.eval()
    with torch.inference_mode():
        between = nt_xent(
            projectors.time(encoder.time(ecgs)), projectors.frequency(encoder.frequency(spectrum(ecgs))), 0.2
        )
    encoder.train()
    return float(between.mean())


def train(margin: float | None, seed: int, ecgs: Tensor, steps: int) -> tuple[list[float], float, float]:
    """Losses, and how far ECGs and spectra are apart before and after."""
    encoder, projectors = networks(seed)
    before = apart(encoder, projectors, ecgs)
    generator, losses = seeded(seed), []
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projectors.parameters()], lr=1e-3)
    for _ in range(steps):
        views = disturb(ecgs, generator)
        loss, _ = tf_c_loss(encoder, projectors, ecgs, views, generator, consistency_margin=margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, before, apart(encoder, projectors, ecgs)


@pytest.fixture(scope="module")
def ecgs() -> Tensor:
    return draw_twins(16)[0]


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_ecg_and_its_spectrum_come_together(ecgs: Tensor, seed: int) -> None:
    """Negative control: with the paper's margin the loss falls as well, and they end farther apart than by chance."""
    chance = math.log(2 * len(ecgs) - 1)
    losses, before, after = train(None, seed, ecgs, 100)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    assert after < 0.75 * chance < before
    losses, _, after = train(1.0, seed, ecgs, 100)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    assert after > chance
