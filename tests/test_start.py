"""A study that begins with given weights: the file that it names, or none; what the file lacks is the seed's."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from server.rounds import begin, given_weights
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import all_names, build_model, take_arrays
from shared_model.study import Study
from simulation.grid import run_in_process
from tests.federations import same_weights, tiny_study, weights_of

Arrays = dict[str, NDArray[np.float32]]


def weights(study: Study) -> Arrays:
    model = build_model(study)
    return take_arrays(model, all_names(study, model))


def encoder_file(path: Path, seed: int = 99, **tables: object) -> tuple[Path, str]:
    """The encoder of another seed as a file, and its SHA-256."""
    arrays = {
        name: value for name, value in weights(tiny_study(seed=seed, **tables)).items() if name.startswith("encoder.")
    }
    save_file(arrays, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_files_weights_lie_over_the_seeds(tmp_path: Path) -> None:
    path, digest = encoder_file(tmp_path / "start.safetensors")
    study = tiny_study(start_sha256=digest)
    begun = begin(study, tmp_path / "checkpoint", resume=False, start=path).weights
    own, other = weights(study), weights(tiny_study(seed=99))
    for name, value in begun.items():
        expected = other if name.startswith("encoder.") else own
        assert np.array_equal(value, expected[name]), name
    assert any(not np.array_equal(own[name], other[name]) for name in own if name.startswith("encoder."))


def test_it_is_a_study_of_its_own() -> None:
    assert tiny_study(start_sha256="0" * 64).digest != tiny_study().digest
    with pytest.raises(HemoFedError):
        tiny_study(start_sha256="not a hash")


def refused(study: Study, start: Path | None) -> tuple[str, ExitCode]:
    with pytest.raises(HemoFedError) as caught:
        given_weights(study, start, weights(study))
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.exit_code


def test_another_file_none_or_one_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    path, digest = encoder_file(tmp_path / "start.safetensors")
    study = tiny_study(start_sha256=digest)
    assert refused(study, None)[1] == ExitCode.USAGE
    assert refused(tiny_study(), path) == (
        f"{path}: the study names no start_sha256; add it, so that every site knows what it begins with",
        ExitCode.BAD_STUDY,
    )
    other, _ = encoder_file(tmp_path / "other.safetensors", seed=98)
    message, code = refused(study, other)
    assert "SHA-256" in message
    assert code == ExitCode.BAD_CHECKPOINT
    (tmp_path / "noise").write_bytes(b"no weights")
    assert refused(study, tmp_path / "noise")[1] == ExitCode.BAD_CHECKPOINT
    assert refused(study, tmp_path / "absent")[1] == ExitCode.BAD_CHECKPOINT


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path, digest = encoder_file(tmp_path / "wide.safetensors", encoder={"embedding_dim": 64})
    message, code = refused(tiny_study(start_sha256=digest), path)
    assert "does not fit" in message
    assert code == ExitCode.RELEASE_DIFFERS
    save_file({"something": np.zeros(3, np.float32)}, tmp_path / "strange.safetensors")
    digest = hashlib.sha256((tmp_path / "strange.safetensors").read_bytes()).hexdigest()
    assert refused(tiny_study(start_sha256=digest), tmp_path / "strange.safetensors")[1] == ExitCode.RELEASE_DIFFERS


def test_pretraining_then_starting_from_it_is_one_study_cut_in_two(site_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A run that begins with a finished run's weights goes on from them, and otherwise is the seed's own."""
    sites = [site_dirs["alpha"], site_dirs["beta"]]
    run_in_process(tiny_study(seed=7), sites, tmp_path / "first", resume=False, workers=1)
    start = tmp_path / "first" / "model" / "model.safetensors"
    digest = hashlib.sha256(start.read_bytes()).hexdigest()
    study = tiny_study(pretrain={"rounds": 0}, start_sha256=digest)
    for name in ("one", "two"):
        run_in_process(study, sites, tmp_path / name, resume=False, workers=1, start=start)
    assert same_weights(tmp_path / "one", tmp_path / "two")
    run_in_process(tiny_study(pretrain={"rounds": 0}), sites, tmp_path / "cold", resume=False, workers=1)
    assert not same_weights(tmp_path / "one", tmp_path / "cold")
    warm, begun = weights_of(tmp_path / "one"), weights_of(tmp_path / "first")
    cold, seeds = weights_of(tmp_path / "cold"), weights(study)
    name = "encoder.stem.weight"
    assert np.abs(warm[name] - begun[name]).mean() < np.abs(warm[name] - seeds[name]).mean()
    assert np.abs(cold[name] - seeds[name]).mean() < np.abs(cold[name] - begun[name]).mean()
