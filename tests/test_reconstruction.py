"""Masked reconstruction: what is hidden, the error against loops, and that it teaches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.objectives.relations import describe_raw
from shared_model.reconstruction import (
    PATCH,
    SAMPLES_A_STEP,
    Decoder,
    Reconstructor,
    hidden_patches,
    masked_reconstruction,
    reconstruction_error,
)
from tests.twins import draw_twins

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network_of(preset: str = "small", dim: int = 16) -> Reconstructor:
    encoder = EncoderSettings(preset=preset, embedding_dim=dim, dropout=0)
    torch.manual_seed(0)
    return Reconstructor(build_encoder(encoder, 1), Decoder(encoder))


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 5), time=st.integers(1, 2600), seed=st.integers(0, 2**31))
def test_half_of_the_time_is_hidden_in_whole_patches(batch: int, time: int, seed: int) -> None:
    hidden = hidden_patches(batch, time, seeded(seed), CPU)
    assert hidden.shape == (batch, time)
    patches = math.ceil(time / PATCH)
    for row in hidden:
        blocks = [row[start : start + PATCH] for start in range(0, time, PATCH)]
        assert all(block.all() or not block.any() for block in blocks)
        assert sum(bool(block.any()) for block in blocks) == max(1, round(patches / 2))


@pytest.mark.parametrize("preset", ["small", "resnet18"])
@pytest.mark.parametrize("time", [2250, 2500])
def test_shapes_and_gradients(preset: str, time: int) -> None:
    network = network_of(preset)
    signals = 0.3 * torch.randn(3, 12, time, generator=seeded())
    rebuilt, embedding = network(signals)
    assert rebuilt.shape == (3, 12, math.ceil(time / 4))
    assert embedding.shape == (3, 16)
    torch.testing.assert_close(embedding, network.encoder(signals))
    masked_reconstruction(network, signals, seeded())[0].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_step_of_the_decoder_rebuilds_its_own_eight_samples_of_every_lead() -> None:
    decoder = Decoder(EncoderSettings(embedding_dim=16))
    features = torch.randn(1, 128, 5, generator=seeded())
    changed = features.clone()
    changed[:, :, 2] += 1
    embedding = torch.zeros(1, 16)
    moved = (decoder(changed, embedding) - decoder(features, embedding)).abs().sum(1)[0] > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(2 * SAMPLES_A_STEP, 3 * SAMPLES_A_STEP))
    rebuilt = decoder(features, embedding)
    weight, bias = decoder.steps.weight[:, :128, 0], decoder.steps.bias
    for lead, step, sample in ((0, 0, 0), (3, 2, 5), (11, 4, 7)):
        row = lead * SAMPLES_A_STEP + sample
        expected = float(weight[row] @ features[0, :, step] + bias[row])  # type: ignore[index]
        assert float(rebuilt[0, lead, step * SAMPLES_A_STEP + sample]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def slow_error(rebuilt: Tensor, signals: Tensor, hidden: Tensor) -> list[float]:
    wanted = describe_raw(signals, signals).reshape(len(signals), 12, -1)
    errors = []
    for ecg in range(len(signals)):
        terms = [
            float(rebuilt[ecg, lead, t] - wanted[ecg, lead, t]) ** 2
            for lead in range(12)
            if signals[ecg, lead].any()
            for t in range(rebuilt.shape[-1])
            if hidden[ecg, 4 * t]
        ]
        errors.append(sum(terms) / len(terms) if terms else 0.0)
    return errors


def test_the_error_equals_a_loop_and_leaves_missing_leads_out() -> None:
    signals = draw_twins(3)[0]
    signals[1, 4] = 0
    signals[2] = 0
    hidden = hidden_patches(3, 2500, seeded(1), CPU)
    rebuilt = 0.1 * torch.randn(3, 12, 625, generator=seeded(2))
    found = reconstruction_error(rebuilt, signals, hidden).tolist()
    assert found == pytest.approx(slow_error(rebuilt, signals, hidden), rel=1e-4, abs=1e-7)
    assert found[2] == 0
    other = rebuilt.clone()
    other[1, 4] += 100
    other[0][:, ~hidden[0, ::4]] += 100  # what is not hidden is not asked for
    assert reconstruction_error(other, signals, hidden).tolist() == pytest.approx(found)


def test_an_ecgs_loss_does_not_depend_on_its_neighbours() -> None:
    """Under differential privacy this is what lets it do without a bank."""
    network, signals = network_of().eval(), draw_twins(4)[0]
    hidden = hidden_patches(4, 2500, seeded(1), CPU)
    gaps = signals.masked_fill(hidden[:, None], 0.0)
    together = reconstruction_error(network(gaps)[0], signals, hidden)
    alone = [reconstruction_error(network(gaps[k : k + 1])[0], signals[k : k + 1], hidden[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_training_rebuilds_better_than_silence() -> None:
    network, signals = network_of(), draw_twins(24)[0]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    generator = seeded(3)
    for _ in range(100):
        batch = signals[torch.randperm(24, generator=generator)[:12]]
        loss, _ = masked_reconstruction(network, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hidden = hidden_patches(24, 2500, seeded(9), CPU)
    with torch.no_grad():
        rebuilt, _ = network(signals.masked_fill(hidden[:, None], 0.0))
        ours = float(reconstruction_error(rebuilt, signals, hidden).mean())
        silence = float(reconstruction_error(torch.zeros_like(rebuilt), signals, hidden).mean())
    assert ours < 0.95 * silence  # where the beats fall is hard to tell: QRS carry most of the error
