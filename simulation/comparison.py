"""`hemofed-sim compare`: methods x ways of sharing x shares of labels x seeds, on the same patients."""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from client.store import open_store
from client.tasks import describer
from shared_model.errors import ExitCode, HemoFedError
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.relations import RELATIONS
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.release import VERSION, release_sha256
from shared_model.study import Study
from shared_model.workers import worker_pool
from simulation.comparison_job import Setup, require_same, run_job, score_file, too_few
from simulation.comparison_output import Table, write_outputs
from simulation.comparison_plan import Comparison, Job, jobs_of
from simulation.comparison_summary import WAVES, summarise
from simulation.consortium import hospitals_of
from simulation.experiment import prepare_hospitals
from simulation.plan import Simulation
from simulation.watch import bars


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line."""

    study: Study
    plan: Simulation | None
    comparison: Comparison
    out: Path
    workers: int
    budget_minutes: float | None = None


def compare(asked: Asked, own_sites: Mapping[str, Path], console: Console) -> Table:
    """Run what is not done yet, and write the table of all that is.

    Raises:
        HemoFedError: there are no hospitals, the folder holds another comparison, or a study of it is impossible.
    """
    deadline = None if asked.budget_minutes is None else time.monotonic() + 60 * asked.budget_minutes
    setup = prepared(asked, own_sites, console)
    jobs = jobs_of(asked.comparison, list(setup.sites))
    run_jobs(setup, [job for job in jobs if not finished(setup, job)], asked.workers, deadline, console)
    for job in jobs:
        if finished(setup, job):
            tidy(setup.folder(job))
    table = Table(
        name=asked.study.name,
        hemofed_version=VERSION,
        release_sha256=release_sha256(),
        study_sha256=asked.study.digest,
        study=asked.study.model_dump(mode="json"),
        comparison=asked.comparison.model_dump(mode="json"),
        simulated=asked.plan is not None,
        jobs=len(jobs),
        jobs_finished=sum(finished(setup, job) for job in jobs),
        rows=tuple(summarise(setup, asked.comparison)),
    )
    write_outputs(table, asked.out)
    return table


def prepared(asked: Asked, own_sites: Mapping[str, Path], console: Console) -> Setup:
    """The sites made or found, the folder taken, and every study of the comparison seen to be possible."""
    sites = dict(own_sites)
    if asked.plan is not None:
        sites = {
            hospital.spec.name: hospital.site_dir for hospital in hospitals_of(asked.plan, asked.out / "hospitals")
        }
    if not sites:
        raise HemoFedError(
            "no hospitals: give --site DIR, or a [simulation] table in the study file", ExitCode.BAD_STUDY
        )
    check_study(asked.study)
    for name in (method for block in asked.comparison.blocks for method in block.methods):
        if name != asked.study.objective.name:
            check_settings(name)
    identity = {
        "study": asked.study.model_dump(mode="json"),
        "simulation": asked.plan.model_dump(mode="json") if asked.plan else None,
        "sites": {name: str(path.resolve()) for name, path in sorted(sites.items())} if not asked.plan else None,
        "release": release_sha256(),
    }
    require_same(asked.out, identity)
    if asked.plan is not None:
        prepare_hospitals(asked.study, asked.plan, asked.out, asked.workers, console)
    setup = Setup(asked.study, dict(sorted(sites.items())), asked.out)
    describe_first(setup, asked.comparison, console)
    return setup


def check_study(study: Study) -> None:
    """Refuse what the jobs cannot do: what stays at a site would be lost between a job's steps, and the model be scored
    without it; and each of many jobs would spend the hospitals' privacy budget.

    Raises:
        HemoFedError: the study has either.
    """
    if study.privacy is not None:
        raise HemoFedError(
            "comparison: a study with [privacy] is not compared, each job would spend budget; remove the table",
            ExitCode.BAD_STUDY,
        )
    if study.federation.rule == "fedbn" or not study.finetune.share_head:
        raise HemoFedError(
            "comparison: models of which a part stays at the site are not compared; "
            'use another federation.rule than "fedbn", and finetune.share_head = true',
            ExitCode.BAD_STUDY,
        )


def check_settings(name: str) -> None:
    """A row that needs a setting can be compared only as the study's own objective."""
    try:
        ObjectiveSettings(name=name)
    except ValueError:
        raise HemoFedError(
            f"comparison: {name} needs settings of its own; name it in [objective] with them", ExitCode.BAD_STUDY
        ) from None


def describe_first(setup: Setup, comparison: Comparison, console: Console) -> None:
    """Fill the sites' caches of slow descriptions once, so that jobs side by side do not all do it."""
    named = [WAVES, *(name for block in comparison.blocks for name in block.methods)]  # one baseline sees intervals
    slow = {METHODS[name].relation: name for name in named if RELATIONS[METHODS[name].relation].cached}
    torch.set_num_threads(1)
    with bars(console) as progress:
        task = progress.add_task("describing ECGs", total=len(slow) * len(setup.sites))
        for name in slow.values():
            study = setup.study.model_copy(update={"objective": ObjectiveSettings(name=name)})
            for site_dir in setup.sites.values():
                describer(open_store(site_dir), study, site_dir)
                progress.advance(task)


def finished(setup: Setup, job: Job) -> bool:
    """Whether every score that the job can have is there."""
    return all(
        (setup.folder(job) / score_file(fraction, reading, task)).exists()
        for fraction in job.fractions
        if too_few(setup, job, fraction) is None
        for reading in job.readings
        for task in job.tasks
    )


def tidy(folder: Path) -> None:
    """Remove the checkpoints that a job's last kill left between its outcome and its own cleaning."""
    for left in (*folder.glob("*.run"), folder / "sites"):
        shutil.rmtree(left, ignore_errors=True)


def run_jobs(setup: Setup, jobs: list[Job], workers: int, deadline: float | None, console: Console) -> None:
    """Run jobs, `workers` at a time, in their order; after the deadline none is begun.

    A job that fails leaves its reason; a worker that dies takes no other job with it than those under way.
    """
    waiting, running = list(reversed(jobs)), dict[Future[None], Job]()
    pool = worker_pool(workers)
    with bars(console) as progress:
        task = progress.add_task("jobs: a method, an arm, a seed", total=len(jobs))
        while waiting or running:
            late = deadline is not None and time.monotonic() > deadline
            try:
                while waiting and len(running) < workers and not late:
                    future = pool.submit(run_job, setup, waiting[-1])
                    running[future] = waiting.pop()
                if not running:
                    break
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    future.result()
                    running.pop(future)
                    progress.advance(task)
            except BrokenProcessPool:
                lost = ", ".join(job.name for job in running.values())
                console.print(f"a process died, out of memory most often: {lost} not done", style="yellow")
                running.clear()
                pool = worker_pool(workers)
        pool.shutdown()
    if waiting:
        console.print(
            f"{len(waiting)} jobs were not begun; run the same command with --resume to go on", style="yellow"
        )
