"""The public ECGs that private pretraining looks for positives and negatives in: one file, the same at every hospital.

An ECG of the hospital is compared with the bank alone, never with another patient's. Which bank ECGs are near and far
is worked out once a site and kept in its store's caches, which never leave it.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
SIGNALS, LABEL = "signals", "label|"
FEWEST_ECGS = 16
ROW = (12, 2500)


@dataclass(frozen=True, eq=False)
class Bank:
    """Public ECGs: (ecg, 12, 2500) int16, steps as in a site store, and labels by column, where it has any: (ecg,), NaN
    where unknown. `sha256` is that of the file."""

    signals: NDArray[np.int16]
    sha256: str
    labels: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


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
            return _bank(data, path, sha256)
    raise HemoFedError(
        f"{folder}: no file there has the SHA-256 of the study's bank ({sha256[:12]}...); put the bank there that "
        "the coordinating centre names",
        ExitCode.BANK_DIFFERS,
    )


def _bank(data: bytes, path: Path, sha256: str) -> Bank:
    try:
        arrays = load(data)
    except SafetensorError:
        arrays = {}
    signals = arrays.pop(SIGNALS, np.empty(0))
    labels = {name.removeprefix(LABEL): value for name, value in arrays.items() if name.startswith(LABEL)}
    fits = signals.dtype == np.int16 and signals.shape[1:] == ROW and len(signals) >= FEWEST_ECGS
    if not fits or any(value.shape != (len(signals),) for value in labels.values()):
        raise HemoFedError(
            f"{path}: not a bank of at least {FEWEST_ECGS} ECGs; make one with hemofed-sim bank", ExitCode.BANK_DIFFERS
        )
    return Bank(signals, sha256, labels)


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


def neighbours_by_label(store: Store, objective: ObjectiveSettings, bank: Bank, column: str) -> Neighbours:
    """As `neighbours`, by how near a bank ECG's label is to the ECG's own; meaningless rows where the ECG has none.

    Raises:
        HemoFedError: fewer bank ECGs than make a bank have this label.
    """
    public = bank.labels.get(column, np.full(len(bank.signals), np.nan, np.float32))
    known = np.flatnonzero(~np.isnan(public))
    if len(known) < FEWEST_ECGS:
        raise HemoFedError(
            f"the study's bank has no {column} for {FEWEST_ECGS} ECGs or more; make one with hemofed-sim bank --labels",
            ExitCode.BANK_DIFFERS,
        )
    apart = np.abs(store.index.labels[column].astype(np.float64)[:, None] - public[known].astype(np.float64))
    order = known[np.argsort(apart, axis=1, kind="stable")]
    near = max(1, math.ceil(objective.nearest_share * len(known)))
    return Neighbours(order[:, :near], order[:, -min(objective.farthest_k, len(known) - near) :])


def _described(relation: Relation, steps: NDArray[np.int16]) -> torch.Tensor:
    signal, present = to_millivolt(steps)
    return relation.describe(torch.from_numpy(signal), torch.from_numpy(present))


def to_bank(relation: Relation, described: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Distances of n ECGs to the bank's: (n, width), (b, width) -> (n, b).

    A relation measures all pairs of what it is given; those among the n are thrown away.
    """
    return relation.distance(torch.cat([described, bank]))[: len(described), len(described) :]
