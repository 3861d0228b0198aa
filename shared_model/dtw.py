"""Dynamic time warping over time, inside a Sakoe-Chiba band, for many pairs of series at once.

d(a, b) = sqrt(min over warping paths of sum ||a[:, i] - b[:, j]||^2) with |i - j| <= band: all leads are warped
together. Sakoe and Chiba 1978 (doi:10.1109/TASSP.1978.1163055), their symmetric form without slope constraint.
Other libraries write the same band as: dtaidistance `dtw_ndim.distance(a.T, b.T, window=band + 1)`, tslearn
`dtw(a.T, b.T, global_constraint="sakoe_chiba", sakoe_chiba_radius=band)`.

The work is done by a C kernel that is compiled at first use (`dtw_native.py`) or, where that cannot be, by numba
(`dtw_numba.py`). Both are single-threaded on purpose: a second OpenMP runtime in the process makes small torch
operations many times slower. `HEMOFED_DTW` = c or numba chooses one.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_model.dtw_native import NoKernelError, load_kernel
from shared_model.errors import HemoFedError

Series = NDArray[np.float32]
LARGEST = 1e9  # squared and summed over any path it stays below the 1e30 that kernels take for infinity
SETTING = "HEMOFED_DTW"


@dataclass(frozen=True)
class Backend:
    """What computes. `pairwise(x, band)` and `cross(a, b, band)` take checked, contiguous float32."""

    name: str
    why: str
    pairwise: Callable[[Series, int], Series]
    cross: Callable[[Series, Series, int], Series]


def pairwise_dtw(x: NDArray[np.float32], band_share: float = 0.1) -> NDArray[np.float32]:
    """DTW distance between every two series of a batch.

    Args:
        x: (batch, lead, time) float32, in mV and at any one rate.
        band_share: half-width of the band as a share of the time, 0 to 1; 0.1 of 10 s is +-1 s, 0 is Euclidean.

    Returns:
        (batch, batch) float32, symmetric, diagonal 0.

    Raises:
        ValueError: x has another number of axes, or no lead or time, or a value that is NaN, infinite or beyond
            +-1e9; band_share is not in 0 to 1.
        HemoFedError: HEMOFED_DTW asks for what cannot be had.
    """
    x = checked_series(x)
    return _backend().pairwise(x, band_samples(band_share, x.shape[2]))


def cross_dtw(a: NDArray[np.float32], b: NDArray[np.float32], band_share: float = 0.1) -> NDArray[np.float32]:
    """DTW distance between every series of one set and every series of another, as `pairwise_dtw`.

    Args:
        a: (n, lead, time) float32.
        b: (m, lead, time) float32.
        band_share: as in `pairwise_dtw`.

    Returns:
        (n, m) float32.

    Raises:
        ValueError: as in `pairwise_dtw`, or a and b differ in lead or time.
        HemoFedError: as in `pairwise_dtw`.
    """
    a, b = checked_series(a), checked_series(b)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"DTW compares series of equal lead and time, not {a.shape} and {b.shape}")
    return _backend().cross(a, b, band_samples(band_share, a.shape[2]))


def dtw_backend() -> str:
    """What computes DTW on the CPU here, and why.

    Raises:
        HemoFedError: HEMOFED_DTW asks for what cannot be had.
    """
    backend = _backend()
    return f"{backend.name}: {backend.why}"


def checked_series(x: NDArray[np.float32]) -> Series:
    """x as contiguous float32, or ValueError (see `pairwise_dtw`)."""
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"DTW takes (batch, lead, time), not {x.shape}")
    if x.size and not max(x.max(), -x.min()) <= LARGEST:  # NaN compares as False
        raise ValueError(f"DTW takes finite values within +-{LARGEST:g}: leave out ECGs with NaN or infinity")
    return np.ascontiguousarray(x, np.float32)


def band_samples(band_share: float, time: int) -> int:
    """Half-width of the band in samples, below `time`. Raises ValueError where band_share is not in 0 to 1."""
    if not 0 <= band_share <= 1:
        raise ValueError(f"band_share is a share of the time, 0 to 1, not {band_share}")
    return min(round(band_share * time), time - 1)


def _backend() -> Backend:
    return _chosen_backend(os.environ.get(SETTING, ""))


@functools.cache
def _chosen_backend(choice: str) -> Backend:
    if choice not in {"", "c", "numba"}:
        raise HemoFedError(f"{SETTING} is {choice!r}: set it to c or numba, or leave it out")
    if choice == "numba":
        return _numba_backend(f"{SETTING} asks for it")
    try:
        kernel = load_kernel()
    except NoKernelError as error:
        if choice == "c":
            raise HemoFedError(f"{SETTING} asks for C, but there is no kernel: {error}") from error
        return _numba_backend(f"no C kernel: {error}")
    return Backend("C", kernel.built, kernel.pairwise, kernel.cross)


def _numba_backend(why: str) -> Backend:
    from shared_model import dtw_numba  # numba takes a second to import and more to compile

    return Backend("numba", why, dtw_numba.pairwise, dtw_numba.cross)
