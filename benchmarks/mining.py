"""Distances, mining and triplet loss of one batch of 64 ECGs against the published way of computing them.

The rivals are rewritten from the description: Python loops over pairs, values fetched one by one.
`python -m benchmarks.mining`; about half a minute on one core. DTW has its own, `benchmarks.dtw`.
"""

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import compare
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


def main() -> None:
    """Print one JSON line a comparison."""
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
