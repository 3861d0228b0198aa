"""A study from its first message to its folder: results.json, metrics.jsonl, model/ and report.html."""

import hashlib
import json
import platform
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from server import noised_summary, summary
from server.aggregation import Weights
from server.conductor import Ask, travelling
from server.judging import StudyOutcome, strictest
from server.logbook import file_watcher
from server.report.card import write_card
from server.report.files import RESULTS_FILE, load_metrics, load_results, write_results
from server.report.page import write_page
from server.report.results import (
    Baselines,
    Comparisons,
    Estimate,
    LocalOnly,
    ModelSummary,
    Oracle,
    Pooled,
    Privacy,
    Results,
    SiteSummary,
    Threshold,
)
from server.rounds import run_study
from shared_model.disclosure import round_count
from shared_model.ecg_paper import ExampleEcg
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import build_model
from shared_model.noised import NOISED_BINS, noise_scale, noise_variance, tables_of
from shared_model.release import VERSION, release_sha256
from shared_model.study import Study
from shared_model.wire import SiteDescription, SiteFailure

WEIGHTS_FILE = "model.safetensors"
NOT_ASKED = "not asked for: only hemofed-sim run makes baselines, since it can see all sites"


def conduct(
    study: Study,
    ask: Ask,
    described: Mapping[str, SiteDescription | SiteFailure],
    out: Path,
    *,
    engine: str,
    resume: bool,
    start: Path | None = None,
) -> Results:
    """Run a study and write its folder. A study that is finished already is not run again.

    Raises:
        HemoFedError: as `run_study`, or the folder holds the results of another study or release.
    """
    if resume and (out / RESULTS_FILE).exists():
        finished = load_results(out)
        if (finished.study_digest, finished.release_sha256) != (study.digest, release_sha256()):
            raise HemoFedError(
                f"{out}: holds the results of another study or release; give its study.toml, or another --out",
                ExitCode.BAD_CHECKPOINT,
            )
        return finished
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    outcome = run_study(study, ask, described, out, resume=resume, watcher=file_watcher(out), start=start)
    digest = write_weights(study, travelling(study, "evaluate", outcome.weights), out)
    results = results_of(study, outcome, engine, round(time.monotonic() - started, 1), digest)
    write_folder(results, out)
    return results


def write_folder(results: Results, out: Path, examples: tuple[ExampleEcg, ...] = ()) -> None:
    """Write results.json, the model card and the page; what was there is replaced."""
    write_results(results, out)
    write_card(results, out / "model")
    write_page(results, load_metrics(out), examples, out)


def write_weights(study: Study, weights: Weights, out: Path) -> str:
    """Write model/model.safetensors with what it needs to be used; returns its SHA-256.

    The same weights give the same bytes, so that two runs can be compared by their hashes.
    """
    folder = out / "model"
    folder.mkdir(exist_ok=True)
    facts = {
        "study": study.model_dump(mode="json"),
        "release_sha256": release_sha256(),
        "study_sha256": study.digest,
    }
    # One entry: safetensors writes several in an order that changes from process to process.
    note = {"hemofed": json.dumps(facts)}
    save_file({name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}, folder / WEIGHTS_FILE, note)
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def results_of(asked: Study, outcome: StudyOutcome, engine: str, seconds: float, weights_sha256: str) -> Results:
    """The outcome as figures, without baselines."""
    study = strictest(asked, (site.minimum_cell for site in outcome.sites.values()))
    threshold = outcome.threshold
    sharing = [name for name, site in outcome.sites.items() if site.shares_own_figures]
    name = study.target.name
    return Results(
        name=study.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        hemofed_version=VERSION,
        release_sha256=release_sha256(),
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
        engine=engine,
        seed=study.seed,
        simulated=all(site.simulated for site in outcome.sites.values()),
        seconds=seconds,
        study=asked.model_dump(mode="json"),
        study_digest=asked.digest,
        model=ModelSummary(
            encoder=study.encoder.preset,
            parameters=sum(value.numel() for value in build_model(study).parameters()),
            weights_sha256=weights_sha256,
        ),
        privacy=privacy_of(study, outcome),
        sites=tuple(
            site_summary(name, site, name in {*outcome.test, *outcome.noised})
            for name, site in sorted(outcome.sites.items())
        ),
        left_out=dict(outcome.left_out),
        oracle_auroc=None,
        oracle=Oracle(reason="known for simulated hospitals only"),
        threshold=Threshold(
            probability=threshold.probability,
            rule=rule_of(study),
            reason=threshold.reason,
        ),
        targets=(name,),
        baselines=no_baselines(name),
        **figures_of(study, outcome, sharing),
    )


def figures_of(study: Study, outcome: StudyOutcome, sharing: Collection[str]) -> dict[str, Any]:
    """The fields of `Results` that come from counts of test patients, exact or noisy."""
    edge, name = outcome.threshold.edge, study.target.name
    if study.privacy is not None:
        noisy = noised_summary.total(outcome.noised)
        return {
            "test": {name: noised_summary.target_result(study, noisy, edge)},
            "site_results": noised_summary.site_results(study, outcome.noised, sharing, edge),
            "subgroups": noised_summary.subgroups(study, noisy, edge),
            "fairness": noised_summary.fairness(study, noisy),
        }
    test = reduce(add, outcome.test.values())
    return {
        "test": {name: summary.target_result(study, test, edge)},
        "site_results": summary.site_results(study, outcome.test, sharing, edge),
        "subgroups": summary.subgroups(study, test, edge),
        "fairness": summary.fairness(study, test),
    }


def rule_of(study: Study) -> str:
    """How the threshold came about, as a phrase."""
    if study.target.kind == "classification":
        return "largest sensitivity + specificity (Youden)"
    return f"predicted value at or above {study.target.threshold:g}, shown as 0.5 on the score scale"


def site_summary(name: str, site: SiteDescription, judged: bool) -> SiteSummary:
    """One hospital's own description, rounded once more in case its site.toml rounds less."""
    return SiteSummary(
        name=name,
        simulated=site.simulated,
        patients=rounded(site.patients),
        records=rounded(site.records),
        train_patients=round_count(site.train_patients),
        validation_patients=rounded(site.validation_patients),
        test_patients=rounded(site.test_patients),
        labelled_train_patients=round_count(site.labelled_train_patients),
        reason="a site's prevalence is not asked for",
        note="" if judged else "not in the test figures: it gave no counts of its test patients",
    )


def rounded(count: int | None) -> int | None:
    """Once more, in case the site's own site.toml rounds less; None stays unsaid."""
    return None if count is None else round_count(count)


def privacy_of(study: Study, outcome: StudyOutcome) -> Privacy:
    """What guarded the patients: the study's budget where it has one, and counts by each site's tier."""
    if study.privacy is not None:
        scale = noise_scale(tables_of(study.evaluation.groups), study.privacy.release_epsilon)
        return Privacy(
            differentially_private=True,
            unit="patient",
            epsilon=study.privacy.epsilon,
            delta=study.privacy.delta,
            release_epsilon=study.privacy.release_epsilon,
            count_noise_sd=round(noise_variance(scale) ** 0.5, 1),
            disclosure_tier="noised",
            score_bins=NOISED_BINS,
            minimum_cell=study.evaluation.minimum_cell,
        )
    tiers = sorted({site.disclosure for site in outcome.sites.values()})
    fine = tiers == ["masked"]
    return Privacy(
        disclosure_tier=", ".join(tiers) + (" (summed in this process)" if "masked" in tiers else ""),
        score_bins=1024 if fine else 32,
        minimum_cell=study.evaluation.minimum_cell,
    )


def no_baselines(target: str) -> Baselines:
    """Every baseline null, with the reason."""
    missing = Estimate(reason=NOT_ASKED)
    return Baselines(
        local_only={target: LocalOnly(reason=NOT_ASKED)},
        pooled={target: Pooled(auroc=missing)},
        comparisons=Comparisons(federated_minus_local_only=missing, federated_minus_pooled=missing),
    )
