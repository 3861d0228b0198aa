"""Counts become the figures of results.json. What may not be shown is taken out before anything is computed."""

import math
from collections.abc import Collection, Mapping
from functools import reduce
from operator import add

from server.report.results import (
    Calibration,
    CalibrationBin,
    Estimate,
    Fairness,
    Gap,
    OperatingPoint,
    PrecisionRecall,
    Regression,
    SiteResult,
    SubgroupResult,
    TargetResult,
    WorstGroup,
)
from shared_model import calibration as reliability
from shared_model import intervals, statistics
from shared_model.bootstrap import bootstrap_auroc
from shared_model.disclosure import (
    Suppressed,
    publishable_counts,
    publishable_curve,
    round_count,
    suppress_published,
    suppressed_groups,
)
from shared_model.gaps import partition_gaps
from shared_model.histograms import ScoreHistogram
from shared_model.moments import RegressionMoments, regression_figures
from shared_model.study import Study
from shared_model.subgroups import ALL, partition_of
from shared_model.tally import SiteTally

DELONG = "DeLong on one index ECG a patient, widened by the binning bound"


def rounded(value: float | None) -> float | None:
    """Three decimals: of a rate with all its digits the exact counts behind it can be worked out."""
    return None if value is None else round(value, 3)


def estimate(figure: intervals.Estimate, method: str | None = None) -> Estimate:
    """A figure of the statistics as one of results.json, to three decimals; the bound holds that rounding too."""
    if figure.value is None:
        return Estimate(reason=figure.reason or "not computed")
    whole = figure.low is not None and figure.high is not None
    reason = None if whole else (figure.reason or "no interval could be had")
    bound = None if figure.bound is None else math.ceil(1000 * figure.bound + 0.5) / 1000
    return Estimate(
        value=rounded(figure.value),
        low=rounded(figure.low),
        high=rounded(figure.high),
        bound=bound,
        method=method,
        reason=reason,
    )


def nothing(reason: str) -> Estimate:
    """No figure, and why."""
    return Estimate(reason=reason)


def target_result(study: Study, tally: SiteTally, edge: int | None) -> TargetResult:
    """The model on everybody's test patients; each figure is there, or the reason why it is not."""
    kind = study.target.kind
    shown = suppress_published(tally.histograms, study.evaluation.minimum_cell)
    everyone = shown.get(ALL, Suppressed("no site released counts"))
    all_ecgs = (
        estimate(bootstrap_auroc(tally.bootstrap), "patient-level Poisson bootstrap over all ECGs")
        if tally.bootstrap is not None and not isinstance(everyone, Suppressed)
        else nothing("not every site released replicates, or the count is suppressed")
    )
    if isinstance(everyone, Suppressed):
        why = everyone.reason
        return TargetResult(
            kind=kind,
            reason=why,
            auroc=nothing(why),
            auprc=PrecisionRecall(reason=why),
            calibration=Calibration(reason=why),
            operating_point=OperatingPoint(reason=why),
            all_ecg_auroc=all_ecgs,
            regression=Regression(reason=why) if kind == "regression" else None,
        )
    curve = publishable_curve(everyone, study.evaluation.minimum_cell, edge)
    probabilities = kind == "classification"
    brier = rounded(reliability.brier(everyone).value) if probabilities else None
    return TargetResult(
        kind=kind,
        patients=round_count(everyone.size),
        positives=round_count(everyone.positives),
        auroc=estimate(statistics.auroc(everyone), DELONG),
        auprc=precision_recall(everyone),
        brier=brier,
        calibration=calibration(curve, everyone) if probabilities else Calibration(reason=NO_PROBABILITY),
        operating_point=operating_points(study, tally.histograms, edge)[ALL],
        roc=() if isinstance(curve, Suppressed) else roc(curve),
        all_ecg_auroc=all_ecgs,
        regression=regression(study, tally.moments.get(ALL)) if kind == "regression" else None,
        reason=None if brier is not None else NO_PROBABILITY,
    )


NO_PROBABILITY = "a regression gives mmHg, not a probability"


def precision_recall(histogram: ScoreHistogram) -> PrecisionRecall:
    """AUPRC beside the prevalence that a random score would reach."""
    figure = estimate(statistics.auprc(histogram), "average precision; Boyd's logit interval, widened by the bound")
    prevalence = round(histogram.positives / histogram.size, 3) if histogram.size else None
    return PrecisionRecall(**figure.model_dump(), prevalence=prevalence)


def roc(curve: ScoreHistogram) -> tuple[tuple[float, float], ...]:
    """Points of the ROC at edges whose cells hold enough patients to be shown."""
    false_positive, true_positive = statistics.roc_points(curve)
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in zip(false_positive, true_positive, strict=True))


def calibration(curve: ScoreHistogram | Suppressed, everyone: ScoreHistogram) -> Calibration:
    """Slope and intercept of all patients; the reliability plot from cells that hold enough of them."""
    figures = reliability.calibration(everyone)
    bins: tuple[CalibrationBin, ...] = ()
    error = None
    if not isinstance(curve, Suppressed):
        shown = reliability.calibration(curve)
        error = rounded(shown.expected_error)
        bins = tuple(
            CalibrationBin(
                mean_predicted=round(cell.mean_predicted, 3),
                observed=round(cell.observed, 3),
                low=round(cell.low, 3),
                high=round(cell.high, 3),
                patients=round_count(cell.count),
            )
            for cell in shown.cells
        )
    values = [rounded(each) for each in (figures.intercept.value, figures.slope.value, figures.expected_over_observed)]
    why = figures.intercept.reason or figures.slope.reason or figures.reason or "not computed"
    return Calibration(
        intercept=values[0],
        slope=values[1],
        expected_over_observed=values[2],
        expected_error=error,
        bins=bins,
        reason=why if None in values else None,
    )


def operating_points(
    study: Study, histograms: Mapping[str, ScoreHistogram], edge: int | None
) -> dict[str, OperatingPoint]:
    """Sensitivity, specificity, PPV and NPV of each group at the threshold that validation chose.

    Guarantee: a 2x2 table with a cell of 1 to minimum_cell - 1 patients is suppressed, and so are those from
    which it would follow by subtraction ("all" minus the other groups of a partition).
    """
    if edge is None:
        return dict.fromkeys(histograms, OperatingPoint(reason="no threshold could be chosen on the validation split"))
    least = study.evaluation.minimum_cell
    points = {name: statistics.operating_point(histogram, edge) for name, histogram in histograms.items()}
    exact = {name: point for name, point in points.items() if point.exact}
    with_condition = {name: (point.true_positives[0], point.false_negatives[0]) for name, point in exact.items()}
    without = {name: (point.false_positives[0], point.true_negatives[0]) for name, point in exact.items()}
    hidden = {**suppressed_groups(with_condition, least), **suppressed_groups(without, least)}
    return {name: operating_point(point, hidden.get(name), least) for name, point in points.items()}


def operating_point(point: statistics.OperatingPoint, hidden: Suppressed | None, minimum_cell: int) -> OperatingPoint:
    """One group's rates, or the reason why they are not shown."""
    tables = [
        {"tp": tp, "fn": fn, "fp": fp, "tn": tn}
        for tp, fn, fp, tn in zip(
            point.true_positives, point.false_negatives, point.false_positives, point.true_negatives, strict=True
        )
    ]
    if hidden or any(isinstance(publishable_counts(table, minimum_cell), Suppressed) for table in tables):
        reason = f"suppressed: the 2x2 table has, or would give away, a cell of fewer than {minimum_cell} patients"
        return OperatingPoint(threshold=point.threshold, reason=reason)
    return OperatingPoint(
        threshold=point.threshold,
        sensitivity=estimate(point.sensitivity, "Wilson"),
        specificity=estimate(point.specificity, "Wilson"),
        ppv=estimate(point.ppv, "Wilson"),
        npv=estimate(point.npv, "Wilson"),
    )


def regression(study: Study, moments: RegressionMoments | None) -> Regression:
    """Errors in mmHg beside those of the best constant, the mean of these very patients."""
    if moments is None or moments.count < study.evaluation.minimum_cell:
        return Regression(reason="fewer patients than may be shown")
    figures = regression_figures(moments, study.target.centre)
    return Regression(
        rmse=rounded(figures.rmse),
        mae=rounded(figures.mae),
        pearson_r=rounded(figures.pearson_r),
        r2=rounded(figures.r_squared),
        bias=rounded(figures.bias),
        mean_predictor_rmse=rounded(figures.rmse_of_cohort_mean),
        reason=figures.reason,
    )


def group_figures(
    group: ScoreHistogram | Suppressed, study: Study, point: OperatingPoint, moments: RegressionMoments | None
) -> dict[str, object]:
    """The fields of a GroupResult; a suppressed group has its reason and nothing else."""
    if isinstance(group, Suppressed):
        return {"suppressed": True, "reason": f"suppressed: {group.reason}"}
    if group.size == 0:
        return {"reason": "no test patients in this group"}
    figures = reliability.calibration(group) if study.target.kind == "classification" else None
    result: dict[str, object] = {
        "patients": round_count(group.size),
        "positives": round_count(group.positives),
        "auroc": estimate(statistics.auroc(group), DELONG),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
        "calibration_slope": rounded(figures.slope.value) if figures else None,
        "expected_over_observed": rounded(figures.expected_over_observed) if figures else None,
    }
    if None in result.values():
        result["reason"] = point.reason or (figures.slope.reason if figures else NO_PROBABILITY) or "not computed"
    if study.target.kind == "regression":
        result["regression"] = regression(study, moments)
    return result


def subgroups(study: Study, tally: SiteTally, edge: int | None) -> tuple[SubgroupResult, ...]:
    """Every group of every partition, after suppression; a group that a site withheld lacks that site."""
    shown = suppress_published(tally.histograms, study.evaluation.minimum_cell)
    points = operating_points(study, tally.histograms, edge)
    results = []
    for name in study.evaluation.groups:
        if name == ALL or (name not in shown and name not in tally.withheld):
            continue
        group = shown.get(name, Suppressed("withheld by every site that has such patients"))
        if isinstance(group, ScoreHistogram) and group.size == 0 and name not in tally.withheld:
            continue
        figures = group_figures(
            group, study, points.get(name, OperatingPoint(reason="withheld")), tally.moments.get(name)
        )
        if name in tally.withheld and not figures.get("suppressed"):
            figures["reason"] = f"lacks the patients of {tally.withheld[name]} sites that withheld it"
        results.append(SubgroupResult(partition=partition_of(name), group=label_of(name), **figures))  # type: ignore[arg-type]
    return tuple(results)


def label_of(name: str) -> str:
    """A group's levels alone: "female & 50-75" of "sex=female & age=50-75"."""
    return " & ".join(part.split("=", 1)[1] for part in name.split(" & "))


def fairness(study: Study, tally: SiteTally) -> Fairness:
    """The worst group and the largest gap of all partitions, with what they were picked from."""
    shown = suppress_published(tally.histograms, study.evaluation.minimum_cell)
    aurocs = {
        name: statistics.auroc(group)
        for name, group in shown.items()
        if isinstance(group, ScoreHistogram) and name != ALL and group.size
    }
    return fairness_of(aurocs, DELONG)


def fairness_of(aurocs: Mapping[str, intervals.Estimate], method: str) -> Fairness:
    """The same from the AUROC of each group that may be shown, by name; `method` made their intervals."""
    by_partition: dict[str, dict[str, intervals.Estimate]] = {}
    for name, figure in aurocs.items():
        by_partition.setdefault(partition_of(name), {})[name] = figure
    gaps = {name: partition_gaps(groups) for name, groups in by_partition.items()}
    known = {name: figure.value for name, figure in aurocs.items() if figure.value is not None}
    largest = max(
        (found.largest for found in gaps.values() if found.largest),
        key=lambda gap: gap.difference.value or 0,
        default=None,
    )
    if not known or largest is None:
        return Fairness(reason="fewer than two groups of a partition could be shown")
    worst = min(known, key=known.__getitem__)
    compared = sum(found.comparisons for found in gaps.values())
    note = (
        f"largest of {compared} gaps in {len(gaps)} partitions; the interval is for one comparison, "
        f"p for all of them (Bonferroni) {min(1.0, compared * largest.p_value):.2g}"
    )
    return Fairness(
        worst_group=WorstGroup(partition=partition_of(worst), group=worst, auroc=estimate(aurocs[worst], method)),
        largest_gap=Gap(
            **estimate(largest.difference, f"unpaired; {method}").model_dump(),
            partition=partition_of(largest.better),
            groups=(largest.better, largest.worse),
            note=note,
        ),
    )


KEPT = Suppressed("this hospital keeps its own figures, or would give away those of one that does")


def site_results(
    study: Study, tallies: Mapping[str, SiteTally], sharing: Collection[str], edge: int | None
) -> tuple[SiteResult, ...]:
    """Each hospital's own test patients, where it let its own figures out.

    Guarantee: the hospitals are the groups of one more partition of everybody and are suppressed as such; a
    single one that keeps its figures is joined by the smallest other, so that no subtraction yields them.
    """
    counted = {name: tally.histograms[ALL] for name, tally in sorted(tallies.items()) if ALL in tally.histograms}
    group_of = {name: f"site={number}" for number, name in enumerate(counted)}
    groups = {group_of[name]: histogram for name, histogram in counted.items()}
    groups |= {ALL: reduce(add, counted.values())} if counted else {}
    shown = suppress_published(groups, study.evaluation.minimum_cell)
    points = operating_points(study, groups, edge)
    kept = {name for name in counted if name not in sharing and counted[name].size}
    if len(kept) == 1:
        others = [name for name in counted if name not in kept and counted[name].size]
        kept |= set(sorted(others, key=lambda name: counted[name].size)[:1])
    results = []
    for name in sorted(tallies):
        if name in counted:
            group = group_of[name]
            shown_group = KEPT if name in kept else shown[group]
            figures = group_figures(shown_group, study, points[group], tallies[name].moments.get(ALL))
        else:
            figures = group_figures(Suppressed("withheld by the site"), study, OperatingPoint(reason="withheld"), None)
        results.append(SiteResult(name=name, **figures))  # type: ignore[arg-type]
    return tuple(results)
