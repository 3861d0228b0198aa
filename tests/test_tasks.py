"""What a site does when asked, on real site stores: what leaves it, what stays, and what it refuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

import client.app
from client import tasks
from client.local_state import load_before
from client.site import load_site
from client.store import open_store
from server.app import MESSAGE_TYPES
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import build_model, put_arrays, take_arrays, travelling_names
from shared_model.score_grid import COARSE_BINS, FINE_BINS
from shared_model.study import Study
from shared_model.wire import Arrays, Instruction, Reply, pack, unpack
from simulation.grid import InProcessGrid
from tests.federations import copy_site, tiny_study

TASKS = ("describe", "pretrain", "finetune", "evaluate")
Sites = Mapping[str, Path]


def start(study: Study, task: str) -> Arrays:
    """The weights that a study begins with, as they travel in a task."""
    model = build_model(study)
    return {} if task == "describe" else take_arrays(model, travelling_names(study, task, model))


def run_of(study: Study) -> str:
    """Each study has a run of its own, so that what one leaves at a site is not another's."""
    return study.digest[:32]


def instruct(study: Study, task: Any, number: int = 1, **more: Any) -> Instruction:
    return Instruction(run_id=run_of(study), task=task, round_number=number, study=study, learning_rate=1e-3, **more)


def send(site_dir: Path, instruction: Instruction, arrays: Arrays | None = None) -> Message:
    """The site's answer as it goes over the wire."""
    grid = InProcessGrid([site_dir])
    content = pack(instruction, start(instruction.study, instruction.task) if arrays is None else arrays)
    (answer,) = grid.send_and_receive([Message(content, 2, MESSAGE_TYPES[instruction.task])])
    assert not answer.has_error()
    return answer


def ask(site_dir: Path, instruction: Instruction, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
    return unpack(send(site_dir, instruction, arrays).content, Reply)


def wire_bytes(answer: Message) -> bytes:
    """Everything of an answer that the centre can see."""
    parts = [str(answer.metadata).encode(), repr(answer.content).encode()]
    parts += [str(dict(record)).encode() for record in answer.content.config_records.values()]
    for record in answer.content.array_records.values():
        parts += [part for name, array in record.items() for part in (name.encode(), array.data)]
    return b"\n".join(parts)


def rounded(patients: Any, to: int) -> int:
    return round(len(set(patients.tolist())) / to) * to


@pytest.mark.parametrize("to", [5, 10])
def test_a_site_describes_itself_in_rounded_counts(site_dirs: Sites, tmp_path: Path, to: int) -> None:
    site = copy_site(site_dirs["alpha"], tmp_path / "site", count_rounding=to)
    reply, arrays = ask(site, instruct(tiny_study(), "describe"))
    index, said = open_store(site).index, reply.description
    assert said is not None
    assert not arrays
    labelled = ~np.isnan(index.labels["mpcwp_mmhg"])
    expected = {
        "records": round(len(index) / to) * to,
        "patients": rounded(index.patient, to),
        "train_patients": rounded(index.patient[index.split == 0], to),
        "labelled_train_patients": rounded(index.patient[labelled & (index.split == 0)], to),
        "pretrain_patients": rounded(index.patient[index.split == 0], to),
        "validation_patients": rounded(index.patient[labelled & (index.split == 1)], to),
        "test_patients": rounded(index.patient[labelled & (index.split == 2)], to),
    }
    assert {name: getattr(said, name) for name in expected} == pytest.approx(expected, abs=to)  # ties may go up
    assert all(getattr(said, name) % to == 0 for name in expected)


def test_a_site_without_labels_says_so(site_dirs: Sites) -> None:
    reply, _ = ask(site_dirs["gamma"], instruct(tiny_study(), "describe"))
    assert reply.description is not None
    assert reply.description.labelled_train_patients == reply.description.test_patients == 0
    assert reply.description.train_patients > 0
    assert ask(site_dirs["gamma"], instruct(tiny_study(), "pretrain"))[0].status == "done"
    failed, arrays = ask(site_dirs["gamma"], instruct(tiny_study(), "finetune"))
    assert (failed.status, failed.code, arrays) == ("failed", ExitCode.NO_USABLE_PATIENTS, {})


def norm_names(model: nn.Module) -> set[str]:
    """Every array of a normalisation layer, found by the layer's type."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d)
    return {
        f"{name}.{entry}"
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
        for entry in layer.state_dict()
    }


STUDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "local head": {"finetune": {"share_head": False}},
    "batch norm": {"encoder": {"norm": "batch"}},
    "fedbn": {"encoder": {"norm": "batch"}, "federation": {"rule": "fedbn"}},
}


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", STUDIES)
def test_what_leaves_a_site_after_training(site_dirs: Sites, name: str, task: str) -> None:
    study = tiny_study(**STUDIES[name])
    model = build_model(study)
    floats = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    _, arrays = ask(site_dirs["alpha"], instruct(study, task))
    expected = {key for key in floats if key.startswith("encoder.")}
    if task == "finetune" and name != "local head":
        expected |= {key for key in floats if key.startswith("head.")}
    if name == "fedbn":
        expected -= norm_names(model)
    assert set(arrays) == expected
    assert all(value.dtype == np.float32 for value in arrays.values())
    assert not any("num_batches_tracked" in key for key in arrays)
    moved = {key for key, value in arrays.items() if not np.array_equal(value, start(study, task)[key])}
    assert len(moved) > len(expected) / 2
    if name == "batch norm":
        assert any(key.endswith("running_mean") for key in arrays)


def test_arrays_that_do_not_travel_in_a_task_are_refused(site_dirs: Sites) -> None:
    study = tiny_study()
    for arrays in (start(study, "finetune"), {}, {**start(study, "pretrain"), "encoder.more": np.zeros(1)}):
        reply, back = ask(site_dirs["alpha"], instruct(study, "pretrain"), arrays)
        assert (reply.status, reply.code, back) == ("failed", ExitCode.RELEASE_DIFFERS, {})
    wrong = {**start(study, "pretrain"), "encoder.embedding.bias": np.zeros(3, np.float32)}
    assert ask(site_dirs["alpha"], instruct(study, "pretrain"), wrong)[0].code == ExitCode.RELEASE_DIFFERS


def head_of(site_dir: Path, study: Study, task: str, number: int) -> torch.Tensor:
    model, _ = tasks.site_model(instruct(study, task, number), start(study, task), site_dir)
    return model["head"].output.weight.detach().clone()  # type: ignore[union-attr, operator]


def test_what_stays_at_a_site_is_kept_by_round(site_dirs: Sites, tmp_path: Path) -> None:
    site, study = copy_site(site_dirs["alpha"], tmp_path / "site"), tiny_study(finetune={"share_head": False})
    for number in (1, 2):
        ask(site, instruct(study, "finetune", number))
    after = {n: load_before(site, run_of(study), "finetune", n + 1)["model.head.output.weight"] for n in (1, 2)}
    fresh = build_model(study)["head"].output.weight  # type: ignore[union-attr]
    assert not torch.equal(after[1], after[2])
    assert torch.equal(head_of(site, study, "finetune", 1), fresh)  # type: ignore[arg-type]
    assert torch.equal(head_of(site, study, "finetune", 2), after[1])  # round 2 again: as it was before round 2
    assert torch.equal(head_of(site, study, "finetune", 3), after[2])
    assert torch.equal(head_of(site, study, "evaluate", 1), after[1])
    assert torch.equal(head_of(site, study, "evaluate", 2), after[2])


@pytest.mark.parametrize("model", ["final", "best_on_validation"])
def test_rounds_that_nobody_goes_back_to_are_dropped(site_dirs: Sites, tmp_path: Path, model: str) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / "site")
    study = tiny_study(finetune={"share_head": False, "rounds": 6, "local_epochs": 0.1}, evaluation={"model": model})
    for number in range(1, 7):
        ask(site, instruct(study, "finetune", number))
    kept = sorted(int(path.stem.removeprefix("round-")) for path in (site / "state").rglob("*.safetensors"))
    assert kept == ([4, 5, 6] if model == "final" else [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("rule", ["fedavg", "fedbn"])
def test_batch_norm_goes_through_all_phases(site_dirs: Sites, rule: str) -> None:
    """Its step counter is an array without a dimension, and stays at the site."""
    study = tiny_study(encoder={"norm": "batch"}, federation={"rule": rule}, name=f"batch norm, {rule}")
    for task in TASKS:
        assert ask(site_dirs["alpha"], instruct(study, task))[0].status == "done"
    model, _ = tasks.site_model(instruct(study, "finetune", 2), start(study, "finetune"), site_dirs["alpha"])
    counter = model.state_dict()["encoder.blocks.0.norm1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter > 0


def test_nothing_is_left_at_a_site_where_all_travels(site_dirs: Sites, tmp_path: Path) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / "site")
    ask(site, instruct(tiny_study(), "finetune"))
    assert not (site / "state").exists()


SECRET = "patient 8812-0417-5566 Ada Byron"  # long: four digits turn up in a time stamp by chance


def raises(error: Exception) -> Any:
    def work(*_: object) -> None:
        raise error

    return work


@pytest.mark.parametrize("error", [RuntimeError(SECRET), HemoFedError(SECRET, ExitCode.BAD_SITE), KeyError(SECRET)])
@pytest.mark.parametrize("task", TASKS)
def test_no_word_of_an_error_leaves_the_site(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, error: Exception
) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / SECRET / "site")
    monkeypatch.setattr(tasks, "open_store", raises(error))
    answer = send(site, instruct(tiny_study(), task))
    reply, arrays = unpack(answer.content, Reply)
    assert reply.status == "failed"
    assert reply.code == (ExitCode.BAD_SITE if isinstance(error, HemoFedError) else ExitCode.UNEXPECTED)
    assert (reply.description, reply.training, arrays) == (None, None, {})
    for word in (SECRET, "8812-0417-5566", "Byron", str(tmp_path)):
        assert word.encode() not in wire_bytes(answer)
    log = (site / "client.log").read_text()
    assert SECRET in log
    assert reply.reference in log


def test_a_word_that_leaves_a_site_would_be_found() -> None:
    """The control of the test above: it searches where words can be."""
    for body, arrays in ((Reply(site=SECRET), {}), (Reply(site="a"), {SECRET: np.zeros(1)})):
        assert SECRET.encode() in wire_bytes(Message(pack(body, arrays), 2, "train"))
    hidden = np.frombuffer(SECRET.encode(), np.uint8)
    assert SECRET.encode() in wire_bytes(Message(pack(Reply(site="a"), {"w": hidden}), 2, "train"))


def test_a_message_that_is_no_instruction_is_answered_with_a_code(site_dirs: Sites) -> None:
    grid = InProcessGrid([site_dirs["beta"]])
    (answer,) = grid.send_and_receive([Message(pack(Reply(site="a")), 2, "train.pretrain")])
    assert unpack(answer.content, Reply)[0].code == ExitCode.SITE_FAILED


def test_a_broken_store_is_a_failed_reply(site_dirs: Sites, tmp_path: Path) -> None:
    for number, damage in enumerate(("signals.i16", "index.sqlite", "site.toml")):
        site = copy_site(site_dirs["beta"], tmp_path / str(number))
        (site / damage).write_bytes((site / damage).read_bytes()[:10])
        reply, arrays = ask(site, instruct(tiny_study(), "pretrain"))
        assert (reply.status, arrays) == ("failed", {})


def counts(site: Path, study: Study | None = None) -> tuple[Reply, Arrays]:
    return ask(site, instruct(study or tiny_study(), "evaluate", split="test", threshold_edge=FINE_BINS // 2))


def test_the_clear_tier_lets_out_coarse_cells_and_no_replicates(larger_site: Path, tmp_path: Path) -> None:
    fine = counts(larger_site)[1]
    assert any(name.startswith("bootstrap|") for name in fine)  # the control: tier masked, summed in this process
    assert len(fine["all|cells"]) == FINE_BINS
    reply, arrays = counts(copy_site(larger_site, tmp_path / "clear", disclosure="clear"))
    assert reply.status == "done"
    assert not any(name.startswith("bootstrap|") for name in arrays)
    cells = {name: value for name, value in arrays.items() if name.endswith("|cells")}
    assert "all|cells" in cells
    coarse = {*range(0, FINE_BINS + 1, FINE_BINS // COARSE_BINS), FINE_BINS // 2}
    for name, given in cells.items():
        value = given.astype(np.int64)
        assert len(value) <= COARSE_BINS + 1
        assert set(arrays[name.replace("cells", "edges")].tolist()) <= coarse
        assert not ((value[:, :2] > 0) & (value[:, :2] < 11)).any()  # patients with, and without the condition


def test_a_tier_that_cannot_be_kept_lets_nothing_out(site_dirs: Sites, tmp_path: Path) -> None:
    noised = copy_site(site_dirs["alpha"], tmp_path / "noised", disclosure="noised")
    reply, arrays = counts(noised)
    assert (reply.status, reply.code, arrays) == ("failed", ExitCode.DISCLOSURE_REFUSED, {})
    assert ask(noised, instruct(tiny_study(), "finetune"))[0].status == "done"
    study = tiny_study()
    asked = instruct(study, "evaluate", split="test")
    with pytest.raises(HemoFedError) as caught:  # masked, and no secure sum
        tasks.evaluate(asked, start(study, "evaluate"), site_dirs["alpha"], False)
    assert caught.value.exit_code == ExitCode.DISCLOSURE_REFUSED


@pytest.mark.parametrize("task", TASKS)
def test_a_site_that_did_not_say_its_tier_lets_nothing_out(site_dirs: Sites, tmp_path: Path, task: str) -> None:
    site = copy_site(site_dirs["alpha"], tmp_path / "site")
    lines = (site / "site.toml").read_text().splitlines()
    (site / "site.toml").write_text("\n".join(line for line in lines if not line.startswith("disclosure")))
    reply, arrays = ask(site, instruct(tiny_study(), task))
    assert (reply.status, reply.code, arrays) == ("failed", ExitCode.BAD_SITE, {})
    assert reply.description is None
    assert "disclosure is not set" in (site / "client.log").read_text()


def test_a_device_that_is_not_there_is_refused(site_dirs: Sites) -> None:
    settings, study = load_site(site_dirs["alpha"]), tiny_study(federation={"threads_per_client": 1})
    assert tasks.prepare_device(settings.model_copy(update={"device": "cpu"}), study).type == "cpu"
    assert torch.get_num_threads() == 1
    if not torch.cuda.is_available():
        with pytest.raises(HemoFedError) as caught:
            tasks.prepare_device(settings.model_copy(update={"device": "cuda"}), study)
        assert caught.value.exit_code == ExitCode.DEVICE_MISSING


def test_the_same_instruction_gives_the_same_weights_at_one_site_and_others_at_another(site_dirs: Sites) -> None:
    study = tiny_study()
    first, again, other = (ask(site_dirs[name], instruct(study, "pretrain"))[1] for name in ("alpha", "alpha", "beta"))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert any(first[name].tobytes() != other[name].tobytes() for name in first)
    later = ask(site_dirs["alpha"], instruct(study, "pretrain", 2))[1]
    assert any(first[name].tobytes() != later[name].tobytes() for name in first)


def test_weights_of_another_encoder_do_not_fit() -> None:
    model = build_model(tiny_study())
    for arrays in ({"encoder.embedding.bias": np.zeros(3, np.float32)}, {"encoder.more": np.zeros(3, np.float32)}):
        with pytest.raises(HemoFedError) as caught:
            put_arrays(model, arrays)
        assert caught.value.exit_code == ExitCode.RELEASE_DIFFERS


def test_the_client_app_answers_what_the_centre_asks() -> None:
    assert set(MESSAGE_TYPES) == {*TASKS, "distance"}
    assert callable(client.app.app)
