"""The compiled loops against numpy, scipy and plain arithmetic."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.signal import resample_poly

from shared_model.kernels import decimate, rounded, scaled

floats = st.floats(-40, 40, width=32) | st.just(float("nan"))


@settings(max_examples=60, deadline=None)
@given(
    down=st.sampled_from([2, 3, 4, 8]), count=st.integers(2, 700), seed=st.integers(0, 99), offset=st.floats(-300, 300)
)
def test_decimation_is_that_of_scipy(down: int, count: int, seed: int, offset: float) -> None:
    length = count * down  # scipy's line is exact only where the length is a multiple
    signal = np.random.default_rng(seed).normal(0, 1, (2, length)).cumsum(axis=1) + offset
    ours = decimate(signal.astype(np.float32), down)
    scipys = resample_poly(signal, 1, down, axis=-1, padtype="line")
    assert ours.shape == scipys.shape
    np.testing.assert_allclose(ours, scipys, atol=4e-6 * np.abs(signal).max())


@pytest.mark.parametrize("length", [1, 2, 3, 41, 4999, 5001])
def test_decimation_keeps_a_line_at_any_length(length: int) -> None:
    line = (0.3 + 0.001 * np.arange(length, dtype=np.float32))[None]
    np.testing.assert_allclose(decimate(line, 2), line[:, ::2], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 499), down=st.sampled_from([2, 4, 5]))
def test_a_missing_sample_is_never_swallowed(place: int, down: int) -> None:
    """`resample` sees by this that it must take the long way."""
    signal = np.zeros((1, 500), np.float32)
    signal[0, place] = np.nan
    assert np.isnan(decimate(signal, down)).any()


@settings(max_examples=60, deadline=None)
@given(
    steps=arrays(np.int16, st.tuples(st.integers(1, 40), st.just(3))),
    gain=st.sampled_from([200.0, -4880.0, 1.3e-3, 1e-300, np.inf]),
    baseline=st.integers(-(2**31), 2**31),
    factor=st.sampled_from([1.0, 1e-3, 1e3]),
)
def test_scaling_is_numpys_to_the_last_bit(steps: np.ndarray, gain: float, baseline: int, factor: float) -> None:
    zero, per_unit = np.full(3, float(baseline)), np.full(3, gain)
    ours = scaled(steps, np.array([2, 0]), zero, per_unit, np.full(2, factor), np.int16(-32768))
    with np.errstate(over="ignore", invalid="ignore"):
        physical = (steps[:, [2, 0]].T.astype(np.float64) - baseline) / gain
        numpys = (physical * factor).astype(np.float32)
    numpys[(steps[:, [2, 0]].T == -32768) | ~np.isfinite(numpys)] = np.nan
    np.testing.assert_array_equal(ours, numpys)


@given(arrays(np.float32, st.integers(1, 60), elements=floats))
def test_rounding_is_numpys(signal: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        wanted = np.clip(np.rint(signal * np.float32(1000)), -32767, 32767)
    wanted = np.where(np.isnan(wanted), -32768, wanted).astype(np.int16)
    ours = rounded(signal, np.float32(1000), np.float32(32767), np.int16(-32768))
    np.testing.assert_array_equal(ours, wanted)


def test_without_a_place_for_the_compiled_code_it_is_compiled_each_time() -> None:
    """As in a container whose file system is read-only."""
    script = (
        "import numba\n"
        "compile_once = numba.njit\n"
        "def refuse(*functions, **options):\n"
        "    if options.get('cache'):\n"
        "        raise RuntimeError('cannot cache function: no locator available')\n"
        "    return compile_once(*functions, **options)\n"
        "numba.njit = refuse\n"
        "import numpy as np\n"
        "from shared_model.kernels import rounded\n"
        "print(rounded(np.ones(3, np.float32), np.float32(1), np.float32(9), np.int16(-9))[0])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout.strip() == "1", ended.stderr
