"""Dynamic time warping over time, inside a Sakoe-Chiba band, for all pairs of a batch at once.

Sakoe and Chiba 1978 (doi:10.1109/TASSP.1978.1163055). The kernel walks anti-diagonals, whose cells do not
depend on each other, so that the compiler can use vector instructions. It is single-threaded on purpose: a
second OpenMP runtime in the process makes small torch operations many times slower.
"""

import numba
import numpy as np
from numpy.typing import NDArray

GROUP = 3  # leads added up in one pass over a diagonal: fewer passes, and three leads are the usual case
FAR = np.float32(1e30)  # infinity would break fastmath


def pairwise_dtw(x: NDArray[np.float32], band_share: float = 0.1) -> NDArray[np.float32]:
    """DTW distance between every two series of a batch, all leads warped together over time.

    d(a, b) = sqrt(min over warping paths of sum ||a[:, i] - b[:, j]||^2), with |i - j| <= band: the same
    number as `dtaidistance.dtw_ndim.distance(a.T, b.T, window=band + 1)`.

    Args:
        x: (batch, lead, time) float32, finite, mV, at any one rate.
        band_share: band half-width as a share of the time; 0.1 of 10 s is +-1 s.

    Returns:
        (batch, batch) float32, symmetric, diagonal 0.

    Raises:
        ValueError: x has another number of axes, or no lead or time.
    """
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"pairwise_dtw takes (batch, lead, time), not {x.shape}")
    band = min(max(round(band_share * x.shape[2]), 0), x.shape[2] - 1)
    silent = ((0, 0), (0, -x.shape[1] % GROUP), (0, 0))  # leads of zeros add nothing to a distance
    forward = np.pad(x.astype(np.float32), silent)
    backward = np.ascontiguousarray(forward[:, :, ::-1])
    distance: NDArray[np.float32] = _all_pairs(forward, backward, band)
    return distance


@numba.njit(fastmath=True, nogil=True)
def _all_pairs(x, reversed_x, band):  # type: ignore[no-untyped-def]
    batch, _, time = x.shape
    distance = np.zeros((batch, batch), np.float32)
    # Three anti-diagonals, indexed by the time in the first series plus one, so that index 0 is outside.
    older = np.empty(time + 2, np.float32)
    old = np.empty(time + 2, np.float32)
    new = np.empty(time + 2, np.float32)
    cost = np.empty(time, np.float32)
    for a in range(batch):
        for b in range(a):
            squared = _one_pair(x[a], reversed_x[b], band, older, old, new, cost)
            distance[a, b] = distance[b, a] = np.sqrt(squared)
    return distance


@numba.njit(fastmath=True, nogil=True)
def _one_pair(x, reversed_y, band, older, old, new, cost):  # type: ignore[no-untyped-def]
    leads, time = x.shape
    older[:], old[:], new[:] = FAR, FAR, FAR
    older[0] = 0  # the corner before (0, 0)
    for step in range(2 * time - 1):  # the diagonal i + j = step, first <= i <= last
        first = max(0, step - time + 1, (step - band + 1) // 2)
        last = min(time - 1, step, (step + band) // 2)
        # Unsigned, since a check for negative indices would keep the loops below from being vectorised.
        count, i, next_i = np.uint64(last + 1 - first), np.uint64(first), np.uint64(first + 1)
        j = np.uint64(first + time - 1 - step)  # reversed_y[:, j + k] is y[:, step - (i + k)]
        for k in range(count):
            cost[k] = 0
        for lead in range(0, leads, GROUP):
            l0, l1, l2 = np.uint64(lead), np.uint64(lead + 1), np.uint64(lead + 2)
            for k in range(count):
                d0 = x[l0, i + k] - reversed_y[l0, j + k]
                d1 = x[l1, i + k] - reversed_y[l1, j + k]
                d2 = x[l2, i + k] - reversed_y[l2, j + k]
                cost[k] += d0 * d0 + d1 * d1 + d2 * d2
        for k in range(count):
            new[next_i + k] = cost[k] + min(min(old[i + k], old[next_i + k]), older[i + k])
        new[first] = FAR  # the cell before the band may hold an older diagonal; the one after it never does
        older, old, new = old, new, older
    return old[time]
