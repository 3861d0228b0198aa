"""A privacy budget, and what a plan costs, as tables for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table

from client.budget import Budget, PhaseCost, PlanCost
from client.plain_text import shown


def budget_screen(budget: Budget) -> RenderableType:
    """Caps and shares, and under them the rounds of every admitted study."""
    totals = Table(title="one patient's privacy budget", title_justify="left")
    for heading in ("", "epsilon", "delta"):
        totals.add_column(heading, justify="left" if not heading else "right")
    totals.add_row("cap", f"{budget.epsilon:g}", f"{budget.delta:g}")
    totals.add_row("given out", f"{budget.epsilon_shared:g}", f"{budget.delta_shared:g}")
    totals.add_row("left", f"{budget.epsilon_left:g}", f"{budget.delta_left:g}")
    return Group(totals, _studies(budget)) if budget.studies else Group(totals, "no study is admitted yet")


def _studies(budget: Budget) -> Table:
    table = Table(title="rounds; what was reserved is spent, answered or not", title_justify="left")
    table.add_column("study")
    table.add_column("share", justify="right")
    table.add_column("task")
    for heading in ("planned", "reserved", "answered", "left"):
        table.add_column(heading, justify="right")
    for study in budget.studies:
        who = f"{shown(study.name)} ({study.digest[:8]})"
        share = f"{study.epsilon:g}, {study.delta:g}" + (", filter" if study.accounting == "filter" else "")
        for task in study.tasks:
            table.add_row(who, share, task.task, *map(str, (task.planned, task.reserved, task.answered, task.left)))
            who = share = ""
        table.add_section()
    return table


def plan_screen(cost: PlanCost) -> RenderableType:
    """The plan line by line, then together, then whether the hospital would admit it."""
    title = f"{shown(cost.study)} ({cost.digest[:8]}): what its plan costs one patient at delta {cost.delta:g}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for heading in ("rounds", "steps", "q", "sigma", "epsilon", "more rounds"):
        table.add_column(heading, justify="right")
    for phase in cost.phases:
        noisy = bool(phase.noise_to_signal)
        table.add_row(
            phase.task,
            str(phase.rounds),
            str(phase.steps_per_round) if noisy else "",
            f"{phase.sampling_rate:g}" if noisy else "",
            f"{phase.noise_multiplier:g}" if noisy else "",
            f"{phase.epsilon:.3f}",
            f"{phase.more_rounds:+d}",
        )
    table.add_section()
    table.add_row("together", "", "", "", "", f"{cost.epsilon:.3f}", "")
    verdict = "admitted already" if cost.admitted else "would be admitted"
    lines = [f"refused: {shown(line)}" for line in cost.refused] or [verdict]
    share = f"share: epsilon {cost.share_epsilon:g}; the plan is {'within' if cost.within_share else 'above'} it"
    return Group(table, _noise([phase for phase in cost.phases if phase.noise_to_signal]), share, *lines)


def _noise(phases: list[PhaseCost]) -> Table:
    table = Table(title="noise to signal, sigma / (q N), for N training patients", title_justify="left")
    table.add_column("task")
    patients = list(dict.fromkeys(n for phase in phases for n in phase.noise_to_signal))
    for n in sorted(patients, key=int):
        table.add_column(n, justify="right")
    for phase in phases:
        values = (phase.noise_to_signal.get(n) for n in sorted(patients, key=int))
        table.add_row(phase.task, *("" if value is None else f"{value:.4f}" for value in values))
    return table
