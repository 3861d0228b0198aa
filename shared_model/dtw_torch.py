"""Banded DTW of a batch on any torch device: all pairs at once, one anti-diagonal after the other.

Meant for a GPU, where it is the count of kernel launches that costs: positions are counted from the main diagonal,
so that windows do not move, and costs are computed for many anti-diagonals together. That leaves three launches an
anti-diagonal. On a CPU `dtw.pairwise_dtw` is many times faster.
"""

import torch
from torch import Tensor

from shared_model.dtw import LARGEST, band_samples

FAR = 1e30
OUTSIDE = 1e15  # a sample beyond the ends: its squared difference is FAR from all that `checked_series` allows
MOST_NUMBERS = 2**22  # of one intermediate tensor: 16 MiB, which a GPU's cache holds
LEAST_DIAGONALS = 8  # whose costs are computed together, in pairs


@torch.no_grad()
def pairwise_dtw_torch(x: Tensor, band_share: float = 0.1) -> Tensor:
    """The same as `dtw.pairwise_dtw`, on the device of x.

    Args:
        x: (batch, lead, time) float32 mV.
        band_share: half-width of the band as a share of the time, 0 to 1.

    Returns:
        (batch, batch) float32, symmetric, diagonal 0, without gradient.

    Raises:
        ValueError: as `dtw.pairwise_dtw`.
    """
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"DTW takes (batch, lead, time), not {tuple(x.shape)}")
    if not bool((x.abs() <= LARGEST).all()):
        raise ValueError(f"DTW takes finite values within +-{LARGEST:g}: leave out ECGs with NaN or infinity")
    batch, _, time = x.shape
    band = band_samples(band_share, time)
    rows = max(1, MOST_NUMBERS // max(1, LEAST_DIAGONALS * batch * (band + 2)))
    x = x.float()
    parts = [_squared_distances(x[start : start + rows], x, band) for start in range(0, batch, rows)]
    distance = torch.cat([*parts, x.new_zeros(0, batch)]).sqrt()
    return torch.minimum(distance, distance.T).fill_diagonal_(0.0)


def _squared_distances(a: Tensor, b: Tensor, band: int) -> Tensor:
    """(n, lead, time), (m, lead, time), band in samples -> (n, m).

    Position k of the even anti-diagonal i + j = 2q is the cell (q + k, q - k), of the odd one after it
    (q + k + 1, q - k), k = -half to half. `even` and `odd` are the latest of each kind, with a column of FAR
    at both ends.
    """
    (n, _, time), half = a.shape, (band + 1) // 2
    width = 2 * half + 1
    even = a.new_full((n, len(b), width + 2), FAR)
    odd = even.clone()
    even[..., half + 1] = 0  # the corner before (0, 0)
    block = max(1, MOST_NUMBERS // (n * len(b) * width))
    for start in range(0, time, block):
        stop = min(start + block, time)
        even_cost = _costs(a, b, band, start, stop, later=0)
        odd_cost = _costs(a, b, band, start, stop, later=1)
        for q in range(stop - start):
            here = even[..., 1:-1]
            torch.minimum(here, torch.minimum(odd[..., :-2], odd[..., 1:-1]), out=here)
            here += even_cost[:, :, q]
            if start + q == time - 1:
                break
            here = odd[..., 1:-1]
            torch.minimum(here, torch.minimum(even[..., 1:-1], even[..., 2:]), out=here)
            here += odd_cost[:, :, q]
    return even[..., half + 1]


def _costs(a: Tensor, b: Tensor, band: int, start: int, stop: int, later: int) -> Tensor:
    """Squared differences summed over leads: (n, m, stop - start, width); FAR outside band and table."""
    half = (band + 1) // 2
    first = torch.nn.functional.pad(a, (half, half + later), value=OUTSIDE)[..., later:]
    second = torch.nn.functional.pad(b, (half, half), value=OUTSIDE).flip(-1)
    # Window q of the first runs forwards from q - half + later; of the second backwards from q + half.
    forwards = first.unfold(-1, 2 * half + 1, 1)[:, :, start:stop]
    time = b.shape[2]
    backwards = second.unfold(-1, 2 * half + 1, 1)[:, :, time - stop : time - start].flip(2)
    cost = a.new_zeros(len(a), len(b), stop - start, 2 * half + 1)
    for lead in range(a.shape[1]):
        difference = forwards[:, None, lead] - backwards[None, :, lead]
        cost.addcmul_(difference, difference)
    from_diagonal = (2 * torch.arange(-half, half + 1, device=a.device) + later).abs()
    return cost.masked_fill_(from_diagonal > band, FAR)
