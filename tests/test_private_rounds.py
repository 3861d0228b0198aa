"""A private study at real site stores: policy and ledger before any record, one answer a round, and what leaves."""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import tasks
from client.ledger import open_ledger
from client.ledger_file import LEDGER_FILE
from client.policy import load_policy, write_policy
from client.site import load_site, write_site
from server.report.files import load_metrics, load_results
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Entry, Tip, tip_of, verify_chain
from shared_model.model import build_model, sent_names, take_arrays
from shared_model.study import Study
from shared_model.wire import Arrays, Instruction, Reply
from simulation.bank import make_bank
from simulation.grid import run_in_process, run_on_ray
from simulation.private_sites import equip
from tests.federations import copy_site, tiny_study, weights_of
from tests.test_tasks import send, wire_bytes

Sites = Mapping[str, Path]
PHASE = {"sampling_rate": 0.5, "noise_multiplier": 2.0, "steps_per_round": 2, "units": 2}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    path.write_bytes(make_bank(24, seed=5, labels=True))
    return path


def private_study(bank: Path, **tables: Any) -> Study:
    privacy = {
        "epsilon": 8.0,
        "delta": 1e-3,
        "bank_sha256": hashlib.sha256(bank.read_bytes()).hexdigest(),
        "pretrain": PHASE,
        "finetune": PHASE,
        **tables.pop("privacy", {}),
    }
    usual = {"evaluation": {"every_round": False, "partitions": ["sex"]}, "encoder": {"embedding_dim": 16}}
    return tiny_study(**{**usual, **tables, "privacy": privacy})


@pytest.fixture
def site(site_dirs: Sites, bank: Path, tmp_path: Path) -> Path:
    folder = copy_site(site_dirs["alpha"], tmp_path / "alpha")
    equip(folder, private_study(bank), 60, bank)
    return folder


def instruct(study: Study, task: Any = "finetune", number: int = 1, **more: Any) -> Instruction:
    usual = {"run_id": study.digest[:32], "learning_rate": 1e-3, **more}
    return Instruction(task=task, round_number=number, study=study, **usual)


def weights(study: Study, task: str) -> Arrays:
    model = build_model(study)
    return take_arrays(model, sent_names(study, task, model))


def train(site_dir: Path, instruction: Instruction, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
    given = weights(instruction.study, instruction.task) if arrays is None else arrays
    return tasks.train(instruction, given, site_dir, False)


def entries(site_dir: Path) -> list[Entry]:
    with open_ledger(site_dir, load_policy(site_dir)) as ledger:
        return ledger.entries_since(0)


def kinds(site_dir: Path) -> list[str]:
    return [entry.kind for entry in entries(site_dir)]


def hide_records(site_dir: Path) -> None:
    """Whoever looks at a patient now fails, and with another code."""
    for name in ("index.sqlite", "signals.i16"):
        (site_dir / name).unlink()


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---- a whole study


@pytest.mark.parametrize("objective", ["ssl_dml_l2", "masked_reconstruction", "supervised_dml_triplet", "supervised"])
def test_a_private_study_runs_and_every_round_is_paid_for_before_it_is_answered(
    objective: str, site_dirs: Sites, bank: Path, tmp_path: Path
) -> None:
    tables: dict[str, Any] = {"objective": {"name": objective}}
    if objective == "supervised":
        tables["privacy"] = {"pretrain": None}
    study = private_study(bank, **tables)
    sites = [copy_site(site_dirs[name], tmp_path / name) for name in ("alpha", "beta")]
    for folder in sites:
        equip(folder, study, 40, bank)
    run_in_process(study, sites, tmp_path / "run", resume=False, workers=1)
    rounds = (0 if objective == "supervised" else 1) + 2 + 2  # pretraining, fine-tuning, two releases
    for folder in sites:
        assert kinds(folder) == ["header", "admit"] + ["reserve", "commit"] * rounds
    results = load_results(tmp_path / "run")
    assert results.privacy.differentially_private
    assert results.privacy.epsilon == 8.0
    assert all(row.train_loss is None for row in load_metrics(tmp_path / "run"))
    assert all(row.signal_to_noise is not None for row in load_metrics(tmp_path / "run"))
    assert {entry.patients for entry in results.sites} == {None}
    assert {entry.train_patients for entry in results.sites} == {40}


def test_the_noise_is_not_the_seeds(site_dirs: Sites, bank: Path, tmp_path: Path) -> None:
    """Two runs of one study give different weights; without [privacy] they would be the same to the last bit."""
    study = private_study(bank, privacy={"pretrain": None}, objective={"name": "supervised"})
    for name in ("one", "two"):
        folder = copy_site(site_dirs["alpha"], tmp_path / name)
        equip(folder, study, 40, bank)
        run_in_process(study, [folder], tmp_path / f"run-{name}", resume=False, workers=1)
    first, second = weights_of(tmp_path / "run-one"), weights_of(tmp_path / "run-two")
    assert any(not np.array_equal(first[name], second[name]) for name in first)


# ---- what leaves


def test_a_site_says_what_it_declares_and_opens_no_store(site: Path, bank: Path) -> None:
    hide_records(site)
    reply, _ = tasks.describe(instruct(private_study(bank), "describe"), {}, site, False)
    assert reply.description is not None
    said = reply.description
    assert (said.train_patients, said.pretrain_patients, said.labelled_train_patients) == (60, 60, 60)
    assert (said.records, said.patients, said.validation_patients, said.test_patients) == (None,) * 4


def test_no_loss_and_no_count_leave_with_the_weights(site: Path, bank: Path) -> None:
    reply, arrays = train(site, instruct(private_study(bank)))
    assert reply.training is not None
    said = reply.training.model_dump(exclude_none=True)
    assert set(said) == {"schema_version", "signal_to_noise"}
    assert set(arrays) == set(weights(private_study(bank), "finetune"))
    bare = wire_bytes(send(site, instruct(private_study(bank), "pretrain")))
    assert b"loss" not in bare.replace(b'"loss":null', b"")


@pytest.mark.parametrize("trained", ["last_stage", "norms_and_biases", "head"])
def test_frozen_weights_come_back_as_they_were(trained: str, site: Path, bank: Path) -> None:
    phase = PHASE | {"trained": trained}
    study = private_study(bank, privacy={"pretrain": None, "finetune": phase}, objective={"name": "supervised"})
    equip(site, study, 40, None)
    before = weights(study, "finetune")
    _, after = train(site, instruct(study))
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert any(name.startswith("head.") for name in moved)
    in_encoder = {name for name in moved if name.startswith("encoder.")}
    assert bool(in_encoder) == (trained != "head")
    if trained == "last_stage":
        assert all(name.startswith(("encoder.blocks.3.", "encoder.embedding.")) for name in in_encoder)
    if trained == "norms_and_biases":
        assert all(after[name].ndim == 1 for name in in_encoder)


# ---- one answer a round


def test_a_round_asked_again_gets_the_stored_answer_for_nothing(site: Path, bank: Path) -> None:
    study = private_study(bank)
    first_reply, first = train(site, instruct(study))
    spent = kinds(site)
    hide_records(site)  # nothing is computed a second time
    reply, again = train(site, instruct(study, ledger_tip=tip_of(entries(site)[1])))
    assert same(first, again)
    assert reply.training == first_reply.training
    assert kinds(site) == spent
    assert [entry.kind for entry in reply.ledger] == ["reserve", "commit"]


def test_another_question_under_the_same_round_is_refused(site: Path, bank: Path) -> None:
    """Averaging answers to one round would wear the noise away."""
    study = private_study(bank)
    train(site, instruct(study))
    other = {name: value + np.float32(1e-3) for name, value in weights(study, "finetune").items()}
    for instruction, arrays in ((instruct(study), other), (instruct(study, learning_rate=0.5), None)):
        with pytest.raises(HemoFedError) as caught:
            train(site, instruction, arrays)
        assert caught.value.exit_code == ExitCode.LEDGER_REFUSED


def test_evaluations_of_both_splits_are_paid_for_and_a_third_is_refused(site: Path, bank: Path) -> None:
    study = private_study(bank)
    given = weights(study, "evaluate")
    for split in ("validation", "test"):
        _, counts = tasks.evaluate(instruct(study, "evaluate", split=split), given, site, True)
        assert counts
    _, again = tasks.evaluate(instruct(study, "evaluate", split="test"), given, site, True)
    assert same(again, counts)
    moved = {name: value + np.float32(1e-3) for name, value in given.items()}
    for run_id in (study.digest[:32], "f" * 32):
        with pytest.raises(HemoFedError) as caught:
            tasks.evaluate(instruct(study, "evaluate", split="test", run_id=run_id), moved, site, True)
        assert caught.value.exit_code in (ExitCode.LEDGER_REFUSED, ExitCode.BUDGET_EXCEEDED)


# ---- refused before any private record is read


def refused(site: Path, study: Study, code: ExitCode, task: str = "finetune", number: int = 1, **more: Any) -> None:
    """The refusal comes from a site whose records are gone: they were not asked for."""
    hide_records(site)
    with pytest.raises(HemoFedError) as caught:
        train(site, instruct(study, task, number, **more))
    assert caught.value.exit_code == code, caught.value.message
    assert "\n" not in caught.value.message


def test_a_site_without_policy_takes_no_part(site: Path, bank: Path) -> None:
    (site / "policy.toml").unlink()
    refused(site, private_study(bank), ExitCode.POLICY_REFUSED)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tasks": ("pretrain", "evaluate")}, ExitCode.POLICY_REFUSED),
        ({"objectives": ("supervised",)}, ExitCode.POLICY_REFUSED),
        ({"partitions": ()}, ExitCode.POLICY_REFUSED),
        ({"minimum_cohort": 1000}, ExitCode.POLICY_REFUSED),
        ({"epsilon": 7.9}, ExitCode.POLICY_REFUSED),
    ],
)
def test_what_the_policy_does_not_allow(change: dict[str, Any], code: ExitCode, site: Path, bank: Path) -> None:
    write_policy(site, load_policy(site).model_copy(update=change))
    refused(site, private_study(bank), code)


def test_a_study_that_asks_for_less_noise_than_its_share_pays_for(site: Path, bank: Path) -> None:
    quiet = private_study(bank, privacy={"finetune": PHASE | {"noise_multiplier": 0.3}})
    refused(site, quiet, ExitCode.BUDGET_EXCEEDED)


def test_more_steps_than_the_share_pays_for(site: Path, bank: Path) -> None:
    longer = private_study(bank, privacy={"finetune": PHASE | {"steps_per_round": 400}})
    refused(site, longer, ExitCode.BUDGET_EXCEEDED)


def test_a_second_study_beyond_what_is_left(site: Path, bank: Path) -> None:
    train(site, instruct(private_study(bank)))
    refused(site, private_study(bank, name="another"), ExitCode.BUDGET_EXCEEDED)


def test_more_rounds_than_planned(site: Path, bank: Path) -> None:
    study = private_study(bank)
    for number in (1, 2, 3):  # two rounds and a spare one
        train(site, instruct(study, number=number))
    refused(site, study, ExitCode.BUDGET_EXCEEDED, number=4)


def test_another_bank(site: Path, bank: Path) -> None:
    study = private_study(bank, privacy={"bank_sha256": "1" * 64})
    refused(site, study, ExitCode.BANK_DIFFERS, "pretrain")
    assert not (site / LEDGER_FILE).exists()  # and nothing was spent on it


def test_a_study_without_privacy_where_the_policy_asks_for_it(site: Path, bank: Path) -> None:
    study = tiny_study()
    hide_records(site)
    for work in (tasks.train, tasks.evaluate):
        task = "finetune" if work is tasks.train else "evaluate"
        with pytest.raises(HemoFedError) as caught:
            work(instruct(study, task), weights(study, task), site, True)
        assert caught.value.exit_code == ExitCode.POLICY_REFUSED


@pytest.mark.parametrize("tier", ["clear", "masked"])
def test_counts_in_the_clear_of_a_private_study(tier: str, site: Path, bank: Path) -> None:
    write_site(site, load_site(site).model_copy(update={"disclosure": tier}))
    hide_records(site)
    study = private_study(bank)
    with pytest.raises(HemoFedError) as caught:
        tasks.evaluate(instruct(study, "evaluate", split="test"), weights(study, "evaluate"), site, True)
    assert caught.value.exit_code == ExitCode.DISCLOSURE_REFUSED
    assert not (site / LEDGER_FILE).exists()


def test_a_ledger_put_back_to_before_the_last_contact(site: Path, bank: Path, tmp_path: Path) -> None:
    study = private_study(bank)
    train(site, instruct(study, number=1))
    older = shutil.copytree(site, tmp_path / "backup")
    reply, _ = train(site, instruct(study, number=2))
    seen = tip_of(reply.ledger[-1])
    shutil.rmtree(site)
    shutil.copytree(older, site)
    refused(site, study, ExitCode.LEDGER_ROLLED_BACK, number=3, ledger_tip=seen)


# ---- the centre


def test_entries_carry_on_from_what_the_centre_saw(site: Path, bank: Path) -> None:
    study, tip = private_study(bank), Tip()
    for number in (1, 2):
        reply, _ = train(site, instruct(study, number=number, ledger_tip=tip))
        tip = verify_chain(tip, reply.ledger)
    assert tip == tip_of(entries(site)[-1])
    with pytest.raises(HemoFedError):
        verify_chain(Tip(), reply.ledger)


# ---- engines and crashes


@pytest.mark.long
def test_a_private_study_runs_on_ray(site_dirs: Sites, bank: Path, tmp_path: Path) -> None:
    study = private_study(bank, objective={"name": "ssl_dml_l2"})
    sites = [copy_site(site_dirs[name], tmp_path / name) for name in ("alpha", "beta")]
    for folder in sites:
        equip(folder, study, 40, bank)
    run_on_ray(study, sites, tmp_path / "run", resume=False, workers=2)
    for folder in sites:
        assert kinds(folder).count("commit") == 5


@pytest.mark.long
def test_killed_at_any_time_what_was_begun_is_spent(site_dirs: Sites, bank: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of private rounds; resumed, the study ends. What was begun is paid for, again where its
    answer was lost: the ledger can hold more reservations than answers, never fewer."""
    phase = PHASE | {"steps_per_round": 6, "noise_multiplier": 8.0, "spare_rounds": 12}
    study = private_study(bank, objective={"name": "ssl_dml_l2"}, privacy={"pretrain": phase, "finetune": phase})
    sites = [copy_site(site_dirs[name], tmp_path / name) for name in ("alpha", "beta")]
    for folder in sites:
        equip(folder, study, 40, bank)
    script = (
        "import sys, json; from pathlib import Path; from shared_model.study import Study; "
        "from simulation.grid import run_in_process; "
        "study = Study.model_validate_json(Path(sys.argv[1]).read_text()); "
        "run_in_process(study, [Path(p) for p in sys.argv[3:]], Path(sys.argv[2]), resume=True, workers=1)"
    )
    (tmp_path / "study.json").write_text(study.model_dump_json())
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", script, str(tmp_path / "study.json"), str(tmp_path / "run"), *map(str, sites)]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    rng, kills = np.random.default_rng(1), 0
    for _ in range(20):
        process = subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE)
        wanted = reservations(sites) + 1
        while kills < 5 and process.poll() is None and reservations(sites) < wanted:
            time.sleep(0.01)
        if kills < 5 and process.poll() is None:
            time.sleep(float(rng.uniform(0, 0.4)))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.wait(timeout=300) == 0, process.communicate()[1].decode()
        break
    assert kills == 5
    for folder in sites:
        found = kinds(folder)
        assert found.count("commit") == 5
        assert found.count("reserve") >= found.count("commit")
    assert sum(kinds(folder).count("reserve") for folder in sites) > 10  # at least one round was paid for twice


def reservations(sites: list[Path]) -> int:
    """How many stand in the ledgers, read beside whoever writes them."""
    total = 0
    for folder in sites:
        try:
            with sqlite3.connect(f"file:{folder / LEDGER_FILE}?mode=ro", uri=True) as connection:
                total += connection.execute("SELECT count(*) FROM entries WHERE entry LIKE '%reserve%'").fetchone()[0]
        except sqlite3.Error:
            continue
    return int(total)
