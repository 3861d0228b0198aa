"""Banded DTW in numba, for machines without a C compiler: one pair at a time along anti-diagonals.

The cells of an anti-diagonal do not depend on each other, so that they fill the lanes of a vector.
"""

import numba
import numpy as np
from numpy.typing import NDArray

GROUP = 3  # leads added up in one pass over a diagonal
BLOCK = 32  # cells of a diagonal are taken in blocks, so that no scalar remainder is left
FAR = np.float32(1e30)  # infinity would break fastmath


def pairwise(x: NDArray[np.float32], band: int) -> NDArray[np.float32]:
    """(n, lead, time), band half-width in samples -> (n, n)."""
    x = _padded(x)
    distance: NDArray[np.float32] = _distances(x, _reversed(x), band, True)
    return distance + distance.T


def cross(a: NDArray[np.float32], b: NDArray[np.float32], band: int) -> NDArray[np.float32]:
    """(n, lead, time), (m, lead, time), band half-width in samples -> (n, m)."""
    distance: NDArray[np.float32] = _distances(_padded(a), _reversed(_padded(b)), band, False)
    return distance


def _padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Leads of zeros up to whole groups, which add nothing to a distance, and a block of time to read beyond."""
    silent_leads = -x.shape[1] % GROUP if x.shape[1] > 1 else 0
    return np.pad(x, ((0, 0), (0, silent_leads), (0, BLOCK)))


def _reversed(padded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Backwards in time, the block still at the end."""
    return np.concatenate([padded[:, :, -BLOCK - 1 :: -1], padded[:, :, -BLOCK:]], 2)


@numba.njit(fastmath=True, nogil=True)
def _distances(x, reversed_y, band, below_diagonal):  # type: ignore[no-untyped-def]
    distance = np.zeros((len(x), len(reversed_y)), np.float32)
    # Three anti-diagonals, indexed by the time in the first series plus one, so that index 0 is outside.
    older = np.empty(x.shape[2] + 2, np.float32)
    old = np.empty(x.shape[2] + 2, np.float32)
    new = np.empty(x.shape[2] + 2, np.float32)
    cost = np.empty(x.shape[2], np.float32)
    for a in range(len(x)):
        for b in range(a if below_diagonal else len(reversed_y)):
            distance[a, b] = np.sqrt(_one_pair(x[a], reversed_y[b], band, older, old, new, cost))
    return distance


@numba.njit(fastmath=True, nogil=True)
def _one_pair(x, reversed_y, band, older, old, new, cost):  # type: ignore[no-untyped-def]
    leads, time = len(x), x.shape[1] - BLOCK
    older[:], old[:], new[:] = FAR, FAR, FAR
    older[0] = 0  # the corner before (0, 0)
    for step in range(2 * time - 1):  # the diagonal i + j = step, first <= i <= last
        first = max(0, step - time + 1, (step - band + 1) // 2)
        last = min(time - 1, step, (step + band) // 2)
        # Unsigned, since a check for negative indices would keep the loops below from being vectorised.
        count = np.uint64((last - first + BLOCK) // BLOCK * BLOCK)
        i, next_i = np.uint64(first), np.uint64(first + 1)
        j = np.uint64(first + time - 1 - step)  # reversed_y[:, j + k] is y[:, step - (i + k)]
        if leads == 1:
            for k in range(count):
                d0 = x[0, i + k] - reversed_y[0, j + k]
                new[next_i + k] = d0 * d0 + min(min(old[i + k], old[next_i + k]), older[i + k])
        else:
            cost[: last - first + BLOCK] = 0
            for lead in range(0, leads - GROUP, GROUP):
                l0, l1, l2 = np.uint64(lead), np.uint64(lead + 1), np.uint64(lead + 2)
                for k in range(count):
                    d0 = x[l0, i + k] - reversed_y[l0, j + k]
                    d1 = x[l1, i + k] - reversed_y[l1, j + k]
                    d2 = x[l2, i + k] - reversed_y[l2, j + k]
                    cost[k] += d0 * d0 + d1 * d1 + d2 * d2
            l0, l1, l2 = np.uint64(leads - 3), np.uint64(leads - 2), np.uint64(leads - 1)
            for k in range(count):
                d0 = x[l0, i + k] - reversed_y[l0, j + k]
                d1 = x[l1, i + k] - reversed_y[l1, j + k]
                d2 = x[l2, i + k] - reversed_y[l2, j + k]
                total = cost[k] + d0 * d0 + d1 * d1 + d2 * d2
                new[next_i + k] = total + min(min(old[i + k], old[next_i + k]), older[i + k])
        new[first] = new[last + 2] = FAR  # next to the band
        older, old, new = old, new, older
    return old[time]
