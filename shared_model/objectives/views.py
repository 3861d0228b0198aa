"""How a batch of ECGs becomes the rows that are embedded: as they are, or changed as recordings differ."""

from collections.abc import Callable

import torch
from torch import Tensor

from shared_model.objectives.augmentations import augment, random_crop, random_gain, random_noise

__all__ = ["VIEWS", "View", "as_is", "augment", "random_crop", "random_gain", "random_noise"]


def as_is(signals: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG001
    """One view, unchanged: distance mining compares whole ECGs of different patients."""
    return (signals,)


View = Callable[[Tensor, torch.Generator], tuple[Tensor, ...]]
VIEWS: dict[str, View] = {"as_is": as_is}
