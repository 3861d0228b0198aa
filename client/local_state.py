"""What stays at a site between rounds: a local head, local norm layers, the optimiser's moments.

Kept per round, so that resuming round r starts from the state of round r - 1 and nothing newer.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROUNDS_KEPT = 3


def _folder(site_dir: Path, run_id: str, task: str) -> Path:
    return site_dir / "state" / run_id / task


def _round_files(folder: Path) -> list[tuple[int, Path]]:
    files = [(int(path.stem.removeprefix("round-")), path) for path in folder.glob("round-*.safetensors")]
    return sorted(files)


def load_before(site_dir: Path, run_id: str, task: str, limit: int | None) -> dict[str, torch.Tensor]:
    """State of the last round before `limit` (None: of the last round) that this site took part in, or empty."""
    files = _round_files(_folder(site_dir, run_id, task))
    earlier = [path for number, path in files if limit is None or number < limit]
    return load_file(earlier[-1]) if earlier else {}


def save(
    site_dir: Path,
    run_id: str,
    task: str,
    round_number: int,
    state: Mapping[str, torch.Tensor],
    keep_all: bool,
) -> None:
    """Write the state of a finished round whole or not at all; drop rounds that nobody can resume from."""
    folder = _folder(site_dir, run_id, task)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{round_number:05d}.safetensors"
    unfinished = path.with_suffix(".unfinished")
    save_file({name: value.contiguous() for name, value in state.items()}, unfinished)
    unfinished.replace(path)
    if not keep_all:
        for number, old in _round_files(folder):
            if number <= round_number - ROUNDS_KEPT:
                old.unlink()
