"""Real rounds on tiny hospitals: one seed, one outcome, on every engine and after every interruption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import client.tasks
import client.training
import server.conduct
from server.conductor import Watcher
from server.logbook import file_watcher
from server.report.results import RoundMetrics
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study
from simulation.grid import InProcessGrid, run_in_process, run_on_ray
from tests.federations import copy_site, results_of, rounds_of, same_weights, tiny_study, weights_of

Sites = Mapping[str, Path]
LABELLED = ("alpha", "beta")
STUDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "local head": {"finetune": {"share_head": False}},
    "fedbn": {"encoder": {"norm": "batch"}, "federation": {"rule": "fedbn"}},
    "kept optimiser": {"federation": {"keep_optimizer_state": True}},
    "fedadam": {"federation": {"rule": "fedadam"}},
    "fedprox": {"federation": {"rule": "fedprox", "proximal_mu": 0.1}},
    "best on validation": {"evaluation": {"model": "best_on_validation"}},
    "learned distance": {
        "objective": {"name": "relcon"},
        "distance": {"rounds": 2, "local_epochs": 0.2, "batch_size": 8},
        "encoder": {"norm": "batch"},
        "federation": {"rule": "fedbn", "keep_optimizer_state": True},
    },
    "trained boundary": {"objective": {"name": "supervised_dml_margin", "task_weight": 1.0}},
}


def run(study: Study, folders: Sequence[Path], out: Path, workers: int = 1, resume: bool = False) -> Path:
    run_in_process(study, folders, out, resume=resume, workers=workers)
    return out


def several(sites: Sites, names: Sequence[str] = LABELLED) -> list[Path]:
    return [sites[name] for name in names]


@pytest.fixture(scope="module")
def whole(site_dirs: Sites, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each study run once, uninterrupted, when it is first asked for."""
    folder = tmp_path_factory.mktemp("whole")

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = run(tiny_study(**STUDIES[name]), several(site_dirs), folder / name)
            return self[name]

    return Runs()


@pytest.mark.parametrize("name", ["plain", "local head", "fedbn", "kept optimiser"])
def test_the_same_seed_gives_the_same_weights(site_dirs: Sites, whole: Sites, tmp_path: Path, name: str) -> None:
    again = run(tiny_study(**STUDIES[name]), several(site_dirs), tmp_path)
    assert same_weights(again, whole[name])
    assert rounds_of(again) == rounds_of(whole[name])


def test_another_seed_gives_other_weights(site_dirs: Sites, whole: Sites, tmp_path: Path) -> None:
    assert not same_weights(run(tiny_study(seed=2), several(site_dirs), tmp_path), whole["plain"])


def test_every_rule_and_setting_changes_the_weights(whole: Sites) -> None:
    for name in ("local head", "kept optimiser", "fedadam", "fedprox"):
        assert not same_weights(whole[name], whole["plain"])


def test_the_order_of_the_sites_does_not_matter(site_dirs: Sites, whole: Sites, tmp_path: Path) -> None:
    assert same_weights(run(tiny_study(), several(site_dirs, ("beta", "alpha")), tmp_path), whole["plain"])


def test_the_same_weights_are_the_same_bytes(site_dirs: Sites, whole: Sites, tmp_path: Path) -> None:
    """Several entries of safetensors' metadata would be written in an order that changes."""
    tensors = weights_of(whole["plain"])
    files = set()
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        files.add(server.conduct.write_weights(tiny_study(), tensors, tmp_path / str(number)))  # type: ignore[arg-type]
    assert len(files) == 1


def test_two_workers_give_the_weights_of_one(site_dirs: Sites, whole: Sites, tmp_path: Path) -> None:
    assert same_weights(run(tiny_study(), several(site_dirs), tmp_path, workers=2), whole["plain"])
    assert rounds_of(tmp_path) == rounds_of(whole["plain"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["local head", "fedbn", "kept optimiser"])
def test_two_workers_give_the_weights_of_one_with_what_stays(
    site_dirs: Sites, whole: Sites, tmp_path: Path, name: str
) -> None:
    assert same_weights(run(tiny_study(**STUDIES[name]), several(site_dirs), tmp_path, workers=2), whole[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "local head", "fedbn", "kept optimiser", "learned distance"])
def test_ray_gives_the_weights_of_one_process(site_dirs: Sites, whole: Sites, tmp_path: Path, name: str) -> None:
    pytest.importorskip("ray")
    run_on_ray(tiny_study(**STUDIES[name]), several(site_dirs), tmp_path, resume=False, workers=2)
    assert results_of(tmp_path)["engine"] == "ray"
    assert same_weights(tmp_path, whole[name])
    assert rounds_of(tmp_path) == rounds_of(whole[name])


@pytest.mark.long
def test_a_study_that_fails_on_ray_is_not_a_success(site_dirs: Sites, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(HemoFedError) as caught:
        run_on_ray(tiny_study(), several(site_dirs, ("gamma",)), tmp_path, resume=False, workers=1)
    assert caught.value.exit_code == ExitCode.NO_USABLE_PATIENTS


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def interrupt(monkeypatch: pytest.MonkeyPatch, phase: str, number: int) -> None:
    """End the study when a round is over: its line is written, its checkpoint not yet."""

    def watcher(out: Path) -> Watcher:
        usual = file_watcher(out)

        def on_round(metrics: RoundMetrics) -> None:
            usual.on_round(metrics)
            if (metrics.phase, metrics.round) == (phase, number):
                raise Interrupted

        return Watcher(usual.on_sites, usual.on_round_start, on_round, usual.on_notice)

    monkeypatch.setattr(server.conduct, "file_watcher", watcher)


@pytest.mark.parametrize("name", STUDIES)
def test_a_resumed_study_ends_as_one_that_was_not_interrupted(
    site_dirs: Sites, whole: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The sites have trained the round that the centre lost, and kept what stays with them."""
    study = tiny_study(**STUDIES[name])
    before = (("distance", 1), ("distance", 2)) if "distance" in study.phases else ()
    for boundary in (*before, ("pretrain", 1), ("finetune", 1), ("finetune", 2)):
        with monkeypatch.context() as patch:
            interrupt(patch, *boundary)
            with pytest.raises(Interrupted):
                run(study, several(site_dirs), tmp_path, resume=True)
    run(study, several(site_dirs), tmp_path, resume=True)
    assert same_weights(tmp_path, whole[name])
    assert rounds_of(tmp_path) == rounds_of(whole[name])
    ours, theirs = results_of(tmp_path), results_of(whole[name])
    assert ours["test"] == theirs["test"]
    assert ours["threshold"] == theirs["threshold"]


def test_a_finished_study_is_not_run_again(site_dirs: Sites, whole: Sites) -> None:
    before = (whole["plain"] / "results.json").read_bytes()
    run(tiny_study(), several(site_dirs), whole["plain"], resume=True)
    assert (whole["plain"] / "results.json").read_bytes() == before


SECRET = "patient 8812 Ada Byron"


def written(out: Path) -> bytes:
    """Everything the centre wrote."""
    return b"\n".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file())


def test_a_site_that_fails_in_one_phase_is_left_out_and_says_nothing(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / SECRET)
    usual = client.training.finetune

    def broken(study: Study, model: Any, store: Any, *rest: Any) -> Any:
        if store.site_dir == site:
            raise RuntimeError(f"{SECRET} in {store.site_dir}, {store.index.patient_keys[0]}")
        return usual(study, model, store, *rest)

    monkeypatch.setattr(client.tasks, "finetune", broken)
    out = run(tiny_study(), [site_dirs["alpha"], site], tmp_path / "out")
    phases = {(row["phase"], row["sites_replied"], row["sites_failed"]) for row in rounds_of(out)}
    assert phases == {("pretrain", ("alpha", "beta"), ()), ("finetune", ("alpha",), ("beta",))}
    notices = (out / "notices.log").read_text()
    assert "beta: not in round 1 of finetune: unexpected; its own log says more under" in notices
    reference = notices.split("under ")[1].split()[0]
    log = (site / "client.log").read_text()
    assert SECRET in log
    assert reference in log
    for word in (SECRET, "8812", str(tmp_path / SECRET), "RuntimeError"):
        assert word.encode() not in written(out)
    assert b"alpha" in written(out)  # the search finds what is there


def test_a_site_whose_store_is_broken_is_left_out(site_dirs: Sites, tmp_path: Path) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / SECRET)
    (site / "signals.i16").write_bytes(b"cut")
    out = run(tiny_study(), [site_dirs["alpha"], site], tmp_path / "out")
    assert [entry["name"] for entry in results_of(out)["sites"]] == ["alpha"]
    assert "node 3 (beta): left out: bad site" in (out / "notices.log").read_text()
    assert SECRET.encode() not in written(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_two_sites_of_one_name_are_refused(site_dirs: Sites, tmp_path: Path, workers: int) -> None:
    twin = copy_site(site_dirs["beta"], tmp_path / "twin", name="alpha")
    with pytest.raises(HemoFedError, match="'alpha'") as caught:
        run(tiny_study(), [site_dirs["alpha"], twin], tmp_path / "out", workers)
    assert caught.value.exit_code == ExitCode.BAD_SITE


def test_a_study_in_which_every_site_fails_has_no_results(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.tasks, "finetune", lambda *_: 1 / 0)
    with pytest.raises(HemoFedError) as caught:
        run(tiny_study(), several(site_dirs), tmp_path)
    assert caught.value.exit_code == ExitCode.TOO_FEW_SITES
    assert not (tmp_path / "results.json").exists()


def test_a_study_without_labels_is_refused(site_dirs: Sites, tmp_path: Path) -> None:
    for study, names in (
        (tiny_study(), ("gamma",)),
        (tiny_study(target={"column": "troponin"}), ("alpha", "beta")),
    ):
        with pytest.raises(HemoFedError) as caught:
            run(study, several(site_dirs, names), tmp_path / names[0])
        assert caught.value.exit_code == ExitCode.NO_USABLE_PATIENTS


def test_a_site_without_labels_pretrains_only(site_dirs: Sites, tmp_path: Path) -> None:
    out = run(tiny_study(), several(site_dirs, ("alpha", "gamma")), tmp_path)
    replied = {row["phase"]: row["sites_replied"] for row in rounds_of(out)}
    assert replied == {"pretrain": ("alpha", "gamma"), "finetune": ("alpha",)}


@pytest.mark.parametrize("tier", ["clear", "noised"])
def test_each_sites_tier_is_kept_in_one_study(site_dirs: Sites, tmp_path: Path, tier: str) -> None:
    other = copy_site(site_dirs["beta"], tmp_path / "other", disclosure=tier, minimum_cell=2)
    out = run(tiny_study(), [site_dirs["alpha"], other], tmp_path / "out")
    own = results_of(out)["test"]["mpcwp_gt_18"]
    assert own["all_ecg_auroc"]["value"] is None or tier == "noised"  # replicates of beta never came
    notices = (out / "notices.log").read_text()
    assert ("beta: not in the test figures: disclosure refused" in notices) == (tier == "noised")


@pytest.mark.long
def test_a_killed_worker_costs_one_answer_and_not_the_study(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is dead when the next instruction goes out."""
    usual = InProcessGrid.push_messages
    killed: list[int] = []

    def push(self: InProcessGrid, messages: Any) -> Any:
        messages = list(messages)
        assert self._pool is not None
        if messages[0].metadata.message_type == "train.finetune" and not killed:
            for process in list(self._pool._processes.values()):
                process.kill()
                process.join()
                killed.append(process.pid or 0)
        return usual(self, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", push)
    out = run(tiny_study(), several(site_dirs), tmp_path, workers=2)
    assert killed
    assert len(rounds_of(out)) == 3


def test_the_strictest_site_decides_what_is_shown(site_dirs: Sites, whole: Sites, tmp_path: Path) -> None:
    assert results_of(whole["plain"])["test"]["mpcwp_gt_18"]["auroc"]["value"] is not None
    assert rounds_of(whole["plain"])[-1]["validation_auroc"] is not None
    strict = copy_site(site_dirs["beta"], tmp_path / "strict", minimum_cell=1000)
    out = run(tiny_study(), [site_dirs["alpha"], strict], tmp_path / "out")
    own = results_of(out)["test"]["mpcwp_gt_18"]
    assert own["auroc"]["value"] is None
    assert "1000" in own["auroc"]["reason"]
    assert all(row["validation_auroc"] is None for row in rounds_of(out))
