"""Augmentations: what they leave alone, how far they go, and that a seed decides them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from torch import Tensor

from shared_model.objectives import augmentations as aug
from tests.twins import draw_twins

ADDING = {
    "noise": aug.electrode_noise,
    "wander": aug.baseline_wander,
    "hum": aug.mains_hum,
    "rotation": aug.vcg_rotation,
}
CHANGES = {
    **ADDING,
    "crop": aug.random_crop,
    "gain": aug.random_gain,
    "white": aug.random_noise,
    "dropout": aug.lead_dropout,
    "warp": aug.time_warp,
    "augment": aug.augment,
    "strong": aug.strong_augment,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ecgs() -> Tensor:
    """Drawn ECGs (24, 12, 2500), consistent in their limb leads."""
    return draw_twins(24)[0]


def residual_mv(ecgs: Tensor) -> float:
    """Largest breach of Einthoven's and Goldberger's equations."""
    one, two, three, right, left, foot = ecgs[:, :6].double().unbind(1)
    breaches = (three - two + one, right + (one + two) / 2, left - one + two / 2, foot - two + one / 2)
    return float(torch.stack(breaches).abs().max())


def test_the_measure_of_consistency_notices_noise_on_single_leads(ecgs: Tensor) -> None:
    assert residual_mv(ecgs) < 1e-5
    assert residual_mv(aug.random_noise(ecgs, seeded(0))) > 0.01


@pytest.mark.parametrize("name", [*ADDING, "gain", "warp", "crop"])
def test_limb_leads_stay_consistent(name: str, ecgs: Tensor) -> None:
    changed = CHANGES[name](ecgs, seeded(0))
    assert residual_mv(changed) < 1e-5
    assert changed.shape[2] != 2500 or (changed - ecgs).abs().amax((1, 2)).median() > 0.005  # most were changed


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_missing_stays_missing_and_a_batch_of_one_will_do(name: str, ecgs: Tensor) -> None:
    batch = ecgs[:6].clone()
    batch[0] = 0
    batch[1, 3] = 0
    batch[2, :6] = 0
    changed = CHANGES[name](batch, seeded(0))
    assert (changed[0] == 0).all()
    assert (changed[1, 3] == 0).all()
    assert (changed[2, :6] == 0).all()
    assert torch.isfinite(changed).all()
    assert changed.dtype == torch.float32
    assert changed[3:].abs().amax(2).min() > 0 or name in {"dropout", "strong"}
    alone = CHANGES[name](ecgs[:1], seeded(0))
    assert alone.shape == (1, 12, changed.shape[2])
    assert alone.any()


@pytest.mark.parametrize("name", [*ADDING, "gain", "white"])
def test_a_gap_stays_a_gap(name: str, ecgs: Tensor) -> None:
    batch = ecgs[:4].clone()
    batch[:, 1, 307:391] = 0
    batch[:, 6:, 2000:] = 0
    changed = CHANGES[name](batch, seeded(0))
    assert (changed[:, 1, 307:391] == 0).all()
    assert (changed[:, 6:, 2000:] == 0).all()


def test_single_zeros_are_signal_and_gaps_of_50_samples_are_not() -> None:
    signals = torch.ones(1, 1, 2510)
    signals[0, 0, 100] = signals[0, 0, 200:210] = 0
    for start in range(500, 2000, 101):  # at every place within a block
        signals[0, 0, start : start + 50] = 0
    signals[0, 0, 2460:] = 0
    there = aug.present_samples(signals)[0, 0]
    assert there[100]
    assert there[200:210].all()
    assert not there[2460:].any()
    for start in range(500, 2000, 101):
        assert not there[start : start + 50].any()
        assert there[start - 1]
        assert there[start + 50]


def test_wander_is_slow_and_within_its_size(ecgs: Tensor) -> None:
    """Over 100 s, where 0.05 Hz is resolved: all power between 0.05 and 0.5 Hz."""
    still = torch.full((20, 12, 25_000), 0.5)
    added = (aug.baseline_wander(still, seeded(1)) - still).double()
    assert added[:, aug.INDEPENDENT].abs().max() <= aug.WANDER_MV
    assert aug.WANDER_MV / 2 < added.abs().max() <= 2 * aug.WANDER_MV
    power = np.abs(np.fft.rfft(added.numpy() * np.hanning(25_000))) ** 2
    hz = np.fft.rfftfreq(25_000, 1 / 250)
    outside = (hz < 0.05 - 0.03) | (hz > 0.5 + 0.03)  # the window's main lobe is 0.02 Hz to each side
    assert power[..., outside].sum() < 1e-5 * power.sum()
    assert (power[:, 0].argmax(-1) * 0.01).std() > 0.05  # not one frequency for all


def test_hum_is_of_50_or_60_hz_and_within_its_size() -> None:
    still = torch.full((40, 12, 2500), 0.5)
    added = (aug.mains_hum(still, seeded(1)) - still).double()
    assert aug.HUM_MV / 2 < added[:, aug.INDEPENDENT].abs().max() <= aug.HUM_MV * 1.0001
    power = np.abs(np.fft.rfft(added.numpy())) ** 2
    peak_hz = power.sum(1).argmax(-1) / 10
    assert set(peak_hz) == {50.0, 60.0}
    assert (power.max(-1).sum() / power.sum()) > 0.999


def test_noise_has_the_size_it_says() -> None:
    added = aug.electrode_noise(torch.full((20, 12, 2500), 5.0), seeded(0)) - 5.0
    deviation = added.std(2).mean(0)
    assert deviation[aug.INDEPENDENT].numpy() == pytest.approx(aug.NOISE_MV, rel=0.02)
    assert float(deviation[2]) == pytest.approx(math.sqrt(2) * aug.NOISE_MV, rel=0.02)


# ---- rotation

# The printed inverse (Edenbrandt and Pahlm 1988): I, II, V1..V6 to x, y, z.
PRINTED_INVERSE = [
    [0.156, -0.010, -0.172, -0.074, 0.122, 0.231, 0.239, 0.194],
    [-0.227, 0.887, 0.057, -0.019, -0.106, -0.022, 0.041, 0.048],
    [0.022, 0.102, -0.229, -0.310, -0.246, -0.063, 0.055, 0.108],
]


def test_the_inverse_is_the_printed_one() -> None:
    torch.testing.assert_close(aug.INVERSE_DOWER, torch.tensor(PRINTED_INVERSE), atol=6e-4, rtol=0)
    torch.testing.assert_close(aug.INVERSE_DOWER @ aug.DOWER, torch.eye(3), atol=1e-5, rtol=0)


def dipole(ecgs: Tensor) -> Tensor:
    return aug.INVERSE_DOWER @ ecgs[:, aug.INDEPENDENT]


def test_a_turn_by_nothing_changes_nothing_and_a_turn_back_restores(ecgs: Tensor) -> None:
    axis, angle = torch.randn(24, 3, generator=seeded(0)), torch.linspace(-40, 40, 24)
    torch.testing.assert_close(aug.rotate_vcg(ecgs, axis, 0 * angle), ecgs, atol=1e-6, rtol=0)
    turned = aug.rotate_vcg(ecgs, axis, angle)
    assert (turned - ecgs).abs().max() > 0.1
    torch.testing.assert_close(aug.rotate_vcg(turned, axis, -angle), ecgs, atol=1e-5, rtol=0)


def test_a_turn_keeps_the_dipoles_length_and_what_no_dipole_explains(ecgs: Tensor) -> None:
    axis, angle = torch.randn(24, 3, generator=seeded(0)), torch.full((24,), 30.0)
    turned = aug.rotate_vcg(ecgs, axis, angle)
    torch.testing.assert_close(dipole(turned).norm(dim=1), dipole(ecgs).norm(dim=1), atol=1e-5, rtol=0)
    rest = [(x[:, aug.INDEPENDENT] - aug.DOWER @ dipole(x)) for x in (ecgs, turned)]
    assert rest[0].abs().max() > 0.05
    torch.testing.assert_close(rest[1], rest[0], atol=1e-5, rtol=0)


def test_a_turn_about_z_moves_the_frontal_axis_by_its_angle(ecgs: Tensor) -> None:
    """A quarter turn takes left to down: x' = -y, y' = x; the direction is that of the frontal axis."""
    z = torch.tensor([[0.0, 0.0, 1.0]]).expand(24, 3)
    before, after = dipole(ecgs), dipole(aug.rotate_vcg(ecgs, z, torch.full((24,), 90.0)))
    expected = torch.stack([-before[:, 1], before[:, 0], before[:, 2]], 1)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


def test_random_turns_stay_within_their_angle(ecgs: Tensor) -> None:
    """A vector moves by at most 2 sin(angle / 2) of its length."""
    moved = (dipole(aug.vcg_rotation(ecgs, seeded(3))) - dipole(ecgs)).norm(dim=1) / dipole(ecgs).norm(dim=1)
    limit = 2 * math.sin(math.radians(aug.ROTATION_DEG) / 2)
    assert 0.5 * limit < float(moved.nanquantile(0.999)) <= limit * 1.001


def test_an_ecg_without_one_of_the_eight_leads_is_not_turned(ecgs: Tensor) -> None:
    batch = ecgs[:3].clone()
    batch[0, 7] = 0
    batch[1, 3] = 0  # aVR is not one of the eight
    turned = aug.vcg_rotation(batch, seeded(0))
    assert torch.equal(turned[0], batch[0])
    assert not torch.equal(turned[1], batch[1])
    assert not torch.equal(turned[2], batch[2])


# ---- dropout and warp


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), leads=st.integers(1, 12), share=st.floats(0, 1))
def test_dropout_never_takes_all_that_is_there(seed: int, leads: int, share: float) -> None:
    ecgs = torch.ones(8, 12, 10)
    chosen = torch.rand(8, 12, generator=seeded(seed)).argsort(1)[:, leads:]
    ecgs.scatter_(1, chosen[:, :, None].expand(-1, -1, 10), 0.0)
    dropped = aug.lead_dropout(ecgs, seeded(seed), share)
    assert dropped.flatten(1).any(1).all()
    assert ((dropped == ecgs) | (dropped == 0)).all()
    whole = dropped.any(2) == dropped.all(2)
    assert whole.all()
    if share == 0:
        assert torch.equal(dropped, ecgs)
    if share == 1:
        assert (dropped.any(2).sum(1) == 1).all()


def test_dropout_takes_the_share_it_says() -> None:
    dropped = aug.lead_dropout(torch.ones(4000, 12, 1), seeded(0))
    assert float((dropped == 0).float().mean()) == pytest.approx(aug.DROP_SHARE, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), time=st.integers(100, 3000), share=st.floats(0, 0.5))
def test_warped_time_runs_within_its_share_and_keeps_both_ends(seed: int, time: int, share: float) -> None:
    source = aug.warped_times(time, 16, seeded(seed), share).double()
    assert source[:, 0].abs().max() < 1e-3
    assert (source[:, -1] - (time - 1)).abs().max() < 1e-3
    speed = source.diff(dim=1)
    assert speed.min() >= 1 - share - 1e-3
    assert speed.max() <= 1 + share + 1e-3


def test_warp_reads_the_signal_at_the_warped_times(ecgs: Tensor) -> None:
    source = aug.warped_times(2500, 24, seeded(5))
    assert (source - torch.arange(2500)).abs().amax(1).max() > 10
    warped = aug.time_warp(ecgs, seeded(5))
    for ecg, out, times in zip(ecgs[:4], warped, source.clamp(0, 2499), strict=False):
        expected = interp1d(np.arange(2500), ecg.numpy())(times.numpy())
        np.testing.assert_allclose(out.numpy(), expected, atol=2e-3)


# ---- all together


@pytest.mark.parametrize("name", CHANGES)
def test_a_seed_decides_everything(name: str, ecgs: Tensor) -> None:
    change = CHANGES[name]
    first = change(ecgs, seeded(1))
    assert torch.equal(first, change(ecgs, seeded(1)))
    assert not torch.equal(first, change(ecgs, seeded(2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CHANGES)
def test_a_cpu_generator_gives_the_same_on_a_gpu(name: str, ecgs: Tensor) -> None:
    on_gpu = CHANGES[name](ecgs.cuda(), seeded(1)).cpu()
    torch.testing.assert_close(on_gpu, CHANGES[name](ecgs, seeded(1)), atol=2e-3, rtol=0)


def test_two_strong_views_of_one_ecg_differ_and_are_nearer_than_those_of_others(ecgs: Tensor) -> None:
    first, second = aug.strong_augment(ecgs, seeded(1)), aug.strong_augment(ecgs, seeded(2))
    assert first.shape == (24, 12, 1250)
    # Standard deviation by lead survives crops and warps: a crude fingerprint, over leads that both views have.
    both = (first.any(2) & second.any(2)).float()[:, None]
    gap = ((first.std(2)[:, None] - second.std(2)[None]).abs() * both).sum(2) / both.sum(2)
    assert float((gap.argmin(1) == torch.arange(24)).float().mean()) > 0.5


def test_the_supervised_augmentation_is_what_it_was(ecgs: Tensor) -> None:
    """Figures that were published rest on it: crop, gain and noise as written before they moved here."""
    generator = seeded(4)
    start = torch.rand((24, 1, 1), generator=generator)
    index = (start * 251).long() + torch.arange(2250)
    expected = ecgs.gather(2, index.expand(24, 12, 2250))
    expected = expected * (1 + 0.1 * (2 * torch.rand((24, 1, 1), generator=generator) - 1))
    noise = torch.randn(expected.shape, generator=generator)
    assert torch.equal(aug.augment(ecgs, seeded(4)), expected + 0.01 * noise * (expected != 0))
