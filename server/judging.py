"""The judging of a study: counts from the sites, the threshold from validation, the test split once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TypeVar

from server.aggregation import Weights
from server.checkpoint import Checkpoint
from server.conductor import Conductor, ask_sites, instruct, require_sites, travelling
from shared_model import noised_statistics
from shared_model.errors import HemoFedError
from shared_model.histograms import ScoreHistogram, empty_histogram
from shared_model.noised import NoisedTally, from_noised_arrays, judged_groups, noise_scale, tables_of
from shared_model.score_grid import edge_probability, snap_threshold
from shared_model.statistics import Threshold, auroc, choose_threshold
from shared_model.study import Study
from shared_model.subgroups import ALL
from shared_model.tally import SiteTally, from_arrays
from shared_model.wire import Arrays, SiteDescription, SiteFailure, Split

Counted = TypeVar("Counted", SiteTally, NoisedTally)


@dataclass(frozen=True)
class StudyOutcome:
    """What a study ends with, before it is turned into tables."""

    run_id: str
    sites: Mapping[str, SiteDescription]
    left_out: Mapping[str, str]
    weights: Weights
    model_round: int
    threshold: Threshold
    test: Mapping[str, SiteTally]
    noised: Mapping[str, NoisedTally] = field(default_factory=dict)
    """The noisy counts of a private study's test patients, which then stand in place of `test`."""


def judge(conductor: Conductor, state: Checkpoint) -> StudyOutcome:
    """Choose the round, take its validation counts for the threshold, and read the test split, once."""
    best = conductor.study.evaluation.model == "best_on_validation" and state.position.best_round > 0
    number = state.position.best_round if best else conductor.study.finetune.rounds
    weights = state.best_weights if best else state.weights
    conductor.watcher.on_round_start("evaluate", 1, 1)
    test: Mapping[str, SiteTally] = {}
    noised: Mapping[str, NoisedTally] = {}
    if conductor.study.privacy is None:
        threshold = choose(conductor.study, everyone(gather(conductor, weights, number, "validation")))
        test = gather(conductor, weights, number, "test", threshold.edge)
    else:
        threshold = choose_noised(conductor.study, gather_noised(conductor, weights, number, "validation"))
        noised = gather_noised(conductor, weights, number, "test", threshold.edge)
    require_sites(conductor, len(test) + len(noised), "gave counts of their test patients")
    return StudyOutcome(conductor.run_id, conductor.sites, conductor.left_out, weights, number, threshold, test, noised)


def choose(study: Study, validation: ScoreHistogram) -> Threshold:
    """The threshold of a probability by Youden's index; of a regression the study's own, in the middle of the grid."""
    return choose_threshold(validation) if study.target.kind == "classification" else middle()


def choose_noised(study: Study, validation: Mapping[str, NoisedTally]) -> Threshold:
    """The same from noisy counts, among the edges of their grid."""
    if study.target.kind == "regression":
        return middle()
    if not validation:
        return Threshold(None, None, "no site gave counts of its validation patients")
    everybody = reduce(add, validation.values())
    return noised_statistics.choose_threshold(everybody.tables[ALL], everybody.variance, study.evaluation.minimum_cell)


def middle() -> Threshold:
    """A regression's threshold: where the pressure's score is 0.5."""
    edge = snap_threshold(0.5)
    return Threshold(edge, edge_probability(edge))


def gather(
    conductor: Conductor, weights: Weights, number: int, split: Split, threshold_edge: int | None = None
) -> dict[str, SiteTally]:
    """Every site's counts on one split, by site. Sites that failed or may release nothing are left out."""

    def read(arrays: Arrays) -> SiteTally:
        return fitting(conductor.study, from_arrays(arrays), split)

    return read_answers(conductor, weights, number, split, threshold_edge, read)


def gather_noised(
    conductor: Conductor, weights: Weights, number: int, split: Split, threshold_edge: int | None = None
) -> dict[str, NoisedTally]:
    """Every site's noisy counts on one split of a private study, by site. Exact counts are turned away: in one sum with
    noisy ones they would belie what the study says of its privacy."""
    study = conductor.study
    assert study.privacy is not None  # judge asks private studies only
    groups = judged_groups(study, split)
    scale = noise_scale(tables_of(groups), study.privacy.release_epsilon)

    def read(arrays: Arrays) -> NoisedTally:
        return from_noised_arrays(arrays, groups, scale)

    return read_answers(conductor, weights, number, split, threshold_edge, read)


def read_answers(
    conductor: Conductor,
    weights: Weights,
    number: int,
    split: Split,
    threshold_edge: int | None,
    read: Callable[[Arrays], Counted],
) -> dict[str, Counted]:
    """What `read` makes of each site's answer; a site that failed, or whose counts it refuses, is left out."""
    instruction = instruct(conductor, "evaluate", number, split=split, threshold_edge=threshold_edge)
    found: dict[str, Counted] = {}
    sent = travelling(conductor.study, "evaluate", weights)
    for answer in ask_sites(conductor, instruction, sent, sorted(conductor.sites)):
        if isinstance(answer, SiteFailure):
            conductor.watcher.on_notice(f"{answer.site}: not in the {split} figures: {answer.reason}")
            continue
        try:
            found[answer.site] = read(answer.arrays)
        except HemoFedError as error:
            conductor.watcher.on_notice(f"{answer.site}: not in the {split} figures: {error.message}")
    return found


def fitting(study: Study, tally: SiteTally, split: Split) -> SiteTally:
    """The tally, if it can be added to the others'; else HemoFedError, so that one site cannot spoil the sum."""
    strangers = {*tally.histograms, *tally.moments, *tally.withheld} - set(study.evaluation.groups)
    if strangers:
        raise HemoFedError(f"its counts have groups that the study does not ask for, such as {min(strangers)!r}")
    asked = study.evaluation.bootstrap_replicates if split == "test" else 0
    if tally.bootstrap is not None and tally.bootstrap.replicates != asked:
        raise HemoFedError(f"it sent {tally.bootstrap.replicates} bootstrap replicates where {asked} were asked for")
    return tally


def everyone(tallies: Mapping[str, SiteTally]) -> ScoreHistogram:
    """The sum over sites of their index ECGs; empty where no site released any."""
    return reduce(
        add,
        (tally.histograms[ALL] for tally in tallies.values() if ALL in tally.histograms),
        empty_histogram(),
    )


def strictest(study: Study, minimum_cells: Iterable[int]) -> Study:
    """The study with the largest `minimum_cell` of itself and its sites: a site can be stricter, never looser."""
    least = max([study.evaluation.minimum_cell, *minimum_cells])
    return study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"minimum_cell": least})})


def validation_auroc(conductor: Conductor, state: Checkpoint, number: int) -> float | None:
    """AUROC over all sites' validation patients to three decimals, or None where too few counts may be had."""
    histogram = everyone(gather(conductor, state.weights, number, "validation"))
    study = strictest(conductor.study, (site.minimum_cell for site in conductor.sites.values()))
    if min(histogram.positives, histogram.negatives) < study.evaluation.minimum_cell:
        return None
    value = auroc(histogram).value
    return None if value is None else round(value, 3)
