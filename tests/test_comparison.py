"""`hemofed-sim compare`: the same patients for all, what is there is not made again, and figures that add up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from client.store import open_store
from client.tasks import in_labelled_share, training_rows
from client.uses import uses_of
from server.report.results import Estimate
from shared_model.errors import ExitCode, HemoFedError
from shared_model.gaps import holm
from simulation import comparison_summary as summary
from simulation.comparison import Asked, compare
from simulation.comparison_job import FEWEST_OF_A_CLASS, Setup, study_of, too_few
from simulation.comparison_output import Table
from simulation.comparison_plan import Block, Comparison, Job, arms_of, jobs_of, judged_on, trained_on
from simulation.comparison_summary import Cell, Row, with_differences
from simulation.plan import load_comparison
from tests.federations import copy_site, tiny_study

Sites = Mapping[str, Path]
FILES = ("comparison.json", "comparison.csv", "comparison.md", "comparison.svg")
SHARES = (0.01, 0.1, 0.25, 0.5, 1.0)


def plan(**changes: Any) -> Comparison:
    usual: dict[str, Any] = {
        "methods": ("supervised", "ssl_dml_l2"),
        "modes": ("federated",),
        "fractions": (0.05, 1.0),
        "seeds": 1,
    }
    return Comparison(**{**usual, **changes})


def asked(comparison: Comparison, out: Path, **changes: Any) -> Asked:
    out.mkdir(parents=True, exist_ok=True)
    return Asked(tiny_study(**changes), None, comparison, out, workers=2)


def run(comparison: Comparison, sites: Sites, out: Path, **changes: Any) -> Table:
    return compare(asked(comparison, out, **changes), sites, Console(quiet=True))


@pytest.fixture(scope="module")
def two_sites(site_dirs: Sites) -> Sites:
    return {name: site_dirs[name] for name in ("alpha", "beta")}


@pytest.fixture(scope="module")
def compared(two_sites: Sites, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Table]:
    out = tmp_path_factory.mktemp("compared") / "out"
    comparison = plan(
        methods=("supervised", "ssl_dml_l2", "supervised_dml_triplet"),
        modes=("local", "federated", "pooled"),
        tasks=("classification", "regression"),
        leave_one_out_seeds=1,
    )
    return out, run(comparison, two_sites, out)


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "jobs").rglob("*.safetensors"))}


def test_every_cell_has_a_figure_or_a_reason(compared: tuple[Path, Table]) -> None:
    out, table = compared
    assert table.jobs == table.jobs_finished == 3 * (1 + 1 + 2 + 2)
    cells = {(row.method, row.mode, row.fraction, row.reading, row.task) for row in table.rows}
    assert len(cells) == len(table.rows)
    assert {row.mode for row in table.rows} == {"local", "federated", "pooled", "unseen"}
    for row in table.rows:
        assert bool(row.figures) or (row.missing or "").startswith("not run")
        if row.fraction == 0.05:
            assert not row.figures
            assert f"fewer than {FEWEST_OF_A_CLASS}" in (row.missing or "")
    assert any(row.figures for row in table.rows if row.mode == "federated" and row.task == "regression")
    assert {row.method for row in table.rows} >= {"mean predictor", "age, sex, intervals"}
    for name in FILES:
        assert (out / name).stat().st_size > 500
    assert Table.model_validate_json((out / "comparison.json").read_text()) == table
    assert len((out / "comparison.csv").read_text().splitlines()) == 1 + len(table.rows)


def test_what_was_learned_from_is_noted_at_the_site(compared: tuple[Path, Table], two_sites: Sites) -> None:
    """`forget` tells which runs had used a patient's ECGs."""
    noted = {use.run_id for site_dir in two_sites.values() for use in uses_of(site_dir) if use.task == "compare"}
    assert {"ssl_dml_l2/federated/seed-1", "supervised/pooled/seed-1"} <= noted
    assert not list((compared[0] / "jobs").rglob("site.toml"))  # the jobs' own views of the sites are gone


def test_finished_work_is_not_done_again_and_lost_work_is_the_same(
    compared: tuple[Path, Table], two_sites: Sites
) -> None:
    out, table = compared
    before = files_of(out)
    lost = [name for name in before if "ssl_dml_l2/federated" in name and "finetuned" in name]
    (out / lost[0]).unlink()
    kept_at = {name: (out / name).stat().st_mtime_ns for name in before if name != lost[0]}
    comparison = Comparison(**{**table.comparison, "further": ()})  # type: ignore[arg-type]
    again = run(comparison, two_sites, out)
    assert files_of(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in kept_at} == kept_at
    assert again == table


def test_pretraining_is_shared_by_all_shares_unless_it_learns_from_labels(compared: tuple[Path, Table]) -> None:
    names = {path.name for path in (compared[0] / "jobs" / "ssl_dml_l2" / "pooled" / "seed-1").iterdir()}
    assert "pretrained.safetensors" in names
    names = {path.name for path in (compared[0] / "jobs" / "supervised_dml_triplet" / "pooled" / "seed-1").iterdir()}
    assert "pretrained-100pct.safetensors" in names
    assert "pretrained.safetensors" not in names


def test_a_local_model_is_judged_on_its_own_patients_and_a_left_out_hospital_by_the_others(
    compared: tuple[Path, Table],
) -> None:
    folder = compared[0] / "jobs" / "ssl_dml_l2"
    name = "finetuned-classification-100pct.safetensors"
    for arm, sites in (("federated", {"alpha", "beta"}), ("without-alpha", {"alpha"}), ("local-beta", {"beta"})):
        path = folder / arm / "seed-1" / name
        if path.exists():  # beta alone may have too few labels of a class
            assert set(load_file(path)) == sites


def test_arms_train_and_test_on_whom_they_say() -> None:
    sites = ["a", "b", "c"]
    assert trained_on("federated", sites) == trained_on("pooled", sites) == judged_on("federated", sites) == sites
    assert trained_on("local-b", sites) == judged_on("local-b", sites) == ["b"]
    assert trained_on("without-b", sites) == ["a", "c"]
    assert judged_on("without-b", sites) == ["b"]
    block = Block(methods=("simclr",), leave_one_out_seeds=1)
    assert len(arms_of(block, sites, 1)) == 2 + 3 + 3
    assert len(arms_of(block, sites, 2)) == 2 + 3
    assert arms_of(block, ["a"], 1) == ["federated", "pooled", "local-a"]  # nobody is left to learn from


def test_a_whole_seed_of_every_method_comes_before_the_next(site_dirs: Sites) -> None:
    comparison = plan(seeds=3, further=(Block(methods=("cmsc",), modes=("federated",), fractions=(1.0,), seeds=2),))
    jobs = jobs_of(comparison, ["a", "b"])
    assert [job.seed for job in jobs] == [1, 1, 2, 2, 3, 3, 1, 2]
    assert [job.method for job in jobs[6:]] == ["cmsc", "cmsc"]
    assert len({job.name for job in jobs}) == len(jobs)


def test_labelled_shares_are_nested_by_patient_and_the_same_for_every_method(site_dirs: Sites) -> None:
    index = open_store(site_dirs["alpha"]).index
    labelled = ~np.isnan(index.labels["mpcwp_mmhg"]) & (index.split == 0)
    total, inner = len(np.unique(index.patient[labelled])), np.zeros(len(index), np.bool_)
    for share in SHARES:
        study = tiny_study(finetune={"labelled_share": share})
        chosen = in_labelled_share(index, study, labelled)
        assert len(np.unique(index.patient[chosen])) == int(np.ceil(share * total))
        assert not (inner & ~chosen).any()
        other = tiny_study(finetune={"labelled_share": share}, objective={"name": "simclr"})
        assert np.array_equal(chosen, in_labelled_share(index, other, labelled))
        inner = chosen
    half = [
        in_labelled_share(index, tiny_study(seed=seed, finetune={"labelled_share": 0.5}), labelled) for seed in (1, 2)
    ]
    assert not np.array_equal(*half)
    rows = training_rows(index, tiny_study(finetune={"labelled_share": 0.5}), "finetune")
    assert set(rows.tolist()) == set(index.row[half[0] & labelled].tolist())
    everything = training_rows(index, tiny_study(finetune={"labelled_share": 0.5}), "pretrain")
    assert len(everything) == (index.split == 0).sum()  # self-supervision needs no label
    supervised = tiny_study(finetune={"labelled_share": 0.5}, objective={"name": "rank_n_contrast"})
    assert training_rows(index, supervised, "pretrain").tolist() == rows.tolist()


def test_only_objective_seed_share_and_kind_differ_between_jobs(site_dirs: Sites, tmp_path: Path) -> None:
    setup = Setup(tiny_study(), site_dirs, tmp_path)
    jobs = [Job(method, "federated", 2, (1.0,), (), ()) for method in ("simclr", "supervised")]
    one, other = (study_of(setup, job, 0.5, "regression").model_dump() for job in jobs)
    assert {key for key in one if one[key] != other[key]} == {"objective"}
    assert one["seed"] == 2
    assert one["finetune"]["labelled_share"] == 0.5
    assert one["target"]["kind"] == "regression"


def test_too_few_labels_are_counted_in_patients_of_the_whole_arm(site_dirs: Sites, tmp_path: Path) -> None:
    setup = Setup(tiny_study(), site_dirs, tmp_path)
    assert too_few(setup, Job("simclr", "federated", 1, (), (), ()), 1.0) is None
    assert too_few(setup, Job("simclr", "federated", 1, (), (), ()), 0.02) is not None
    assert too_few(setup, Job("simclr", "local-gamma", 1, (), (), ()), 1.0) is not None  # it has no labels


def replicates_of(values: list[float], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = np.array(values)[:, None]
    return np.hstack([base, base + rng.normal(0, 0.02, (len(values), summary.REPLICATES))])


def cell(method: str, values: np.ndarray, reading: str = "finetuned") -> Cell:
    row = Row(method=method, mode="federated", fraction=1.0, reading=reading, task="classification", hospitals=2)
    return Cell(row, dict(enumerate(values, 1)))


def test_intervals_are_over_patients_and_seeds() -> None:
    same = summary.interval(replicates_of([0.7, 0.7, 0.7]), 3)
    apart = summary.interval(replicates_of([0.6, 0.7, 0.8]), 3)
    assert same.value == apart.value == 0.7
    assert (apart.high or 0) - (apart.low or 0) > 2 * ((same.high or 0) - (same.low or 0))
    assert summary.interval(replicates_of([0.7]), 3).reason == "1 of 3 seeds"
    assert summary.interval(np.full((2, 1 + summary.REPLICATES), np.nan), 2).value is None


def test_differences_are_paired_and_adjusted_together() -> None:
    noise = replicates_of([0.7, 0.72], seed=1)
    baseline, better, same = cell("supervised", noise), cell("simclr", noise + 0.01), cell("cmsc", noise)
    unpaired = cell("pclr", replicates_of([0.71, 0.73], seed=2))
    rows = with_differences([baseline, better, same, unpaired])
    assert rows[0].against_baseline is None
    assert rows[1].against_baseline == Estimate(value=0.01, low=0.01, high=0.01)
    # the same difference, but on replicates that do not go together, has an interval of its own width
    assert (rows[3].against_baseline.high or 0) - (rows[3].against_baseline.low or 0) > 0.03  # type: ignore[union-attr]
    tested = rows[1:]
    assert [row.p_adjusted for row in tested] == holm([row.p_value or 0.0 for row in tested])
    assert rows[2].p_value == 1.0


def test_seeds_are_paired_by_their_number() -> None:
    """Where one seed of the baseline is missing, its others do not stand in for it."""
    noise = replicates_of([0.6, 0.7, 0.8])
    baseline, better = cell("supervised", noise), cell("simclr", noise + 0.01)
    without_second = Cell(baseline.row, {seed: baseline.replicates[seed] for seed in (1, 3)})
    rows = with_differences([without_second, better])
    assert rows[1].against_baseline == Estimate(value=0.01, low=0.01, high=0.01)
    none = Cell(baseline.row, {})
    assert with_differences([none, better])[1].against_baseline is None


def test_a_seed_whose_hospitals_are_not_all_done_is_left_out(
    compared: tuple[Path, Table], two_sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hospital without labels enough is left out for good; one that is still to come would change the mean."""
    setup = Setup(tiny_study(), two_sites, compared[0])
    patients = {name: summary.patients_of(setup, name) for name in two_sites}
    scores = {"alpha": np.random.default_rng(0).random(len(patients["alpha"].outcome))}

    def of(why: str) -> Cell:
        monkeypatch.setattr(summary, "scores_of_seed", lambda *_: (scores, {why}))
        block = Block(methods=("simclr",), seeds=1)
        return summary.cell_of(setup, patients, block, "simclr", "local", 1.0, "finetuned", "classification")

    assert of("local-beta: fewer than 10 labelled patients of a class").row.hospitals == 1
    assert of(summary.NOT_YET).row.missing == "not run: not run yet"
    assert not of(summary.NOT_YET).replicates


def test_other_hospitals_are_no_pair() -> None:
    noise = replicates_of([0.7])
    single = cell("simclr", noise)
    other = Cell(single.row.model_copy(update={"hospitals": 1}), single.replicates)
    assert with_differences([cell("supervised", noise), other])[1].against_baseline is None


def test_one_model_is_judged_on_all_patients_and_many_by_their_mean() -> None:
    rng = np.random.default_rng(0)
    patients = {}
    for name, n in (("a", 40), ("b", 25)):
        measured = rng.normal(18, 5, n)
        weights = np.vstack([np.ones(n), rng.poisson(1.0, (5, n))])
        patients[name] = summary.Patients((measured > 18).astype(float), measured, weights, {})
    scores = {name: one.measured + rng.normal(0, 5, len(one.measured)) for name, one in patients.items()}
    auroc = summary.FIGURES["classification"]["auroc"]
    together = summary.replicates(scores, patients, ["a", "b"], "federated", "classification", auroc)
    alone = summary.replicates(scores, patients, ["a", "b"], "local", "classification", auroc)
    for r in range(6):
        w = [patients[name].weights[r] for name in ("a", "b")]
        everybody = auroc(
            np.concatenate([scores["a"], scores["b"]]),
            np.concatenate([patients["a"].outcome, patients["b"].outcome]),
            np.concatenate(w)[None],
        )
        assert together[r] == everybody[0]
        each = [auroc(scores[name], patients[name].outcome, w[k][None])[0] for k, name in enumerate(("a", "b"))]
        assert alone[r] == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('methods = ["supervised", "magic"]', "unknown method 'magic'"),
        ('methods = ["simclr"]', "lacks 'supervised'"),
        ('methods = ["supervised"]\nfractions = [0.0, 1.0]', "fractions lie above 0"),
        ('methods = ["supervised"]\nfractions = []', "fractions"),
        ('methods = ["supervised"]\nseeds = 0', "seeds"),
        ('methods = ["supervised"]\nmodes = ["central"]', "modes"),
        ('methods = ["supervised"]\nshares = [1.0]', "unknown key shares"),
        ('methods = ["supervised"]\n[[comparison.further]]\nmethods = ["supervised"]', "stands in two tables"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(table: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'name = "x"\n[comparison]\n{table}\n')
    with pytest.raises(HemoFedError, match=words) as caught:
        load_comparison(path)
    assert caught.value.exit_code == ExitCode.BAD_STUDY
    assert "\n" not in caught.value.message


def test_a_study_without_the_table_says_where_to_read(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('name = "x"\n')
    with pytest.raises(HemoFedError, match=r"docs/comparison\.md"):
        load_comparison(path)


def test_another_study_is_not_mixed_in(compared: tuple[Path, Table], two_sites: Sites) -> None:
    with pytest.raises(HemoFedError, match="another study") as caught:
        run(plan(), two_sites, compared[0], seed=5)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT


def test_a_row_that_needs_a_setting_is_refused_before_anything_runs(two_sites: Sites, tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="good_views_rhythm needs settings"):
        run(plan(methods=("supervised", "good_views_rhythm")), two_sites, tmp_path / "out")


@pytest.mark.parametrize(
    "tables",
    [
        {"finetune": {"share_head": False}},
        {"federation": {"rule": "fedbn"}, "encoder": {"norm": "batch"}},
    ],
    ids=["local heads", "fedbn"],
)
def test_models_of_which_a_part_stays_at_the_site_are_refused(
    two_sites: Sites, tmp_path: Path, tables: dict[str, Any]
) -> None:
    """Their scores would be those of a model without that part."""
    with pytest.raises(HemoFedError, match="stays at the site") as caught:
        run(plan(), two_sites, tmp_path / "out", **tables)
    assert caught.value.exit_code == ExitCode.BAD_STUDY


def test_a_row_with_settings_of_its_own_is_compared_as_the_studys_objective(two_sites: Sites, tmp_path: Path) -> None:
    objective = {"name": "good_views_rhythm", "group_column": "mpcwp_mmhg"}
    comparison = plan(methods=("supervised", "good_views_rhythm"), fractions=(1.0,))
    table = run(comparison, two_sites, tmp_path / "out", objective=objective)
    assert table.jobs_finished == table.jobs == 2


def test_no_hospitals_and_a_folder_in_use_end_with_their_codes(tmp_path: Path) -> None:
    from simulation.cli import app

    study = tmp_path / "study.toml"
    study.write_text('name = "x"\n[comparison]\nmethods = ["supervised"]\n')
    done = CliRunner().invoke(app, ["compare", str(study), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, HemoFedError)
    assert done.exception.exit_code == ExitCode.BAD_STUDY
    (tmp_path / "out" / "identity.json").write_text("{}")
    done = CliRunner().invoke(app, ["compare", str(study), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, HemoFedError)
    assert done.exception.exit_code == ExitCode.USAGE


def test_a_job_that_cannot_be_done_says_why_and_the_others_go_on(two_sites: Sites, tmp_path: Path) -> None:
    """No patient of these sites has ECGs within a day around a catheterisation."""
    objective = {"name": "ebcl", "window_days": 0.001}
    table = run(
        plan(methods=("supervised", "ebcl"), fractions=(1.0,)), two_sites, tmp_path / "out", objective=objective
    )
    by_method = {row.method: row for row in table.rows if row.reading == "finetuned"}
    assert by_method["supervised"].figures
    assert "not run" in (by_method["ebcl"].missing or "")
    assert table.jobs_finished == 1


def test_without_time_nothing_is_begun_and_the_table_says_so(two_sites: Sites, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    table = compare(Asked(tiny_study(), None, plan(), out, 2, budget_minutes=0.0), two_sites, Console(quiet=True))
    assert table.jobs_finished == 0
    assert all("not run" in (row.missing or "") for row in table.rows if row.reading == "finetuned")


def wait_for_files(out: Path, more: int, process: subprocess.Popen[bytes]) -> bool:
    """Until so many more files of jobs are there, however fast the machine; False if the process ended before."""

    def count() -> int:
        return len(list(out.glob("jobs/**/*.safetensors")))

    wanted = count() + more
    while process.poll() is None:
        if count() >= wanted:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.long
def test_killed_at_any_time_it_goes_on_to_the_same_table(
    two_sites: Sites, compared: tuple[Path, Table], tmp_path: Path
) -> None:
    """SIGKILL at random moments, the workers with it; the files are those of an undisturbed comparison."""
    study = tmp_path / "study.toml"
    study.write_text(
        'name = "tiny"\n'
        "[pretrain]\nrounds = 1\nlocal_epochs = 0.4\nbatch_size = 16\n"
        "[finetune]\nrounds = 2\nlocal_epochs = 0.5\nbatch_size = 16\n"
        "[evaluation]\nbootstrap_replicates = 20\nminimum_cell = 5\n"
        '[comparison]\nmethods = ["supervised", "ssl_dml_l2", "supervised_dml_triplet"]\n'
        'fractions = [0.05, 1.0]\nseeds = 1\ntasks = ["classification", "regression"]\nleave_one_out_seeds = 1\n'
    )
    sites = {name: copy_site(path, tmp_path / name) for name, path in two_sites.items()}
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "from simulation.cli import main; main()",
        "compare",
        str(study),
        "--out",
        str(out),
    ]
    command += [word for path in sites.values() for word in ("--site", str(path))] + ["--resume", "--quiet", "--json"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    rng, kills = np.random.default_rng(1), 0
    for _ in range(12):
        process = subprocess.Popen(
            command, env=environment, cwd=root, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if kills < 4 and wait_for_files(out, int(rng.integers(1, 9)), process):
            time.sleep(float(rng.uniform(0, 0.5)))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            time.sleep(0.2)
            continue
        words = process.communicate(timeout=600)
        assert process.returncode == 0, words[1].decode()
        break
    assert kills >= 2
    assert files_of(out) == files_of(compared[0])
    written = json.loads((out / "comparison.json").read_text())
    assert written["jobs"] == written["jobs_finished"]
