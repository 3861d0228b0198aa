"""What a site knows of an ECG besides its signal, as relations: who it is of, what was measured.

A fact is one number an ECG (or a few); NaN is unknown, and an ECG whose fact is unknown is compared with nobody.
"""

import torch
from torch import Tensor


@torch.no_grad()
def equal_distance(facts: Tensor) -> Tensor:
    """0 where all facts are the same, 1 where one differs, +inf where one is unknown: (n, k) -> (n, n) float32."""
    differs = (facts[:, None] != facts[None, :]).any(-1).float()
    return _known_only(differs, facts)


@torch.no_grad()
def absolute_difference(facts: Tensor) -> Tensor:
    """|a - b| of one fact, +inf where it is unknown: (n, 1) -> (n, n) float32. The label-distance of supervised deep
    metric learning and Rank-N-Contrast."""
    return _known_only((facts[:, None] - facts[None, :]).abs().sum(-1).float(), facts)


def _known_only(distance: Tensor, facts: Tensor) -> Tensor:
    unknown = facts.isnan().any(1)
    return distance.masked_fill(unknown[:, None] | unknown[None, :], torch.inf)
