"""A trade-off for people and for programs: JSON, Markdown, and a figure of AUROC against epsilon."""

from pathlib import Path
from typing import Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from server.report.results import Estimate
from simulation.comparison_job import write_text
from simulation.comparison_output import COLOURS, MARKERS, shown

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "tradeoff.json", "tradeoff.md", "tradeoff.svg"


class Point(BaseModel):
    """One arm.

    Attributes:
        epsilon: asked for, of the whole study; None is no privacy.
        patients: of a hospital alone; None is the federation.
        auroc: mean over seeds, its interval over patients and seeds.
        spent_epsilon: what the plan costs, at the study's delta.
        noise_multiplier: sigma by phase.
        signal_to_noise: by phase, of each round, a mean over seeds and hospitals.
    """

    model_config = ConfigDict(frozen=True)

    start: str
    epsilon: float | None
    trained: str
    bank: str
    patients: int | None
    seeds: int
    auroc: Estimate | None = None
    spent_epsilon: float | None = None
    noise_multiplier: dict[str, float] = {}
    signal_to_noise: dict[str, tuple[float, ...]] = {}

    @property
    def curve(self) -> str:
        """What it is a point of, in words."""
        bank = ", bank of the same hospitals" if self.bank == "same" else ""
        size = f", alone with {self.patients:,} patients" if self.patients else ""
        return f"{self.start.replace('_', ' ')}, {self.trained.replace('_', ' ')}{bank}{size}"


class TradeoffTable(BaseModel):
    """tradeoff.json."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    name: str
    hemofed_version: str
    release_sha256: str
    study: dict[str, object]
    tradeoff: dict[str, object]
    cells: int
    cells_finished: int
    points: tuple[Point, ...]


def write_outputs(table: TradeoffTable, out: Path) -> None:
    """Write all three files; what was there is replaced."""
    write_text(out / JSON_FILE, table.model_dump_json(indent=1) + "\n")
    write_text(out / MARKDOWN_FILE, markdown(table))
    draw(table, out / FIGURE_FILE)


def epsilon_words(epsilon: float | None) -> str:
    """The number, or `none`."""
    return "none" if epsilon is None else f"{epsilon:g}"


def markdown(table: TradeoffTable) -> str:
    """One line a point."""
    lines = [
        f"# {table.name}: privacy against accuracy\n",
        "Simulated hospitals. Intervals are 95%, over patients and seeds. Private cells cannot be repeated bit for "
        "bit: noise is never seeded.\n",
        f"{table.cells_finished} of {table.cells} cells are finished.\n",
        "| start, trained | epsilon | AUROC | sigma | signal to noise, first and last round | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for point in table.points:
        sigma = ", ".join(f"{task} {value:g}" for task, value in point.noise_multiplier.items()) or "-"
        signal = ", ".join(f"{k} {v[0]:.2g} to {v[-1]:.2g}" for k, v in point.signal_to_noise.items() if v) or "-"
        cells = (point.curve, epsilon_words(point.epsilon), shown(point.auroc), sigma, signal, str(point.seeds))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(table: TradeoffTable, path: Path) -> None:
    """AUROC against epsilon, a curve for each start; no privacy at the right edge."""
    points = [point for point in table.points if point.auroc is not None and point.auroc.value is not None]
    canvas = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    finite = sorted({point.epsilon for point in points if point.epsilon is not None})
    right = 3 * finite[-1] if finite else 1.0
    for number, curve in enumerate(dict.fromkeys(point.curve for point in points)):
        own = sorted((p for p in points if p.curve == curve), key=lambda p: p.epsilon or right)
        places = [point.epsilon or right for point in own]
        values = [point.auroc.value for point in own if point.auroc]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(places, values, color=colour, marker=marker, ms=5, lw=1.3, label=curve)  # type: ignore[arg-type]
        low = [point.auroc.low or 0.0 for point in own if point.auroc]
        high = [point.auroc.high or 0.0 for point in own if point.auroc]
        axes.fill_between(places, low, high, color=colour, alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks([*finite, right], [*(f"{epsilon:g}" for epsilon in finite), "none"])
    axes.minorticks_off()
    axes.set_xlabel("epsilon of the whole study")
    axes.set_ylabel("AUROC")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right center", frameon=False)
    unfinished = path.with_suffix(".unfinished")
    canvas.savefig(unfinished, format="svg", metadata={"Date": None})
    unfinished.replace(path)
