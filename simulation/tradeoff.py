"""`hemofed-sim tradeoff`: what privacy costs in accuracy, on simulated hospitals: epsilon x start x what is trained."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from shared_model.errors import ExitCode, HemoFedError
from shared_model.release import VERSION, release_sha256
from shared_model.study import Study
from shared_model.workers import worker_pool
from simulation.bank import make_bank, public_hospital
from simulation.comparison_figures import FIGURES
from simulation.comparison_job import Setup, require_same
from simulation.comparison_summary import Floats, Patients, interval, patients_of, stacked
from simulation.consortium import Hospital, hospitals_of, make_hospital, make_hospitals
from simulation.hospitals import HospitalSpec
from simulation.plan import Simulation
from simulation.tradeoff_job import FACTS_FILE, SCORES_FILE, Ground, public_start, run_cell, tidy
from simulation.tradeoff_output import Point, TradeoffTable, write_outputs
from simulation.tradeoff_plan import Cell, Tradeoff, cells_of
from simulation.watch import bars

ALONE_JUDGE = "alone-judge"
JUDGE_PATIENTS = 4000
TRAIN_SHARE = 0.6


@dataclass(frozen=True)
class AskedTradeoff:
    """What was asked for on the command line."""

    study: Study
    plan: Simulation
    tradeoff: Tradeoff
    out: Path
    workers: int


def tradeoff(asked: AskedTradeoff, console: Console) -> TradeoffTable:
    """Run the cells that are not done yet, and write the table of all that are.

    Raises:
        HemoFedError: the study has no `[privacy]`, or the folder holds another trade-off.
    """
    if asked.study.privacy is None:
        raise HemoFedError("tradeoff: the study has no [privacy]; add it", ExitCode.BAD_STUDY)
    identity = {
        "study": asked.study.model_dump(mode="json"),
        "simulation": asked.plan.model_dump(mode="json"),
        "public_patients": asked.tradeoff.public_patients,
        "bank_ecgs": asked.tradeoff.bank_ecgs,
        "release": release_sha256(),
    }
    require_same(asked.out, identity)
    ground = prepared(asked, console)
    cells = cells_of(asked.tradeoff)
    run_cells(ground, [cell for cell in cells if not finished(ground, cell)], asked.workers, console)
    for cell in cells:
        if finished(ground, cell):
            tidy(ground.folder(cell))
    table = TradeoffTable(
        name=asked.study.name,
        hemofed_version=VERSION,
        release_sha256=release_sha256(),
        study=asked.study.model_dump(mode="json"),
        tradeoff=asked.tradeoff.model_dump(mode="json"),
        cells=len(cells),
        cells_finished=sum(finished(ground, cell) for cell in cells),
        points=tuple(points_of(ground, cells)),
    )
    write_outputs(table, asked.out)
    return table


def finished(ground: Ground, cell: Cell) -> bool:
    """Whether a cell is trained and scored."""
    return (ground.folder(cell) / FACTS_FILE).exists()


def prepared(asked: AskedTradeoff, console: Console) -> Ground:
    """Hospitals, the public archive, the banks, and the public starts of all seeds."""
    plan, settings, out = asked.plan, asked.tradeoff, asked.out
    sizes = sorted({size for sweep in settings.sweeps for size in sweep.patients if size})
    extra = [HospitalSpec(name=f"alone-{size}", patients=ceil(size / TRAIN_SHARE)) for size in sizes]
    extra += [HospitalSpec(name=ALONE_JUDGE, patients=JUDGE_PATIENTS)] if sizes else []
    # Labelled only because a study asks for somebody to fine-tune on: its pretraining never looks at them.
    public = Hospital(public_hospital(settings.public_patients, labelled_share=1.0), out / "hospitals" / "public")
    whole = plan.model_copy(update={"hospitals": (*plan.hospitals, *extra)})
    with bars(console) as progress:
        task = progress.add_task("hospitals, public archive and banks", total=len(whole.hospitals) + 3)
        for _ in make_hospitals(whole, out / "hospitals", asked.workers, asked.study.target.threshold):
            progress.advance(task)
        make_hospital(public, plan.seed)
        progress.advance(task)
        kinds = {"shifted": None, "same": HospitalSpec(name="same", patients=settings.bank_ecgs, labelled_share=0)}
        banks = {}
        for kind, spec in kinds.items():
            banks[kind] = out / f"bank-{kind}.safetensors"
            if not banks[kind].exists():
                banks[kind].write_bytes(make_bank(settings.bank_ecgs, plan.seed, spec))
            progress.advance(task)
    made = {hospital.spec.name: hospital.site_dir for hospital in hospitals_of(whole, out / "hospitals")}
    sites = {spec.name: made[spec.name] for spec in plan.hospitals}
    return Ground(
        asked.study,
        dict(sorted(sites.items())),
        {size: made[f"alone-{size}"] for size in sizes},
        public.site_dir,
        banks,
        dict(sorted(sites.items())) | ({ALONE_JUDGE: made[ALONE_JUDGE]} if sizes else {}),
        out,
    )


def run_cells(ground: Ground, cells: Sequence[Cell], workers: int, console: Console) -> None:
    """Run cells, `workers` at a time; each leaves its files, so that a sweep that was killed goes on."""
    with bars(console) as progress:
        starts = sorted({cell.seed for cell in cells if cell.start != "scratch"})
        task = progress.add_task("public starts and cells", total=len(starts) + len(cells))
        with worker_pool(workers) as pool:
            for done in as_completed([pool.submit(public_start, ground, seed) for seed in starts]):
                done.result()
                progress.advance(task)
            for cell_done in as_completed([pool.submit(run_cell, ground, cell) for cell in cells]):
                cell_done.result()
                progress.advance(task)


def points_of(ground: Ground, cells: Sequence[Cell]) -> list[Point]:
    """One point for each arm: AUROC over its seeds, with an interval over patients and seeds."""
    setup = Setup(ground.study, ground.judges, ground.out)
    patients = {name: patients_of(setup, name) for name in ground.judges}
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    return [point_of(ground, patients, arm) for arm in arms.values()]


def point_of(ground: Ground, patients: Mapping[str, Patients], cells: Sequence[Cell]) -> Point:
    """The seeds of one arm as a point; without figures where none is finished."""
    first, done = cells[0], [cell for cell in cells if finished(ground, cell)]
    point = Point(
        start=first.start,
        epsilon=first.epsilon or None,
        trained=first.trained,
        bank=first.bank,
        patients=first.patients or None,
        seeds=len(done),
    )
    if not done:
        return point
    facts = [json.loads((ground.folder(cell) / FACTS_FILE).read_text()) for cell in done]
    judges = [ALONE_JUDGE] if first.patients else list(ground.sites)
    values = {cell.seed: auroc_of(load_file(ground.folder(cell) / SCORES_FILE), patients, judges) for cell in done}
    return point.model_copy(
        update={
            "auroc": interval(stacked(values), len(cells)),
            "spent_epsilon": facts[0]["epsilon"],
            "noise_multiplier": facts[0]["noise_multiplier"],
            "signal_to_noise": {
                task: mean_of_rounds([fact["signal_to_noise"][task] for fact in facts])
                for task in facts[0]["signal_to_noise"]
                if first.epsilon
            },
        }
    )


def mean_of_rounds(by_seed: Sequence[Sequence[float | None]]) -> tuple[float, ...]:
    """The mean over seeds of each round that all seeds saw."""
    rounds = zip(*by_seed, strict=False)
    return tuple(round(float(np.mean([v for v in values if v is not None])), 4) for values in rounds if any(values))


def auroc_of(scores: Mapping[str, Floats], patients: Mapping[str, Patients], judges: Sequence[str]) -> Floats:
    """(1 + replicates,) AUROC over the test patients of the judges."""
    figure = FIGURES["classification"]["auroc"]
    return figure(
        np.concatenate([scores[name] for name in judges]),
        np.concatenate([patients[name].outcome for name in judges]),
        np.hstack([patients[name].weights for name in judges]),
    )
