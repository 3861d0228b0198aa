"""What a federation is held against: every hospital alone, all data in one place, and the oracle.

Each baseline is the same study through the same code with one site: a hospital's own folder, or a folder that
pools them all. Only who holds the other patients differs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from client.evaluation import index_ecgs
from client.site import SiteSettings, load_site, write_site
from client.store import Store, open_store, record_ids
from client.tasks import POOLED_FILE, SPLITS, has_label, prepare_device, scored_records, site_model
from client.training import predict
from server.conduct import WEIGHTS_FILE
from server.judging import strictest
from server.report.files import RESULTS_FILE
from server.report.results import Baselines, Comparisons, Estimate, LocalOnly, Pooled, SiteMean
from server.summary import estimate, nothing, rounded
from shared_model.bootstrap import (
    BootstrapHistograms,
    bootstrap_histograms,
    bootstrap_weights,
    mean_site_difference,
)
from shared_model.disclosure import round_count
from shared_model.errors import HemoFedError
from shared_model.histograms import ScoreHistogram, histogram_of
from shared_model.objectives.draws import Rows
from shared_model.statistics import auroc
from shared_model.study import Study
from shared_model.wire import Instruction
from shared_model.workers import worker_pool
from simulation.grid import run_in_process

POOLED = "pooled"
EVERY_SITE = "mean over sites, each on its own test patients, one index ECG a patient"
PAIRED = "paired patient-level Poisson bootstrap of the mean over sites, one index ECG a patient"


@dataclass(frozen=True)
class Arm:
    """One baseline: a study with one site, and where its outcome lies."""

    name: str
    site_dir: Path
    out: Path


def baseline_arms(study: Study, site_dirs: Mapping[str, Path], out: Path) -> list[Arm]:
    """Every site with labels alone, and all together, the pooled one first since it takes longest."""
    pooled = Arm(
        POOLED,
        pooled_folder(list(site_dirs.values()), out / "baselines" / "pooled-site"),
        out / "baselines" / POOLED,
    )
    alone = [
        Arm(f"local-{name}", site_dir, out / "baselines" / f"local-{name}")
        for name, site_dir in sorted(site_dirs.items())
        if has_training_labels(site_dir, study)
    ]
    return [pooled, *alone]


def has_training_labels(site_dir: Path, study: Study) -> bool:
    """Whether a site could train alone: it has two labelled training ECGs, and a weight once its count is rounded."""
    index = open_store(site_dir).index
    labelled = has_label(index, study.target.column) & (index.split == SPLITS["train"])
    patients = len(np.unique(index.patient[labelled]))
    return bool(labelled.sum() >= 2 and round_count(patients, load_site(site_dir).count_rounding))


def pooled_folder(site_dirs: Sequence[Path], folder: Path) -> Path:
    """A site folder that stands for all sites at once; possible only where one machine holds them all."""
    folder.mkdir(parents=True, exist_ok=True)
    sites = [load_site(site_dir) for site_dir in site_dirs]
    least, simulated = max(site.minimum_cell for site in sites), all(site.simulated for site in sites)
    write_site(folder, SiteSettings(name=POOLED, disclosure="masked", minimum_cell=least, simulated=simulated))
    (folder / POOLED_FILE).write_text(json.dumps([str(site_dir.resolve()) for site_dir in site_dirs]))
    return folder


def run_baselines(
    study: Study, arms: Sequence[Arm], workers: int, start: Path | None = None
) -> Iterator[tuple[Arm, str | None]]:
    """Run the arms that are not finished, `workers` at a time; yields each when it is done, or why it failed."""
    # With one site the server's rule has nothing to combine: the mean of one is the site's own weights.
    alone = study.federation.model_copy(
        update={
            "minimum_sites": 1,
            "rule": study.federation.rule if study.federation.rule == "fedbn" else "fedavg",
        }
    )
    single = study.model_copy(update={"federation": alone})
    with worker_pool(min(workers, len(arms))) as pool:
        running = {pool.submit(run_arm, single, arm, start): arm for arm in arms}
        for done in as_completed(running):
            try:
                done.result()
                yield running[done], None
            except HemoFedError as error:
                yield running[done], error.message
            except BrokenProcessPool:
                yield running[done], "its process died, out of memory most often; run again with fewer --workers"


def run_arm(study: Study, arm: Arm, start: Path | None = None) -> None:
    """Run one baseline from where it stands."""
    if not (arm.out / RESULTS_FILE).exists():
        run_in_process(study, [arm.site_dir], arm.out, resume=True, workers=1, start=start)


@dataclass(frozen=True)
class SiteScores:
    """One model on one site's test patients, one index ECG each."""

    histogram: ScoreHistogram
    bootstrap: BootstrapHistograms

    @property
    def auroc(self) -> float | None:
        """AUROC of this site."""
        return auroc(self.histogram).value


def index_test_rows(store: Store, study: Study) -> Rows:
    """The index ECGs of a site's labelled test patients."""
    index = store.index
    rows = index.row[has_label(index, study.target.column) & (index.split == SPLITS["test"])]
    chosen: Rows = rows[index_ecgs(index.patient[rows], index.recorded_at[rows], index.measured_at[rows])]
    return chosen


def count_scores(study: Study, store: Store, rows: Rows, scores: NDArray[np.float64]) -> SiteScores:
    """Histogram and bootstrap replicates of given scores; the replicates pair with any other model's."""
    chosen = np.zeros(len(store.index), np.bool_)
    chosen[rows] = True
    said = scored_records(study, store.index, chosen, scores)
    assert said.probabilities is not None
    assert said.outcomes is not None
    weights = bootstrap_weights(said.patient_keys, max(study.evaluation.bootstrap_replicates, 200), study.seed)
    return SiteScores(
        histogram_of(said.probabilities, said.outcomes),
        bootstrap_histograms(said.probabilities, said.outcomes, said.patients, weights),
    )


def score_site(study: Study, run: Path, site_dir: Path, state_dir: Path) -> SiteScores | None:
    """Score a site's test patients with the model of a finished run; None where the site has none.

    Args:
        run: folder of the run, with its checkpoint and model.
        state_dir: site folder that holds what stayed local in that run (a head, norm layers).
    """
    store = open_store(site_dir)
    rows = index_test_rows(store, study)
    if not len(rows):
        return None
    position = json.loads((run / "checkpoint" / "position.json").read_text())
    # What stayed local must be that of the round whose weights were judged, as in `server.judging.judge`.
    number = position["best_round"] or study.finetune.rounds
    instruction = Instruction(run_id=position["run_id"], task="evaluate", study=study, round_number=number)
    device = prepare_device(load_site(site_dir), study)
    model, _ = site_model(instruction, load_file(run / "model" / WEIGHTS_FILE), state_dir)
    return count_scores(study, store, rows, predict(study, model.to(device), store, rows, device))


def oracle_scores(study: Study, site_dir: Path, truth: Path) -> SiteScores | None:
    """The oracle's probabilities on the same test patients, from what the generator wrote apart."""
    store = open_store(site_dir)
    rows = index_test_rows(store, study)
    if not len(rows) or not truth.exists():
        return None
    with np.load(truth) as known:
        probability = dict(zip(known["record"].tolist(), known["oracle_probability"].tolist(), strict=True))
    names = record_ids(site_dir)
    return count_scores(study, store, rows, np.array([probability[names[row]] for row in rows]))


@dataclass(frozen=True)
class Scored:
    """Every model on every site's test patients; a site that a model has no score for is absent."""

    federated: Mapping[str, SiteScores]
    local_only: Mapping[str, SiteScores]
    pooled: Mapping[str, SiteScores]
    oracle: Mapping[str, SiteScores]


def score_all(study: Study, site_dirs: Mapping[str, Path], out: Path, truths: Mapping[str, Path]) -> Scored:
    """Score all finished runs on the sites that let fine counts and figures of their own out.

    That is tier "masked" (summed in this process) and `share_site_results`: what is shown is by site.
    """
    settings = {name: load_site(path) for name, path in site_dirs.items()}
    chosen = [name for name, site in settings.items() if site.disclosure == "masked" and site.share_site_results]
    open_sites = {name: site_dirs[name] for name in chosen}
    folder = out / "baselines"

    def scores(run_of: Mapping[str, tuple[Path, Path]]) -> dict[str, SiteScores]:
        found = {name: score_site(study, run, open_sites[name], state) for name, (run, state) in run_of.items()}
        return {name: value for name, value in found.items() if value is not None}

    alone = {name: path for name, path in open_sites.items() if (folder / f"local-{name}" / RESULTS_FILE).exists()}
    pooled = (folder / POOLED / RESULTS_FILE).exists()
    oracle = {name: oracle_scores(study, open_sites[name], path) for name, path in truths.items() if name in open_sites}
    return Scored(
        federated=scores({name: (out, path) for name, path in open_sites.items()}),
        local_only=scores({name: (folder / f"local-{name}", path) for name, path in alone.items()}),
        pooled=scores({name: (folder / POOLED, folder / "pooled-site") for name in open_sites if pooled}),
        oracle={name: value for name, value in oracle.items() if value is not None},
    )


def baselines_of(study: Study, scored: Scored, site_dirs: Mapping[str, Path]) -> Baselines:
    """The comparison as it stands in results.json; a site whose classes are too small to show is null."""
    least = strictest(study, (load_site(path).minimum_cell for path in site_dirs.values())).evaluation.minimum_cell
    sites = sorted(site_dirs)
    local = site_mean(scored.local_only, sites, least)
    missing = [name for name in sites if local.sites[name] is None]
    reason = (
        f"no figure for {', '.join(missing)}: no labels to train on alone, fewer than {least} test patients of a "
        "class, or a site.toml that keeps fine counts or its own figures in"
        if missing
        else None
    )
    return Baselines(
        local_only={study.target.name: LocalOnly(auroc=local, reason=reason)},
        pooled={study.target.name: Pooled(auroc=everyone_auroc(scored.pooled))},
        comparisons=Comparisons(
            federated_minus_local_only=paired(scored.federated, scored.local_only, least),
            federated_minus_pooled=paired(scored.federated, scored.pooled, least),
        ),
        federated=site_mean(scored.federated, sites, least),
        pooled_by_site=site_mean(scored.pooled, sites, least),
        oracle_by_site=site_mean(scored.oracle, sites, least),
    )


def shown(scores: SiteScores, minimum_cell: int) -> bool:
    """Whether a site has enough test patients of either class for its own figure."""
    return min(scores.histogram.positives, scores.histogram.negatives) >= minimum_cell


def site_mean(scored: Mapping[str, SiteScores], sites: Sequence[str], minimum_cell: int) -> SiteMean:
    """AUROC at each site and their mean, to three decimals."""
    values = {
        name: rounded(scored[name].auroc) if name in scored and shown(scored[name], minimum_cell) else None
        for name in sorted(sites)
    }
    known = [value for value in values.values() if value is not None]
    return SiteMean(mean=rounded(float(np.mean(known))) if known else None, sites=values, method=EVERY_SITE)


def everyone_auroc(scored: Mapping[str, SiteScores]) -> Estimate:
    """AUROC over the test patients of all sites together."""
    if not scored:
        return nothing("not run, or no site lets fine counts out")
    histograms = [scores.histogram for scores in scored.values()]
    return estimate(
        auroc(sum(histograms[1:], histograms[0])), f"DeLong, one index ECG a patient of {len(scored)} sites"
    )


def paired(first: Mapping[str, SiteScores], second: Mapping[str, SiteScores], minimum_cell: int) -> Estimate:
    """Mean over sites of the difference in AUROC between two models on the same patients."""
    names = [name for name in sorted(first) if name in second and shown(first[name], minimum_cell)]
    if not names:
        return nothing("no site has both models and enough test patients")
    return estimate(mean_site_difference([(first[name].bootstrap, second[name].bootstrap) for name in names]), PAIRED)
