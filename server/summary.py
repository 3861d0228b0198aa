"""Counts become the figures of results.json. What may not be shown is taken out before anything is computed."""

from collections.abc import Mapping

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
)
from shared_model.gaps import partition_gaps
from shared_model.histograms import ScoreHistogram
from shared_model.moments import regression_figures
from shared_model.study import Study
from shared_model.subgroups import ALL, partition_of
from shared_model.tally import SiteTally

DELONG = "DeLong on one index ECG a patient, widened by the binning bound"


def estimate(figure: intervals.Estimate, method: str | None = None) -> Estimate:
    """A figure of the statistics as one of results.json, rounded to what can be meant."""
    if figure.value is None:
        return Estimate(reason=figure.reason or "not computed")
    whole = figure.low is not None and figure.high is not None
    reason = None if whole else (figure.reason or "no interval could be had")
    return Estimate(
        value=figure.value, low=figure.low, high=figure.high, bound=figure.bound, method=method, reason=reason
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
    brier = reliability.brier(everyone).value if probabilities else None
    return TargetResult(
        kind=kind,
        patients=round_count(everyone.size),
        positives=round_count(everyone.positives),
        auroc=estimate(statistics.auroc(everyone), DELONG),
        auprc=precision_recall(everyone),
        brier=brier,
        calibration=calibration(curve, everyone) if probabilities else Calibration(reason=NO_PROBABILITY),
        operating_point=operating_point(everyone, edge, study.evaluation.minimum_cell),
        roc=() if isinstance(curve, Suppressed) else roc(curve),
        all_ecg_auroc=all_ecgs,
        regression=regression(study, tally) if kind == "regression" else None,
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
    return tuple((round(float(x), 4), round(float(y), 4)) for x, y in zip(false_positive, true_positive, strict=True))


def calibration(curve: ScoreHistogram | Suppressed, everyone: ScoreHistogram) -> Calibration:
    """Slope and intercept of all patients; the reliability plot from cells that hold enough of them."""
    figures = reliability.calibration(everyone)
    bins: tuple[CalibrationBin, ...] = ()
    if not isinstance(curve, Suppressed):
        bins = tuple(
            CalibrationBin(
                mean_predicted=round(cell.mean_predicted, 4),
                observed=round(cell.observed, 4),
                low=cell.low,
                high=cell.high,
                patients=round_count(cell.count),
            )
            for cell in reliability.calibration(curve).cells
        )
    values = (figures.intercept.value, figures.slope.value, figures.expected_over_observed)
    why = figures.intercept.reason or figures.slope.reason or figures.reason or "not computed"
    return Calibration(
        intercept=values[0],
        slope=values[1],
        expected_over_observed=values[2],
        bins=bins,
        reason=why if None in values else None,
    )


def operating_point(histogram: ScoreHistogram, edge: int | None, minimum_cell: int) -> OperatingPoint:
    """Sensitivity, specificity, PPV and NPV at the threshold that validation chose."""
    if edge is None:
        return OperatingPoint(reason="no threshold could be chosen on the validation split")
    point = statistics.operating_point(histogram, edge)
    table = {
        "tp": point.true_positives,
        "fn": point.false_negatives,
        "fp": point.false_positives,
        "tn": point.true_negatives,
    }
    hidden = [publishable_counts({name: pair[end] for name, pair in table.items()}, minimum_cell) for end in (0, 1)]
    for counts in hidden:
        if isinstance(counts, Suppressed):
            return OperatingPoint(threshold=point.threshold, reason=f"suppressed: {counts.reason}")
    return OperatingPoint(
        threshold=point.threshold,
        sensitivity=estimate(point.sensitivity, "Wilson"),
        specificity=estimate(point.specificity, "Wilson"),
        ppv=estimate(point.ppv, "Wilson"),
        npv=estimate(point.npv, "Wilson"),
    )


def regression(study: Study, tally: SiteTally) -> Regression:
    """Errors in mmHg beside those of a constant: the study's fixed centre stands for the training mean."""
    moments = tally.moments.get(ALL)
    if moments is None or moments.count < study.evaluation.minimum_cell:
        return Regression(reason="fewer patients than may be shown")
    figures = regression_figures(moments, study.target.centre)
    return Regression(
        rmse=figures.rmse,
        mae=figures.mae,
        pearson_r=figures.pearson_r,
        r2=figures.r_squared,
        bias=figures.bias,
        mean_predictor_rmse=figures.rmse_of_cohort_mean,
        reason=figures.reason,
    )


def group_figures(group: ScoreHistogram | Suppressed, study: Study, edge: int | None) -> dict[str, object]:
    """The fields of a GroupResult; a suppressed group has its reason and nothing else."""
    if isinstance(group, Suppressed):
        return {"suppressed": True, "reason": f"suppressed: {group.reason}"}
    if group.size == 0:
        return {"reason": "no test patients in this group"}
    point = operating_point(group, edge, study.evaluation.minimum_cell)
    figures = reliability.calibration(group) if study.target.kind == "classification" else None
    result: dict[str, object] = {
        "patients": round_count(group.size),
        "positives": round_count(group.positives),
        "auroc": estimate(statistics.auroc(group), DELONG),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
        "calibration_slope": figures.slope.value if figures else None,
        "expected_over_observed": figures.expected_over_observed if figures else None,
    }
    if None in result.values():
        result["reason"] = point.reason or (figures.slope.reason if figures else NO_PROBABILITY) or "not computed"
    return result


def subgroups(study: Study, tally: SiteTally, edge: int | None) -> tuple[SubgroupResult, ...]:
    """Every group of every partition, after suppression; a group that a site withheld lacks that site."""
    shown = suppress_published(tally.histograms, study.evaluation.minimum_cell)
    results = []
    for name in study.evaluation.groups:
        if name == ALL or (name not in shown and name not in tally.withheld):
            continue
        group = shown.get(name, Suppressed("withheld by every site that has such patients"))
        if isinstance(group, ScoreHistogram) and group.size == 0 and name not in tally.withheld:
            continue
        figures = group_figures(group, study, edge)
        if name in tally.withheld and not figures.get("suppressed"):
            figures["reason"] = f"lacks the patients of {tally.withheld[name]} sites that withheld it"
        label = " & ".join(part.split("=", 1)[1] for part in name.split(" & "))
        results.append(SubgroupResult(partition=partition_of(name), group=label, **figures))  # type: ignore[arg-type]
    return tuple(results)


def fairness(study: Study, tally: SiteTally) -> Fairness:
    """The worst group and the largest gap of all partitions, with what they were picked from."""
    shown = suppress_published(tally.histograms, study.evaluation.minimum_cell)
    aurocs = {
        name: statistics.auroc(group)
        for name, group in shown.items()
        if isinstance(group, ScoreHistogram) and name != ALL and group.size
    }
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
    note = f"{gaps[partition_of(largest.better)].note}; p adjusted {largest.p_adjusted:.2g}"
    return Fairness(
        worst_group=WorstGroup(partition=partition_of(worst), group=worst, auroc=estimate(aurocs[worst], DELONG)),
        largest_gap=Gap(
            **estimate(largest.difference, "unpaired, DeLong").model_dump(),
            partition=partition_of(largest.better),
            groups=(largest.better, largest.worse),
            note=note,
        ),
    )


def site_results(study: Study, tallies: Mapping[str, SiteTally], edge: int | None) -> tuple[SiteResult, ...]:
    """Each hospital's own test patients, where it let its own figures out."""
    results = []
    for name, tally in sorted(tallies.items()):
        everyone = (
            suppress_published({ALL: tally.histograms[ALL]}, study.evaluation.minimum_cell)[ALL]
            if (ALL in tally.histograms)
            else Suppressed("withheld by the site")
        )
        results.append(SiteResult(name=name, **group_figures(everyone, study, edge)))  # type: ignore[arg-type]
    return tuple(results)
