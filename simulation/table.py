"""The outcome of a run as a table on the terminal."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from server.report.results import Estimate, Results


def number(value: float | None) -> str:
    """Three decimals, or a dash for what was not computed."""
    return "-" if value is None else f"{value:.3f}"


def interval(estimate: Estimate) -> str:
    """`0.781 (0.744-0.818)`; a dash and the reason where there is no figure."""
    if estimate.value is None:
        return f"- ({estimate.reason})"
    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    join = " to " if estimate.low < 0 else "-"
    return f"{estimate.value:.3f} ({estimate.low:.3f}{join}{estimate.high:.3f})"


def print_table(results: Results, console: Console) -> None:
    """Local-only, federated, pooled and oracle: mean over sites, all patients together, and each site."""
    target, baselines = results.own_target, results.baselines
    arms = (
        ("local-only", baselines.local_only[target].auroc, "no one model"),
        ("federated", baselines.federated, interval(results.own.auroc)),
        ("pooled", baselines.pooled_by_site, interval(baselines.pooled[target].auroc)),
        ("oracle", baselines.oracle_by_site, number(results.oracle.on_test_patients)),
    )
    table = Table(title=f"{results.name}: AUROC of {target}", caption="one index ECG a test patient", box=SIMPLE)
    for column in ("", "mean of sites", "all patients (95% interval)"):
        table.add_column(column, no_wrap=True)
    for arm, means, everyone in arms:
        table.add_row(arm, number(means.mean), everyone)
    console.print(table)
    by_site = Table(title="by site", box=SIMPLE)
    for column in ("site", *(name for name, _, _ in arms)):
        by_site.add_column(column, no_wrap=True)
    for site in results.sites:
        by_site.add_row(site.name, *(number(means.sites.get(site.name)) for _, means, _ in arms))
    console.print(by_site)
    if (errors := results.own.regression) is not None:
        console.print(
            f"RMSE {number(errors.rmse)}, MAE {number(errors.mae)}, r {number(errors.pearson_r)}; RMSE of always "
            f"saying the mean: {number(errors.mean_predictor_rmse)}" + (f" ({errors.reason})" if errors.reason else ""),
            highlight=False,
        )
    compared = baselines.comparisons
    console.print(
        f"federated minus local-only, paired: {interval(compared.federated_minus_local_only)}",
        highlight=False,
    )
    console.print(f"federated minus pooled, paired:     {interval(compared.federated_minus_pooled)}", highlight=False)
    if results.oracle.value is not None:
        console.print(
            f"oracle on {results.oracle.patients:,} fresh patients: {number(results.oracle.value)}; "
            f"ceiling by wedge reading noise alone: {number(results.oracle.noise_ceiling_auroc)}",
            highlight=False,
        )
    for name, reason in results.left_out.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    print_groups(results, console)


def print_groups(results: Results, console: Console) -> None:
    """The subgroups of one factor, suppressed ones named as such."""
    table = Table(title="by subgroup (counts rounded to 5)", box=SIMPLE)
    for column in ("group", "patients", "AUROC (95% interval)"):
        table.add_column(column)
    for group in results.subgroups:
        if " x " in group.partition:
            continue
        label = f"{group.partition}: {group.group}"
        if group.suppressed or group.auroc is None:
            table.add_row(label, "suppressed" if group.suppressed else "-", group.reason or "-")
        else:
            table.add_row(label, str(group.patients), interval(group.auroc))
    console.print(table)
