"""From distances between ECGs to triplets of anchor, positive and negatives. No loop over pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shared_model.objectives.similarity import EmbeddingDistance, squared_l2, unit_and_cosine

Positives = Literal["nearest", "random"]
Negatives = Literal["beyond_nearest", "farthest", "random", "semihard", "softhard"]
LOOKING_AT_EMBEDDINGS = ("semihard", "softhard")


@dataclass(frozen=True)
class Triplets:
    """Row i is anchor i.

    Attributes:
        positive: (batch,) int64, the column of the positive.
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
    positives: Positives = "nearest",
    embeddings: Tensor | None = None,
    margin: float = 0.3,
    embedding_distance: EmbeddingDistance = "cosine",
) -> Triplets:
    """A positive and negatives for every anchor.

    A negative is always farther than the positive: where all labels tie there is no triplet.

    Args:
        distance: (batch, batch) float32; +inf marks a pair that cannot be compared.
        same_record: (batch, batch) bool; such pairs are neither positive nor negative. The diagonal is
            implied.
        negatives: "farthest" picks one of the `farthest_k` farthest, "random" one of all the rest,
            "beyond_nearest" takes every ECG but the nearest `nearest_share` of those that can be compared.
            "semihard" (Schroff et al. 2015, arXiv:1503.03832, section 3.2): one that the embedding has farther than the
            positive but inside the margin, else the nearest farther one, else the farthest. "softhard" (Roth et
            al. 2020, arXiv:2002.08473): one that the embedding has nearer than the farthest ECG of the positive's
            kind, the positive then being one that it has farther than the nearest negative; any where there is none.
        positives: "nearest" in `distance`, or "random" among those at distance 0 (the same class).
        embeddings: (batch, embedding_dim), for the modes that look at them; compared by `embedding_distance`.
        margin: of "semihard", in units of that distance.
        generator: draws the picks, on its own device, so that a CPU generator gives the same picks
            everywhere.

    Raises:
        ValueError: "semihard" or "softhard" without embeddings.
    """
    itself = torch.eye(len(distance), dtype=torch.bool, device=distance.device)
    distance = distance.masked_fill(same_record | itself, torch.inf)
    nearest, positive = distance.min(1)
    near = distance <= 0
    hard = _between(embeddings, embedding_distance) if negatives in LOOKING_AT_EMBEDDINGS else distance
    if positives == "random":
        eligible = _farther_than_a_negative(hard, near, distance) if negatives == "softhard" else near
        positive = _pick_one(eligible, generator).int().argmax(1)
        nearest = nearest.masked_fill(~near.any(1), torch.inf)
    candidate = distance.isfinite() & (distance > distance.gather(1, positive[:, None]))
    match negatives:
        case "beyond_nearest":
            chosen = _beyond_nearest(distance, candidate, nearest_share)
        case "farthest":
            chosen = _pick_one(_farthest(distance, candidate, farthest_k), generator)
        case "random":
            chosen = _pick_one(candidate, generator)
        case "semihard":
            chosen = _semihard(hard, positive, candidate, margin, generator)
        case "softhard":
            confusing = candidate & (hard < hard.masked_fill(~near, -torch.inf).amax(1, keepdim=True))
            chosen = _pick_one(torch.where(confusing.any(1, keepdim=True), confusing, candidate), generator)
    usable = nearest.isfinite() & chosen.any(1)
    return Triplets(positive, chosen & usable[:, None], usable)


def _between(embeddings: Tensor | None, distance: EmbeddingDistance) -> Tensor:
    if embeddings is None:
        raise ValueError(f"negatives {' and '.join(LOOKING_AT_EMBEDDINGS)} are chosen by embeddings: none were given")
    return squared_l2(embeddings) if distance == "squared_l2" else 1 - unit_and_cosine(embeddings)[1]


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


def _semihard(hard: Tensor, positive: Tensor, candidate: Tensor, margin: float, generator: torch.Generator) -> Tensor:
    """One candidate a row: inside the margin, else the nearest beyond the positive, else the farthest of all."""
    to_positive = hard.gather(1, positive[:, None])
    beyond = candidate & (hard > to_positive)
    inside = beyond & (hard < to_positive + margin)
    next_best = torch.zeros_like(candidate).scatter(
        1, hard.masked_fill(~beyond, torch.inf).argmin(1, keepdim=True), True
    )
    last = torch.zeros_like(candidate).scatter(
        1, hard.masked_fill(~candidate, -torch.inf).argmax(1, keepdim=True), True
    )
    fallback = torch.where(beyond.any(1, keepdim=True), next_best, last) & candidate
    return torch.where(inside.any(1, keepdim=True), _pick_one(inside, generator), fallback)


def _farther_than_a_negative(hard: Tensor, near: Tensor, distance: Tensor) -> Tensor:
    """Positives that the embedding has farther than the nearest negative; all positives where there is none."""
    nearest_negative = hard.masked_fill(near | distance.isinf(), torch.inf).amin(1, keepdim=True)
    confused = near & (hard > nearest_negative)
    return torch.where(confused.any(1, keepdim=True), confused, near)


def _pick_one(eligible: Tensor, generator: torch.Generator) -> Tensor:
    """One eligible column of each row, drawn uniformly; none where there is none."""
    draw = torch.rand(eligible.shape, generator=generator, device=generator.device).to(eligible.device)
    column = draw.masked_fill(~eligible, -1.0).argmax(1, keepdim=True)
    return torch.zeros_like(eligible).scatter(1, column, True) & eligible
