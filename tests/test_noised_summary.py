"""A private study at the centre: noisy counts in, figures with what is said of their privacy out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.noised import discrete_laplace
from server import noised_summary
from server.conduct import conduct
from server.logbook import file_watcher
from server.report import words
from server.report.files import load_results
from server.report.results import Results
from server.rounds import run_study
from shared_model.errors import ExitCode, HemoFedError
from shared_model.noised import (
    NOISED_EDGES,
    NoisedTally,
    judged_groups,
    noise_scale,
    noise_variance,
    tables_of,
    to_noised_arrays,
)
from shared_model.subgroups import ALL
from shared_model.wire import Answer, Instruction, Reply, SiteReply
from tests.federations import MadeUpSites, counted, description, private_study, three_sites
from tests.noised_fixtures import binormal_scores, table_of, two_geometrics

EDGE = 480
NOISED = {"disclosure": "noised"}
SEXES = private_study(evaluation={"partitions": ["sex"], "minimum_cell": 11})


def noised_sites(**changes: Any) -> Mapping[str, Any]:
    return three_sites(**{name: description(**NOISED) for name in ("alpha", "beta", "gamma")}, **changes)


def by_sex(patients: int, auroc: float, seed: int = 0, women: float = 0.5, scale: float = 2.0) -> NoisedTally:
    """Noisy counts of one site for `SEXES`, nobody of unknown sex."""
    generator = np.random.default_rng(seed)
    probabilities, outcomes = binormal_scores(generator, patients, auroc, 0.35)
    female = generator.random(patients) < women
    exact = {
        name: table_of(probabilities[mask], outcomes[mask])
        for name, mask in (
            (ALL, np.full(patients, True)),
            ("sex=female", female),
            ("sex=male", ~female),
            ("sex=unknown", np.full(patients, False)),
        )
    }
    return NoisedTally(
        {name: table + two_geometrics(generator, scale, table.shape) for name, table in exact.items()}, scale
    )


def noisily_counted(site: str, instruction: Instruction, patients: int = 3000) -> Answer:
    """What an honest site sends in a private study: everybody a woman of 50 to 75, of race white."""
    study, generator = instruction.study, np.random.default_rng(ord(site[0]))
    assert study.privacy is not None
    groups = judged_groups(study, instruction.split)
    table = table_of(*binormal_scores(generator, patients, 0.8, 0.35))
    hers = {ALL, "sex=female", "age=50-75", "race=white", "sex=female & age=50-75"}
    tables = {
        name: discrete_laplace(
            (table if name in hers else 0 * table).ravel(), tables_of(groups), study.privacy.release_epsilon
        ).reshape(table.shape)
        for name in groups
    }
    return SiteReply(site, Reply(site=site), to_noised_arrays(tables))


def run_private(out: Path, sites: MadeUpSites, described: Mapping[str, Any] | None = None) -> Results:
    return conduct(private_study(), sites.ask, described or noised_sites(), out, engine="test", resume=False)


# --- a whole study


def test_a_private_study_ends_in_results_that_say_what_guarded_the_patients(tmp_path: Path) -> None:
    sites = MadeUpSites(evaluate=noisily_counted)
    results = run_private(tmp_path, sites)
    assert [(each.task, each.split) for each in sites.of("evaluate")] == [
        ("evaluate", "validation"),
        ("evaluate", "test"),
    ]
    study = private_study()
    assert study.privacy is not None
    privacy = results.privacy
    assert (privacy.differentially_private, privacy.unit, privacy.epsilon, privacy.delta) == (
        True,
        "patient",
        50.0,
        1e-5,
    )
    assert (privacy.release_epsilon, privacy.disclosure_tier, privacy.score_bins) == (1.0, "noised", 8)
    assert privacy.count_noise_sd == round(noise_variance(noise_scale(5, 1.0)) ** 0.5, 1) == 7.1
    own = results.own
    assert own.auroc.low is not None
    assert own.auroc.high is not None
    assert own.auroc.low < 0.8 < own.auroc.high
    assert own.patients == pytest.approx(9000, abs=300)
    assert own.auprc.prevalence == pytest.approx(0.35, abs=0.03)
    assert own.operating_point.sensitivity is not None
    assert results.threshold.probability in noised_summary.statistics.BIN_LIMITS[1:-1]
    shown = {each.group for each in results.subgroups if not each.suppressed}
    assert {"female", "50-75", "white", "female & 50-75"} <= shown
    assert "male" not in shown
    assert load_results(tmp_path) == results
    said = words.privacy_statement(results)
    for part in (
        "for each patient",
        "epsilon 50.00",
        "one patient more or less",
        "epsilon 1 for all",
        "SD 7.1 patients",
    ):
        assert part in said
    page = (tmp_path / "report.html").read_text()
    assert "noise was added to every count" in page
    assert "noise was added to every count" in (tmp_path / "model" / "card.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["privacy"]["unit"] == "patient"


def test_without_a_privacy_table_nothing_is_said_to_be_private(tmp_path: Path) -> None:
    """The control: the fields are null, and the counts are exact."""
    study = private_study(privacy=None)
    results = conduct(study, MadeUpSites().ask, three_sites(), tmp_path, engine="test", resume=False)
    privacy = results.privacy
    assert not privacy.differentially_private
    assert (privacy.unit, privacy.epsilon, privacy.delta, privacy.release_epsilon, privacy.count_noise_sd) == (
        None,
    ) * 5
    assert "noise" not in words.privacy_statement(results)


def test_a_site_of_another_tier_takes_no_part_in_a_private_study(tmp_path: Path) -> None:
    """Before anything is asked of anybody, so that nothing is spent for a sum that cannot be made."""
    sites = MadeUpSites(evaluate=noisily_counted)
    described = {**noised_sites(), "beta": description(disclosure="clear"), "gamma": description(disclosure="masked")}
    results = run_private(tmp_path, sites, described)
    assert set(results.left_out) == {"beta", "gamma"}
    assert all("not 'noised'" in reason for reason in results.left_out.values())
    assert {name for _, asked in sites.seen for name in asked} == {"alpha"}
    assert "beta: left out" in (tmp_path / "notices.log").read_text()


def test_exact_counts_are_turned_away_from_a_sum_of_noisy_ones(tmp_path: Path) -> None:
    def evaluate(site: str, instruction: Instruction) -> Answer:
        return counted(site) if site == "beta" else noisily_counted(site, instruction)

    results = run_private(tmp_path, MadeUpSites(evaluate=evaluate))
    assert {site.name for site in results.sites if site.note} == {"beta"}
    assert (
        "beta: not in the test figures: noisy counts must be of the study's own groups"
        in (tmp_path / "notices.log").read_text()
    )


def test_noisy_counts_are_turned_away_from_a_sum_of_exact_ones(tmp_path: Path) -> None:
    noisy = private_study()

    def evaluate(site: str, instruction: Instruction) -> Answer:
        asked = instruction.model_copy(update={"study": noisy})
        return noisily_counted(site, asked) if site == "beta" else counted(site)

    watcher, study = file_watcher(tmp_path), private_study(privacy=None)
    outcome = run_study(study, MadeUpSites(evaluate=evaluate).ask, three_sites(), tmp_path, watcher=watcher)
    assert set(outcome.test) == {"alpha", "gamma"}
    assert not outcome.noised
    assert "beta: not in the test figures" in (tmp_path / "notices.log").read_text()


def test_a_private_study_without_any_noisy_counts_stops(tmp_path: Path) -> None:
    with pytest.raises(HemoFedError, match="gave counts of their test patients") as caught:
        run_private(tmp_path, MadeUpSites())
    assert caught.value.exit_code is ExitCode.TOO_FEW_SITES


def test_too_few_validation_patients_leave_the_rates_out_and_say_why(tmp_path: Path) -> None:
    def evaluate(site: str, instruction: Instruction) -> Answer:
        return noisily_counted(site, instruction, 4 if instruction.split == "validation" else 3000)

    results = run_private(tmp_path, MadeUpSites(evaluate=evaluate))
    assert results.threshold.probability is None
    assert "too few beside the noise" in str(results.threshold.reason)
    assert results.own.operating_point.reason == noised_summary.NO_THRESHOLD
    assert results.own.auroc.value is not None


# --- the figures of made-up counts


def test_figures_are_of_the_sum_and_its_noise_is_that_of_all_sites() -> None:
    tallies = {"a": by_sex(800, 0.8, 1), "b": by_sex(600, 0.8, 2), "c": by_sex(700, 0.8, 3)}
    whole = noised_summary.total(tallies)
    assert whole.sites == 3
    result = noised_summary.target_result(SEXES, whole, EDGE)
    direct = noised_summary.statistics.auroc(whole.tables[ALL], 3 * noise_variance(2.0), 11)
    assert result.auroc.value == round(direct.value or 0, 3)
    assert (result.auroc.low, result.auroc.high) == (round(direct.low or 0, 3), round(direct.high or 0, 3))
    assert "noise included" in str(result.auroc.method)
    assert result.calibration.expected_over_observed == pytest.approx(1, abs=0.15)
    assert len(result.calibration.bins) >= 6
    assert result.calibration.expected_error is not None
    assert len(result.roc) == len(NOISED_EDGES)
    for missing in (result.auprc, result.all_ecg_auroc, result.calibration, result):
        assert missing.reason == noised_summary.FINER


def test_a_group_is_hidden_by_its_noisy_counts_alone_and_shows_nothing() -> None:
    tally = by_sex(2000, 0.8, women=0.97)
    groups = {each.group: each for each in noised_summary.subgroups(SEXES, tally, EDGE)}
    assert set(groups) == {"female", "male", "unknown"}
    assert not groups["female"].suppressed
    assert groups["male"].suppressed
    assert groups["unknown"].suppressed  # nobody, and the reader cannot tell it from few
    assert groups["male"].reason == groups["unknown"].reason
    moved = NoisedTally({**tally.tables, "sex=male": tally.tables["sex=female"]}, tally.scale)
    assert not {each.group: each for each in noised_summary.subgroups(SEXES, moved, EDGE)}["male"].suppressed


def test_the_gap_between_two_groups_has_an_interval_that_includes_the_noise() -> None:
    good, poor = by_sex(3000, 0.9, 1), by_sex(3000, 0.7, 2)
    tally = NoisedTally({**good.tables, "sex=male": poor.tables["sex=male"]}, good.scale)
    fairness = noised_summary.fairness(SEXES, tally)
    assert fairness.worst_group is not None
    assert fairness.worst_group.group == "sex=male"
    assert fairness.largest_gap is not None
    assert fairness.largest_gap.low is not None
    assert fairness.largest_gap.high is not None
    assert fairness.largest_gap.low < 0.2 < fairness.largest_gap.high
    assert noised_summary.fairness(SEXES, by_sex(20, 0.8)).reason


def test_a_hospital_that_keeps_its_figures_is_not_the_only_one_left_out() -> None:
    sizes = {"a": 900, "b": 500, "c": 700, "d": 600}
    tallies = {name: by_sex(size, 0.8, seed) for seed, (name, size) in enumerate(sizes.items())}

    def hidden(*keeping: str) -> set[str]:
        sharing = [name for name in tallies if name not in keeping]
        results = noised_summary.site_results(SEXES, tallies, sharing, EDGE)
        return {each.name for each in results if each.suppressed}

    assert hidden() == set()
    assert hidden("a") == {"a", "b"}
    assert hidden("a", "d") == {"a", "d"}


def test_of_a_regression_the_class_is_released_and_the_pressure_is_not() -> None:
    study = private_study(target={"kind": "regression"}, evaluation={"partitions": ["sex"]})
    tally = by_sex(2000, 0.8)
    result = noised_summary.target_result(study, tally, 512)
    assert result.auroc.value is not None
    assert result.operating_point.threshold == 0.5
    assert result.regression is not None
    assert result.regression.rmse is None
    assert result.regression.reason == noised_summary.NO_PRESSURE
    assert result.calibration.bins == ()
    (female, *_) = noised_summary.subgroups(study, tally, 512)
    assert female.regression is not None
    assert female.expected_over_observed is None


def test_too_few_patients_leave_every_figure_out_with_its_reason() -> None:
    result = noised_summary.target_result(SEXES, by_sex(10, 0.8), EDGE)
    assert (result.patients, result.positives, result.roc) == (None, None, ())
    for part in (result, result.auroc, result.auprc, result.calibration, result.operating_point):
        assert "too few beside the noise" in str(part.reason)


def test_no_figure_has_more_than_three_decimals_and_no_count_is_negative() -> None:
    tally = by_sex(2000, 0.8)
    shown: list[Any] = [noised_summary.target_result(SEXES, tally, EDGE), *noised_summary.subgroups(SEXES, tally, EDGE)]
    figures: list[float] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                collect(each)
        elif isinstance(value, float):
            figures.append(value)

    for each in shown:
        collect(each.model_dump(exclude={"operating_point": {"threshold"}}))
    assert len(figures) > 50
    assert all(figure == round(figure, 3) for figure in figures)
    assert noised_summary.noisy_count(np.array([-7, 2])) == 0
    assert noised_summary.prevalence(np.array([[-3] * 8, [9] * 8])) == 1.0
