"""DTW over time against an explicit loop, dtaidistance and tslearn; every backend, and what must hold of any DTW."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dtaidistance import dtw_ndim
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_model import dtw_numba
from shared_model.dtw import band_samples, cross_dtw, pairwise_dtw
from shared_model.dtw_native import Kernel, NoKernelError, load_kernel
from shared_model.dtw_torch import pairwise_dtw_torch
from shared_model.objectives.relations import RELATIONS

Series = NDArray[np.float32]


@functools.cache
def kernel() -> Kernel:
    try:
        return load_kernel()
    except NoKernelError as error:
        pytest.skip(f"no C kernel here: {error}")


PAIRWISE: dict[str, Callable[[Series, float], Series]] = {
    "c": lambda x, share: kernel().pairwise(x, band_samples(share, x.shape[2])),
    "numba": lambda x, share: dtw_numba.pairwise(x, band_samples(share, x.shape[2])),
    "torch": lambda x, share: pairwise_dtw_torch(torch.from_numpy(x), share).numpy(),
}
CROSS: dict[str, Callable[[Series, Series, float], Series]] = {
    "c": lambda a, b, share: kernel().cross(a, b, band_samples(share, a.shape[2])),
    "numba": lambda a, b, share: dtw_numba.cross(a, b, band_samples(share, a.shape[2])),
}
each_pairwise = pytest.mark.parametrize("pairwise", PAIRWISE.values(), ids=PAIRWISE)
each_cross = pytest.mark.parametrize("cross", CROSS.values(), ids=CROSS)
series_shapes = {
    "leads": st.integers(1, 5),
    "time": st.integers(1, 40),
    "band_share": st.floats(0, 1),
    "seed": st.integers(0, 2**31),
}


def noise(seed: int, *shape: int) -> Series:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def walks(seed: int, *shape: int) -> Series:
    """Series that wander, as ECGs do, so that warping pays."""
    return (0.1 * np.random.default_rng(seed).normal(size=shape).cumsum(-1)).astype(np.float32)


def slow_dtw(a: NDArray[np.float64], b: NDArray[np.float64], band: int) -> float:
    """The textbook recursion, one cell at a time: a, b (lead, time)."""
    time = a.shape[1]
    total = np.full((time + 1, time + 1), np.inf)
    total[0, 0] = 0
    for i in range(time):
        for j in range(max(0, i - band), min(time, i + band + 1)):
            cost = ((a[:, i] - b[:, j]) ** 2).sum()
            total[i + 1, j + 1] = cost + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return float(np.sqrt(total[time, time]))


# --- oracles


@each_pairwise
@settings(deadline=None)  # the first call compiles
@given(**series_shapes)
def test_equals_the_textbook_recursion(
    pairwise: Callable[[Series, float], Series], leads: int, time: int, band_share: float, seed: int
) -> None:
    x = noise(seed, 3, leads, time)
    band = min(round(band_share * time), time - 1)
    expected = [[slow_dtw(a.astype(float), b.astype(float), band) for b in x] for a in x]
    np.testing.assert_allclose(pairwise(x, band_share), expected, rtol=1e-4, atol=1e-6)


@each_cross
@settings(deadline=None)
@given(**series_shapes)
def test_the_rectangular_form_equals_the_textbook_recursion(
    cross: Callable[[Series, Series, float], Series], leads: int, time: int, band_share: float, seed: int
) -> None:
    a, b = noise(seed, 2, leads, time), noise(seed + 1, 3, leads, time)
    band = min(round(band_share * time), time - 1)
    expected = [[slow_dtw(one.astype(float), other.astype(float), band) for other in b] for one in a]
    np.testing.assert_allclose(cross(a, b, band_share), expected, rtol=1e-4, atol=1e-6)


@each_pairwise
@pytest.mark.parametrize(
    ("leads", "time", "band_share"),
    [(1, 2500, 0.02), (1, 625, 0.1), (3, 625, 0.1), (12, 625, 0.1), (12, 1250, 0.05), (12, 2500, 0.05), (5, 333, 1.0)],
)
def test_equals_dtaidistance(
    pairwise: Callable[[Series, float], Series], leads: int, time: int, band_share: float
) -> None:
    """dtaidistance takes time first, and counts the diagonal as part of its window: window = band + 1."""
    x = walks(leads, 4, leads, time)
    rows = [np.ascontiguousarray(series.T, dtype=np.float64) for series in x]
    window = round(band_share * time) + 1
    expected = [[dtw_ndim.distance(a, b, window=window, use_c=True) for b in rows] for a in rows]
    np.testing.assert_allclose(pairwise(x, band_share), expected, rtol=1e-4, atol=1e-6)


@each_pairwise
def test_a_window_of_one_more_or_less_is_another_distance(pairwise: Callable[[Series, float], Series]) -> None:
    """The conversion of the window matters: noise makes the path touch the band."""
    x = noise(1, 2, 2, 100)
    found = pairwise(x, 0.05)[0, 1]
    a, b = (np.ascontiguousarray(series.T, dtype=np.float64) for series in x)
    narrower, equal, wider = (dtw_ndim.distance(a, b, window=window, use_c=True) for window in (5, 6, 7))
    assert found == pytest.approx(equal, rel=1e-5)
    assert wider * 1.001 < found < narrower / 1.001


@each_pairwise
@pytest.mark.parametrize(("leads", "time", "band_share"), [(1, 400, 0.05), (3, 625, 0.1), (12, 250, 0.1)])
def test_equals_tslearn(pairwise: Callable[[Series, float], Series], leads: int, time: int, band_share: float) -> None:
    """tslearn takes time first, and its radius is our band."""
    from tslearn.metrics import dtw

    x = walks(leads, 4, leads, time)
    band = {"global_constraint": "sakoe_chiba", "sakoe_chiba_radius": round(band_share * time)}
    expected = [[dtw(a.T.astype(float), b.T.astype(float), **band) for b in x] for a in x]
    np.testing.assert_allclose(pairwise(x, band_share), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 50])
def test_the_backends_agree_wherever_a_batch_ends(batch: int) -> None:
    """Lanes, rows and turns of the C kernel are filled in part: every pair must still land in its place."""
    x = noise(batch, batch, 2, 12)
    expected = PAIRWISE["numba"](x, 0.2)
    for pairwise in PAIRWISE.values():
        np.testing.assert_allclose(pairwise(x, 0.2), expected, rtol=1e-5, atol=1e-6)
    other = noise(batch + 100, 50 - batch, 2, 12)
    expected = CROSS["numba"](x, other, 0.2)
    np.testing.assert_allclose(CROSS["c"](x, other, 0.2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most_numbers", [1, 500, 4000])
def test_torch_in_small_parts_is_the_same(most_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(noise(1, 9, 3, 30))
    whole = pairwise_dtw_torch(x, 0.2)
    monkeypatch.setattr("shared_model.dtw_torch.MOST_NUMBERS", most_numbers)
    torch.testing.assert_close(pairwise_dtw_torch(x, 0.2), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("relation", ["dtw", "dtw_12_lead"])
def test_a_gpu_gives_the_same_distances(relation: str) -> None:
    described = torch.from_numpy(walks(1, 20, RELATIONS[relation].width))
    found = RELATIONS[relation].distance(described.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), RELATIONS[relation].distance(described), rtol=1e-4, atol=1e-5)


# --- what holds of any DTW


@each_pairwise
@settings(deadline=None)
@given(**series_shapes)
def test_it_is_symmetric_with_a_zero_diagonal_and_no_more_than_euclidean(
    pairwise: Callable[[Series, float], Series], leads: int, time: int, band_share: float, seed: int
) -> None:
    x = noise(seed, 5, leads, time)
    distance = pairwise(x, band_share)
    np.testing.assert_array_equal(distance, distance.T)
    assert not distance.diagonal().any()
    euclidean = np.linalg.norm((x[:, None] - x[None]).reshape(5, 5, -1), axis=-1)
    assert (distance <= euclidean * (1 + 1e-5)).all()
    np.testing.assert_allclose(pairwise(x, 0.0), euclidean, rtol=1e-5, atol=1e-6)


@each_pairwise
@settings(deadline=None)
@given(**series_shapes, wider=st.floats(0, 1))
def test_a_wider_band_is_never_farther_and_time_may_run_backwards(
    pairwise: Callable[[Series, float], Series], leads: int, time: int, band_share: float, seed: int, wider: float
) -> None:
    x = noise(seed, 4, leads, time)
    narrow, wide = sorted((band_share, wider))
    distance = pairwise(x, narrow)
    assert (pairwise(x, wide) <= distance * (1 + 1e-5)).all()
    backwards = x[:, :, ::-1].copy()
    np.testing.assert_allclose(pairwise(backwards, narrow), distance, rtol=1e-5, atol=1e-6)


@each_pairwise
@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 40), seed=st.integers(0, 2**31), scale=st.sampled_from([2.0**-10, 0.5, 2.0**20]))
def test_order_and_unit_of_the_batch_do_not_matter(
    pairwise: Callable[[Series, float], Series], batch: int, seed: int, scale: float
) -> None:
    x = noise(seed, batch, 3, 10)
    order = np.random.default_rng(seed).permutation(batch)
    distance = pairwise(x, 0.3)
    np.testing.assert_allclose(pairwise(x[order], 0.3), distance[np.ix_(order, order)], rtol=1e-5)
    np.testing.assert_allclose(pairwise(x * np.float32(scale), 0.3), distance * scale, rtol=1e-5)


def test_warping_pays_for_a_delay() -> None:
    """The property that mining is after; a band that is too narrow for the delay is the negative control."""
    time_s = np.arange(625) / 62.5
    pulse = np.exp(-(((time_s - 5) / 0.05) ** 2))
    x = np.stack([pulse, np.roll(pulse, 32)])[:, None].astype(np.float32)  # half a second
    euclidean = np.linalg.norm(x[0] - x[1])
    assert pairwise_dtw(x, 0.1)[0, 1] < 1e-3 * euclidean
    assert pairwise_dtw(x, 0.02)[0, 1] > 0.5 * euclidean


# --- what is given


def test_the_rectangular_form_is_a_block_of_the_square_one() -> None:
    x = noise(3, 21, 4, 15)
    np.testing.assert_allclose(cross_dtw(x[:8], x[8:], 0.2), pairwise_dtw(x, 0.2)[:8, 8:], rtol=1e-5)
    assert not cross_dtw(x[:3], x[:3], 0.2).diagonal().any()


def test_batches_of_one_and_of_none() -> None:
    assert pairwise_dtw(np.ones((1, 3, 10), np.float32)).tolist() == [[0.0]]
    none, two = np.ones((0, 3, 10), np.float32), np.ones((2, 3, 10), np.float32)
    assert pairwise_dtw(none).shape == pairwise_dtw_torch(torch.from_numpy(none)).shape == (0, 0)
    assert cross_dtw(none, two).shape == (0, 2)
    assert cross_dtw(two, none).shape == (2, 0)


def test_any_layout_and_number_type_is_taken_and_left_alone() -> None:
    x = np.random.default_rng(1).integers(-1000, 1000, size=(5, 12, 4))  # time before lead
    before = x.copy()
    turned = x.transpose(0, 2, 1)
    expected = pairwise_dtw(np.ascontiguousarray(turned, np.float32), 0.3)
    np.testing.assert_array_equal(pairwise_dtw(turned, 0.3), expected)
    np.testing.assert_array_equal(pairwise_dtw(turned[::-1].astype(float), 0.3), expected[::-1, ::-1])
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(3, 10), (2, 0, 10), (2, 3, 0), (1, 2, 3, 4)])
def test_refuses_what_is_not_a_batch_of_series(shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    for refused in (lambda: pairwise_dtw(x), lambda: cross_dtw(x, x), lambda: pairwise_dtw_torch(torch.from_numpy(x))):
        with pytest.raises(ValueError, match="batch, lead, time"):
            refused()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e9, -2e9, np.float32(3e38)])
def test_refuses_what_is_not_finite_or_would_overflow(value: float) -> None:
    x = np.ones((2, 3, 10), np.float32)
    sound = x.copy()
    x[1, 2, 3] = value
    for refused in (
        lambda: pairwise_dtw(x),
        lambda: cross_dtw(x, sound),
        lambda: cross_dtw(sound, x),
        lambda: pairwise_dtw_torch(torch.from_numpy(x)),
    ):
        with pytest.raises(ValueError, match="finite"):
            refused()


@each_pairwise
def test_the_largest_values_allowed_do_not_overflow(pairwise: Callable[[Series, float], Series]) -> None:
    x = np.full((2, 12, 600), 1e9, np.float32)
    x[1] = -1e9
    np.testing.assert_allclose(pairwise(x, 0.1)[0, 1], 2e9 * np.sqrt(12 * 600), rtol=1e-4)


@pytest.mark.parametrize("band_share", [-0.01, 1.01, np.nan, np.inf])
def test_refuses_a_band_that_is_no_share(band_share: float) -> None:
    x = np.ones((2, 3, 10), np.float32)
    for refused in (
        lambda: pairwise_dtw(x, band_share),
        lambda: cross_dtw(x, x, band_share),
        lambda: pairwise_dtw_torch(torch.from_numpy(x), band_share),
    ):
        with pytest.raises(ValueError, match="band_share"):
            refused()


@pytest.mark.parametrize("shape", [(2, 4, 10), (2, 3, 11)])
def test_refuses_sets_that_differ_in_lead_or_time(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="equal lead and time"):
        cross_dtw(np.zeros((2, 3, 10), np.float32), np.zeros(shape, np.float32))
