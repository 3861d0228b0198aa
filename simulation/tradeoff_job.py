"""One cell of a trade-off: a study trained at one epsilon from one start, scored exactly on simulated patients.

Each cell has site folders and ledgers of its own, which look at the hospitals' stores: a sweep would spend a real
hospital's budget once a cell. Private cells cannot be repeated bit for bit, since noise is never seeded.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from client.site import load_site
from client.tasks import SPLITS, has_label, prepare_device
from client.training import predict
from server.app import asker, enrol
from server.conductor import Watcher, travelling
from server.report.results import RoundMetrics
from server.rounds import prepare, train
from shared_model.accounting import calibrate, epsilon_of, plan_of, spends_of
from shared_model.model import part_of
from shared_model.privacy import PrivacySettings
from shared_model.study import Phase, Study, TrainingPhase
from simulation.baselines import index_test_rows
from simulation.comparison_job import model_of, store_of, train_phases, view, write_arrays, write_text
from simulation.grid import InProcessGrid
from simulation.private_sites import equip
from simulation.tradeoff_plan import Cell

SCORES_FILE, FACTS_FILE = "scores.safetensors", "facts.json"


@dataclass(frozen=True)
class Ground:
    """What all cells share.

    Attributes:
        study: with `[privacy]`, whose noise is set anew for every epsilon.
        sites: the federation's hospitals.
        alone: hospitals that stand for one alone, by their number of training patients.
        public: the simulated public archive.
        banks: files of public ECGs, by kind.
        judges: site folders whose test patients are scored; of a hospital alone too.
    """

    study: Study
    sites: Mapping[str, Path]
    alone: Mapping[int, Path]
    public: Path
    banks: Mapping[str, Path]
    judges: Mapping[str, Path]
    out: Path

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.out / "cells" / cell.name


def cell_study(ground: Ground, cell: Cell) -> Study:
    """The study of a cell, its noise the least that its epsilon allows."""
    base, privacy = ground.study, ground.study.privacy
    assert privacy is not None
    changes: dict[str, object] = {"seed": cell.seed, "privacy": None}
    if cell.start == "public":
        changes["objective"] = base.objective.model_validate({"name": "supervised"})
    if cell.epsilon:
        changes["privacy"] = private_part(ground, cell, privacy)
    study = base.model_copy(update=changes)
    return calibrated(study, cell.epsilon) if cell.epsilon else study


def private_part(ground: Ground, cell: Cell, privacy: PrivacySettings) -> PrivacySettings:
    """`[privacy]` of a cell before its noise is set."""
    assert privacy.finetune is not None
    pretrain = privacy.pretrain
    if pretrain is not None and cell.start == "public_and_private":
        trained = "norms_and_biases" if cell.trained == "head" else cell.trained
        pretrain = pretrain.model_copy(update={"trained": trained})
    return privacy.model_copy(
        update={
            "epsilon": cell.epsilon,
            "bank_sha256": hashlib.sha256(ground.banks[cell.bank].read_bytes()).hexdigest(),
            "pretrain": None if cell.start == "public" else pretrain,
            "finetune": privacy.finetune.model_copy(update={"trained": cell.trained}),
        }
    )


def calibrated(study: Study, epsilon: float) -> Study:
    """The study with all its noise times one factor, the smallest with which it costs at most `epsilon`."""
    privacy = study.privacy
    assert privacy is not None
    changes: dict[str, object] = {}
    for line in calibrate(plan_of(study), epsilon, privacy.delta):
        phase = privacy.phase(line.task)
        if phase is not None:
            changes[line.task] = phase.model_copy(update={"noise_multiplier": line.each.noise_multiplier})
    return study.model_copy(update={"privacy": privacy.model_copy(update=changes)})


def public_start(ground: Ground, seed: int) -> Path:
    """Encoder weights from pretraining on the public archive, made at first need, once a seed."""
    path = ground.out / "public" / f"seed-{seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        study = ground.study.model_copy(update={"seed": seed, "privacy": None})
        phases: dict[TrainingPhase, Phase] = {"pretrain": study.pretrain}
        run = path.with_suffix(".run")
        weights = train_phases(study, phases, [view(ground.public, run / "site")], run / "run")
        write_arrays(path, {name: value for name, value in weights.items() if part_of(name) == "encoder"})
        shutil.rmtree(run)
    return path


def run_cell(ground: Ground, cell: Cell) -> None:
    """Train and score a cell unless it is done."""
    folder = ground.folder(cell)
    if (folder / FACTS_FILE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    study = cell_study(ground, cell)
    start = None if cell.start == "scratch" else public_start(ground, cell.seed)
    if start is not None:
        study = study.model_copy(update={"start_sha256": hashlib.sha256(start.read_bytes()).hexdigest()})
    seen = Seen()
    grid = InProcessGrid(list(cell_sites(ground, cell, study).values()), workers=1)
    try:
        nodes, described = enrol(grid, study, sorted(grid.get_node_ids()))
        ask = asker(grid, nodes, study.federation)
        watcher = Watcher(on_round=seen.rounds.append)
        conductor, state = prepare(study, ask, described, folder / "run", resume=True, watcher=watcher, start=start)
        weights = train(conductor, state, study.phases).weights
    finally:
        grid.close()
    sent = travelling(study, "evaluate", weights)
    scores = {}
    for name, site_dir in ground.judges.items():
        store, device = store_of(site_dir), prepare_device(load_site(site_dir), study)
        model = model_of(study, sent, device)
        scores[name] = predict(study, model, store, index_test_rows(store, study), device)
    save_file(scores, folder / SCORES_FILE)
    write_text(folder / FACTS_FILE, json.dumps(facts_of(study, seen), indent=1))
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what a finished cell has no more need of, also where a kill left it."""
    for left in ("run", "sites"):
        shutil.rmtree(folder / left, ignore_errors=True)


@dataclass
class Seen:
    """What the centre saw of the rounds."""

    rounds: list[RoundMetrics] = field(default_factory=list)


def facts_of(study: Study, seen: Seen) -> dict[str, object]:
    """What a cell cost, and how much of its updates was signal."""
    privacy = study.privacy
    spends = spends_of(plan_of(study))
    return {
        "epsilon": epsilon_of(spends, privacy.delta) if privacy is not None else None,
        "noise_multiplier": {
            task: phase.noise_multiplier
            for task in ("pretrain", "finetune")
            if privacy is not None and (phase := privacy.phase(task)) is not None
        },
        "signal_to_noise": {
            task: [row.signal_to_noise for row in seen.rounds if row.phase == task] for task in study.phases
        },
    }


def cell_sites(ground: Ground, cell: Cell, study: Study) -> dict[str, Path]:
    """Site folders of a cell's own that look at the hospitals' stores, with policies and ledgers for this cell
    alone."""
    folder = ground.folder(cell) / "sites"
    sites = {"alone": ground.alone[cell.patients]} if cell.patients else dict(ground.sites)
    made = {}
    for name, site_dir in sites.items():
        made[name] = view(site_dir, folder / name)
        if study.privacy is not None:
            equip(made[name], study, train_patients(site_dir, study), ground.banks[cell.bank])
    return made


def train_patients(site_dir: Path, study: Study) -> int:
    """How many labelled training patients a simulated hospital has."""
    index = store_of(site_dir).index
    chosen = has_label(index, study.target.column) & (index.split == SPLITS["train"])
    return len(np.unique(index.patient[chosen]))
