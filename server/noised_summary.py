"""Noisy counts become the figures of results.json. Post-processing only: nothing here can cost a patient anything.

What is shown is judged by noisy counts and by the known noise; small counts need no hiding, but figures that are
mostly noise do. A hospital that keeps its own figures is kept out of sight all the same: that is its word.
"""

from collections.abc import Collection, Mapping
from functools import reduce
from operator import add

from server.report.results import (
    Calibration,
    CalibrationBin,
    Fairness,
    OperatingPoint,
    PrecisionRecall,
    Regression,
    SiteResult,
    SubgroupResult,
    TargetResult,
)
from server.summary import KEPT, NO_PROBABILITY, estimate, fairness_of, label_of, nothing, rounded
from shared_model import intervals
from shared_model import noised_statistics as statistics
from shared_model.disclosure import round_count
from shared_model.noised import NOISED_BINS, NoisedTally
from shared_model.noised_statistics import Table
from shared_model.score_grid import edge_probability
from shared_model.study import Study
from shared_model.subgroups import ALL, partition_of

AUROC = f"{NOISED_BINS} noisy bins, binormal correction for binning; delta method and Wilson, the noise included"
RATE = "Wilson, the noise included"
FINER = "not made from noisy counts: the tier 'noised' has a few wide score bins only"
NO_PRESSURE = "not released under the tier 'noised': errors in mmHg would need tables of their own"
NO_THRESHOLD = "no threshold could be chosen on the validation split"


def target_result(study: Study, tally: NoisedTally, edge: int | None) -> TargetResult:
    """The model on everybody's test patients; each figure is there, or the reason why it is not."""
    kind, least = study.target.kind, study.evaluation.minimum_cell
    table, variance = tally.tables[ALL], tally.variance
    regression = Regression(reason=NO_PRESSURE) if kind == "regression" else None
    if why := statistics.too_small(table, variance, least):
        return TargetResult(
            kind=kind,
            reason=why,
            auroc=nothing(why),
            auprc=PrecisionRecall(reason=why),
            calibration=Calibration(reason=why),
            operating_point=OperatingPoint(reason=why),
            all_ecg_auroc=nothing(FINER),
            regression=regression,
        )
    probabilities = kind == "classification"
    return TargetResult(
        kind=kind,
        patients=noisy_count(table),
        positives=noisy_count(table[1]),
        auroc=estimate(statistics.auroc(table, variance, least), AUROC),
        auprc=PrecisionRecall(reason=FINER, prevalence=prevalence(table)),
        calibration=calibration(table, variance, least) if probabilities else Calibration(reason=NO_PROBABILITY),
        operating_point=operating_point(table, edge, variance, least),
        roc=roc(table),
        all_ecg_auroc=nothing(FINER),
        regression=regression,
        reason=FINER,
    )


def noisy_count(counts: Table) -> int:
    """A noisy total for print: not below 0, to the nearest 5."""
    return round_count(max(0, int(counts.sum())))


def prevalence(table: Table) -> float:
    """Share with the condition by noisy counts, within 0 to 1; the total must be positive."""
    return round(min(1.0, max(0.0, float(table[1].sum() / table.sum()))), 3)


def roc(table: Table) -> tuple[tuple[float, float], ...]:
    """Points of the ROC at the edges of the bins."""
    false_positive, true_positive = statistics.roc_points(table)
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in zip(false_positive, true_positive, strict=True))


def calibration(table: Table, variance: float, least: int) -> Calibration:
    """The reliability plot from bins that hold enough patients; the prediction is taken as the middle of its bin."""
    middles = statistics.BIN_MIDDLES
    found = statistics.reliability(table, variance, least)
    bins = tuple(
        CalibrationBin(
            mean_predicted=round(float(middles[number]), 3),
            observed=round(share.value, 3),
            low=round(share.low, 3),
            high=round(share.high, 3),
            patients=noisy_count(table[:, number]),
        )
        for number, share in found
        if share.value is not None and share.low is not None and share.high is not None
    )
    expected = float((table.sum(axis=0) * middles).sum() / table[1].sum())
    return Calibration(
        expected_over_observed=rounded(max(0.0, expected)),
        expected_error=rounded(statistics.expected_error(table, found)),
        bins=bins,
        reason=FINER,
    )


def operating_point(table: Table, edge: int | None, variance: float, least: int) -> OperatingPoint:
    """Rates at the threshold, each with its interval or the reason why it has too few patients."""
    if edge is None:
        return OperatingPoint(reason=NO_THRESHOLD)
    rates = [estimate(each, RATE) for each in statistics.operating_rates(table, edge, variance, least)]
    return OperatingPoint(
        threshold=edge_probability(edge), sensitivity=rates[0], specificity=rates[1], ppv=rates[2], npv=rates[3]
    )


def group_figures(table: Table, study: Study, edge: int | None, variance: float) -> dict[str, object]:
    """The fields of a GroupResult; a group whose figures would be mostly noise has its reason and nothing else."""
    least = study.evaluation.minimum_cell
    if why := statistics.too_small(table, variance, least):
        return {"suppressed": True, "reason": f"suppressed: {why}"}
    point = operating_point(table, edge, variance, least)
    expected = float((table.sum(axis=0) * statistics.BIN_MIDDLES).sum() / table[1].sum())
    regression = study.target.kind == "regression"
    return {
        "patients": noisy_count(table),
        "positives": noisy_count(table[1]),
        "auroc": estimate(statistics.auroc(table, variance, least), AUROC),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
        "expected_over_observed": None if regression else rounded(max(0.0, expected)),
        "regression": Regression(reason=NO_PRESSURE) if regression else None,
        "reason": point.reason or (NO_PROBABILITY if regression else FINER),
    }


def subgroups(study: Study, tally: NoisedTally, edge: int | None) -> tuple[SubgroupResult, ...]:
    """Every group of the study; which ones have patients at all is not known."""
    return tuple(
        SubgroupResult(
            partition=partition_of(name),
            group=label_of(name),
            **group_figures(tally.tables[name], study, edge, tally.variance),  # type: ignore[arg-type]
        )
        for name in study.evaluation.groups
        if name != ALL
    )


def fairness(study: Study, tally: NoisedTally) -> Fairness:
    """The worst group and the largest gap among the groups that are shown."""
    least = study.evaluation.minimum_cell
    aurocs: dict[str, intervals.Estimate] = {
        name: statistics.auroc(table, tally.variance, least)
        for name, table in tally.tables.items()
        if name != ALL and statistics.too_small(table, tally.variance, least) is None
    }
    return fairness_of(aurocs, AUROC)


def site_results(
    study: Study, tallies: Mapping[str, NoisedTally], sharing: Collection[str], edge: int | None
) -> tuple[SiteResult, ...]:
    """Each hospital's own test patients, where it let its own figures out. A single one that keeps them is joined by
    the smallest other, by noisy count, so that no subtraction yields them."""
    sizes = {name: int(tally.tables[ALL].sum()) for name, tally in tallies.items()}
    kept = {name for name in tallies if name not in sharing}
    if len(kept) == 1:
        kept |= set(sorted(set(tallies) - kept, key=lambda name: (sizes[name], name))[:1])
    results = []
    for name, tally in sorted(tallies.items()):
        hidden = {"suppressed": True, "reason": f"suppressed: {KEPT.reason}"}
        figures = hidden if name in kept else group_figures(tally.tables[ALL], study, edge, tally.variance)
        results.append(SiteResult(name=name, **figures))  # type: ignore[arg-type]
    return tuple(results)


def total(tallies: Mapping[str, NoisedTally]) -> NoisedTally:
    """The sum over sites; there must be one at least."""
    return reduce(add, tallies.values())
