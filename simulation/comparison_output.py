"""A comparison for people and for programs: JSON, CSV, Markdown, and a figure of AUROC against the share of labels."""

import csv
import io
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ScreenTable

from server.report.results import Estimate
from simulation.comparison_job import write_text
from simulation.comparison_plan import BASELINE
from simulation.comparison_summary import Row
from simulation.table import number

JSON_FILE, CSV_FILE, MARKDOWN_FILE, FIGURE_FILE = "comparison.json", "comparison.csv", "comparison.md", "comparison.svg"
# Okabe and Ito's eight colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")
MODES = ("local", "federated", "pooled", "unseen")


class Table(BaseModel):
    """comparison.json. `rows` are as `comparison_summary.Row`; `study` and `comparison` as they were read."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    name: str
    hemofed_version: str
    release_sha256: str
    study_sha256: str
    study: dict[str, object]
    comparison: dict[str, object]
    simulated: bool
    jobs: int
    jobs_finished: int
    rows: tuple[Row, ...]


def write_outputs(table: Table, out: Path) -> None:
    """Write all four files; what was there is replaced."""
    write_text(out / JSON_FILE, table.model_dump_json(indent=1) + "\n")
    write_text(out / CSV_FILE, csv_text(table.rows))
    write_text(out / MARKDOWN_FILE, markdown(table))
    draw(table, out / FIGURE_FILE)


def csv_text(rows: tuple[Row, ...]) -> str:
    """One line a cell; a figure is three columns: value, low, high."""
    figures = ("auroc", "auprc", "rmse", "r")
    plain = [name for name in Row.model_fields if name not in ("figures", "against_baseline")]
    spread = [f"{name}{part}" for name in (*figures, "against_baseline") for part in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *spread])
    for row in rows:
        estimates = [*(row.figures.get(name) for name in figures), row.against_baseline]
        values = [value for each in estimates for value in ((each.value, each.low, each.high) if each else (None,) * 3)]
        writer.writerow([*(getattr(row, name) for name in plain), *values])
    return text.getvalue()


def shown(estimate: Estimate | None, form: str = ".3f") -> str:
    """`0.781 (0.744 to 0.818)`; a dash where there is no figure."""
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def probability(value: float | None) -> str:
    """A p-value to two digits."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.2g}"


def markdown(table: Table) -> str:
    """Tables by task, mode and reading, one line a method, and what is missing."""
    parts = [f"# {table.name}: methods compared\n"]
    if table.simulated:
        parts.append("The hospitals are simulated: nothing here is known of real patients.\n")
    parts.append(
        "Intervals are 95%, over patients and seeds. Local and unseen: mean over hospitals, each with a model of its "
        "own; federated and pooled: all test patients, one model. Difference: to fine-tuned `supervised` on the same "
        "patients and labels; p by Holm over all differences here.\n"
    )
    parts.append(f"{table.jobs_finished} of {table.jobs} jobs are finished.\n")
    keys = dict.fromkeys((row.task, row.mode, row.reading, row.fraction) for row in table.rows)
    for task, mode, reading, fraction in keys:
        rows = [r for r in table.rows if (r.task, r.mode, r.reading, r.fraction) == (task, mode, reading, fraction)]
        parts.append(f"## {task}, {mode}, {reading}, {100 * fraction:g}% of labels\n")
        parts.append("\n".join(block(rows, task)) + "\n")
    return "\n".join(parts)


def block(rows: list[Row], task: str) -> list[str]:
    """One Markdown table."""
    first, second = ("AUROC", "AUPRC") if task == "classification" else ("RMSE", "r")
    lines = [
        f"| method | {first} | {second} | difference | p | worst group | gap | recall@1 | NMI | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.missing and not row.figures:
            lines.append(f"| {row.method} | {row.missing} | | | | | | | | |")
            continue
        worst = f"{row.worst_group}: {row.worst_group_figure:.3f}" if row.worst_group_figure is not None else "-"
        cells = (
            row.method + (" (untrained encoder)" if row.method == BASELINE and row.reading == "frozen" else ""),
            shown(row.figures.get(first.lower())),
            shown(row.figures.get(second.lower())),
            shown(row.against_baseline, "+.3f"),
            probability(row.p_adjusted),
            worst,
            *("-" if value is None else f"{value:.3f}" for value in (row.largest_gap, row.recall_at_1, row.nmi)),
            f"{row.seeds}" + (f" ({row.missing})" if row.missing else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(table: Table, path: Path) -> None:
    """AUROC against the share of labels: a column a mode, a row a reading, bands of 95%."""
    rows = [row for row in table.rows if row.task == "classification" and "auroc" in row.figures]
    rows = [row for row in rows if row.reading != "none" and row.mode != "unseen"]
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    readings = sorted({row.reading for row in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    canvas = Figure(figsize=(4 * max(len(modes), 1) + 2, 3.2 * max(len(readings), 1)), layout="constrained")
    FigureCanvasAgg(canvas)
    if not rows:
        canvas.text(0.5, 0.5, "no AUROC yet", ha="center")
    else:
        panels = canvas.subplots(len(readings), len(modes), sharex=True, sharey=True, squeeze=False)
        for place, reading in enumerate(readings):
            for column, mode in enumerate(modes):
                axes = panels[place, column]
                for number, method in enumerate(methods):
                    curve = [r for r in rows if (r.mode, r.reading, r.method) == (mode, reading, method)]
                    if curve:
                        plot(axes, curve, method, number)
                axes.set_title(f"{mode}, {reading}")
                axes.set_xscale("log")
                axes.set_xlabel("share of labelled training patients")
                axes.set_xticks(sorted({row.fraction for row in rows}))
                axes.set_xticklabels([f"{100 * share:g}%" for share in sorted({row.fraction for row in rows})])
                axes.minorticks_off()
                axes.spines[["top", "right"]].set_visible(False)
            panels[place, 0].set_ylabel("AUROC")
        lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
        canvas.legend(list(lines.values()), list(lines), loc="outside right center", frameon=False)
    unfinished = path.with_suffix(".unfinished")
    canvas.savefig(unfinished, format="svg", metadata={"Date": None})
    unfinished.replace(path)


def plot(axes: Axes, curve: list[Row], method: str, number: int) -> None:
    """One method's line and band."""
    curve = sorted(curve, key=lambda row: row.fraction)
    estimates = [row.figures["auroc"] for row in curve]
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates], np.float64).reshape(-1, 3).T
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    shares = [row.fraction for row in curve]
    axes.plot(shares, value, style, color=colour, marker=marker, ms=4, lw=1.3, label=method)
    axes.fill_between(shares, low, high, color=colour, alpha=0.08, linewidth=0)


def print_table(table: Table, console: Console) -> None:
    """AUROC or RMSE by method, reading and share, a column a mode; intervals are in the files."""
    for task in dict.fromkeys(row.task for row in table.rows):
        name = "auroc" if task == "classification" else "rmse"
        rows = [row for row in table.rows if row.task == task]
        modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
        screen = ScreenTable(title=f"{table.name}: {name.upper()}", box=SIMPLE)
        for heading in ("method", "reading", "labels", *modes):
            screen.add_column(heading, no_wrap=True)
        for method, reading, fraction in dict.fromkeys((row.method, row.reading, row.fraction) for row in rows):
            found = {r.mode: r for r in rows if (r.method, r.reading, r.fraction) == (method, reading, fraction)}
            estimates = [found[mode].figures.get(name) if mode in found else None for mode in modes]
            cells = [number(estimate.value if estimate else None) for estimate in estimates]
            screen.add_row(method, reading, f"{100 * fraction:g}%", *cells)
        console.print(screen)
