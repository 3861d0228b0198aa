"""Distances, mining and triplet loss of one batch of 64 ECGs against the published way of computing them.

The rivals are rewritten from the description: Python loops over pairs, values fetched one by one.
`python -m benchmarks.mining`; about one minute on one core.
"""

import numpy as np
import torch
from dtaidistance import dtw_ndim
from torch import Tensor

from benchmarks.timing import compare, seconds
from shared_model.dtw import pairwise_dtw
from shared_model.objectives.losses import triplet_loss
from shared_model.objectives.mining import mine
from shared_model.objectives.relations import RELATIONS

BATCH = 64
NOBODY = torch.zeros(BATCH, BATCH, dtype=torch.bool)
MARGIN = 0.2


def vectorised_step(ecgs: Tensor, embeddings: Tensor, relation: str) -> Tensor:
    """Distances, mining and loss as in training."""
    triplets = mine(RELATIONS[relation].distance(ecgs), NOBODY, "farthest", torch.Generator().manual_seed(0))
    return triplet_loss(embeddings, triplets, MARGIN, "squared_l2", "all")[0]


def published_step(ecgs: Tensor, embeddings: Tensor) -> Tensor:
    """The same with a loop over pairs, a loop over anchors and a list of losses."""
    distance = np.zeros((BATCH, BATCH))
    for i in range(BATCH):
        for j in range(i):
            distance[i, j] = distance[j, i] = float((ecgs[i] - ecgs[j]).abs().mean())
    losses = []
    for i in range(BATCH):
        order = np.argsort(distance[i])
        positive, negative = int(order[1]), int(np.random.default_rng(i).choice(order[-2:]))
        to_positive = (embeddings[i] - embeddings[positive]).square().sum()
        to_negative = (embeddings[i] - embeddings[negative]).square().sum()
        losses.append(torch.relu(to_positive - to_negative + MARGIN))
    return torch.stack(losses).mean()


def dtaidistance_all_pairs(series: list[np.ndarray], window: int) -> list[float]:
    """Every pair once, in dtaidistance's C code; series (time, lead)."""
    return [
        dtw_ndim.distance(series[i], series[j], window=window, use_c=True) for i in range(len(series)) for j in range(i)
    ]


def compare_dtw(name: str, leads: int, time: int, band_share: float, batch: int) -> None:
    """Our banded DTW of a whole batch against dtaidistance's, on one core each."""
    x = np.random.default_rng(leads).normal(size=(batch, leads, time)).cumsum(-1).astype(np.float32)
    series = [np.ascontiguousarray(row.T, dtype=np.float64) for row in x]
    window = round(band_share * time) + 1
    compare(
        name,
        lambda: pairwise_dtw(x, band_share),
        lambda: dtaidistance_all_pairs(series, window),
        "dtaidistance C",
        repeats=3,
    )


def compare_small_operations_after_dtw() -> None:
    """Guards against a second OpenMP runtime: small torch operations at 2 threads, before and after our DTW.

    The times are taken before and after, so the ratio (before / after) is near 1 when all is well and near
    1/80 when the kernels disturb torch's threads.
    """
    x = torch.randn(64, 2048)

    def small_operations() -> None:
        for _ in range(500):
            x.add(1.0).relu()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    small_operations()
    before = min(seconds(small_operations) for _ in range(5))
    pairwise_dtw(np.zeros((4, 3, 625), np.float32))
    after = min(seconds(small_operations) for _ in range(5))
    torch.set_num_threads(threads)
    print(
        f'{{"benchmark": "small torch operations after DTW", "times_faster": {before / after:.2f}}}',
        flush=True,
    )


def main() -> None:
    """Print one JSON line a comparison."""
    torch.set_num_threads(1)
    compare_small_operations_after_dtw()
    ecgs = torch.randn(BATCH, 12 * 625)
    embeddings = torch.randn(BATCH, 128)
    for relation in ("l1", "l2"):
        compare(
            f"{relation} distance, mining and loss, batch 64, 62.5 Hz",
            lambda relation=relation: vectorised_step(ecgs, embeddings, relation),
            lambda: published_step(ecgs, embeddings),
            "loops over pairs",
        )
    beats = torch.randn(BATCH, RELATIONS["median_beat"].width)
    compare(
        "median beat against L1, batch 64",
        lambda: RELATIONS["median_beat"].distance(beats),
        lambda: RELATIONS["l1"].distance(ecgs),
        "L1 at 62.5 Hz",
    )
    compare_dtw("DTW, 1 lead, 62.5 Hz, band 10%, batch 64", 1, 625, 0.1, 64)
    compare_dtw("DTW, 3 leads, 62.5 Hz, band 10%, batch 64", 3, 625, 0.1, 64)
    compare_dtw("DTW, 12 leads, 62.5 Hz, band 10%, batch 64", 12, 625, 0.1, 64)
    compare_dtw("DTW, 12 leads, 250 Hz, band 5%, batch 16", 12, 2500, 0.05, 16)


if __name__ == "__main__":
    main()
