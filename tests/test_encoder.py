"""Encoder and head: size, seed, initialisation, what decays, what FedBN keeps, dropout off at evaluation."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from shared_model.encoder import EncoderSettings, build_encoder, decay_groups, norm_parameter_names
from shared_model.heads import build_head, in_target_units, standardised
from tests.twins import draw_twins

SMALL = EncoderSettings()
ECGS = torch.randn(4, 12, 2500, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("preset", "low", "high"), [("resnet18", 8.7e6, 8.9e6), ("small", 0.2e6, 0.3e6)])
def test_sizes(preset: str, low: float, high: float, norm: str) -> None:
    encoder = build_encoder(EncoderSettings(preset=preset, norm=norm), seed=1)
    assert low < count(encoder) < high
    assert encoder(ECGS[:2]).shape == (2, 128)


@pytest.mark.parametrize("time", [1, 1250, 2250, 2500])
def test_any_length_of_ecg_gives_an_embedding(time: int) -> None:
    embedding = build_encoder(SMALL, seed=1)(ECGS[:, :, :time])
    assert embedding.shape == (4, 128)
    assert embedding.isfinite().all()


def test_weights_follow_from_the_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for build in (build_encoder, build_head):
        first, again, other = build(SMALL, 1), build(SMALL, 1), build(SMALL, 2)
        states = [
            torch.cat([value.flatten() for value in model.state_dict().values()]) for model in (first, again, other)
        ]
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])
    assert torch.equal(torch.rand(3), expected)


def test_convolutions_keep_the_scale_of_the_signal() -> None:
    """Fault 29 of the published code: kernel squared in the fan makes the SD too small by sqrt(7)."""
    for name, layer in build_encoder(EncoderSettings(preset="resnet18"), seed=1).named_modules():
        if isinstance(layer, nn.Conv1d):
            right = math.sqrt(2 / (layer.kernel_size[0] * layer.out_channels))
            assert float(layer.weight.detach().std()) == pytest.approx(right, rel=0.05), name


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("preset", ["resnet18", "small"])
def test_voltage_is_seen(preset: str, norm: str) -> None:
    """Half the voltage moves the embedding by a share of what another patient does. Group norm behind a first
    convolution without bias took it away: 0.0002 of that distance."""
    ecgs = draw_twins(8)[0]
    encoder = build_encoder(EncoderSettings(preset=preset, norm=norm), seed=1).eval()
    with torch.inference_mode():
        whole, half = encoder(ecgs), encoder(0.5 * ecgs)
    assert float((whole - half).norm(dim=1).mean()) > 0.1 * float((whole - whole.roll(1, 0)).norm(dim=1).mean())


def test_artefacts_are_clipped() -> None:
    encoder = build_encoder(SMALL, seed=1).eval()
    with torch.inference_mode():
        assert torch.equal(encoder(ECGS.sign() * 4.0), encoder(ECGS.sign() * 400.0))


def test_an_ecg_is_embedded_alike_alone_and_in_a_batch() -> None:
    encoder = build_encoder(SMALL, seed=1).eval()
    with torch.inference_mode():
        torch.testing.assert_close(encoder(ECGS)[2:3], encoder(ECGS[2:3]), rtol=1e-4, atol=1e-5)


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    encoder, head = build_encoder(SMALL, seed=1), build_head(SMALL, seed=1)
    assert not torch.equal(head(encoder(ECGS)), head(encoder(ECGS)))
    encoder.eval(), head.eval()
    assert torch.equal(head(encoder(ECGS)), head(encoder(ECGS)))


@pytest.mark.parametrize("preset", ["resnet18", "small"])
def test_norm_names_are_every_norm_layer_and_nothing_else(preset: str) -> None:
    batch = build_encoder(EncoderSettings(preset=preset, norm="batch"), seed=1)
    group = build_encoder(EncoderSettings(preset=preset, norm="group"), seed=1)
    for encoder in (batch, group):
        kept, state = norm_parameter_names(encoder), encoder.state_dict()
        assert kept < state.keys()
        assert all(state[name].ndim <= 1 for name in kept)
        assert {name for name in state if name not in kept} == {
            f"{name}.{part}"
            for name, layer in encoder.named_modules()
            if isinstance(layer, nn.Conv1d | nn.Linear)
            for part in layer.state_dict()
        }
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rsplit(".", 1)[1] for name in norm_parameter_names(batch)} == {"weight", "bias"} | statistics
    assert {name.rsplit(".", 1)[1] for name in norm_parameter_names(group)} == {"weight", "bias"}
    assert group.state_dict().keys() < batch.state_dict().keys()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_weights_decay_and_norms_and_biases_do_not(norm: str) -> None:
    model = nn.ModuleList([build_encoder(EncoderSettings(norm=norm), 1), build_head(EncoderSettings(norm=norm), 1)])
    decayed, spared = decay_groups(model, 0.02)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.02, 0.0)
    expected = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv1d | nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    encoder = build_encoder(SMALL, seed=1)
    encoder.stem.weight.requires_grad_(False)
    assert not any(
        parameter is encoder.stem.weight for group in decay_groups(encoder, 0.1) for parameter in group["params"]
    )


def test_head_gives_one_number_an_ecg() -> None:
    head = build_head(SMALL, seed=1)
    assert head(torch.randn(5, 128)).shape == (5,)
    assert head(torch.randn(1, 128)).shape == (1,)


def test_mmhg_there_and_back() -> None:
    mmhg = torch.tensor([4.0, 16.0, 18.0, 42.0])
    units = standardised(mmhg, centre=16.0, scale=8.0)
    assert units.tolist() == [-1.5, 0.0, 0.25, 3.25]
    torch.testing.assert_close(in_target_units(units, 16.0, 8.0), mmhg)


@pytest.mark.parametrize(
    "wrong", [{"presets": "small"}, {"preset": "resnet50"}, {"embedding_dim": 0}, {"dropout": 1.0}]
)
def test_settings_refuse_what_they_do_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EncoderSettings.model_validate(wrong)
