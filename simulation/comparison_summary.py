"""From the files of a comparison to its table: figures with intervals, and what is paired against the baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load_file
from scipy.stats import norm

from client.tasks import describer
from server.report.results import Estimate
from shared_model.bootstrap import bootstrap_weights
from shared_model.errors import HemoFedError
from shared_model.gaps import holm
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.subgroups import attributes_of, group_masks
from simulation.baselines import index_test_rows
from simulation.comparison_figures import FIGURES, PRIMARY, Figure
from simulation.comparison_job import (
    EMBEDDING_FILE,
    FAILED_FILE,
    FEWEST_OF_A_CLASS,
    PATIENTS_OF_A_SITE,
    Setup,
    labelled_rows,
    score_file,
    store_of,
    too_few,
)
from simulation.comparison_plan import BASELINE, LOCAL, WITHOUT, Block, Comparison, Job, arms_of, trained_on
from simulation.probe import fit_probe

REPLICATES = 1000
Floats = NDArray[np.float64]
KNOWN, MEAN = "age, sex, intervals", "mean predictor"
WAVES = "ssl_dml_wave_attributes"
UNKNOWN_AGE_YEARS = 60.0
NOT_YET = "not run yet"
PARTITIONS = ("sex", "age", "race")


class Row(BaseModel):
    """One cell of the table.

    Attributes:
        method: a row of the catalogue, or a baseline that costs nothing.
        mode: local, federated, pooled, or `unseen`: each hospital by a federation of the others.
        figures: by name, the mean over seeds and its 95% interval over patients and seeds. Of one model: over all test
            patients; of `local` and `unseen`, where each hospital has another model: the mean over hospitals.
        against_baseline: the primary figure minus that of the fine-tuned `supervised` baseline, paired.
        p_value, p_adjusted: of no difference; adjusted by Holm over all differences of the comparison.
        worst_group, worst_group_figure, largest_gap: AUROC over subgroups of sex, age and race, one model only.
        hospitals: how many hospitals the figure is over.
        missing: why there is no figure, or what it leaves out.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    mode: str
    fraction: float
    reading: str
    task: str
    seeds: int = 0
    hospitals: int = 0
    figures: dict[str, Estimate] = {}
    against_baseline: Estimate | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    worst_group: str | None = None
    worst_group_figure: float | None = None
    largest_gap: float | None = None
    recall_at_1: float | None = None
    nmi: float | None = None
    missing: str | None = None


@dataclass(frozen=True, eq=False)
class Patients:
    """The test patients of one site, one index ECG each, and how often each counts in every replicate."""

    outcome: Floats
    measured: Floats
    weights: Floats
    groups: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Cell:
    """A row with what its differences are drawn from: by seed, (1 + replicates,) of the primary figure."""

    row: Row
    replicates: Mapping[int, Floats]


def patients_of(setup: Setup, name: str) -> Patients:
    """A site's test patients; the replicates follow from each patient's key, so that all cells are paired."""
    store = store_of(setup.sites[name])
    index, study = store.index, setup.study
    rows = index_test_rows(store, study)
    measured = index.labels[study.target.column][rows].astype(np.float64) if len(rows) else np.zeros(0)
    keys = [index.patient_keys[code] for code in index.patient[rows]]
    drawn = bootstrap_weights(keys, REPLICATES, study.seed).T if keys else np.zeros((REPLICATES, 0))
    attributes = attributes_of(index.sex[rows], index.age_years[rows], index.race[rows])
    return Patients(
        outcome=(measured > study.target.threshold).astype(np.float64),
        measured=measured,
        weights=np.vstack([np.ones((1, len(rows))), drawn]),
        groups=group_masks(attributes, PARTITIONS),
    )


def summarise(setup: Setup, comparison: Comparison) -> list[Row]:
    """All cells of the table, baselines first, with differences and adjusted p-values."""
    names = list(setup.sites)
    patients = {name: patients_of(setup, name) for name in names}
    cells = [
        cell_of(setup, patients, block, method, mode, fraction, reading, task)
        for block in comparison.blocks
        for method in block.methods
        for mode in modes_of(block)
        for reading, task in product(block.readings, block.tasks)
        for fraction in (block.fractions if mode != "unseen" else block.fractions[-1:])
    ]
    return [*free_rows(setup, patients, comparison), *with_differences(cells)]


def modes_of(block: Block) -> list[str]:
    """The block's modes, and `unseen` where hospitals are left out."""
    return [*block.modes, *(["unseen"] if block.leave_one_out_seeds else [])]


def arms_of_mode(mode: str, sites: Sequence[str]) -> list[str]:
    """The arms behind a cell."""
    if mode in ("local", "unseen"):
        return [(LOCAL if mode == "local" else WITHOUT) + site for site in sites]
    return [mode]


def cell_of(
    setup: Setup,
    patients: Mapping[str, Patients],
    block: Block,
    method: str,
    mode: str,
    fraction: float,
    reading: str,
    task: str,
) -> Cell:
    """One cell from the files that are there."""
    names = list(setup.sites)
    row = Row(method=method, mode=mode, fraction=fraction, reading=reading, task=task)
    by_seed: dict[int, dict[str, Floats]] = {}
    reasons: set[str] = set()
    for seed in range(1, block.seeds + 1):
        planned = arms_of(block, names, seed)
        jobs = [
            Job(method, arm, seed, block.fractions, block.readings, block.tasks)
            for arm in arms_of_mode(mode, names)
            if arm in planned
        ]
        found, why = scores_of_seed(setup, jobs, fraction, reading, task)
        reasons |= why
        if found and NOT_YET not in why:  # a seed of which hospitals are still to come would be another comparison
            by_seed[seed] = found
    common = set.intersection(*(set(found) for found in by_seed.values())) if by_seed else set()
    sites = [name for name in names if name in common and usable(patients[name])]
    if not sites:
        return Cell(row.model_copy(update={"missing": f"not run: {'; '.join(sorted(reasons)) or NOT_YET}"}), {})
    figures = {
        name: {seed: replicates(found, patients, sites, mode, task, figure) for seed, found in by_seed.items()}
        for name, figure in FIGURES[task].items()
    }
    planned_seeds = block.leave_one_out_seeds if mode == "unseen" else block.seeds
    update: dict[str, object] = {
        "seeds": len(by_seed),
        "hospitals": len(sites),
        "figures": {name: interval(stacked(values), planned_seeds) for name, values in figures.items()},
        "missing": "; ".join(sorted(reasons)) or None,
        **embedding_figures(setup, method, mode, block),
    }
    if task == "classification" and mode in ("federated", "pooled"):
        update |= group_figures(list(by_seed.values()), patients, sites)
    return Cell(row.model_copy(update=update), figures[PRIMARY[task]])


def stacked(by_seed: Mapping[int, Floats]) -> Floats:
    """(seeds, 1 + replicates), seeds ascending."""
    return np.stack([by_seed[seed] for seed in sorted(by_seed)])


def usable(patients: Patients) -> bool:
    """Whether a site has both classes among its test patients."""
    return bool(0 < patients.outcome.sum() < len(patients.outcome))


def scores_of_seed(
    setup: Setup, jobs: Sequence[Job], fraction: float, reading: str, task: str
) -> tuple[dict[str, Floats], set[str]]:
    """Site -> scores of one seed, and why those that are missing are."""
    scores: dict[str, Floats] = {}
    reasons = set()
    for job in jobs:
        path = setup.folder(job) / score_file(fraction, reading, task)
        if path.exists():
            scores |= load_file(path)
            continue
        failed = setup.folder(job) / FAILED_FILE
        why = too_few(setup, job, fraction)
        if why is None and not failed.exists():
            reasons.add(NOT_YET)
            continue
        why = why or json.loads(failed.read_text())["reason"]
        reasons.add(why if job.arm in ("federated", "pooled") else f"{job.arm}: {why}")
    return scores, reasons


def replicates(
    scores: Mapping[str, Floats],
    patients: Mapping[str, Patients],
    sites: Sequence[str],
    mode: str,
    task: str,
    figure: Figure,
) -> Floats:
    """(1 + replicates,) of one seed: over all patients of one model, else the mean over the hospitals' models."""

    def truth(name: str) -> Floats:
        return patients[name].outcome if task == "classification" else patients[name].measured

    if mode in ("federated", "pooled"):
        return figure(
            np.concatenate([scores[name] for name in sites]),
            np.concatenate([truth(name) for name in sites]),
            np.hstack([patients[name].weights for name in sites]),
        )
    by_site = np.stack([figure(scores[name], truth(name), patients[name].weights) for name in sites])
    mean: Floats = by_site.mean(0)
    return mean


def seed_draws(seeds: int) -> NDArray[np.int64]:
    """Which seeds stand for the sample in each replicate: (replicates, seeds), the same for every cell of as many."""
    return np.random.default_rng(seeds).integers(0, seeds, (REPLICATES, seeds))


def interval(values: Floats, planned: int) -> Estimate:
    """Mean over seeds of (seeds, 1 + replicates), and the central 95% of replicates over patients and seeds."""
    value, drawn = float(values[:, 0].mean()), drawn_means(values)
    if not np.isfinite(value) or not np.isfinite(drawn).any():
        return Estimate(reason="undefined: the scores or the outcomes do not vary")
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    reason = None if len(values) == planned else f"{len(values)} of {planned} seeds"
    return Estimate(value=round(value, 4), low=round(float(low), 4), high=round(float(high), 4), reason=reason)


def drawn_means(values: Floats) -> Floats:
    """(replicates,): of each replicate, the mean over seeds drawn with replacement."""
    draws = seed_draws(len(values))
    means: Floats = values[draws, np.arange(1, 1 + REPLICATES)[:, None]].mean(1)
    return means


def with_differences(cells: Sequence[Cell]) -> list[Row]:
    """The rows, each with its paired difference to fine-tuned `supervised` in the same mode, share and task."""
    baseline = {
        (cell.row.mode, cell.row.fraction, cell.row.task): cell
        for cell in cells
        if cell.row.method == BASELINE and cell.row.reading == "finetuned"
    }
    rows, tested = [cell.row for cell in cells], []
    for place, cell in enumerate(cells):
        other = baseline.get((cell.row.mode, cell.row.fraction, cell.row.task))
        if other is None or other is cell or cell.row.hospitals != other.row.hospitals:
            continue
        both = sorted(set(cell.replicates) & set(other.replicates))
        if not both:
            continue
        gap = np.stack([cell.replicates[seed] - other.replicates[seed] for seed in both])
        spread = float(np.nanstd(drawn_means(gap)))
        value = float(gap[:, 0].mean())
        p_value = float(2 * norm.sf(abs(value) / spread)) if spread > 0 else 1.0
        tested.append((place, interval(gap, len(both)), p_value))
    for (place, gap_interval, p_value), adjusted in zip(tested, holm([p for _, _, p in tested]), strict=True):
        update = {"against_baseline": gap_interval, "p_value": p_value, "p_adjusted": adjusted}
        rows[place] = rows[place].model_copy(update=update)
    return rows


def group_figures(
    by_seed: Sequence[Mapping[str, Floats]], patients: Mapping[str, Patients], sites: Sequence[str]
) -> dict[str, object]:
    """AUROC of the worst subgroup and the largest gap within a partition, means over seeds, of large enough groups."""
    outcome = np.concatenate([patients[name].outcome for name in sites])
    names = sorted({group for name in sites for group in patients[name].groups if group != "all"})
    figure = FIGURES["classification"]["auroc"]
    found: dict[str, float] = {}
    for group in names:
        empty = {name: np.zeros(len(patients[name].outcome), np.bool_) for name in sites}
        member = np.concatenate([patients[name].groups.get(group, empty[name]) for name in sites])
        if min(outcome[member].sum(), (1 - outcome[member]).sum()) < FEWEST_OF_A_CLASS:
            continue
        ones = np.ones((1, int(member.sum())))
        scores = [np.concatenate([scored[name] for name in sites])[member] for scored in by_seed]
        found[group] = float(np.mean([figure(score, outcome[member], ones)[0] for score in scores]))
    if not found:
        return {}
    gaps = [
        max(values) - min(values)
        for partition in PARTITIONS
        if len(values := [value for group, value in found.items() if group.startswith(f"{partition}=")]) > 1
    ]
    worst = min(found, key=lambda group: found[group])
    return {
        "worst_group": worst,
        "worst_group_figure": round(found[worst], 4),
        "largest_gap": round(max(gaps), 4) if gaps else None,
    }


def embedding_figures(setup: Setup, method: str, mode: str, block: Block) -> dict[str, float]:
    """Recall at 1 and mutual information of the frozen embedding, means over seeds and hospitals' models."""
    figures = []
    for seed, arm in product(range(1, block.seeds + 1), arms_of_mode(mode, list(setup.sites))):
        path = setup.folder(Job(method, arm, seed, (), (), ())) / EMBEDDING_FILE
        if path.exists():
            figures.append(json.loads(path.read_text()))
    return (
        {key: round(float(np.mean([f[key] for f in figures])), 4) for key in ("recall_at_1", "nmi")} if figures else {}
    )


def free_rows(setup: Setup, patients: Mapping[str, Patients], comparison: Comparison) -> list[Row]:
    """What costs nothing: the training mean, and a regression on age, sex and the ECG's intervals and axes; one for
    each share of labels, pooled."""
    names, rows = [name for name in setup.sites if usable(patients[name])], []
    fractions = sorted({fraction for block in comparison.blocks for fraction in block.fractions})
    tasks = sorted({task for block in comparison.blocks for task in block.tasks})
    for fraction, task in product(fractions, tasks):
        for method in (MEAN, KNOWN):
            row = Row(method=method, mode="pooled", fraction=fraction, reading="none", task=task)
            try:
                by_seed = [free_scores(setup, method, task, fraction, seed) for seed in range(1, comparison.seeds + 1)]
            except HemoFedError as error:
                rows.append(row.model_copy(update={"missing": f"not run: {error.message}"}))
                continue
            figures = {
                name: np.stack([replicates(scores, patients, names, "pooled", task, figure) for scores in by_seed])
                for name, figure in FIGURES[task].items()
            }
            update = {
                "seeds": len(by_seed),
                "hospitals": len(names),
                "figures": {name: interval(values, comparison.seeds) for name, values in figures.items()},
            }
            rows.append(row.model_copy(update=update))
    return rows


def free_scores(setup: Setup, method: str, task: str, fraction: float, seed: int) -> dict[str, Floats]:
    """Site -> scores of a model that sees a few numbers only, or none, trained on one seed's labels of all sites."""
    job = Job(BASELINE, "pooled", seed, (fraction,), (), ())
    if (why := too_few(setup, job, fraction)) is not None:
        raise HemoFedError(why)
    described, values, who, test = [], [], [], {}
    for number, name in enumerate(trained_on("pooled", list(setup.sites))):
        store = store_of(setup.sites[name])
        rows = labelled_rows(setup, store, job, fraction)
        described.append(known_of(setup, name)[rows])
        values.append(
            store.index.labels[setup.study.target.column][rows].astype(np.float64) if len(rows) else np.zeros(0)
        )
        who.append(store.index.patient[rows] + number * PATIENTS_OF_A_SITE)
        test[name] = known_of(setup, name)[index_test_rows(store, setup.study)]
    x, y = np.concatenate(described), np.concatenate(values)
    if task == "classification":
        y = (y > setup.study.target.threshold).astype(np.float64)
    if method == MEAN:
        return {name: np.full(len(rows), y.mean()) for name, rows in test.items()}
    fitted = fit_probe(x, y, np.concatenate(who), task)
    return {name: fitted(rows) for name, rows in test.items()}


def known_of(setup: Setup, name: str) -> Floats:
    """What a cart prints of each of a site's ECGs: age, sex, rate, intervals and axes, unknown ones as 0 beside a mark.

    Intervals are the archive's, else measured on the typical beat (`shared_model.waves`); in units of clinical
    constants."""
    store = store_of(setup.sites[name])
    index = store.index
    study = setup.study.model_copy(update={"objective": ObjectiveSettings(name=WAVES)})
    describe = describer(store, study, setup.sites[name])
    waves = describe(index.row, torch.zeros(1), torch.zeros(1)).numpy().astype(np.float64)
    age = index.age_years.astype(np.float64)
    columns = [
        np.where(np.isnan(age), UNKNOWN_AGE_YEARS, age),
        np.isnan(age),
        index.sex == "female",
        index.sex == "male",
    ]
    return np.hstack([np.stack(columns, 1).astype(np.float64), np.nan_to_num(waves), np.isnan(waves)])
