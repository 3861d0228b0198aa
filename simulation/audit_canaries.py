"""Canaries: fake patients whom training can only learn by heart, so that a trace of one is a trace of a patient.

Fine-tuning: a simulated ECG with a pressure drawn at random. Pretraining: two ECGs of different hearts as one patient,
who have nothing in common but that they were seen together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.bank import Bank, neighbours
from client.private import Mechanism, Unit, by_patient, coins, finetuning, pretraining
from client.store import RecordIndex, Store, StoreFolder
from shared_model.leads import to_steps
from shared_model.model import build_model
from shared_model.objectives.draws import Rows
from shared_model.study import Study
from simulation.circulation import Population, draw_circulation
from simulation.ecg_generator import Acquisition, draw_anatomy, synthesise

What = Literal["finetune", "pretrain"]

LABEL_MMHG = (5.0, 45.0)
COLUMN = "mpcwp_mmhg"
BANK_ECGS = 64
NO_SHA256 = "0" * 64  # the bank is handed over, not looked for


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of one audit, and how their training is set up.

    Attributes:
        patients: each canary's rows in the store.
        network: makes encoder and head anew.
        mechanism: of such a network; the one that `train_private` is given at a hospital.
    """

    study: Study
    store: Store
    patients: tuple[Rows, ...]
    network: Callable[[], nn.Sequential]
    mechanism: Callable[[nn.Sequential], Mechanism]

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def declared_patients(self) -> int:
        """How many are in training, as declared: half of them, whatever the coins say."""
        return len(self) // 2


def make_canaries(what: What, count: int, folder: Path, seed: int = 1) -> Canaries:
    """Draw `count` canaries; `folder` is for the store's caches."""
    study, rng = canary_study(what), np.random.default_rng(seed)
    each = 1 if what == "finetune" else 2
    steps_uv = draw_ecgs(rng, each * count)
    store = store_of(steps_uv, np.repeat(np.arange(count), each), rng.uniform(*LABEL_MMHG, each * count), folder)
    patients = tuple(by_patient(store.index.patient, store.index.row))
    bank = Bank(draw_ecgs(rng, BANK_ECGS), NO_SHA256)
    near = neighbours(store, study.objective, bank)

    def mechanism_of(network: nn.Sequential) -> Mechanism:
        if what == "finetune":
            return with_known_coins(finetuning(study, network, store))
        return with_known_coins(pretraining(study, network[0], store, bank, near))

    return Canaries(study, store, patients, partial(network_of, study), mechanism_of)


def canary_study(what: What) -> Study:
    """What is trained, with a small encoder; clip, noise and steps stand in each arm.

    Chosen so that a trace is large. Fine-tuning: labels are standardised about their mean, or most steps would go into
    that. Pretraining: the pair's own term alone, and a margin that no cosine distance reaches, so that no gradient is
    0.
    """
    phase = {"sampling_rate": 1.0, "noise_multiplier": 1.0, "steps_per_round": 1, "units": 1}
    phases = {"finetune": phase} | ({"pretrain": phase} if what == "pretrain" else {})
    table = {
        "name": f"audit of {what}",
        "target": {"column": COLUMN, "kind": "regression", "centre": sum(LABEL_MMHG) / 2},
        "objective": {"name": "ssl_dml_l2", "margin": 2.0},
        "pretrain": {"rounds": 1 if what == "pretrain" else 0},
        "finetune": {"augment": False},
        "evaluation": {"every_round": False},
        "privacy": {"epsilon": 1.0, "bank_sha256": NO_SHA256, "bank_weight": 0.0, **phases},
    }
    return Study.model_validate(table)


def network_of(study: Study) -> nn.Sequential:
    """Encoder and head with their first weights, which are public; dropout off, as in private training."""
    model = build_model(study)
    return nn.Sequential(model["encoder"], model["head"]).eval()


def draw_ecgs(rng: np.random.Generator, count: int) -> NDArray[np.int16]:
    """ECGs of `count` different hearts: (count, 12, 2500) steps as in a site store."""
    circulation = draw_circulation(rng, Population(ecgs_per_patient=(1.0,)), count)
    anatomy = draw_anatomy(rng, circulation)
    return to_steps(synthesise(rng, circulation, anatomy, Acquisition(sampling_rate_hz=250)))


def store_of(
    steps_uv: NDArray[np.int16], patient: NDArray[np.int64], label: NDArray[np.float64], folder: Path
) -> Store:
    """A site store in memory: every ECG a record of its own, all of the training split."""
    n = len(steps_uv)
    unknown, nobody = np.full(n, np.nan), np.full(n, "unknown")
    index = RecordIndex(
        row=np.arange(n),
        record=np.arange(n),
        segment=np.zeros(n, np.uint8),
        patient=patient,
        patient_keys=tuple(f"{code:04x}" for code in range(int(patient.max()) + 1)),
        split=np.zeros(n, np.uint8),
        recorded_at=unknown,
        age_years=unknown.astype(np.float32),
        sex=nobody,
        race=nobody,
        labels={COLUMN: label.astype(np.float32)},
        measured_at=unknown,
        source_rate_hz=np.full(n, 250, np.float32),
        lead_mask=np.full(n, 0xFFF, np.uint16),
    )
    return Store([StoreFolder(folder, steps_uv, np.arange(n), "canaries")], index)


def with_known_coins(mechanism: Mechanism) -> Mechanism:
    """The mechanism with each patient's unit the same in every step, and known to the attacker. The guarantee holds
    whatever the coins inside a unit are, so this is the worst that it has to stand; who is in a step, and the noise,
    stay secret."""

    def draw_unit(rows: Rows, own: torch.Generator) -> Unit:
        return mechanism.draw_unit(rows, coins(b"known", int(rows[0]), own.device))

    return replace(mechanism, draw_unit=draw_unit)


def units_of(canaries: Canaries, mechanism: Mechanism) -> list[Unit]:
    """Every canary's unit."""
    device = next(mechanism.network.parameters()).device
    return [mechanism.draw_unit(rows, torch.Generator(device=device)) for rows in canaries.patients]
