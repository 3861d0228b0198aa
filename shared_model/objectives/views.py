"""How each ECG of a batch becomes the rows that are embedded: as it is, disturbed twice, or in two parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from shared_model.objectives.augmentations import disturb, random_crop, strong_augment

LIMB_LEADS = 6  # the first six of the canonical order; the chest leads follow


def as_is(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG001
    """One view, unchanged: distance mining compares whole ECGs of different patients."""
    return (signals,)


def two_augmented(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Each ECG twice, differently disturbed (SimCLR: Chen et al. 2020, arXiv:2002.05709)."""
    return strong_augment(signals, generator), strong_augment(signals, generator)


def two_halves(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG001
    """The first and the second 5 s (contrastive multi-segment coding, CLOCS: Kiyasseh et al. 2021,
    arXiv:2005.13249)."""
    half = signals.shape[-1] // 2
    return signals[..., :half], signals[..., half : 2 * half]


def two_lead_groups(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG001
    """The six limb leads, and the six chest leads, the others 0, that is missing (CLOCS between leads)."""
    limb = torch.zeros_like(signals)
    chest = torch.zeros_like(signals)
    limb[:, :LIMB_LEADS] = signals[:, :LIMB_LEADS]
    chest[:, LIMB_LEADS:] = signals[:, LIMB_LEADS:]
    return limb, chest


def two_crops(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Two windows of 5 s at random places, which may overlap."""
    return random_crop(signals, generator, 0.5), random_crop(signals, generator, 0.5)


def original_and_augmented(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """An ECG as it is, and disturbed."""
    return signals, disturb(signals, generator)


View = Callable[[Tensor, torch.Generator], tuple[Tensor, ...]]
VIEWS: dict[str, View] = {
    "as_is": as_is,
    "two_augmented": two_augmented,
    "original_and_augmented": original_and_augmented,
    "two_halves": two_halves,
    "two_lead_groups": two_lead_groups,
    "two_crops": two_crops,
}
