"""The public ECGs that private pretraining looks for positives and negatives in: one file, the same at every hospital.

An ECG of the hospital is compared with the bank alone, never with another patient's. Which bank ECGs are near and far
is worked out once a site and kept in its store's caches, which never leave it.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from client.store import Progress, Store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from shared_model.objectives.relations import Relation
from shared_model.objectives.settings import ObjectiveSettings

BANK_FOLDER = "banks"
SIGNALS = "signals"
FEWEST_ECGS = 16
ROW = (12, 2500)


@dataclass(frozen=True, eq=False)
class Bank:
    """Public ECGs: (ecg, 12, 2500) int16, steps as in a site store. `sha256` is that of the file."""

    signals: NDArray[np.int16]
    sha256: str


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each stored ECG the bank's numbers, nearest first: `near` (n, k), and the farthest, `far` (n, f)."""

    near: NDArray[np.int64]
    far: NDArray[np.int64]


def load_bank(site_dir: Path, sha256: str) -> Bank:
    """The bank of this SHA-256 among the files in the site's `banks/`.

    Raises:
        HemoFedError: no file there has that SHA-256, or it is no bank.
    """
    folder = site_dir / BANK_FOLDER
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return Bank(_signals(data, path), sha256)
    raise HemoFedError(
        f"{folder}: no file there has the SHA-256 of the study's bank ({sha256[:12]}...); put the bank there that "
        "the coordinating centre names",
        ExitCode.BANK_DIFFERS,
    )


def _signals(data: bytes, path: Path) -> NDArray[np.int16]:
    try:
        signals = load(data)[SIGNALS]
    except (SafetensorError, KeyError):
        signals = np.empty(0)
    if signals.dtype != np.int16 or signals.shape[1:] != ROW or len(signals) < FEWEST_ECGS:
        raise HemoFedError(
            f"{path}: not a bank of at least {FEWEST_ECGS} ECGs; make one with hemofed-sim bank", ExitCode.BANK_DIFFERS
        )
    return signals


def neighbours(store: Store, objective: ObjectiveSettings, bank: Bank, progress: Progress | None = None) -> Neighbours:
    """The near and far bank ECGs of every stored ECG, from the site's cache or worked out now.

    Guarantee
    ---------
    A row follows from that ECG and the bank alone, so that one patient's rows do not depend on another's.
    """
    relation = objective.relation
    near = max(1, math.ceil(objective.nearest_share * len(bank.signals)))
    far = min(objective.farthest_k, len(bank.signals) - near)
    described = _described(relation, bank.signals)

    def compute(steps: NDArray[np.int16]) -> NDArray[np.float32]:
        order = to_bank(relation, _described(relation, steps), described).argsort(dim=1, stable=True)
        return torch.cat([order[:, :near], order[:, -far:]], 1).numpy().astype(np.float32)

    name = f"bank-{bank.sha256[:16]}-{relation.cache_name}-{near}"
    table = np.asarray(store.derived(name, near + far, compute, progress)).astype(np.int64)
    return Neighbours(table[:, :near], table[:, near:])


def _described(relation: Relation, steps: NDArray[np.int16]) -> torch.Tensor:
    signal, present = to_millivolt(steps)
    return relation.describe(torch.from_numpy(signal), torch.from_numpy(present))


def to_bank(relation: Relation, described: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Distances of n ECGs to the bank's: (n, width), (b, width) -> (n, b).

    A relation measures all pairs of what it is given; those among the n are thrown away.
    """
    return relation.distance(torch.cat([described, bank]))[: len(described), len(described) :]
