"""The public bank: its file, who may use it, and that what is near and far follows from an ECG and the bank alone."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from typer.testing import CliRunner

from client.bank import BANK_FOLDER, Bank, load_bank, neighbours, neighbours_by_label
from client.store import Store, open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from shared_model.objectives.settings import ObjectiveSettings
from simulation.bank import first_ecgs, make_bank, public_hospital
from simulation.circulation import EFFECT_SCALE
from simulation.cli import app
from tests.federations import copy_site

ECGS = 24


@pytest.fixture(scope="module")
def made() -> bytes:
    return make_bank(ECGS, seed=3)


@pytest.fixture(scope="module")
def bank(made: bytes, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return load_bank(put(made, tmp_path_factory.mktemp("site")), hashlib.sha256(made).hexdigest())


def put(data: bytes, site_dir: Path, name: str = "bank.safetensors") -> Path:
    (site_dir / BANK_FOLDER).mkdir(exist_ok=True)
    (site_dir / BANK_FOLDER / name).write_bytes(data)
    return site_dir


def test_a_bank_follows_from_its_arguments_and_is_found_by_its_sha256(made: bytes, bank: Bank, tmp_path: Path) -> None:
    assert make_bank(ECGS, seed=3) == made
    other = make_bank(ECGS, seed=4)
    assert other != made
    assert bank.signals.shape == (ECGS, 12, 2500)
    put(other, put(made, tmp_path), "another.safetensors")
    for data in (made, other):
        found = load_bank(tmp_path, hashlib.sha256(data).hexdigest())
        assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert not np.array_equal(load_bank(tmp_path, hashlib.sha256(other).hexdigest()).signals, bank.signals)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors at all",
        save({"signals": np.zeros((20, 12, 2500), np.float32)}),
        save({"signals": np.zeros((20, 11, 2500), np.int16)}),
        save({"signals": np.zeros((3, 12, 2500), np.int16)}),
        save({"ecgs": np.zeros((20, 12, 2500), np.int16)}),
    ],
)
def test_what_is_no_bank_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="not a bank") as caught:
        load_bank(put(data, tmp_path), hashlib.sha256(data).hexdigest())
    assert caught.value.exit_code == ExitCode.BANK_DIFFERS


def test_another_bank_than_the_studys_is_refused(made: bytes, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", put(made, tmp_path)):
        with pytest.raises(HemoFedError, match="no file there has the SHA-256") as caught:
            load_bank(folder, "0" * 64)
        assert caught.value.exit_code == ExitCode.BANK_DIFFERS


@pytest.mark.parametrize("name", ["ssl_dml_l1", "ssl_dml_l2", "ssl_dml_dtw", "ssl_dml_median_beat"])
def test_near_and_far_are_those_of_each_ecg_by_itself(
    name: str, bank: Bank, site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    """One ECG after the other against one bank ECG after the other, in place of all at once."""
    store = open_store(copy_site(site_dirs["alpha"], tmp_path / "site"))
    objective = ObjectiveSettings(name=name, nearest_share=0.2)
    found = neighbours(store, objective, bank)
    assert found.near.shape == (len(store.index), 5)
    relation = objective.relation

    def describe(steps: np.ndarray) -> torch.Tensor:
        signal, present = to_millivolt(steps[None])
        return relation.describe(torch.from_numpy(signal), torch.from_numpy(present))

    public = [describe(steps) for steps in bank.signals]
    for row in range(0, len(store.index), 29):
        own = describe(store.read(np.array([row]))[0])
        apart = np.array([float(relation.distance(torch.cat([own, other]))[0, 1]) for other in public])
        np.testing.assert_allclose(apart[found.near[row]], np.sort(apart)[:5], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(apart[found.far[row]], np.sort(apart)[-2:], rtol=1e-3, atol=1e-4)


def test_by_label_the_nearest_pressure_is_near_and_the_farthest_far(
    site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    data = make_bank(ECGS, seed=3, labels=True)
    bank = load_bank(put(data, tmp_path), hashlib.sha256(data).hexdigest())
    public = bank.labels["mpcwp_mmhg"]
    store = open_store(site_dirs["alpha"])
    found = neighbours_by_label(store, ObjectiveSettings(name="supervised_dml_triplet"), bank, "mpcwp_mmhg")
    for row, own in enumerate(store.index.labels["mpcwp_mmhg"]):
        apart = [abs(float(own) - float(other)) for other in public]
        assert apart[found.near[row, 0]] == min(apart)
        assert apart[found.far[row, -1]] == max(apart)


def test_a_bank_without_the_label_is_refused(bank: Bank, site_dirs: Mapping[str, Path]) -> None:
    objective = ObjectiveSettings(name="supervised_dml_triplet")
    with pytest.raises(HemoFedError, match="--labels") as caught:
        neighbours_by_label(open_store(site_dirs["alpha"]), objective, bank, "mpcwp_mmhg")
    assert caught.value.exit_code == ExitCode.BANK_DIFFERS


def test_the_table_is_kept_at_the_site_and_made_anew_for_another_bank(
    bank: Bank, site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    store = open_store(copy_site(site_dirs["alpha"], tmp_path / "site"))
    objective = ObjectiveSettings(name="ssl_dml_l2")
    calls: list[tuple[int, int]] = []

    def ask(store: Store, bank: Bank) -> np.ndarray:
        return neighbours(store, objective, bank, lambda done, total: calls.append((done, total))).near

    first = ask(store, bank)
    made = len(calls)
    assert made
    assert np.array_equal(ask(open_store(tmp_path / "site"), bank), first)
    assert len(calls) == made
    assert not np.array_equal(ask(store, Bank(bank.signals[::-1].copy(), "1" * 64)), first)
    assert len(calls) == 2 * made


def test_the_simulated_public_is_shifted_and_has_no_labels() -> None:
    spec = public_hospital(10)
    assert spec.effect_scale == EFFECT_SCALE / 2
    assert spec.absent_effects
    assert spec.wave_width != 1
    assert spec.labelled_share == 0


def test_the_command_makes_banks_from_simulated_and_from_stored_ecgs(
    site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "bank.safetensors"
    result = CliRunner().invoke(app, ["bank", "--out", str(out), "--ecgs", "16", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"file": str(out), "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}
    site = site_dirs["alpha"]
    result = CliRunner().invoke(app, ["bank", "--out", str(out), "--ecgs", "20", "--site", str(site)])
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert f'bank_sha256 = "{digest}"' in result.output
    signals = load_bank(put(out.read_bytes(), tmp_path), digest).signals
    store = open_store(site)
    stored = {steps.tobytes() for steps in store.read(first_ecgs(store.index))}
    assert len({steps.tobytes() for steps in signals} & stored) == 20


def test_too_few_patients_and_a_folder_that_is_not_there_are_refused(
    site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "nowhere" / "bank.safetensors"
    result = CliRunner().invoke(app, ["bank", "--out", str(out), "--ecgs", "16"])
    assert isinstance(result.exception, HemoFedError)
    assert result.exception.exit_code == ExitCode.USAGE
