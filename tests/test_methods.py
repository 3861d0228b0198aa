"""Every row of the catalogue trains: two steps at a site, and federated by its name in a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.store import open_store
from client.tasks import describer, training_rows
from client.training import LocalWork, pretrain, train_distance
from server.report.files import load_metrics
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import all_names, build_model, sent_names, take_arrays, trained_parts, travelling_names
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.draws import DRAWS
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings, settings_of
from shared_model.objectives.step import LOSSES
from shared_model.objectives.views import VIEWS
from shared_model.study import Study
from simulation.grid import run_in_process
from tests.federations import same_weights, tiny_study, weights_of

CPU = torch.device("cpu")
ROWS = sorted(METHODS)
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "good_views_rhythm": {"group_column": "mpcwp_mmhg"},
    "ebcl": {"window_days": 90.0},
}
OWN_NETWORKS = ("cpc", "ebcl", "relcon", "supervised_dml_margin", "tf_c")
Sites = Mapping[str, Path]


def study_of(name: str, **tables: Any) -> Study:
    objective = {"name": name, **NEEDED.get(name, {}), **tables.get("objective", {})}
    return tiny_study(**{**tables, "objective": objective})


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_whole(name: str) -> None:
    method = METHODS[name]
    assert method.citation
    assert method.departures
    assert method.relation in RELATIONS
    assert method.draw in DRAWS
    assert method.views in VIEWS
    assert method.loss in LOSSES or not method.pretrains
    assert set(method.defaults) <= settings_of(method)
    assert ObjectiveSettings(name=name, **NEEDED.get(name, {})).method is method


def two_steps(study: Study, site_dir: Path) -> tuple[nn.ModuleDict, dict[str, Tensor], list[float]]:
    """The model after two steps of every phase before fine-tuning, its first weights, and the losses."""
    store, losses = open_store(site_dir), []
    model = build_model(study)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for task in study.phases:
        if task == "finetune":
            continue
        phase = study.phases[task].model_copy(update={"local_epochs": 1e-6, "minimum_steps": 2, "batch_size": 12})
        work = LocalWork(phase, training_rows(store.index, study, task), learning_rate=1e-3, seed=1)
        if task == "distance":
            outcome = train_distance(study, model, store, work, CPU)
        else:
            outcome = pretrain(study, model, store, work, CPU, describer(store, study, site_dir))
        assert outcome.steps == 2
        losses.append(outcome.loss)
    return model, before, losses


@pytest.mark.parametrize("name", [name for name in ROWS if METHODS[name].pretrains])
def test_two_steps_move_all_that_is_trained_and_nothing_else(name: str, site_dirs: Sites) -> None:
    study = study_of(name)
    model, before, losses = two_steps(study, site_dirs["alpha"])
    assert all(np.isfinite(loss) and loss != 0 for loss in losses)
    trained = {part for task in study.phases if task != "finetune" for part in trained_parts(study, task)}
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == trained & set(model)
    again, _, losses_again = two_steps(study, site_dirs["alpha"])
    assert losses_again == losses
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_task_loss_trains_the_head_with_the_encoder(site_dirs: Sites) -> None:
    """Fault 16 of the published code: its class loss went through a head that no optimiser knew."""
    study = study_of("supervised_dml_triplet", objective={"task_weight": 3.0})
    model, before, _ = two_steps(study, site_dirs["alpha"])
    assert not torch.equal(model.state_dict()["head.output.weight"], before["head.output.weight"])
    assert any(name.startswith("head.") for name in travelling_names(study, "pretrain", model))


def run(study: Study, site_dirs: Sites, out: Path) -> Path:
    run_in_process(study, [site_dirs[name] for name in ("alpha", "beta", "gamma")], out, resume=False, workers=1)
    return out


@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_rows_with_networks_or_draws_of_their_own_run_federated(name: str, site_dirs: Sites, tmp_path: Path) -> None:
    check_federated(name, site_dirs, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(ROWS) - set(OWN_NETWORKS)))
def test_all_other_rows_run_federated(name: str, site_dirs: Sites, tmp_path: Path) -> None:
    check_federated(name, site_dirs, tmp_path)


def check_federated(name: str, site_dirs: Sites, tmp_path: Path) -> None:
    study = study_of(name, distance={"rounds": 1, "local_epochs": 0.2, "batch_size": 8})
    out = run(study, site_dirs, tmp_path / "run")
    rounds = load_metrics(out)
    assert [row.phase for row in rounds] == [name for name, phase in study.phases.items() for _ in range(phase.rounds)]
    for row in rounds:
        with_labels = row.phase == "finetune" or METHODS[name].labels or name == "good_views_rhythm"
        # gamma has no labels: it sits out whatever learns from them, and has no catheterisation to look around
        without_events = row.phase == "pretrain" and METHODS[name].draw == "around_events"
        everybody = ("alpha", "beta") if with_labels or without_events else ("alpha", "beta", "gamma")
        assert row.sites_replied == everybody
        assert row.train_loss is not None


def test_a_group_column_that_is_the_target_shows_no_label_beyond_the_studys_share(site_dirs: Sites) -> None:
    index = open_store(site_dirs["alpha"]).index
    for share in (0.5, 1.0):
        tables = {"finetune": {"labelled_share": share}}
        by_rhythm, fine = (
            training_rows(index, study_of("good_views_rhythm", **tables), task) for task in ("pretrain", "finetune")
        )
        assert by_rhythm.tolist() == fine.tolist()


def test_a_group_column_that_no_record_has_stops_the_study(site_dirs: Sites, tmp_path: Path) -> None:
    """It once pretrained on nothing, with a warning about batch sizes."""
    study = study_of("good_views_rhythm", objective={"group_column": "rythm"})
    with pytest.raises(HemoFedError) as caught:
        run(study, site_dirs, tmp_path / "run")
    assert caught.value.exit_code == ExitCode.TOO_FEW_SITES
    with pytest.raises(HemoFedError, match="0 training ECGs for pretrain; ingest more records with a value in rythm"):
        training_rows(open_store(site_dirs["alpha"]).index, study, "pretrain")


def test_supervised_has_no_pretraining_and_is_fine_tuning_alone(site_dirs: Sites, tmp_path: Path) -> None:
    supervised = run(study_of("supervised"), site_dirs, tmp_path / "supervised")
    without = run(tiny_study(pretrain={"rounds": 0}), site_dirs, tmp_path / "without")
    assert [row.phase for row in load_metrics(supervised)] == ["finetune", "finetune"]
    assert same_weights(supervised, without)


def test_a_learned_distance_is_sent_frozen_and_does_not_come_back() -> None:
    study = study_of("relcon")
    model = build_model(study)
    distance = {name for name in model.state_dict() if name.startswith("distance.")}
    assert distance
    assert distance <= set(sent_names(study, "pretrain", model))
    assert not distance & set(travelling_names(study, "pretrain", model))
    assert distance == set(travelling_names(study, "distance", model))
    assert not distance & set(sent_names(study, "finetune", model))
    assert distance < set(all_names(study, model))


@pytest.mark.parametrize("name", ["relcon", "ssl_dml_learned", "tf_c", "cpc", "supervised_dml_margin"])
@pytest.mark.parametrize("rule", ["fedavg", "fedbn"])
def test_the_centre_holds_whatever_it_sends(name: str, rule: str) -> None:
    """FedBN once kept the norms of the learned distance at the sites, and the centre had none to send."""
    study = study_of(name, encoder={"norm": "batch"}, federation={"rule": rule})
    model = build_model(study)
    held = set(all_names(study, model))
    for task in (*study.phases, "evaluate"):
        assert set(sent_names(study, task, model)) <= held
    local = {key for key in model.state_dict() if key not in held and not key.endswith("num_batches_tracked")}
    assert bool(local) == (rule == "fedbn")
    assert not any(key.startswith("distance.") for key in local)


def test_what_pretraining_alone_needs_leaves_the_model_folder_free(site_dirs: Sites, tmp_path: Path) -> None:
    """The delivered model is encoder and head, whatever trained it."""
    names = set(weights_of(run(study_of("supervised_dml_margin"), site_dirs, tmp_path / "run")))
    assert {name.split(".")[0] for name in names} == {"encoder", "head"}


def test_networks_follow_from_the_seed_and_leave_the_global_stream_alone() -> None:
    for name in ("tf_c", "cpc", "relcon", "simclr"):
        study = study_of(name)
        first, state = build_model(study), torch.get_rng_state()
        torch.manual_seed(99)
        second = build_model(study)
        torch.set_rng_state(state)
        one, other = (take_arrays(model, all_names(study, model)) for model in (first, second))
        assert all(np.array_equal(one[key], other[key]) for key in one)
        different = build_model(study.model_copy(update={"seed": study.seed + 1})).state_dict()
        assert any(not np.array_equal(one[key], different[key].numpy()) for key in one)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "ssl_dml"}, "unknown objective 'ssl_dml'"),
        ({"name": "simclr", "margin": 0.5}, "simclr does not use margin"),
        ({"name": "ssl_dml_l2", "temperature": 0.5}, "ssl_dml_l2 does not use temperature"),
        ({"name": "good_views_rhythm"}, "needs group_column"),
        ({"name": "ebcl", "window_days": 0}, "window_days"),
        ({"name": "supervised_dml_triplet", "task_weight": -1}, "task_weight"),
        ({"margins": 0.3}, "margins"),
        ({"name": "cpc", "horizon": 129}, "horizon"),
        ({"name": "ebcl", "temperature": 0.005}, "starts at 0.01 or above"),
        ({"name": "ssl_dml_l2", "positives": "random"}, "no two ECGs are at distance 0"),
        ({"name": "ssl_dml_wave_attributes", "positives": "random"}, "no two ECGs are at distance 0"),
        ({"name": "supervised_dml_npair", "positives": "nearest"}, "equally near"),
        ({"name": "supervised_dml_triplet", "negatives": "softhard"}, "softhard"),
        ({"name": "ssl_dml_l2", "farthest_k": 5}, 'farthest_k is used with negatives = "farthest" only'),
        ({"name": "ssl_dml_l2", "negatives": "farthest", "nearest_share": 0.3}, "nearest_share is used with"),
        ({"name": "supervised_dml_angular", "nearest_share": 0.3}, "nearest_share is used with"),
    ],
)
def test_settings_that_do_nothing_or_make_no_sense_are_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveSettings(**table)


CHOICES: Sequence[Mapping[str, Any]] = (
    {"name": "ssl_dml_l1", "negatives": "farthest", "farthest_k": 5},
    {"name": "supervised_dml_triplet", "negatives": "beyond_nearest", "nearest_share": 0.3},
    {"name": "supervised_dml_margin", "positives": "random", "negatives": "softhard"},
    {"name": "cpc", "horizon": 64, "temperature": 0.2},
    {"name": "ebcl", "temperature": 0.01},
)


@pytest.mark.parametrize("given", [{"name": name, **NEEDED.get(name, {})} for name in ROWS] + [*CHOICES])
def test_a_study_travels_with_every_key_written_out(given: Mapping[str, Any]) -> None:
    """A setting at its usual value is no mistake, whether or not the row looks at it."""
    settings = ObjectiveSettings(**given)
    assert ObjectiveSettings.model_validate_json(settings.model_dump_json()) == settings


def test_the_table_in_the_docs_is_the_catalogue() -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    written = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6]
    rows = [
        f"| `{method.name}` | {method.draw} | {method.views} | {method.relation} | {method.loss} |"
        for method in METHODS.values()
        if method.pretrains
    ]
    assert [line for line in written if line.split("`")[1] in METHODS] == rows
