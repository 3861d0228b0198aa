"""How alike embeddings are, in full precision: bfloat16 cannot tell near from nearer."""

from typing import Literal

import torch
from torch import Tensor

EmbeddingDistance = Literal["cosine", "squared_l2"]


def full_precision(embeddings: Tensor) -> Tensor:
    """float64 as it is, all else as float32: under autocast embeddings come in bfloat16."""
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns.T, in the precision of its arguments also under autocast: (n, d), (m, d) -> (n, m)."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


def unit_and_cosine(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings at length 1, and the cosines between them: (n, d) -> (n, d), (n, n)."""
    unit = torch.nn.functional.normalize(full_precision(embeddings), dim=1)
    return unit, product(unit, unit)


def squared_l2(embeddings: Tensor) -> Tensor:
    """Squared Euclidean distances: (n, d) -> (n, n)."""
    embeddings = full_precision(embeddings)
    square = embeddings.square().sum(1)
    return (square[:, None] + square[None, :] - 2 * product(embeddings, embeddings)).clamp(min=0)


def euclidean(embeddings: Tensor) -> Tensor:
    """Euclidean distances: (n, d) -> (n, n).

    Not by a matrix product, whose rounding under the root would be worth 1e-3 between duplicates; there the distance is
    0 and so is its gradient.
    """
    embeddings = full_precision(embeddings)
    return torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
