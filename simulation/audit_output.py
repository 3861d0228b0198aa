"""An audit for people and for programs: JSON, every canary's scores as CSV, a table, and a figure."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ScreenTable

from shared_model.privacy import PrivatePhase
from simulation.audit_canaries import What
from simulation.comparison_job import write_text
from simulation.comparison_output import COLOURS, MARKERS

JSON_FILE, CSV_FILE, FIGURE_FILE = "audit.json", "canaries.csv", "audit.svg"
Verdict = Literal["passed", "toothless", "broken"]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class AttackResult(BaseModel):
    """One attack on one arm.

    Attributes:
        auc: area under the ROC curve of telling canaries that were in from those that were not.
        tpr_at_1_percent, tpr_at_0_1_percent: share of those that were in found, at that rate of false alarms.
        epsilon_lower_bound: holds with the audit's confidence; `correct` of `guesses` were right.
    """

    model_config = ConfigDict(frozen=True)

    attack: str
    auc: float
    tpr_at_1_percent: float
    tpr_at_0_1_percent: float
    epsilon_lower_bound: float
    guesses: int
    correct: int


class ArmResult(BaseModel):
    """One way of training. `claimed_epsilon` is the accountant's, at the audit's delta; None: nothing is claimed."""

    model_config = ConfigDict(frozen=True)

    name: str
    steps: int
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    claimed_epsilon: float | None
    included: int
    attacks: tuple[AttackResult, ...]

    @property
    def largest_bound(self) -> float:
        """Of all attacks."""
        return max(each.epsilon_lower_bound for each in self.attacks)

    @property
    def broken(self) -> bool:
        """Whether an attack refutes what is claimed."""
        return self.claimed_epsilon is not None and self.largest_bound > self.claimed_epsilon


class Audit(BaseModel):
    """audit.json.

    Attributes:
        confidence: of each lower bound by itself.
        demanded_bound: what the attacks must reach in the first arm, without privacy.
        ceiling: the bound if every canary were guessed right.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    hemofed_version: str
    release_sha256: str
    what: What
    canaries: int
    shadows: int
    delta: float
    confidence: float
    demanded_bound: float
    ceiling: float
    verdict: Verdict
    arms: tuple[ArmResult, ...]


@dataclass(frozen=True, eq=False)
class Tried:
    """An arm with what every attack said of every canary: scores (m,), high for "was in"."""

    name: str
    run: PrivatePhase
    claim: float | None
    included: Mask
    scores: dict[str, Floats]
    attacks: tuple[AttackResult, ...]

    @property
    def result(self) -> ArmResult:
        """As it stands in audit.json."""
        return ArmResult(
            name=self.name,
            steps=self.run.steps_per_round,
            sampling_rate=self.run.sampling_rate,
            clip_norm=self.run.clip_norm,
            noise_multiplier=self.run.noise_multiplier,
            claimed_epsilon=self.claim,
            included=int(self.included.sum()),
            attacks=self.attacks,
        )


def roc(scores: Floats, included: Mask) -> tuple[Floats, Floats]:
    """False and true positive rate at every threshold, from none to all; equal scores are called together."""
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    hits, alarms = (np.cumsum(found)[last_of_equals] for found in (included[order], ~included[order]))
    return np.append(0.0, alarms / max(1, alarms[-1])), np.append(0.0, hits / max(1, hits[-1]))


def auc(scores: Floats, included: Mask) -> float:
    """Area under the ROC curve."""
    false_rate, true_rate = roc(scores, included)
    return float(np.trapezoid(true_rate, false_rate))


def tpr_at(scores: Floats, included: Mask, false_rate: float) -> float:
    """The true positive rate at the last threshold with at most that rate of false positives."""
    false_rates, true_rates = roc(scores, included)
    return float(true_rates[false_rates <= false_rate].max())


def write_outputs(audit: Audit, tried: list[Tried], out: Path) -> None:
    """Write all three files; what was there is replaced."""
    write_text(out / JSON_FILE, audit.model_dump_json(indent=1) + "\n")
    write_text(out / CSV_FILE, csv_text(tried))
    draw(audit, tried, out / FIGURE_FILE)


def csv_text(tried: list[Tried]) -> str:
    """One line for each canary of each arm: whether it was in, and each attack's score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(tried[0].scores)
    writer.writerow(["arm", "steps", "canary", "included", *names])
    for arm in tried:
        columns = [arm.included.astype(int), *(arm.scores[name] for name in names)]
        for canary, values in enumerate(zip(*columns, strict=True)):
            included, *scores = values
            writer.writerow([arm.name, arm.run.steps_per_round, canary, included, *map(float, scores)])
    return text.getvalue()


def heading(arm: ArmResult) -> str:
    """What was trained, how long, and what is claimed for it."""
    claim = "" if arm.claimed_epsilon is None else f", claim {arm.claimed_epsilon:.2f}"
    return f"{arm.name}, {arm.steps} step{'s' if arm.steps > 1 else ''}{claim}"


def print_table(audit: Audit, console: Console) -> None:
    """What was found, one line for each attack on each arm, and what follows."""
    table = ScreenTable(
        title=f"audit of {audit.what}: {audit.canaries} canaries",
        caption=f"bounds at {100 * audit.confidence:g}%, delta {audit.delta:g}; none can exceed {audit.ceiling:.2f}",
        box=SIMPLE,
    )
    for column in ("training, attack", "AUC", "TPR 1%", "0.1%", "bound", "right"):
        table.add_column(column, no_wrap=True)
    for arm in audit.arms:
        table.add_row(heading(arm))
        for each in arm.attacks:
            rates = (f"{rate:.3f}" for rate in (each.auc, each.tpr_at_1_percent, each.tpr_at_0_1_percent))
            bound = f"{each.epsilon_lower_bound:.2f}"
            table.add_row(f"  {each.attack}", *rates, bound, f"{each.correct}/{each.guesses}")
    console.print(table)
    if audit.verdict == "passed":
        console.print(
            f"passed: without privacy {audit.arms[0].largest_bound:.2f} is shown ({audit.demanded_bound:.2f} was "
            "demanded), and no bound exceeds its claim. This finds faults; it does not prove that there are none.",
            highlight=False,
        )


def draw(audit: Audit, tried: list[Tried], path: Path) -> None:
    """Left: each arm's bounds beside its claim. Right: ROC curves of each arm's best attack, on logarithmic axes."""
    canvas = Figure(figsize=(10.5, 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2)
    draw_bounds(audit, left)
    draw_roc(tried, right)
    unfinished = path.with_suffix(".unfinished")
    canvas.savefig(unfinished, format="svg", metadata={"Date": None})
    unfinished.replace(path)


def draw_bounds(audit: Audit, axes: Axes) -> None:
    """One row an arm: a bar for the claim, a marker for each attack's bound."""
    for number, name in enumerate(each.attack for each in audit.arms[0].attacks):
        bounds = [arm.attacks[number].epsilon_lower_bound for arm in audit.arms]
        rows = np.arange(len(bounds)) + 0.12 * (number - (len(audit.arms[0].attacks) - 1) / 2)
        axes.plot(bounds, rows, MARKERS[number], color=COLOURS[number + 1], ms=6, label=name, clip_on=False)
    for row, arm in enumerate(audit.arms):
        if arm.claimed_epsilon is not None:
            claim = "claimed epsilon" if arm is next(a for a in audit.arms if a.claimed_epsilon is not None) else None
            axes.plot([arm.claimed_epsilon] * 2, [row - 0.35, row + 0.35], color=COLOURS[0], lw=2.5, label=claim)
    axes.axvline(audit.ceiling, color="#999999", lw=0.8, ls=":", label="all guesses right")
    axes.set_yticks(range(len(audit.arms)), [heading(arm) for arm in audit.arms])
    axes.set_ylim(len(audit.arms) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("epsilon: claim, and lower bound by each attack")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.15))


def draw_roc(tried: list[Tried], axes: Axes) -> None:
    """True against false positive rate of the attack with the largest bound, by AUC where none has one."""
    for number, arm in enumerate(tried):
        best = max(arm.attacks, key=lambda each: (each.epsilon_lower_bound, each.auc))
        false_rate, true_rate = roc(arm.scores[best.attack], arm.included)
        label = f"{arm.name}, {arm.run.steps_per_round} steps ({best.attack})"
        axes.step(false_rate, true_rate, where="post", color=COLOURS[number % len(COLOURS)], lw=1.4, label=label)
    least = 1 / max(len(arm.included) for arm in tried)
    axes.plot([least, 1], [least, 1], color="#999999", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
