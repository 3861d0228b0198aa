"""InfoNCE and its kin: a row's pairs against everything else it is compared with."""

from typing import Literal

import torch
from torch import Tensor

from shared_model.objectives.losses import Diagnostics, of_pairs
from shared_model.objectives.similarity import unit_and_cosine

PairSum = Literal["each", "sum_inside_log"]


def info_nce(
    embeddings: Tensor,
    distance: Tensor,
    excluded: Tensor,
    temperature: float | Tensor,
    radius: float = 0.0,
    candidates: Tensor | None = None,
    positives: PairSum = "each",
) -> tuple[Tensor, Diagnostics]:
    """Contrastive loss on cosine similarities, averaged over the rows that have a positive.

    "each" is the mean over a row's positives of -log(exp(s_p / t) / sum over candidates exp(s / t)): NT-Xent (Chen et
    al. 2020, eq. 1) where there is one, else SupCon's L_out (Khosla et al. 2020, eq. 2). "sum_inside_log" is
    -log(sum over positives / sum over candidates), as in Good Views. The positives are among the candidates.

    A row without a positive, or with nothing but positives, has nothing to be told apart and is left out; a batch of
    such rows gives loss 0 and gradient 0.

    Args:
        embeddings: (rows, embedding_dim) float32.
        distance: (rows, rows): at most `radius` is a positive, +inf cannot be compared.
        excluded: (rows, rows) bool: neither positive nor candidate; the diagonal among them.
        temperature: t, a number or a trained 0-d tensor.
        candidates: (rows, rows) bool: further limits who is compared; None compares all.
    """
    _, cosine = unit_and_cosine(embeddings)
    compared = distance.isfinite() & ~excluded
    if candidates is not None:
        compared = compared & candidates
    positive = compared & (distance <= radius)
    usable = positive.any(1) & (compared & ~positive).any(1)
    logits = (cosine / temperature).masked_fill(~compared, -torch.inf)
    everything = torch.where(usable, logits.masked_fill(~usable[:, None], 0.0).logsumexp(1), 0.0)
    if positives == "each":
        count = positive.sum(1).clamp(min=1)
        pulled = torch.where(positive, cosine / temperature, 0.0).sum(1) / count
    else:
        pulled = logits.masked_fill(~positive, -torch.inf).masked_fill(~usable[:, None], 0.0).logsumexp(1)
    loss = torch.where(usable, everything - pulled, 0.0).sum() / usable.sum().clamp(min=1)
    return loss, of_pairs(cosine.detach(), usable)
