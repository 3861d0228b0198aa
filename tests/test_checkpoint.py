"""A checkpoint comes back bit for bit, is never half there, and is refused when it is another's or damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from server import checkpoint as checkpoints
from server.checkpoint import Checkpoint, Position, load, save
from shared_model.errors import ExitCode, HemoFedError
from shared_model.release import release_sha256

STUDY = "a" * 64
ODD = np.array([np.nan, -0.0, 0.0, np.inf, 1e-45, 3.0000002], np.float32)


def example(number: int = 2, fill: float = 1.0) -> Checkpoint:
    """A checkpoint with moments and a best round."""
    position = Position(
        run_id="0" * 32,
        study_sha256=STUDY,
        release_sha256=release_sha256(),
        phase="finetune",
        round_number=number,
        site_weights={"pretrain/a/b": 35.0, "finetune/a/b": 0.1},
        best_round=1,
        best_score=0.1 + 0.2,
    )
    weights = {"encoder.w": np.full((3, 2), fill, np.float32), "head.b": ODD.copy()}
    return Checkpoint(position, weights, {"m.encoder.w": ODD.copy()}, {"head.b": ODD[::-1].copy()})


def bits(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], bytes]]:
    groups = {"w": checkpoint.weights, "m": checkpoint.moments, "b": checkpoint.best_weights}
    return {
        f"{group}/{name}": (value.shape, value.tobytes())
        for group, arrays in groups.items()
        for name, value in arrays.items()
    }


def test_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(example(), tmp_path / "checkpoint")
    back = load(tmp_path / "checkpoint", STUDY)
    assert back is not None
    assert back.position == example().position
    assert bits(back) == bits(example())
    assert bits(back) != bits(example(fill=2.0))


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert load(tmp_path / "checkpoint", STUDY) is None


def test_only_the_last_round_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(example(number), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetune-00003.safetensors", "position.json"]


@pytest.mark.parametrize("stop", ["arrays", "position", "rename"])
def test_a_crash_while_saving_leaves_the_round_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    save(example(1, fill=1.0), tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def half(arrays: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "arrays":
            patch.setattr(checkpoints, "save_file", half)
        elif stop == "position":
            patch.setattr(json, "dumps", crash)
        else:
            patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(example(2, fill=2.0), tmp_path)
    back = load(tmp_path, STUDY)
    assert back is not None
    assert bits(back) == bits(example(1, fill=1.0))
    save(example(2, fill=2.0), tmp_path)
    again = load(tmp_path, STUDY)
    assert again is not None
    assert bits(again) == bits(example(2, fill=2.0))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def arrays_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def replaced(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "position.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "arrays cut short": lambda folder: cut(arrays_file(folder)),
    "arrays gone": lambda folder: arrays_file(folder).unlink(),
    "arrays empty": lambda folder: arrays_file(folder).write_bytes(b""),
    "position cut short": lambda folder: cut(folder / "position.json"),
    "position empty": lambda folder: (folder / "position.json").write_text(""),
    "position a list": lambda folder: (folder / "position.json").write_text("[]"),
    "position a number": lambda folder: (folder / "position.json").write_text("3"),
    "position without arrays": lambda folder: (folder / "position.json").write_text("{}"),
    "position not text": lambda folder: (folder / "position.json").write_bytes(b"\xff\xff"),
    "an unknown phase": replaced(phase="holiday"),
    "an unknown key": replaced(colour=1),
    "another schema": replaced(schema_version=2),
    "arrays not a name": replaced(arrays=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    save(example(), tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(HemoFedError) as caught:
        load(tmp_path, STUDY)
    assert int(caught.value.exit_code) == int(ExitCode.BAD_CHECKPOINT) == 17
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_one_of_another_study_is_refused(tmp_path: Path) -> None:
    save(example(), tmp_path)
    with pytest.raises(HemoFedError, match="another study") as caught:
        load(tmp_path, "b" * 64)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT


def test_one_of_another_release_is_refused(tmp_path: Path) -> None:
    """Other code may round otherwise, and the outcome would be neither's."""
    save(example(), tmp_path)
    replaced(release_sha256="b" * 64)(tmp_path)
    with pytest.raises(HemoFedError, match="another release") as caught:
        load(tmp_path, STUDY)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT
