"""Attacks that say of each canary whether it was in training: by the loss of the final model, by what it is beside
models trained without it, and by the noised sums of every step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.private import Mechanism, cheapest, clipped_sum
from shared_model.privacy import PrivatePhase
from simulation.audit_canaries import Canaries, units_of

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

RIDGE = 1e-6  # of the mean squared gradient: keeps the joint attack solvable without noise
LOSS_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Seen:
    """All that an attacker has of one arm. m canaries, k shadow models, which may be none.

    Attributes:
        loss: (m,) of each canary in the final model.
        shadow_loss, shadow_included: (k, m) the same of models that the attacker trained, and who was in them.
        inner_product: (m,) sum over the steps looked at of <clipped gradient of the canary, noised sum of the step>,
            less half of what the canary itself would add to it.
        evidence: (m,), information: (m, m): of all coins together, sums of `told_by_step`.
    """

    loss: Floats
    shadow_loss: Floats
    shadow_included: Mask
    inner_product: Floats
    evidence: Floats
    information: Floats


Attack = Callable[[Seen], Floats]


def losses(canaries: Canaries, mechanism: Mechanism) -> Floats:
    """Each canary's loss in the network as it stands: (m,)."""
    with torch.no_grad():
        units = mechanism.prepare(units_of(canaries, mechanism))
        return np.array([float(mechanism.unit_loss(mechanism.network, unit)) for unit in units])


class Witness:
    """Watches `train_private` through its `on_step`: the noised sum of a step, against the gradient that each canary
    has at the weights before it. Both follow from what the guarantee lets out: the weights after every step, and the
    sums that they come from.

    Takes 4 bytes a canary and weight: 0.9 GB for 800 canaries and the small encoder.
    """

    def __init__(self, canaries: Canaries, mechanism: Mechanism, phase: PrivatePhase, looks: int) -> None:
        self.canaries, self.mechanism, self.phase = canaries, mechanism, phase
        self.denominator = phase.sampling_rate * canaries.declared_patients
        steps = np.linspace(1, phase.steps_per_round, min(looks, phase.steps_per_round)).round().astype(int)
        self.looked_at = frozenset(steps.tolist())
        self.parameters = [parameter for parameter in mechanism.network.parameters() if parameter.requires_grad]
        m, size = len(canaries), sum(parameter.numel() for parameter in self.parameters)
        self.inner_product: Floats = np.zeros(m)
        self.evidence: Floats = np.zeros(m)
        self.information: Floats = np.zeros((m, m))
        self.gradients = torch.empty(m, size)
        if 1 in self.looked_at:
            self.take_gradients()

    def take_gradients(self) -> None:
        """The canaries' clipped gradients at the weights as they stand."""
        units = self.mechanism.prepare(units_of(self.canaries, self.mechanism))
        gradients = cheapest(self.parameters, self.parameters[0].device)
        found = gradients(self.mechanism.network, self.parameters, self.mechanism.unit_loss, units)
        for row, gradient in enumerate(found):
            self.gradients[row] = flat(clipped_sum(self.parameters, [gradient], self.phase.clip_norm))

    def on_step(self, step: int, _total: int) -> None:
        """After a step: `grad` still holds the noised sum over its constant denominator."""
        if step in self.looked_at:
            noised = flat([parameter.grad for parameter in self.parameters if parameter.grad is not None])
            product = np.asarray((self.gradients @ (noised * self.denominator)).numpy(), np.float64)
            gram = np.asarray((self.gradients @ self.gradients.T).numpy(), np.float64)
            self.inner_product += product - self.phase.sampling_rate * np.diag(gram) / 2
            information, evidence = told_by_step(product, gram, self.phase)
            self.information += information
            self.evidence += evidence
        if step + 1 in self.looked_at:
            self.take_gradients()


def told_by_step(product: Floats, gram: Floats, phase: PrivatePhase) -> tuple[Floats, Floats]:
    """What a step's noised sum S tells of all coins b together, as far as a linear estimate can use it.

    With the clipped gradients G (m, d), S is rate * G^T b + noise + who was drawn of those in training; W inverts the
    variance of the last two, A = G G^T. Steps add, and the best linear estimate of b - 1/2 is then
    (information + 4)^-1 evidence, since a coin has variance 1/4.

    Args:
        product: G S, (m,).
        gram: A, (m, m).

    Returns:
        information rate^2 A W (m, m), and evidence rate W (G S - rate A / 2) (m,).
    """
    rate, size = phase.sampling_rate, len(product)
    noise = (phase.noise_multiplier * phase.clip_norm) ** 2 + RIDGE * float(np.diag(gram).mean())
    spread = noise * np.eye(size) + rate * (1 - rate) / 2 * gram
    solved = np.linalg.solve(spread, np.column_stack([rate * gram, product - rate * gram.sum(1) / 2]))
    return rate * solved[:, :-1], rate * solved[:, -1]


def flat(parts: list[Tensor]) -> Tensor:
    """All coordinates as one vector."""
    return torch.cat([part.detach().flatten() for part in parts])


def by_loss(seen: Seen) -> Floats:
    """Black box: what a model fits well was in its training (Yeom et al. 2018, arXiv:1709.01604)."""
    return -seen.loss


def by_likelihood(seen: Seen) -> Floats:
    """Black box with shadow models: log likelihood ratio of the canary's own log loss, in against out.

    LiRA (Carlini et al. 2022, arXiv:2112.03570) with one variance for all canaries, as its authors advise for few
    shadow models.
    """
    own, shadow = np.log(seen.loss + LOSS_FLOOR), np.log(seen.shadow_loss + LOSS_FLOOR)
    ratio = np.zeros(len(own))
    for included, sign in ((seen.shadow_included, 1.0), (~seen.shadow_included, -1.0)):
        mean = np.nanmean(np.where(included, shadow, np.nan), axis=0)
        variance = float(np.square(shadow - mean)[included].mean()) + 1e-12
        ratio += sign * (-0.5 * (own - mean) ** 2 / variance - 0.5 * np.log(variance))
    return ratio


def by_inner_product(seen: Seen) -> Floats:
    """White box, one canary at a time: is its gradient in the sums?"""
    return seen.inner_product


def jointly(seen: Seen) -> Floats:
    """White box, all canaries at once, so that what one adds is not taken for another."""
    return np.asarray(np.linalg.solve(seen.information + 4 * np.eye(len(seen.evidence)), seen.evidence), np.float64)


ATTACKS: Mapping[str, Attack] = {
    "black box: loss": by_loss,
    "white box: one by one": by_inner_product,
    "white box: jointly": jointly,
}
WITH_SHADOWS: Mapping[str, Attack] = {"black box: likelihood ratio": by_likelihood}
