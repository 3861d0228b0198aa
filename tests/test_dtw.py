"""DTW over time against an explicit loop and dtaidistance, and against the published warp over leads."""

import numpy as np
import pytest
from dtaidistance import dtw_ndim
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared_model.dtw import pairwise_dtw


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


@settings(deadline=None)  # the first call compiles
@given(
    leads=st.integers(1, 5),
    time=st.integers(1, 40),
    band_share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_equals_the_textbook_recursion(leads: int, time: int, band_share: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, leads, time)).astype(np.float32)
    band = min(round(band_share * time), time - 1)
    expected = [[slow_dtw(a.astype(float), b.astype(float), band) for b in x] for a in x]
    np.testing.assert_allclose(pairwise_dtw(x, band_share), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("leads", "time", "band_share"), [(1, 2500, 0.02), (3, 625, 0.1), (12, 625, 0.1)])
def test_equals_dtaidistance(leads: int, time: int, band_share: float) -> None:
    walk = np.random.default_rng(leads).normal(size=(4, leads, time)).cumsum(-1)
    x = (0.1 * walk).astype(np.float32)
    rows = [np.ascontiguousarray(series.T, dtype=np.float64) for series in x]  # dtaidistance: time first
    window = round(band_share * time) + 1
    expected = [[dtw_ndim.distance(a, b, window=window, use_c=True) for b in rows] for a in rows]
    np.testing.assert_allclose(pairwise_dtw(x, band_share), expected, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one_and_of_none() -> None:
    assert pairwise_dtw(np.ones((1, 3, 10), np.float32)).tolist() == [[0.0]]
    assert pairwise_dtw(np.ones((0, 3, 10), np.float32)).shape == (0, 0)


@pytest.mark.parametrize("shape", [(3, 10), (2, 0, 10), (2, 3, 0)])
def test_refuses_what_is_not_a_batch_of_series(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch, lead, time"):
        pairwise_dtw(np.zeros(shape, np.float32))
