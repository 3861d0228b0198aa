"""One job of a comparison: pretrain a method once, then read it at every share of labels. Each step leaves a file.

What is there is not made again, so that a comparison that was killed goes on. Everything is trained by the code that
`hemofed-sim run` uses, in this process, on views of the site folders, so that jobs side by side do not meet.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from client.site import load_site, write_site
from client.store import Store, open_store
from client.tasks import POOLED_FILE, SPLITS, has_label, in_labelled_share, prepare_device
from client.training import PREDICT_BATCH, autocast, predict, read_signals
from client.uses import note_use
from server.aggregation import Weights
from server.app import asker, enrol
from server.conductor import travelling
from server.rounds import prepare, train
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import build_model, part_of, put_arrays
from shared_model.objectives.catalogue import METHODS
from shared_model.objectives.draws import Rows
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.study import Phase, Study, TrainingPhase
from simulation.baselines import index_test_rows, pooled_folder
from simulation.comparison_plan import Job, Task, judged_on, trained_on
from simulation.grid import InProcessGrid
from simulation.probe import cluster_information, fit_probe, recall_at_1

FEWEST_OF_A_CLASS = 10
FAILED_FILE = "failed.json"
EMBEDDING_FILE = "embedding.json"
PATIENTS_OF_A_SITE = 1_000_000_000  # patient codes of two sites stay apart


@dataclass(frozen=True)
class Setup:
    """What all jobs of a comparison share: the study that they differ from, the sites and the folder of files."""

    study: Study
    sites: Mapping[str, Path]
    out: Path

    def folder(self, job: Job) -> Path:
        """Where a job's files lie."""
        return self.out / "jobs" / job.name


@lru_cache(maxsize=64)
def store_of(site_dir: Path) -> Store:
    """A site's store, opened once in a process: a comparison looks at the same few thousands of times."""
    return open_store(site_dir)


def study_of(setup: Setup, job: Job, fraction: float, task: Task = "classification") -> Study:
    """The study of a job: the comparison's own but for objective, seed, share of labels and kind of target."""
    study = setup.study
    objective = study.objective if study.objective.name == job.method else ObjectiveSettings(name=job.method)
    federation = study.federation.model_copy(update={"minimum_sites": 1})
    if not job.arm.startswith(("federated", "without")):
        # With one site there is nothing to combine.
        federation = federation.model_copy(update={"rule": "fedavg"})
    return study.model_copy(
        update={
            "seed": job.seed,
            "objective": objective,
            "target": study.target.model_copy(update={"kind": task}),
            "finetune": study.finetune.model_copy(update={"labelled_share": fraction}),
            "federation": federation,
            "evaluation": study.evaluation.model_copy(update={"every_round": False, "model": "final"}),
        }
    )


def run_job(setup: Setup, job: Job) -> None:
    """Do what is not done yet. A job that cannot be done leaves its reason in `failed.json`."""
    folder = setup.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED_FILE).unlink(missing_ok=True)
    try:
        for fraction in job.fractions:
            if too_few(setup, job, fraction) is None:
                read_fraction(setup, job, fraction)
    except HemoFedError as error:
        write_text(folder / FAILED_FILE, json.dumps({"reason": error.message}))


def read_fraction(setup: Setup, job: Job, fraction: float) -> None:
    """Pretraining, probes and fine-tuning at one share of labels, as far as they are not done."""
    start = pretrained(setup, job, fraction)
    if "frozen" in job.readings:
        probe(setup, job, fraction, start)
    if "finetuned" in job.readings:
        for task in job.tasks:
            fine_tuned(setup, job, fraction, task, start)


def share_name(fraction: float) -> str:
    """A share in file names: 0.01 -> `1pct`."""
    return f"{100 * fraction:g}pct"


def score_file(fraction: float, reading: str, task: str) -> str:
    """Name of the file that holds a reading's scores of the arm's test patients."""
    return f"{reading}-{task}-{share_name(fraction)}.safetensors"


def pretrained(setup: Setup, job: Job, fraction: float) -> Path | None:
    """The file of the pretrained encoder, made at first need; None for a method that does not pretrain.

    A method that learns from labels is pretrained for each share of them, any other once.
    """
    method, study = METHODS[job.method], study_of(setup, job, fraction)
    if "pretrain" not in study.phases:
        return None
    path = setup.folder(job) / (
        f"pretrained-{share_name(fraction)}.safetensors" if method.labels else "pretrained.safetensors"
    )
    if not path.exists():
        before: dict[TrainingPhase, Phase] = {name: p for name, p in study.phases.items() if name != "finetune"}
        with views(setup, job) as site_dirs:
            weights = train_phases(study, before, site_dirs, path.with_suffix(".run"))
        encoder = {name: value for name, value in weights.items() if part_of(name) == "encoder"}
        write_arrays(path, encoder)
        shutil.rmtree(path.with_suffix(".run"))
    return path


def fine_tuned(setup: Setup, job: Job, fraction: float, task: Task, start: Path | None) -> None:
    """Train on the labels and score the arm's test patients."""
    path = setup.folder(job) / score_file(fraction, "finetuned", task)
    if path.exists():
        return
    study = study_of(setup, job, fraction, task)
    digest = hashlib.sha256(start.read_bytes()).hexdigest() if start else ""
    study = study.model_copy(update={"start_sha256": digest})
    run = path.with_suffix(".run")
    with views(setup, job) as site_dirs:
        weights = train_phases(study, {"finetune": study.finetune}, site_dirs, run, start)
    write_arrays(path, scores_of(setup, job, study, travelling(study, "evaluate", weights)))
    shutil.rmtree(run)


def train_phases(
    study: Study,
    phases: Mapping[TrainingPhase, Phase],
    site_dirs: Sequence[Path],
    out: Path,
    start: Path | None = None,
) -> Weights:
    """Train phases of a study on site folders in this process, from the last whole round where it was stopped."""
    grid = InProcessGrid(site_dirs, workers=1)
    try:
        nodes, described = enrol(grid, study, sorted(grid.get_node_ids()))
        ask = asker(grid, nodes, study.federation)
        conductor, state = prepare(study, ask, described, out, resume=True, start=start)
        return train(conductor, state, phases).weights
    finally:
        grid.close()


@contextmanager
def views(setup: Setup, job: Job) -> Iterator[list[Path]]:
    """Folders through which a job sees its sites' stores, with progress and local state of its own.

    That the stores were used is noted at the sites themselves.
    """
    names = trained_on(job.arm, list(setup.sites))
    folder = setup.folder(job) / "sites"
    for name in names:
        note_use(setup.sites[name], store_of(setup.sites[name]), job.name, setup.study.name, "compare", "train")
    if job.arm == "pooled":
        made = [pooled_folder([setup.sites[name] for name in names], folder / "pooled")]
    else:
        made = [view(setup.sites[name], folder / name) for name in names]
    yield made
    shutil.rmtree(folder, ignore_errors=True)


def view(site_dir: Path, folder: Path) -> Path:
    """A site folder that reads another's store."""
    folder.mkdir(parents=True, exist_ok=True)
    write_site(folder, load_site(site_dir))
    (folder / POOLED_FILE).write_text(json.dumps([str(site_dir.resolve())]))
    return folder


def too_few(setup: Setup, job: Job, fraction: float) -> str | None:
    """Why an arm has too few labels at this share of them, or None."""
    positive = negative = 0
    for name in trained_on(job.arm, list(setup.sites)):
        store = store_of(setup.sites[name])
        rows = labelled_rows(setup, store, job, fraction)
        if len(rows):
            above = store.index.labels[setup.study.target.column][rows] > setup.study.target.threshold
            positive += len(np.unique(store.index.patient[rows[above]]))
            negative += len(np.unique(store.index.patient[rows[~above]]))
    least = min(positive, negative)
    return None if least >= FEWEST_OF_A_CLASS else f"fewer than {FEWEST_OF_A_CLASS} labelled patients of a class"


def labelled_rows(setup: Setup, store: Store, job: Job, fraction: float) -> Rows:
    """The labelled training ECGs of a site that this share lets be seen."""
    index, study = store.index, study_of(setup, job, fraction)
    chosen = has_label(index, study.target.column) & (index.split == SPLITS["train"])
    if fraction < 1:
        chosen &= in_labelled_share(index, study, chosen)
    rows: Rows = index.row[chosen]
    return rows


def model_of(study: Study, weights: Mapping[str, NDArray[np.generic]], device: torch.device) -> nn.ModuleDict:
    """The study's networks with these weights over the seed's."""
    model = build_model(study)
    put_arrays(model, weights)
    return model.to(device).eval()


def scores_of(setup: Setup, job: Job, study: Study, weights: Weights) -> dict[str, NDArray[np.float64]]:
    """Site -> scores of its index test ECGs, of the sites that the arm is judged on."""
    scores = {}
    for name in judged_on(job.arm, list(setup.sites)):
        store = store_of(setup.sites[name])
        device = prepare_device(load_site(setup.sites[name]), study)
        model = model_of(study, weights, device)
        scores[name] = predict(study, model, store, index_test_rows(store, study), device)
    return scores


def probe(setup: Setup, job: Job, fraction: float, start: Path | None) -> None:
    """Linear probes on the frozen encoder for all tasks, and what its embedding is like."""
    folder = setup.folder(job)
    wanted = [task for task in job.tasks if not (folder / score_file(fraction, "frozen", task)).exists()]
    if not wanted:
        return
    study = study_of(setup, job, fraction)
    training, values, patients = [], [], []
    for number, name in enumerate(trained_on(job.arm, list(setup.sites))):
        store = store_of(setup.sites[name])
        rows = labelled_rows(setup, store, job, fraction)
        if len(rows):
            training.append(embedded(setup, job, name, start)[rows])
            values.append(store.index.labels[study.target.column][rows].astype(np.float64))
            patients.append(store.index.patient[rows] + number * PATIENTS_OF_A_SITE)
    x, y, who = np.concatenate(training), np.concatenate(values), np.concatenate(patients)
    test = {
        name: embedded(setup, job, name, start)[index_test_rows(store_of(setup.sites[name]), study)]
        for name in judged_on(job.arm, list(setup.sites))
    }
    for task in wanted:
        target = (y > study.target.threshold).astype(np.float64) if task == "classification" else y
        fitted = fit_probe(x, target, who, task, seed=job.seed)
        scores = {name: fitted(embedding) for name, embedding in test.items()}
        write_arrays(folder / score_file(fraction, "frozen", task), scores)
    describe_embedding(setup, job, study, test, fraction)


def describe_embedding(
    setup: Setup, job: Job, study: Study, test: Mapping[str, NDArray[np.float64]], fraction: float
) -> None:
    """Recall at 1 and mutual information of the test embeddings with the classes, at the largest share of labels."""
    if fraction != max(job.fractions):
        return
    classes = []
    for name in test:
        store = store_of(setup.sites[name])
        values = store.index.labels.get(study.target.column)
        rows = index_test_rows(store, study)
        classes.append(
            np.zeros(0, np.int64) if values is None else (values[rows] > study.target.threshold).astype(np.int64)
        )
    x, y = np.concatenate(list(test.values())), np.concatenate(classes)
    if len(x) > 1:
        figures = {"recall_at_1": recall_at_1(x, y), "nmi": cluster_information(x, y)}
        write_text(setup.folder(job) / EMBEDDING_FILE, json.dumps(figures))


def embedded(setup: Setup, job: Job, name: str, start: Path | None) -> NDArray[np.float64]:
    """The encoder's output for a site's labelled ECGs, at their rows; zeros elsewhere. Kept while a job needs it."""
    return _embedded(study_of(setup, job, 1.0), setup.sites[name], start)


@lru_cache(maxsize=8)
def _embedded(study: Study, site_dir: Path, start: Path | None) -> NDArray[np.float64]:
    store = store_of(site_dir)
    device = prepare_device(load_site(site_dir), study)
    model = model_of(study, load_file(start) if start else {}, device)
    rows = store.index.row[has_label(store.index, study.target.column) & (store.index.split != SPLITS["validation"])]
    out = np.zeros((len(store.index), study.encoder.embedding_dim))
    with torch.inference_mode(), autocast(device, study.federation.precision):
        for chunk in np.array_split(rows, len(rows) // PREDICT_BATCH + 1):
            signals, _ = read_signals(store, chunk, device)
            out[chunk] = model["encoder"](signals).float().cpu().numpy()
    return out


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write named arrays, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: np.ascontiguousarray(value) for name, value in sorted(arrays.items())}, unfinished)
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def require_same(folder: Path, identity: Mapping[str, object]) -> None:
    """Note what a folder is of, or refuse to mix it with another comparison.

    Raises:
        HemoFedError: it holds files of another study, other sites or another release.
    """
    path = folder / "identity.json"
    text = json.dumps(identity, indent=1, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise HemoFedError(
            f"{folder}: holds a comparison of another study, other sites or another release; give another --out",
            ExitCode.BAD_CHECKPOINT,
        )
    write_text(path, text)
