"""Sites' weights become one: guard each reply, add it to a running sum, apply the server's update rule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from shared_model.study import Federation

Weights = dict[str, NDArray[np.float32]]


@dataclass
class RunningMean:
    """A weighted mean that holds one sum, whatever the number of sites.

    Replies must come in site-name order: float addition is not associative, and one order gives one result.
    """

    total: dict[str, torch.Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, arrays: Mapping[str, NDArray[np.generic]], weight: float) -> None:
        """Add weight * arrays to the sum, in place. The arrays may be dropped afterwards."""
        self.weight += weight
        for name, value in arrays.items():
            tensor = torch.from_numpy(value)
            if name in self.total:
                self.total[name].add_(tensor, alpha=weight)
            else:
                self.total[name] = tensor * weight

    def mean(self) -> Weights:
        """The mean; the sum is used up."""
        return {name: self.total.pop(name).div_(self.weight).numpy() for name in list(self.total)}


def fault_of(arrays: Mapping[str, NDArray[np.generic]], expected: Mapping[str, NDArray[np.float32]]) -> str | None:
    """Why an update must not touch the mean, or None: names, shapes, dtype, finiteness."""
    if arrays.keys() != expected.keys():
        return "other names than asked for"
    for name, value in arrays.items():
        if value.dtype != np.float32:
            return f"{name} is {value.dtype}, not float32"
        if value.shape != expected[name].shape:
            return f"{name} has another shape"
        if not np.isfinite(value).all():
            return f"{name} holds NaN or infinity"
    return None


Moments = dict[str, NDArray[np.float32]]
Update = Callable[[Weights, Weights, Moments, int, Federation], tuple[Weights, Moments]]


def take_mean(_old: Weights, mean: Weights, moments: Moments, _step: int, _rule: Federation) -> tuple[Weights, Moments]:
    """FedAvg (McMahan et al., AISTATS 2017): the new weights are the weighted mean."""
    return mean, moments


def adam_step(old: Weights, mean: Weights, moments: Moments, step: int, rule: Federation) -> tuple[Weights, Moments]:
    """FedAdam (Reddi et al., ICLR 2021, algorithm 2) with Adam's bias correction folded into the step size.

    Args:
        moments: `m.<name>` and `v.<name>` of earlier rounds; empty at the first.
        step: 1 at the first aggregated round.
    """
    beta_1, beta_2 = rule.server_beta_1, rule.server_beta_2
    size = rule.server_learning_rate * np.sqrt(1 - beta_2 ** (step + 1)) / (1 - beta_1 ** (step + 1))
    new: Weights = {}
    kept: Moments = {}
    for name, weights in old.items():
        change = mean[name] - weights
        first = beta_1 * moments.get(f"m.{name}", np.zeros_like(weights)) + (1 - beta_1) * change
        second = beta_2 * moments.get(f"v.{name}", np.zeros_like(weights)) + (1 - beta_2) * change**2
        new[name] = (weights + size * first / (np.sqrt(second) + rule.server_tau)).astype(np.float32)
        kept |= {f"m.{name}": first.astype(np.float32), f"v.{name}": second.astype(np.float32)}
    return new, kept


# FedProx changes the local loss and FedBN what travels; at the centre both take the mean.
UPDATE_RULES: dict[str, Update] = {
    "fedavg": take_mean,
    "fedprox": take_mean,
    "fedbn": take_mean,
    "fedadam": adam_step,
}
