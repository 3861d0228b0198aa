"""One `hemofed-sim run`: make the hospitals, run the federation, run the baselines, write the folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from client.store import open_store
from server.conduct import write_folder
from server.report.files import load_results
from server.report.results import Oracle, Results
from shared_model.ecg_paper import ExampleEcg
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from shared_model.study import Study
from simulation.baselines import (
    Scored,
    baseline_arms,
    baselines_of,
    everyone_auroc,
    index_test_rows,
    run_baselines,
    score_all,
)
from simulation.circulation import Population
from simulation.consortium import TRUTH_FILE, hospitals_of, make_hospitals
from simulation.grid import run_in_process, run_on_ray
from simulation.oracle import oracle_auroc
from simulation.plan import Simulation
from simulation.private_sites import equip, put_bank
from simulation.watch import bars, watched

ORACLE = (
    "AUROC of P(recorded mPCWP above the threshold | every generating parameter of the ECG except the pressure), "
    "exact, on fresh patients of the reference population, one ECG each"
)


@dataclass(frozen=True)
class Experiment:
    """What was asked for on the command line."""

    study: Study
    plan: Simulation | None
    out: Path
    engine: str
    workers: int
    baselines: bool
    resume: bool
    start: Path | None = None
    bank: Path | None = None


def run_experiment(experiment: Experiment, own_sites: Mapping[str, Path], console: Console) -> Results:
    """Run all of it; returns what results.json then holds.

    Raises:
        HemoFedError: there are neither simulated hospitals nor site folders, or a step failed.
    """
    study, out = experiment.study, experiment.out
    sites = dict(own_sites)
    truths: dict[str, Path] = {}
    if experiment.plan is not None:
        prepare_hospitals(study, experiment.plan, out, experiment.workers, console)
        for hospital in hospitals_of(experiment.plan, out / "hospitals"):
            sites[hospital.spec.name] = hospital.site_dir
            truths[hospital.spec.name] = hospital.folder / TRUTH_FILE
            if study.privacy is not None:
                share = int(experiment.plan.split.split("/")[0]) / 100
                equip(hospital.site_dir, study, round(share * hospital.spec.patients), experiment.bank)
    if not sites:
        raise HemoFedError(
            "no hospitals: give --site DIR, or a [simulation] table in the study file", ExitCode.BAD_STUDY
        )
    if experiment.plan is None and study.privacy is not None:
        for site_dir in sites.values():
            put_bank(site_dir, study.privacy, experiment.bank)
    engine = run_on_ray if experiment.engine == "ray" else run_in_process
    with watched(study, out, sites, console):
        engine(
            study,
            list(sites.values()),
            out,
            resume=experiment.resume,
            workers=experiment.workers,
            start=experiment.start,
        )
    results = load_results(out)
    # A hospital that was left out stays out of every arm: the comparison is on the same data, or it is none.
    sites = {site.name: sites[site.name] for site in results.sites}
    truths = {name: path for name, path in truths.items() if name in sites}
    if experiment.baselines and study.privacy is None:
        train_baselines(experiment, sites, console)
    elif experiment.baselines:
        console.print("no baselines: each would spend the hospitals' privacy budget again", style="yellow")
    scored = score_all(study, sites, out, truths)
    results = results.model_copy(update={"baselines": baselines_of(study, scored, sites)})
    if experiment.plan is not None:
        oracle = oracle_of(study, experiment.plan, scored)
        results = results.model_copy(update={"oracle": oracle, "oracle_auroc": oracle.value})
    results = Results.model_validate(results.model_dump())
    write_folder(results, out, examples_of(study, sites) if results.simulated else ())
    return results


def prepare_hospitals(study: Study, plan: Simulation, out: Path, workers: int, console: Console) -> None:
    """Write and ingest the simulated hospitals under `out`, with a bar that counts patients."""
    with bars(console) as progress:
        task = progress.add_task("hospitals: write and ingest", total=sum(spec.patients for spec in plan.hospitals))
        for hospital in make_hospitals(plan, out / "hospitals", workers, study.target.threshold):
            progress.advance(task, hospital.spec.patients)


def train_baselines(experiment: Experiment, sites: Mapping[str, Path], console: Console) -> None:
    """Train every hospital alone and all pooled, with a bar that counts finished arms."""
    study = experiment.study
    arms = baseline_arms(study, sites, experiment.out)
    with bars(console) as progress:
        task = progress.add_task("baselines: local-only and pooled", total=len(arms))
        for arm, fault in run_baselines(study, arms, experiment.workers, experiment.start):
            progress.advance(task)
            if fault:
                console.print(f"baseline {arm.name} is missing: {fault}", style="yellow", markup=False)


def oracle_of(study: Study, plan: Simulation, scored: Scored) -> Oracle:
    """The ceilings of the reference population, and the oracle on this study's own test patients."""
    threshold = study.target.threshold
    ceilings = oracle_auroc(Population(), threshold_mmhg=threshold, seed=plan.seed, patients=plan.oracle_patients)
    on_test = everyone_auroc(scored.oracle)
    return Oracle(
        value=ceilings.oracle_auroc,
        on_test_patients=on_test.value,
        patients=plan.oracle_patients,
        noise_ceiling_auroc=ceilings.noise_ceiling_auroc,
        definition=ORACLE,
        reason=on_test.reason,
    )


def examples_of(study: Study, sites: Mapping[str, Path]) -> tuple[ExampleEcg, ...]:
    """Two ECGs a simulated hospital for the page: the lowest and the highest recorded pressure of its test split."""
    examples = []
    column = study.target.column
    for name, site_dir in sorted(sites.items()):
        store = open_store(site_dir)
        rows = index_test_rows(store, study)
        if not len(rows):
            continue
        values = store.index.labels[column]
        for row in (rows[np.argmin(values[rows])], rows[np.argmax(values[rows])]):
            signal, present = to_millivolt(store.read(np.array([row])))
            caption = f"{name}: simulated, recorded {column} {values[row]:.0f}"
            examples.append(ExampleEcg(caption, np.where(present, signal, np.nan)[0].astype(np.float32)))
    return tuple(examples[:4])
