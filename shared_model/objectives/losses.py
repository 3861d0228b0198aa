"""Losses on embeddings and the numbers that tell a healthy pretraining from a collapsing one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from shared_model.objectives.mining import Triplets
from shared_model.objectives.similarity import EmbeddingDistance, euclidean, product, squared_l2, unit_and_cosine

Reduction = Literal["violating", "all"]

HUB_SHARE = 0.05  # "hubs" are the 5% of ECGs used most often as a positive
SICK_VIOLATING_SHARE = 0.6  # prototype: healthy runs end at 0.09-0.16, raw L1 at 0.65-0.74
SICK_MEAN_COSINE = 0.5  # prototype: healthy runs end near 0-0.1, raw L1 at 0.58-0.66
ALIKE_MEAN_COSINE = 0.99  # without triplets only a whole collapse is told: healthy contrastive runs reach 0.7


@dataclass(frozen=True)
class Diagnostics:
    """Health of one step; every entry is a 0-d float32 tensor on the batch's device, so no step waits for it. NaN where
    a number has no meaning for the loss: there are triplets only where a method mines them.

    Attributes:
        violating_share: share of triplets inside the margin.
        mean_cosine: mean cosine between different embeddings of the batch; 1 is collapse.
        hub_share: share of anchors whose positive is among the 5% most used ECGs.
        max_in_degree: how many anchors share the most used positive.
        usable_share: share of anchors that have a positive and a negative; 0 means the batch taught nothing.
    """

    violating_share: Tensor
    mean_cosine: Tensor
    hub_share: Tensor
    max_in_degree: Tensor
    usable_share: Tensor


def triplet_loss(
    embeddings: Tensor,
    triplets: Triplets,
    margin: float,
    distance: EmbeddingDistance = "cosine",
    reduction: Reduction = "violating",
) -> tuple[Tensor, Diagnostics]:
    """Triplet loss max(0, d(a, p) - d(a, n) + margin) over every (anchor, negative) of `triplets`.

    "cosine" is 1 - cos on L2-normalised embeddings, "squared_l2" the published squared distance on
    embeddings as they are. "violating" averages over triplets inside the margin, "all" over all of them.
    A batch without any triplet gives loss 0 and gradient 0. Source: Schroff et al. 2015 (arXiv:1503.03832),
    eq. 2-3.

    Args:
        embeddings: (batch, embedding_dim) float32.
        triplets: what mining chose; an anchor without negatives adds nothing.
    """
    _, cosine = unit_and_cosine(embeddings)
    apart = 1 - cosine if distance == "cosine" else squared_l2(embeddings)
    to_positive = apart.gather(1, triplets.positive[:, None])
    hinge = torch.where(triplets.negatives, (to_positive - apart + margin).relu(), 0.0)
    violating, total = (hinge > 0).sum(), triplets.negatives.sum()
    count = violating if reduction == "violating" else total
    loss = hinge.sum() / count.clamp(min=1)
    return loss, _diagnose(cosine.detach(), triplets, violating, total)


def margin_loss(embeddings: Tensor, triplets: Triplets, beta: Tensor, margin: float) -> tuple[Tensor, Diagnostics]:
    """Margin loss max(0, m + D(a, p) - beta) + max(0, m + beta - D(a, n)) over the triplets, D the Euclidean distance
    of L2-normalised embeddings, averaged over the pairs inside the margin.

    A positive counts once an anchor, however many negatives it has. Nothing but the loss holds beta: too large a value
    is pushed down by the negatives, too small a one up by the positives. Source: Wu et al. 2017 (arXiv:1706.07567),
    section 4.2, with one boundary for all and without its regulariser.

    Args:
        beta: () the boundary, a trained parameter.
    """
    unit, cosine = unit_and_cosine(embeddings)
    apart = euclidean(unit)
    to_positive = apart.gather(1, triplets.positive[:, None]).squeeze(1)
    pull = torch.where(triplets.usable, (to_positive - beta + margin).relu(), 0.0)
    push = torch.where(triplets.negatives, (beta - apart + margin).relu(), 0.0)
    inside = (pull > 0).sum() + (push > 0).sum()
    violating, total = (push > 0).sum(), triplets.negatives.sum()
    return (pull.sum() + push.sum()) / inside.clamp(min=1), _diagnose(cosine.detach(), triplets, violating, total)


def angular_loss(embeddings: Tensor, triplets: Triplets, angle_degrees: float) -> tuple[Tensor, Diagnostics]:
    """Angular loss log(1 + sum over negatives exp(4 tan^2(alpha) (a + p) . n - 2 (1 + tan^2(alpha)) a . p)), averaged
    over anchors, on L2-normalised embeddings.

    Source: Wang et al. 2017 (arXiv:1708.01682), eq. 8.
    """
    unit, cosine = unit_and_cosine(embeddings)
    positive = unit[triplets.positive]
    tangent = math.tan(math.radians(angle_degrees)) ** 2
    term = 4 * tangent * product(unit + positive, unit) - 2 * (1 + tangent) * (unit * positive).sum(1, keepdim=True)
    zero = term.new_zeros(len(term), 1)
    losses = torch.cat([zero, term.masked_fill(~triplets.negatives, -torch.inf)], 1).logsumexp(1)
    loss = torch.where(triplets.usable, losses, 0.0).sum() / triplets.usable.sum().clamp(min=1)
    violating = (triplets.negatives & (term > 0)).sum()
    return loss, _diagnose(cosine.detach(), triplets, violating, triplets.negatives.sum())


def of_pairs(cosine: Tensor, usable: Tensor) -> Diagnostics:
    """Health of a step without triplets.

    Args:
        cosine: (rows, rows), between embeddings, without gradient.
        usable: (rows,) bool: rows that taught something.
    """
    rows = len(cosine)
    nothing = cosine.new_tensor(math.nan)
    mean = (cosine.sum() - cosine.diagonal().sum()) / max(rows * (rows - 1), 1)
    return Diagnostics(nothing, mean, nothing, nothing, usable.float().mean())


def _diagnose(cosine: Tensor, triplets: Triplets, violating: Tensor, total: Tensor) -> Diagnostics:
    batch = len(cosine)
    usable = triplets.usable.float()
    in_degree = torch.zeros(batch, device=cosine.device).scatter_add(0, triplets.positive, usable)
    hubs = in_degree.topk(math.ceil(HUB_SHARE * batch)).values
    pairs = max(batch * (batch - 1), 1)
    return Diagnostics(
        violating_share=violating / total.clamp(min=1),
        mean_cosine=(cosine.sum() - cosine.diagonal().sum()) / pairs,
        hub_share=hubs.sum() / usable.sum().clamp(min=1),
        max_in_degree=hubs[0],
        usable_share=usable.mean(),
    )


def summarise(steps: Sequence[Diagnostics]) -> dict[str, float]:
    """Mean of each diagnostic over a round's steps, and `skipped_batches`: how many had no triplet.

    Steps that were skipped count in `skipped_batches` and `usable_share` only. One wait for the device a
    round.
    """
    names = [field.name for field in fields(Diagnostics)]
    if not steps:
        return dict.fromkeys(names, math.nan) | {"skipped_batches": 0.0}
    table = torch.stack([torch.stack([getattr(step, name) for name in names]) for step in steps]).double().cpu()
    taught = table[:, names.index("usable_share")] > 0
    means = (table[taught] if taught.any() else table).nanmean(0)
    summary = dict(zip(names, means.tolist(), strict=True))
    summary["usable_share"] = float(table[:, names.index("usable_share")].mean())
    summary["skipped_batches"] = float((~taught).sum())
    return summary


def collapse_warning(summary: Mapping[str, float]) -> str | None:
    """One line if the embeddings are collapsing, else None: most triplets violated and all embeddings alike, or, of
    methods without triplets, all embeddings all but the same.

    Args:
        summary: what `summarise` gives for the last round; judged at the end, since every run starts
            violating.
    """
    violating, cosine = summary["violating_share"], summary["mean_cosine"]
    if math.isnan(violating):
        sick, found = cosine > ALIKE_MEAN_COSINE, ""
        remedy = "a larger batch_size or a lower learning_rate"
    else:
        sick = violating > SICK_VIOLATING_SHARE and cosine > SICK_MEAN_COSINE
        found = f"{violating:.0%} of triplets violated, hub share {summary['hub_share']:.0%}, "
        remedy = "objective ssl_dml_median_beat, a larger batch_size or a smaller margin"
    return f"pretraining is collapsing: {found}mean cosine {cosine:.2f}; try {remedy}" if sick else None
