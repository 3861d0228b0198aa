"""Losses on ranks: every ECG is pulled harder than all that are farther from the anchor than it is."""

from typing import Literal

import torch
from torch import Tensor

from shared_model.objectives.losses import Diagnostics, of_pairs
from shared_model.objectives.similarity import euclidean, unit_and_cosine

Similarity = Literal["cosine", "negative_l2"]
Ties = Literal["strict", "inclusive"]
Over = Literal["sum", "mean"]


def relative_contrastive(
    embeddings: Tensor,
    distance: Tensor,
    excluded: Tensor,
    temperature: float,
    ties: Ties = "strict",
    similarity: Similarity = "cosine",
    reduction: Over = "sum",
) -> tuple[Tensor, Diagnostics]:
    """For every anchor a and candidate i: -log(exp(s_ai / t) / sum over S exp(s_ak / t)).

    "strict": S is i and all k with d(a, k) > d(a, i): RelCon (Xu et al. 2025, arXiv:2411.18822, eq. 2).
    "inclusive": S is all k with d(a, k) >= d(a, i): Rank-N-Contrast (Zha et al. 2023, arXiv:2210.01189, eq. 1).
    "sum" adds up over candidates and averages over anchors (RelCon), "mean" averages over all pairs.
    Sorting the candidates from far to near makes each sum over S a prefix, so that no loop over anchors is needed.

    An anchor with fewer than two candidates, or for "strict" with all equally far, is left out; a batch without any
    other gives loss 0 and gradient 0.

    Args:
        embeddings: (rows, embedding_dim).
        distance: (rows, rows), need not be symmetric: row a holds d(a, .); +inf is left out.
        excluded: (rows, rows) bool: left out; the diagonal among them.
    """
    _, cosine = unit_and_cosine(embeddings)
    logits = (cosine if similarity == "cosine" else -euclidean(embeddings)) / temperature
    candidate = distance.isfinite() & ~excluded
    usable = _can_rank(distance, candidate) if ties == "strict" else candidate.sum(1) > 1
    candidate = candidate & usable[:, None]
    key = distance.masked_fill(~candidate, torch.inf)
    order = key.argsort(stable=True, dim=1, descending=True)  # those that are left out come first
    key, there = key.gather(1, order), candidate.gather(1, order)
    sorted_logits = logits.gather(1, order).masked_fill(~there, -torch.inf)
    prefix = _stable_prefix(sorted_logits, there)  # of all at least as far in the order
    columns = torch.arange(len(key), device=key.device).expand_as(key)
    first_of_tie = _first_of_tie(key, columns)
    if ties == "strict":
        # The last column before the tie closes the strictly farther ones; the candidate itself is added.
        before = torch.cat([torch.full_like(prefix[:, :1], -torch.inf), prefix], 1).gather(1, first_of_tie)
        total = _log_add(before, sorted_logits, there)
    else:
        total = prefix.gather(1, _last_of_tie(key, columns))
    terms = torch.where(there, total - sorted_logits.masked_fill(~there, 0.0), 0.0)
    count = usable.sum() if reduction == "sum" else there.sum()
    return terms.sum() / count.clamp(min=1), of_pairs(cosine.detach(), usable)


def _can_rank(distance: Tensor, candidate: Tensor) -> Tensor:
    """(rows,) bool: some candidate is farther than another."""
    farthest = distance.masked_fill(~candidate, -torch.inf).amax(1)
    return farthest > distance.masked_fill(~candidate, torch.inf).amin(1)


def _stable_prefix(sorted_logits: Tensor, there: Tensor) -> Tensor:
    """log of the cumulative sum of exponentials along a row; finite stand-ins keep gradients free of NaN."""
    lowest = sorted_logits.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    stand_in = torch.where(lowest.isfinite(), lowest, 0.0).detach() - 1e4  # e^-10000 is 0 beside any real term
    return torch.where(there, sorted_logits, stand_in).logcumsumexp(1)


def _log_add(before: Tensor, own: Tensor, there: Tensor) -> Tensor:
    """log(exp(before) + exp(own)), 0 where there is nothing."""
    safe_own = own.masked_fill(~there, 0.0)
    safe_before = torch.where(before.isfinite(), before, safe_own.detach() - 1e4)
    return torch.logaddexp(safe_before, safe_own)


def _first_of_tie(key: Tensor, columns: Tensor) -> Tensor:
    """Column of the first entry of each run of equal keys."""
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[:, 1:] = key[:, 1:] != key[:, :-1]
    return torch.where(starts, columns, 0).cummax(1).values


def _last_of_tie(key: Tensor, columns: Tensor) -> Tensor:
    """Column of the last entry of each run of equal keys."""
    ends = torch.ones_like(key, dtype=torch.bool)
    ends[:, :-1] = key[:, 1:] != key[:, :-1]
    flipped = torch.where(ends, columns, len(key)).flip(1).cummin(1).values
    return flipped.flip(1)
