"""Save and resume, bit for bit: weights and server moments of the last whole round, and where the study was."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Tip
from shared_model.release import release_sha256

PhaseName = Literal["distance", "pretrain", "finetune", "evaluate"]
Weights = dict[str, NDArray[np.float32]]


class Position(BaseModel):
    """Where a study stands: the phase, and the last whole round of it (0 before the first)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    run_id: str
    study_sha256: str
    release_sha256: str
    phase: PhaseName = "distance"
    round_number: int = 0
    site_weights: dict[str, float] = {}
    ledger_tips: dict[str, Tip] = {}
    best_round: int = 0
    best_score: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """All that the centre needs to go on."""

    position: Position
    weights: Weights
    moments: Weights
    best_weights: Weights

    def at(self, **changes: object) -> "Checkpoint":
        """The same weights at another position."""
        return replace(self, position=self.position.model_copy(update=changes))


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint whole or not at all: arrays first, then the position that names them, then cleaning."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{checkpoint.position.phase}-{checkpoint.position.round_number:05d}"
    groups = {"weights": checkpoint.weights, "moments": checkpoint.moments, "best": checkpoint.best_weights}
    flat = {f"{group}/{name}": value for group, arrays in groups.items() for name, value in arrays.items()}
    _write(folder / f"{stem}.safetensors", lambda path: save_file(flat, path))
    text = json.dumps({"arrays": f"{stem}.safetensors", **checkpoint.position.model_dump()}, indent=1)
    _write(folder / "position.json", lambda path: path.write_text(text, encoding="utf-8"))
    for old in folder.glob("*.safetensors"):
        if old.stem != stem:
            old.unlink()


def load(folder: Path, study_sha256: str) -> Checkpoint | None:
    """The last checkpoint in the folder, or None where there is none.

    Raises:
        HemoFedError: it is of another study or release, or damaged.
    """
    path = folder / "position.json"
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        arrays = load_file(folder / table.pop("arrays"))
        position = Position.model_validate(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError, SafetensorError):
        raise HemoFedError(
            f"{folder}: the checkpoint is damaged; remove the folder to begin again", ExitCode.BAD_CHECKPOINT
        ) from None
    if position.release_sha256 != release_sha256():
        raise HemoFedError(
            f"{folder}: the checkpoint is of another release of hemofed; use that release, or give another --out",
            ExitCode.BAD_CHECKPOINT,
        )
    if position.study_sha256 != study_sha256:
        raise HemoFedError(
            f"{folder}: the checkpoint is of another study; give its study.toml, or another --out",
            ExitCode.BAD_CHECKPOINT,
        )
    groups: dict[str, Weights] = {"weights": {}, "moments": {}, "best": {}}
    for key, value in arrays.items():
        group, name = key.split("/", 1)
        groups[group][name] = value
    return Checkpoint(position, groups["weights"], groups["moments"], groups["best"])


def _write(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
