"""From counts to results.json: what is shown cannot be turned back into what is not, and arms are compared fairly."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

import simulation.baselines as baselines
import simulation.experiment as experiment
from client.evaluation import pressure_score
from client.store import open_store
from client.tasks import has_label
from server import summary
from server.conduct import conduct
from server.judging import strictest
from server.logbook import file_watcher
from server.report.results import SiteResult, SubgroupResult
from server.rounds import run_study
from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import ScoreHistogram, histogram_of
from shared_model.moments import moments_of
from shared_model.statistics import operating_point
from shared_model.study import Study
from shared_model.subgroups import ALL
from shared_model.tally import SiteTally
from shared_model.wire import Answer, Instruction, SiteFailure
from simulation.cli import run
from simulation.experiment import Experiment, run_experiment
from simulation.table import print_table
from tests.example_results import example_regression, example_results
from tests.federations import MadeUpSites, copy_site, counted, description, rounds_of, three_sites, tiny_study

STUDY = tiny_study(evaluation={"minimum_cell": 11})
EDGE = 512  # probability 0.5
Sites = Mapping[str, Path]


def group(positives: int, negatives: int, missed: int, alarms: int) -> ScoreHistogram:
    """Patients of whom `missed` of the positives score below 0.5 and `alarms` of the negatives above."""
    scores = [0.8] * (positives - missed) + [0.2] * missed + [0.8] * alarms + [0.2] * (negatives - alarms)
    spread = np.random.default_rng(positives).uniform(-0.1, 0.1, positives + negatives)
    return histogram_of(np.array(scores) + spread, [1] * positives + [0] * negatives)


def by_sex(female: ScoreHistogram, male: ScoreHistogram) -> SiteTally:
    return SiteTally({ALL: female + male, "sex=female": female, "sex=male": male})


def subgroups(tally: SiteTally) -> dict[str, SubgroupResult]:
    return {each.group: each for each in summary.subgroups(STUDY, tally, EDGE)}


def sites(tallies: Mapping[str, SiteTally], keeping: tuple[str, ...] = ()) -> dict[str, SiteResult]:
    sharing = [name for name in tallies if name not in keeping]
    return {each.name: each for each in summary.site_results(STUDY, tallies, sharing, EDGE)}


def numbers(value: Any) -> Iterator[float]:
    """Every figure in nested results."""
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize(("missed", "shown"), [(3, False), (15, True)])
def test_a_small_cell_of_a_2x2_table_does_not_follow_from_the_others(missed: int, shown: bool) -> None:
    """3 missed men: everybody minus the women would give them away, so the women's rates go as well."""
    tally = by_sex(group(100, 120, 17, 30), group(40, 60, missed, 15))
    whole = summary.target_result(STUDY, tally, EDGE).operating_point
    assert whole.sensitivity is not None
    groups = subgroups(tally)
    assert {name: each.sensitivity is not None for name, each in groups.items()} == {"female": shown, "male": shown}
    assert all(each.auroc is not None and not each.suppressed for each in groups.values())


def test_a_table_over_all_is_shown_where_no_group_is_left_to_subtract() -> None:
    tally = by_sex(group(30, 60, 3, 15), group(30, 60, 8, 15))
    point = summary.target_result(STUDY, tally, EDGE).operating_point
    assert point.sensitivity is not None
    assert point.sensitivity.value == pytest.approx(49 / 60, abs=5e-4)
    assert all(each.sensitivity is None for each in subgroups(tally).values())


@pytest.mark.parametrize(("positives", "shown"), [(4, {"a"}), (40, {"a", "b", "c"})])
def test_a_small_hospital_does_not_follow_from_the_others(positives: int, shown: set[str]) -> None:
    tallies = {
        "a": SiteTally({ALL: group(70, 80, 15, 20)}),
        "b": SiteTally({ALL: group(50, 70, 14, 20)}),
        "c": SiteTally({ALL: group(positives, 60, positives // 3, 20)}),
    }
    results = sites(tallies)
    assert {name for name, each in results.items() if not each.suppressed} == shown
    assert all(each.reason for each in results.values() if each.suppressed)


def test_a_hospital_that_keeps_its_figures_is_not_the_only_one_left_out() -> None:
    sizes = {"a": 90, "b": 50, "c": 70, "d": 60}
    tallies = {name: SiteTally({ALL: group(size, 80, 15, 20)}) for name, size in sizes.items()}
    assert {name for name, each in sites(tallies, ("a",)).items() if each.suppressed} == {"a", "b"}
    assert {name for name, each in sites(tallies, ("a", "d")).items() if each.suppressed} == {"a", "d"}
    assert not any(each.suppressed for each in sites(tallies).values())


def test_a_hospital_that_withheld_its_counts_says_so() -> None:
    results = sites({"a": SiteTally({ALL: group(70, 80, 15, 20)}), "b": SiteTally(withheld={ALL: 1})})
    assert results["b"].suppressed
    assert not results["a"].suppressed
    assert sites({"b": SiteTally(withheld={ALL: 1})})["b"].suppressed


def test_no_figure_has_more_than_three_decimals() -> None:
    """With all digits, 83/100 and 120/140 say how many patients there are, whatever the counts are rounded to."""
    tally = by_sex(group(103, 121, 17, 31), group(47, 67, 15, 17))
    shown = [summary.target_result(STUDY, tally, EDGE), *subgroups(tally).values(), *sites({"a": tally}).values()]
    figures = [
        figure for each in shown for figure in numbers(each.model_dump(exclude={"operating_point": {"threshold"}}))
    ]
    assert len(figures) > 50
    assert all(figure == round(figure, 3) for figure in figures)
    exact = operating_point(tally.histograms[ALL], EDGE).sensitivity.value
    assert exact is not None
    assert exact != round(exact, 3)


def test_the_printed_bound_holds_the_auroc_of_the_raw_scores() -> None:
    rng = np.random.default_rng(0)
    for size in (40, 400, 4000):
        outcomes = rng.random(size) < 0.4
        scores = 1 / (1 + np.exp(-rng.normal(outcomes * 1.0, 1.0)))
        auroc = summary.target_result(STUDY, SiteTally({ALL: histogram_of(scores, outcomes)}), EDGE).auroc
        assert auroc.value is not None
        assert auroc.bound is not None
        assert abs(auroc.value - roc_auc_score(outcomes, scores)) <= auroc.bound < 0.01


def test_the_largest_gap_counts_the_comparisons_of_all_partitions() -> None:
    parts = [group(60 + 10 * number, 80, 15 + 4 * number, 20 + number) for number in range(4)]
    names = ("sex=female", "sex=male", "age=18-35", "age=75+")
    everyone = parts[0] + parts[1]
    tally = SiteTally({ALL: everyone, **dict(zip(names, (parts[0], parts[1], parts[0], parts[1]), strict=True))})
    gap = summary.fairness(STUDY, tally).largest_gap
    assert gap is not None
    assert gap.note.startswith("largest of 2 gaps in 2 partitions")


def test_the_strictest_minimum_holds_for_validation_too(tmp_path: Path) -> None:
    def scores(least: int, out: Path) -> list[Any]:
        described = three_sites(alpha=description(minimum_cell=least))
        run_study(tiny_study(), MadeUpSites().ask, described, out, watcher=file_watcher(out))
        return [row["validation_auroc"] for row in rounds_of(out) if row["phase"] == "finetune"]

    assert scores(1000, tmp_path / "strict") == [None, None]
    assert None not in scores(1, tmp_path / "loose")
    assert strictest(STUDY, [1, 30, 5]).evaluation.minimum_cell == 30
    assert strictest(STUDY, []).evaluation.minimum_cell == 11


def test_a_finished_study_is_not_passed_off_as_another(tmp_path: Path) -> None:
    def go(seed: int) -> str:
        ask = MadeUpSites().ask
        return conduct(tiny_study(seed=seed), ask, three_sites(), tmp_path, engine="test", resume=True).study_digest

    assert go(1) == go(1) == tiny_study(seed=1).digest
    with pytest.raises(HemoFedError, match="another study") as caught:
        go(2)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT
    table = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**table, "release_sha256": "0" * 64}))
    with pytest.raises(HemoFedError, match="or release"):
        go(1)


def test_a_hospital_that_fails_at_the_test_is_named_in_the_results(tmp_path: Path) -> None:
    def evaluate(site: str, instruction: Instruction) -> Answer:
        failed = site == "gamma" and instruction.split == "test"
        return SiteFailure(site, 16, "no answer") if failed else counted(site)

    sites = MadeUpSites(evaluate=evaluate)
    results = conduct(tiny_study(), sites.ask, three_sites(), tmp_path, engine="test", resume=False)
    assert {site.name: bool(site.note) for site in results.sites} == {"alpha": False, "beta": False, "gamma": True}
    assert "not in the test figures" in (tmp_path / "report.html").read_text()


def test_baselines_leave_out_a_hospital_that_keeps_its_figures(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "alpha": site_dirs["alpha"],
        "keeps": copy_site(site_dirs["beta"], tmp_path / "keeps", name="keeps", share_site_results=False),
        "clear": copy_site(site_dirs["beta"], tmp_path / "clear", name="clear", disclosure="clear"),
    }
    asked = []
    monkeypatch.setattr(baselines, "score_site", lambda study, run, site_dir, state: asked.append(site_dir))
    baselines.score_all(tiny_study(), folders, tmp_path, {})
    assert asked == [folders["alpha"]]


@pytest.mark.parametrize(("model", "expected"), [("best_on_validation", 1), ("final", 2)])
def test_what_stayed_local_is_that_of_the_round_that_was_judged(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, expected: int
) -> None:
    """With a local head, the best round's encoder must not be scored with the last round's head."""
    study = tiny_study(evaluation={"model": model}, finetune={"share_head": False})
    (tmp_path / "checkpoint").mkdir()
    best = 1 if model == "best_on_validation" else 0
    (tmp_path / "checkpoint" / "position.json").write_text(json.dumps({"run_id": "0" * 32, "best_round": best}))
    monkeypatch.setattr(baselines, "load_file", lambda path: {})

    class Asked(Exception):
        pass

    def site_model(instruction: Any, weights: Any, state_dir: Path) -> None:
        raise Asked(instruction.round_number)

    monkeypatch.setattr(baselines, "site_model", site_model)
    with pytest.raises(Asked) as caught:
        baselines.score_site(study, tmp_path, site_dirs["alpha"], site_dirs["alpha"])
    assert caught.value.args == (expected,)


def test_a_hospital_without_a_weight_does_not_train_alone(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two labelled patients are rounded to none, and the study of such a hospital alone is refused."""
    study, column = tiny_study(), tiny_study().target.column
    assert baselines.has_training_labels(site_dirs["alpha"], study)
    assert not baselines.has_training_labels(site_dirs["gamma"], study)
    store = open_store(site_dirs["alpha"])
    index = store.index
    first_two = np.unique(index.patient[has_label(index, column) & (index.split == 0)])[:2]
    index.labels[column][~np.isin(index.patient, first_two)] = np.nan
    monkeypatch.setattr(baselines, "open_store", lambda site_dir: store)
    assert not baselines.has_training_labels(site_dirs["alpha"], study)
    exact = copy_site(site_dirs["alpha"], tmp_path / "exact", count_rounding=1)
    assert baselines.has_training_labels(exact, study)


def test_the_pooled_folder_has_the_strictest_minimum_cell(site_dirs: Sites, tmp_path: Path) -> None:
    strict = copy_site(site_dirs["beta"], tmp_path / "strict", minimum_cell=25)
    folder = baselines.pooled_folder([site_dirs["alpha"], strict], tmp_path / "pooled")
    assert baselines.load_site(folder).minimum_cell == 25


def test_the_table_of_a_regression_shows_the_mean_predictor() -> None:
    def printed(**changes: Any) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            print_table(example_results(**changes), console)
        return capture.get()

    regression = example_regression()
    assert regression.regression is not None
    shown = printed(test={"mpcwp_gt_18": regression, "mpcwp": regression})
    assert f"always saying the mean: {regression.regression.mean_predictor_rmse:.3f}" in shown
    assert "always saying the mean" not in printed()


def test_a_hospital_that_was_left_out_is_left_out_of_every_arm(
    site_dirs: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store is broken: the others' comparison is made all the same, and not on its data."""
    broken = copy_site(site_dirs["beta"], tmp_path / "broken", name="broken")
    (broken / "signals.i16").write_bytes(b"cut")
    folders = {"alpha": site_dirs["alpha"], "beta": site_dirs["beta"], "broken": broken}
    seen: list[set[str]] = []
    monkeypatch.setattr(experiment, "train_baselines", lambda study, sites, *rest: seen.append(set(sites)))
    asked = Experiment(tiny_study(), None, tmp_path / "out", "in-process", 1, baselines=True, resume=False)
    results = run_experiment(asked, folders, Console(quiet=True))
    assert seen == [{"alpha", "beta"}]
    assert set(results.baselines.federated.sites) == {"alpha", "beta"}


def test_an_out_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HemoFedError, match="give a folder that can be written") as caught:
        run(Path("simulation/studies/demo.toml"), tmp_path / "file" / "out")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_regression_shows_its_errors_by_group_and_by_site_beside_the_mean_predictor() -> None:
    study = Study.model_validate({"name": "x", "target": {"kind": "regression"}, "evaluation": {"partitions": ["sex"]}})
    rng = np.random.default_rng(0)
    measured = rng.gamma(3.8, 4.2, 400).clip(2, 50)
    predicted = measured + rng.normal(0, 3, 400)
    masks = {"all": np.full(400, True), "sex=female": np.arange(400) < 150, "sex=male": np.arange(400) >= 150}
    scores = pressure_score(predicted, 18.0)
    tally = SiteTally(
        {name: histogram_of(scores[mask], measured[mask] > 18) for name, mask in masks.items()},
        {name: moments_of(measured[mask], predicted[mask]) for name, mask in masks.items()},
    )
    female, male = summary.subgroups(study, tally, 512)
    for group, mask in ((female, masks["sex=female"]), (male, masks["sex=male"])):
        assert group.regression is not None
        error = np.sqrt(np.mean((predicted[mask] - measured[mask]) ** 2))
        assert group.regression.rmse == pytest.approx(error, abs=6e-4)
        assert group.regression.mean_predictor_rmse == pytest.approx(measured[mask].std(), abs=6e-4)
    (site,) = summary.site_results(study, {"north": tally}, {"north"}, 512)
    assert site.regression is not None
    assert site.regression.rmse == pytest.approx(np.sqrt(np.mean((predicted - measured) ** 2)), abs=6e-4)
    small = SiteTally(
        {"all": histogram_of(scores[:12], measured[:12] > 18)}, {"all": moments_of(measured[:12], predicted[:12])}
    )
    (hidden,) = summary.site_results(study, {"north": small}, {"north"}, 512)
    assert hidden.suppressed
    assert hidden.regression is None
