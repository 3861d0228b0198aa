"""The figures of the report."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from server.report.results import (
    Estimate,
    Results,
    RoundMetrics,
    SiteMean,
    SubgroupResult,
    TargetResult,
)
from server.report.words import (
    count,
    group_label,
    number,
    oracle_auroc,
    suppressed_text,
    upper_first,
    with_interval,
)
from shared_model.svg import BLUE, GREEN, INK, MUTED, PAGE, RULE, VERMILLION, Drawing, draw, label_rows, short


def comparison(results: Results) -> Drawing | None:
    """Local-only, federated, pooled and oracle on one AUROC axis: each hospital, their mean, all together."""
    baselines, own = results.baselines, results.own.auroc
    pooled = baselines.pooled[results.own_target].auroc
    best = Estimate(value=oracle_auroc(results.oracle), reason="the oracle is known, not estimated")
    alone = Estimate(reason="each hospital has a model of its own")
    rows = [
        ("Local-only", baselines.local_only[results.own_target].auroc, alone, VERMILLION),
        ("Federated", baselines.federated, own, BLUE),
        ("Pooled", baselines.pooled_by_site, pooled, INK),
    ]
    if results.simulated:
        rows.append(("Oracle", baselines.oracle_by_site, best, GREEN))
    if own.value is None and all(means.mean is None for _, means, _, _ in rows):
        return None

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for place, (_, means, together, colour) in enumerate(rows):
            comparison_row(axes, place, means, together, colour)
        label_rows(axes, [row[0] for row in rows], 52)
        axes.margins(x=0.08)
        axes.set_xlabel("AUROC")

    table = tuple((name, number(means.mean), with_interval(each)) for name, means, each, _ in rows)
    title = "AUROC of local-only, federated, pooled and oracle"
    described = "; ".join(f"{name}: mean of hospitals {mean}, all {everyone}" for name, mean, everyone in table)
    columns = ("Trained", "Mean of hospitals", "All patients (95% interval)")
    return Drawing(draw("comparison", 1.9, title, described, paint), columns, table)


def comparison_row(axes: Axes, place: int, means: SiteMean, together: Estimate, colour: str) -> None:
    """Above the line a ring a hospital and the diamond of their mean; on it all patients together."""
    known = [value for value in means.sites.values() if value is not None]
    above = place - 0.16
    axes.plot(known, [above] * len(known), "o", mfc="none", mec=colour, ms=3.6, mew=0.8)
    if means.mean is not None:
        axes.plot(means.mean, above, "D", color=colour, ms=4.5)
    if together.value is not None:
        axes.plot(together.value, place + 0.16, "o", color=colour, ms=4.5)
    if together.low is not None and together.high is not None:
        axes.plot([together.low, together.high], [place + 0.16] * 2, color=colour, lw=1.2)
    if not known and together.value is None:
        middle = axes.get_yaxis_transform()
        axes.text(0.5, place, "not computed", transform=middle, va="center", ha="center", color=MUTED)


def receiver_operating(target: TargetResult, name: str = "roc") -> Drawing | None:
    """The ROC curve and the operating point chosen on validation."""
    if not target.roc:
        return None
    point = target.operating_point

    def paint(canvas: Canvas) -> None:
        axes = square(canvas, "1 \u2212 specificity", "Sensitivity")
        axes.plot(*zip(*target.roc, strict=True), color=BLUE)
        if point.sensitivity and point.specificity and point.sensitivity.value and point.specificity.value:
            x, y = 1 - point.specificity.value, point.sensitivity.value
            axes.plot(x, y, "o", color=VERMILLION, ms=5.5)
            axes.annotate(f"threshold {number(point.threshold, 2)}", (x, y), (6, -11), textcoords="offset points")
        axes.text(0.97, 0.05, f"AUROC {number(target.auroc.value, 2)}", ha="right", transform=axes.transAxes)

    described = (
        f"AUROC {with_interval(target.auroc)}; at the operating point sensitivity "
        f"{with_interval(point.sensitivity, 2)}, specificity {with_interval(point.specificity, 2)}"
    )
    rows = tuple((number(x), number(y)) for x, y in target.roc)
    svg = draw(name, 3.3, "ROC curve with the operating point", described, paint)
    return Drawing(svg, ("False positive rate", "Sensitivity"), rows)


def reliability(target: TargetResult, name: str = "reliability") -> Drawing | None:
    """Predicted against observed, bin by bin, with intervals."""
    bins = target.calibration.bins
    if not bins:
        return None

    def paint(canvas: Canvas) -> None:
        axes = square(canvas, "Mean predicted probability", "Observed share")
        for each in bins:
            axes.plot([each.mean_predicted] * 2, [each.low, each.high], color=BLUE, lw=1)
        axes.plot([b.mean_predicted for b in bins], [b.observed for b in bins], "o-", color=BLUE, ms=4, lw=0.8)
        fit = target.calibration
        axes.text(0.97, 0.12, f"slope {number(fit.slope, 2)}", ha="right", transform=axes.transAxes)
        axes.text(0.97, 0.05, f"intercept {number(fit.intercept, 2)}", ha="right", transform=axes.transAxes)

    described = "; ".join(f"predicted {b.mean_predicted:.2f}, observed {b.observed:.2f}" for b in bins)
    rows = tuple(
        (number(b.mean_predicted), number(b.observed), span_text(b.low, b.high), count(b.patients)) for b in bins
    )
    svg = draw(name, 3.3, "Calibration: predicted against observed", described, paint)
    return Drawing(svg, ("Mean predicted", "Observed", "95% interval", "Patients"), rows)


def forest(results: Results) -> Drawing | None:
    """AUROC by subgroup under the overall one; suppressed groups keep their row and say so."""
    if not results.subgroups:
        return None
    lines: list[SubgroupResult | str] = []
    for group in results.subgroups:
        heading = short(upper_first(group.partition), 30)
        if heading not in lines:
            lines.append(heading)
        lines.append(group)

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        overall = results.own.auroc
        shown = [group for group in results.subgroups if group.auroc is not None]
        for place, line in enumerate(lines):
            if not isinstance(line, str):
                forest_row(axes, place, line)
        if overall.value is not None:
            axes.axvline(overall.value, color=MUTED, lw=0.7, ls=(0, (3, 3)), zorder=0)
        label_rows(
            axes,
            [line if isinstance(line, str) else "\u2002" + short(group_label(line.group), 20) for line in lines],
            86,
        )
        for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if isinstance(line, str) else "normal")
        lows = [group.auroc.low for group in shown if group.auroc and group.auroc.low is not None]
        axes.set_xlim(max(0.0, min([0.5, *lows]) - 0.02), 1)
        axes.set_xlabel("AUROC; dashed: all patients")

    described = "; ".join(f"{g.partition} {g.group}: {group_text(g)}" for g in results.subgroups)
    rows = tuple((g.partition, group_label(g.group), group_text(g)) for g in results.subgroups)
    svg = draw("forest", 0.55 + 0.17 * len(lines), "AUROC by subgroup", described, paint)
    return Drawing(svg, ("Partition", "Group", "AUROC (95% interval)"), rows)


def forest_row(axes: Axes, place: int, group: SubgroupResult) -> None:
    """A point and its interval with the figure beside it, or why there is none."""
    right: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7.5}
    estimate = group.auroc
    if estimate is None or estimate.value is None:
        over_the_line = {"facecolor": PAGE, "edgecolor": "none", "pad": 0.5}
        said = axes.text(0.02, place, short(group_text(group), 40), style="italic", bbox=over_the_line, **right)
        said.set(color=MUTED, in_layout=False)
        return
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [place, place], color=BLUE, lw=1.2)
    axes.plot(estimate.value, place, "s", color=BLUE, ms=4)
    axes.text(1.02, place, with_interval(estimate, 2).replace(" to ", "\u2013"), **right)


def training(metrics: Sequence[RoundMetrics], phase: str) -> Drawing | None:
    """A phase round by round: the loss; below, what tells learning from collapse, or the validation AUROC."""
    rounds = [row for row in metrics if row.phase == phase]
    below = [
        ("validation_auroc", "Validation AUROC", BLUE),
        ("validation_rmse", "Validation RMSE", VERMILLION),
    ]
    if phase == "pretrain":
        below = [
            ("violating_share", "Violating triplets", VERMILLION),
            ("mean_cosine", "Mean cosine", BLUE),
            ("hub_share", "Hub share", GREEN),
        ]
    below = [item for item in below if any(getattr(row, item[0]) is not None for row in rounds)]
    if not rounds:
        return None

    def paint(canvas: Canvas) -> None:
        panels = canvas.subplots(2 if below else 1, 1, sharex=True, squeeze=False)[:, 0]
        curve(panels[0], rounds, "train_loss", INK)
        panels[0].set_title("Training loss")
        for name, label, colour in below:
            curve(panels[1], rounds, name, colour, label)
        if below:
            panels[1].set_title(" ")  # keeps the height of a line free for the legend
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderpad": 0.0}
            legend = panels[1].legend(frameon=False, ncols=3, handlelength=1.2, columnspacing=1.0, **place)
            legend.set_in_layout(False)
        panels[-1].set_xlabel("Round")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)

    columns = ("Round", "Training loss", *(label for _, label, _ in below), "Sites", "Note")
    svg = draw(f"training-{phase}", 3.0, f"Training curves: {phase}", f"{len(rounds)} rounds", paint)
    return Drawing(svg, columns, tuple(training_row(row, [item[0] for item in below]) for row in rounds))


def training_row(row: RoundMetrics, names: Sequence[str]) -> tuple[str, ...]:
    """One round as text."""
    failed = f"no reply: {', '.join(row.sites_failed)}" if row.sites_failed else ""
    note = "; ".join(part for part in (row.warning or "", failed) if part)
    values = (number(getattr(row, name)) for name in names)
    return (str(row.round), number(row.train_loss), *values, str(len(row.sites_replied)), note)


def curve(axes: Axes, rounds: Sequence[RoundMetrics], name: str, colour: str, label: str = "") -> None:
    """One measure over the rounds that have it."""
    known = [(row.round, getattr(row, name)) for row in rounds if getattr(row, name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", color=colour, ms=2.5, label=label)


def square(canvas: Canvas, x_label: str, y_label: str) -> Axes:
    """A unit square with its diagonal."""
    axes: Axes = canvas.subplots()
    axes.plot([0, 1], [0, 1], color=RULE, lw=0.8, zorder=0)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=x_label, ylabel=y_label, xticks=ticks, yticks=ticks, aspect="equal")
    return axes


def group_text(group: SubgroupResult) -> str:
    """A group's AUROC, or why it is not there."""
    if group.suppressed:
        return suppressed_text(group)
    if group.auroc is None or group.auroc.value is None:
        reason = group.auroc.reason if group.auroc is not None else group.reason
        return f"not estimable ({reason})"
    return with_interval(group.auroc, 2)


def span_text(low: float | None, high: float | None) -> str:
    """An interval as text."""
    return "none" if low is None or high is None else f"{number(low)} to {number(high)}"
