"""Steps of training under differential privacy: the unit is a patient.

The sampled Gaussian mechanism (Abadi et al. 2016, arXiv:1607.00133) over patients in place of examples: each patient is
in a step with probability q; the gradient of the patient's own loss, a mean over m ECGs, is clipped to C; the sum is
noised and divided by a constant. A loss that compares the patients of a batch with each other is not private in this
way, whatever is clipped: see docs/privacy.md.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from client.bank import Bank, Neighbours
from client.store import Store
from client.training import LocalWork, Outcome, flatten_optimizer, read_signals, restore_optimizer, target_loss
from shared_model.encoder import decay_groups
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from shared_model.objectives.augmentations import augment
from shared_model.objectives.draws import Rows
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.privacy import PrivatePhase
from shared_model.reconstruction import Reconstructor, hidden_patches, reconstruction_error
from shared_model.study import Study

Unit = tuple[Tensor, ...]
Network = Callable[[Tensor], Any]
UnitLoss = Callable[[Network, Unit], Tensor]
Gradients = Callable[[nn.Module, Sequence[nn.Parameter], UnitLoss, Iterable[Unit]], Iterable[Sequence[Tensor]]]
DrawUnit = Callable[[Rows, torch.Generator], Unit]

ECGS_AT_ONCE = 64
PATIENTS_AT_ONCE = 16  # by vmap: memory grows with it, and little is gained beyond
LOOP_FROM_PARAMETERS = 1_000_000  # on a CPU; below, calling the network once a patient costs more than its arithmetic


@dataclass(frozen=True)
class Mechanism:
    """One phase's private steps at one site.

    Attributes:
        network: what the units go through; its trained parameters are those of the model.
        unit_loss: (network, unit) -> () of one patient; it looks at that patient's unit and at public things alone.
        draw_unit: (a patient's rows, that patient's coins) -> the unit.
        prepare: what is computed of a step's units together, from public things and the weights alone.
    """

    network: nn.Module
    unit_loss: UnitLoss
    draw_unit: DrawUnit
    prepare: Callable[[list[Unit]], list[Unit]] = list


def sample_patients(count: int, rate: float, entropy: Callable[[int], bytes] = os.urandom) -> NDArray[np.int64]:
    """Which of `count` patients are in a step: each by itself with probability `rate`, often none.

    Drawn from the operating system's entropy to 64 bits, so that who was in a step cannot be worked out from a seed.
    """
    words = np.frombuffer(entropy(8 * count), np.uint64)
    if rate >= 1:
        return np.arange(count)
    return np.flatnonzero(words < np.uint64(min(int(rate * 2**64), 2**64 - 1)))


def coins(secret: bytes, patient: int, device: torch.device) -> torch.Generator:
    """A patient's own random numbers in one step: what one patient draws does not move what another draws."""
    digest = hashlib.sha256(secret + patient.to_bytes(8, "big")).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def clipped_sum(
    parameters: Sequence[nn.Parameter], gradients: Iterable[Sequence[Tensor]], clip_norm: float
) -> list[Tensor]:
    """The sum of the patients' gradients, each of L2 norm at most `clip_norm` over all parameters together.

    Guarantee
    ---------
    Unit: a patient; neighbours: one patient more or less; L2 sensitivity: `clip_norm`, whatever the weights and the
    ECGs, if a patient's gradient follows from that patient, the weights and public things alone. A gradient that is not
    finite adds nothing, so that one broken ECG cannot spoil the sum. It is broken by a loss over several patients, by
    batch norm, by anything fitted to the cohort, and by a person who is two patients.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for gradient in gradients:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in gradient]))
        if not torch.isfinite(norm):
            continue
        factor = min(1.0, clip_norm / (float(norm) + 1e-12))
        for place, part in zip(total, gradient, strict=True):
            place.add_(part, alpha=factor)
    return total


def gradients_by_loop(
    network: nn.Module, parameters: Sequence[nn.Parameter], unit_loss: UnitLoss, units: Iterable[Unit]
) -> Iterator[Sequence[Tensor]]:
    """One backward pass a patient: of a large network on a CPU the cheapest, and no more memory than one patient
    takes."""
    for unit in units:
        loss = unit_loss(network, unit)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        yield [part.detach() for part in found]


def gradients_by_vmap(
    network: nn.Module, parameters: Sequence[nn.Parameter], unit_loss: UnitLoss, units: Iterable[Unit]
) -> Iterator[Sequence[Tensor]]:
    """Several patients in one pass (`torch.func.vmap` over `grad`): on a GPU and of a small network the cheapest."""
    identity = {id(parameter): name for name, parameter in network.named_parameters()}
    names = [identity[id(parameter)] for parameter in parameters]
    trained = {name: parameter.detach() for name, parameter in zip(names, parameters, strict=True)}

    def loss_of(weights: dict[str, Tensor], *unit: Tensor) -> Tensor:
        return unit_loss(lambda x: torch.func.functional_call(network, weights, (x,)), unit)

    waiting = list(units)
    for start in range(0, len(waiting), PATIENTS_AT_ONCE):
        chunk = waiting[start : start + PATIENTS_AT_ONCE]
        # Filled up to one size: kernels round differently for another number, and one patient would move the others'
        # last digits, which cut edges of ReLU blow up to 1e-4 of C.
        filled = chunk + chunk[-1:] * (PATIENTS_AT_ONCE - len(chunk))
        stacked = [torch.stack(parts) for parts in zip(*filled, strict=True)]
        over = (None, *(0 for _ in stacked))
        found = torch.func.vmap(torch.func.grad(loss_of), in_dims=over)(trained, *stacked)
        for row in range(len(chunk)):
            yield [found[name][row] for name in names]


def cheapest(parameters: Sequence[nn.Parameter], device: torch.device) -> Gradients:
    """The way of taking gradients that measured cheapest (benchmarks/private_step.py); they agree."""
    small = sum(parameter.numel() for parameter in parameters) < LOOP_FROM_PARAMETERS
    return gradients_by_vmap if device.type == "cuda" or small else gradients_by_loop


def add_noise(total: Sequence[Tensor], scale: float, generator: torch.Generator) -> list[Tensor]:
    """The sum plus independent Gaussian noise of SD `scale` on every coordinate."""
    return [
        part + scale * torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
        for part in total
    ]


def fresh_generator(device: torch.device) -> torch.Generator:
    """A generator seeded from the operating system's entropy. It is never kept: to restore it after a crash would put
    the same noise on other sums, and their difference would be bare."""
    return torch.Generator(device=device).manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)


def train_private(
    mechanism: Mechanism, patients: Sequence[Rows], declared_patients: int, private: PrivatePhase, work: LocalWork
) -> Outcome:
    """The private steps of one round; the weights of `mechanism.network` are changed.

    Args:
        patients: each training patient's rows.
        declared_patients: the public number that stands in the denominator, whatever the true one.

    Guarantee
    ---------
    Unit: a patient, added or removed. The weights after the round are a function of `steps_per_round` sampled Gaussian
    sums (q, sigma) of sensitivity C, as `accounting.plan_of` charges them; optimiser, proximal term and the reported
    signal to noise look at the noised sums alone. A step in which nobody is drawn is noised like any other. No loss is
    reported. It is broken by a second use of the same round's noise, by a network with batch norm (refused here), and
    by floating point at the scale of 1e-7 of the noise (Mironov 2012), which is not guarded against.

    Raises:
        HemoFedError: the network has a layer that mixes patients.
    """
    network, device = mechanism.network, next(mechanism.network.parameters()).device
    refuse_mixing(network)
    network.eval()  # dropout is off: noise regularises enough
    optimizer = torch.optim.AdamW(decay_groups(network, work.phase.weight_decay), lr=work.learning_rate)
    restore_optimizer(optimizer, work.optimizer_state)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    gradients = cheapest(parameters, device)
    generator, energy = fresh_generator(device), 0.0
    for number in range(1, private.steps_per_round + 1):
        units = mechanism.prepare(drawn_units(mechanism, patients, private.sampling_rate, device))
        total = clipped_sum(parameters, gradients(network, parameters, mechanism.unit_loss, units), private.clip_norm)
        noised = add_noise(total, private.noise_multiplier * private.clip_norm, generator)
        energy += sum(float(part.double().square().sum()) for part in noised)
        for parameter, part, origin in zip(parameters, noised, start, strict=True):
            parameter.grad = part / (private.sampling_rate * declared_patients)
            if work.proximal_mu:
                parameter.grad.add_(parameter.detach() - origin, alpha=work.proximal_mu)
        optimizer.step()
        work.on_step(number, private.steps_per_round)
    size = sum(parameter.numel() for parameter in parameters)
    health = {"signal_to_noise": signal_to_noise(energy, size, private)}
    return Outcome(private.steps_per_round, None, health, flatten_optimizer(optimizer))


def drawn_units(mechanism: Mechanism, patients: Sequence[Rows], rate: float, device: torch.device) -> list[Unit]:
    """The units of the patients that are in this step, each drawn with the patient's own coins."""
    secret = os.urandom(32)
    return [
        mechanism.draw_unit(patients[number], coins(secret, int(number), device))
        for number in sample_patients(len(patients), rate)
    ]


def signal_to_noise(energy: float, size: int, private: PrivatePhase) -> float:
    """Norm of the clipped sums against that of their noise, over a round: from the noised sums alone.

    Args:
        energy: squared norms of the noised sums, added up over the steps.
        size: how many numbers a sum has.
    """
    noise = private.steps_per_round * size * (private.noise_multiplier * private.clip_norm) ** 2
    return math.sqrt(max(0.0, energy - noise) / noise)


def refuse_mixing(network: nn.Module) -> None:
    """Refuse a network in which one patient's ECG changes another's output, by opacus' rules for layers."""
    was = network.training
    errors = ModuleValidator.validate(network.train(), strict=False)
    network.train(was)
    if errors:
        raise HemoFedError(
            f"[privacy]: the network has a layer that mixes patients ({type(errors[0]).__name__}); set "
            'encoder.norm = "group"',
            ExitCode.BAD_STUDY,
        )


def by_patient(patient: NDArray[np.int64], rows: Rows) -> list[Rows]:
    """The rows of each patient: `patient` (n,) is the code of every stored ECG's patient."""
    rows = rows[np.argsort(patient[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(patient[rows])) + 1
    return [part for part in np.split(rows, starts) if len(part)]


def pretraining(study: Study, network: nn.Module, store: Store, bank: Bank, near: Neighbours) -> Mechanism:
    """SSL-DML with a public bank: an ECG's own other view and its nearest bank ECG are pulled, far bank ECGs pushed.

    A unit is (views (2m, 12, time) of m ECGs and of their partners, near (m,), far (m,): numbers of bank ECGs); once
    prepared, near and far are embeddings (m, dim) without gradient.
    """
    objective, private = study.objective, study.privacy
    assert private is not None
    assert private.pretrain is not None
    device, m, record = next(network.parameters()).device, private.pretrain.units, store.index.record

    def draw_unit(rows: Rows, own: torch.Generator) -> Unit:
        anchors = rows[torch.randint(len(rows), (m,), generator=own, device=device).cpu().numpy()]
        partners = np.array([partner_of(int(anchor), rows, record, own) for anchor in anchors])
        signals, _ = read_signals(store, np.concatenate([anchors, partners]), device)
        far = far_of(objective, near, anchors, len(bank.signals), own)
        return augment(signals, own), torch.from_numpy(near.near[anchors, 0]).to(device), far

    def prepare(units: list[Unit]) -> list[Unit]:
        numbers = [part for _, nearest, far in units for part in (nearest, far)]
        if not numbers:
            return []
        needed, places = torch.unique(torch.cat(numbers), return_inverse=True)
        embedded = torch.split(embed_bank(network, bank, needed, device)[places], m)
        return [(views, embedded[2 * k], embedded[2 * k + 1]) for k, (views, _, _) in enumerate(units)]

    def unit_loss(embed: Network, unit: Unit) -> Tensor:
        views, nearest, far = unit
        anchor, own = torch.split(embed(views).float(), m)
        apart = embedding_distance(objective, anchor, far)
        own_term = (embedding_distance(objective, anchor, own) - apart + objective.margin).relu().mean()
        bank_term = (embedding_distance(objective, anchor, nearest) - apart + objective.margin).relu().mean()
        return own_term + private.bank_weight * bank_term

    return Mechanism(network, unit_loss, draw_unit, prepare)


def reconstructing(study: Study, network: Reconstructor, store: Store) -> Mechanism:
    """Masked reconstruction, which needs no bank: a unit is (m ECGs (m, 12, time), what is hidden (m, time))."""
    private = study.privacy
    assert private is not None
    assert private.pretrain is not None
    device, m = next(network.parameters()).device, private.pretrain.units

    def draw_unit(rows: Rows, own: torch.Generator) -> Unit:
        chosen = rows[torch.randint(len(rows), (m,), generator=own, device=device).cpu().numpy()]
        signals = augment(read_signals(store, chosen, device)[0], own)
        return signals, hidden_patches(m, signals.shape[-1], own, device)

    def unit_loss(rebuild: Network, unit: Unit) -> Tensor:
        signals, hidden = unit
        return reconstruction_error(rebuild(signals.masked_fill(hidden[:, None], 0.0))[0], signals, hidden).mean()

    return Mechanism(network, unit_loss, draw_unit)


def partner_of(anchor: int, rows: Rows, record: NDArray[np.int64], own: torch.Generator) -> int:
    """An ECG of another record of the same patient, or the anchor itself, which is then seen twice, disturbed."""
    others = rows[record[rows] != record[anchor]]
    if not len(others):
        return anchor
    return int(others[int(torch.randint(len(others), (), generator=own, device=own.device))])


def far_of(objective: ObjectiveSettings, near: Neighbours, anchors: Rows, size: int, own: torch.Generator) -> Tensor:
    """A negative from the bank for each anchor, as the objective chooses them: (m,) int64."""
    if objective.negatives == "farthest":
        choice = torch.randint(near.far.shape[1], (len(anchors),), generator=own, device=own.device).cpu().numpy()
        return torch.from_numpy(near.far[anchors, choice]).to(own.device)
    spared = near.near if objective.negatives == "beyond_nearest" else near.near[:, :1]
    allowed = torch.ones(len(anchors), size, device=own.device)
    allowed.scatter_(1, torch.from_numpy(spared[anchors]).to(own.device), 0.0)
    return torch.multinomial(allowed, 1, generator=own)[:, 0]


def embed_bank(network: nn.Module, bank: Bank, numbers: Tensor, device: torch.device) -> Tensor:
    """Embeddings of these bank ECGs, without gradient: (k,) -> (k, dim)."""
    return embed_alike(network, torch.from_numpy(to_millivolt(bank.signals[numbers.cpu().numpy()])[0]), device)


def embed_alike(network: nn.Module, signals: Tensor, device: torch.device) -> Tensor:
    """Embeddings without gradient, each the same to the last bit whatever else is embedded with it: always so many at
    once, as in `gradients_by_vmap`. (n, 12, time) -> (n, dim)."""
    found = []
    with torch.no_grad():
        for part in torch.split(signals, ECGS_AT_ONCE):
            filled = torch.cat([part, part[-1:].expand(ECGS_AT_ONCE - len(part), -1, -1)])
            found.append(network(filled.to(device)).float()[: len(part)])
    return torch.cat(found)


def embedding_distance(objective: ObjectiveSettings, one: Tensor, other: Tensor) -> Tensor:
    """Row by row: (m, dim), (m, dim) -> (m,)."""
    if objective.embedding_distance == "cosine":
        return 1 - nn.functional.cosine_similarity(one, other, dim=1)
    return (one - other).square().sum(1)


def finetuning(study: Study, network: nn.Sequential, store: Store) -> Mechanism:
    """The study's target: a unit is (m ECGs (m, 12, time), their values (m,)), drawn from the patient's labelled ones.

    Args:
        network: encoder, then head. Where nothing of the encoder is trained, a step's ECGs are embedded together, and
            the head alone is gone through patient by patient.
    """
    private = study.privacy
    assert private is not None
    assert private.finetune is not None
    encoder, head = network
    device, m = next(network.parameters()).device, private.finetune.units
    values = store.index.labels[study.target.column]

    def draw_unit(rows: Rows, own: torch.Generator) -> Unit:
        chosen = rows[torch.randint(len(rows), (m,), generator=own, device=device).cpu().numpy()]
        signals, _ = read_signals(store, chosen, device)
        return augment(signals, own) if study.finetune.augment else signals, torch.from_numpy(values[chosen]).to(device)

    def embed(units: list[Unit]) -> list[Unit]:
        if not units:
            return []
        together = torch.cat([signals for signals, _ in units])
        embedded = torch.split(embed_alike(encoder.eval(), together, device), m)
        return [(embedding, wanted) for embedding, (_, wanted) in zip(embedded, units, strict=True)]

    def unit_loss(score: Network, unit: Unit) -> Tensor:
        inputs, wanted = unit
        return target_loss(study.target, score(inputs), wanted)

    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return Mechanism(network, unit_loss, draw_unit)
    return Mechanism(head, unit_loss, draw_unit, embed)
