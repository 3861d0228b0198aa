"""From distances between ECGs to triplets of anchor, positive and negatives. No loop over pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Negatives = Literal["beyond_nearest", "farthest", "random"]


@dataclass(frozen=True)
class Triplets:
    """Row i is anchor i.

    Attributes:
        positive: (batch,) int64, the column of the nearest other ECG.
        negatives: (batch, batch) bool, the columns the anchor is pushed from; one a row unless all are used,
            none where the anchor is not usable.
        usable: (batch,) bool, False where an anchor has no positive or no negative.
    """

    positive: Tensor
    negatives: Tensor
    usable: Tensor


@torch.no_grad()
def mine(
    distance: Tensor,
    same_record: Tensor,
    negatives: Negatives,
    generator: torch.Generator,
    farthest_k: int = 2,
    nearest_share: float = 0.1,
) -> Triplets:
    """Distance-based mining (SSL-DML): positive = nearest other ECG.

    Args:
        distance: (batch, batch) float32; +inf marks a pair that cannot be compared.
        same_record: (batch, batch) bool; such pairs are neither positive nor negative. The diagonal is
            implied.
        negatives: "farthest" picks one of the `farthest_k` farthest, "random" one of all the rest,
            "beyond_nearest" takes every ECG but the nearest `nearest_share` of those that can be compared.
        generator: draws the picks, on its own device, so that a CPU generator gives the same picks
            everywhere.
    """
    itself = torch.eye(len(distance), dtype=torch.bool, device=distance.device)
    distance = distance.masked_fill(same_record | itself, torch.inf)
    nearest, positive = distance.min(1)
    candidate = distance.isfinite().scatter(1, positive[:, None], False)
    if negatives == "beyond_nearest":
        chosen = _beyond_nearest(distance, candidate, nearest_share)
    else:
        eligible = _farthest(distance, candidate, farthest_k) if negatives == "farthest" else candidate
        chosen = _pick_one(eligible, generator)
    return Triplets(positive, chosen, nearest.isfinite() & chosen.any(1))


def _beyond_nearest(distance: Tensor, candidate: Tensor, share: float) -> Tensor:
    """All candidates but the nearest `share` of the comparable ECGs (the positive is one of them)."""
    rank = distance.argsort(stable=True, dim=1).argsort(1)
    skipped: Tensor = (share * distance.isfinite().sum(1, keepdim=True)).ceil().clamp(min=1)
    return torch.logical_and(candidate, rank >= skipped)


def _farthest(distance: Tensor, candidate: Tensor, k: int) -> Tensor:
    """The k farthest candidates of each row, or all where there are fewer."""
    k = min(k, distance.shape[1])
    column = distance.masked_fill(~candidate, -torch.inf).topk(k, 1).indices
    return torch.zeros_like(candidate).scatter(1, column, True) & candidate


def _pick_one(eligible: Tensor, generator: torch.Generator) -> Tensor:
    """One eligible column of each row, drawn uniformly; none where there is none."""
    draw = torch.rand(eligible.shape, generator=generator, device=generator.device).to(eligible.device)
    column = draw.masked_fill(~eligible, -1.0).argmax(1, keepdim=True)
    return torch.zeros_like(eligible).scatter(1, column, True) & eligible
