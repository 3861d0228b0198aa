"""A study's phases and rounds: pretrain, finetune, evaluate. Knows no network: it is given `ask`."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from server import checkpoint as checkpoints
from server.aggregation import UPDATE_RULES, RunningMean, Weights, fault_of
from server.checkpoint import Checkpoint, PhaseName, Position
from server.conductor import Ask, Conductor, Watcher, ask_sites, instruct, require_sites
from server.judging import StudyOutcome, judge, validation_auroc
from server.report.files import METRICS_FILE, load_metrics, write_metrics
from server.report.results import RoundMetrics
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import all_names, build_model, sent_names, take_arrays, travelling_names
from shared_model.release import release_sha256
from shared_model.study import Phase, Study, TrainingPhase
from shared_model.wire import Answer, SiteDescription, SiteFailure, SiteReply, TrainingReport

PHASES: tuple[PhaseName, ...] = ("distance", "pretrain", "finetune", "evaluate")


def run_study(
    study: Study,
    ask: Ask,
    described: Mapping[str, SiteDescription | SiteFailure],
    out: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    start: Path | None = None,
) -> StudyOutcome:
    """Run a study from its first round, or from its last whole one, to the test split, read once at the end.

    Args:
        described: what each site said of itself, or how it failed to.
        out: folder of this study; `checkpoint/` in it is written after every round.
        start: file of the weights that the study begins with, where its `start_sha256` names one.

    Raises:
        HemoFedError: too few sites answer, the checkpoint is of another study, or no site has labels.
    """
    conductor, state = prepare(study, ask, described, out, resume=resume, watcher=watcher, start=start)
    return judge(conductor, train(conductor, state, study.phases))


def prepare(
    study: Study,
    ask: Ask,
    described: Mapping[str, SiteDescription | SiteFailure],
    out: Path,
    *,
    resume: bool,
    watcher: Watcher | None = None,
    start: Path | None = None,
) -> tuple[Conductor, Checkpoint]:
    """Who takes part, with what weight, and where the study stands. Arguments as for `run_study`."""
    saved = begin(study, out / "checkpoint", resume, start)
    conductor = Conductor(study, ask, out, watcher or Watcher(), saved.position.run_id)
    conductor.ledger_tips.update(saved.position.ledger_tips)
    accept_sites(conductor, described)
    return conductor, fix_site_weights(conductor, saved)


def train(conductor: Conductor, state: Checkpoint, phases: Mapping[TrainingPhase, Phase]) -> Checkpoint:
    """The rounds of these phases that are still to do."""
    for name, phase in phases.items():
        state = run_phase(conductor, state, name, phase)
    return state


def begin(study: Study, folder: Path, resume: bool, start: Path | None = None) -> Checkpoint:
    """The checkpoint to start from: the saved one where the study resumes, else the seed's own weights, under those of
    the file `start` where the study begins with given ones."""
    saved = checkpoints.load(folder, study.digest)
    if saved and not resume:
        raise HemoFedError(
            f"{folder.parent}: holds a study that was begun; add --resume to go on, or give another --out",
            ExitCode.BAD_CHECKPOINT,
        )
    if saved is None:
        model = build_model(study)
        weights = take_arrays(model, all_names(study, model))
        weights |= given_weights(study, start, weights)
        saved = Checkpoint(
            Position(run_id=uuid4().hex, study_sha256=study.digest, release_sha256=release_sha256()), weights, {}, {}
        )
    keep_metrics_before(saved.position, folder.parent)
    return saved


def given_weights(study: Study, start: Path | None, weights: Weights) -> Weights:
    """The arrays of the file that the study begins with; none where it names none. Some may be left out, the head's for
    example.

    Raises:
        HemoFedError: there is no file or another one, or it does not fit the study's encoder.
    """
    if not study.start_sha256:
        if start is not None:
            raise HemoFedError(
                f"{start}: the study names no start_sha256; add it, so that every site knows what it begins with",
                ExitCode.BAD_STUDY,
            )
        return {}
    if start is None:
        raise HemoFedError("the study begins with given weights (start_sha256): give their file", ExitCode.USAGE)
    try:
        data = start.read_bytes()
        arrays = load(data)
    except (OSError, SafetensorError) as error:
        raise HemoFedError(
            f"{start}: not a file of weights ({type(error).__name__})", ExitCode.BAD_CHECKPOINT
        ) from None
    if hashlib.sha256(data).hexdigest() != study.start_sha256:
        raise HemoFedError(
            f"{start}: its SHA-256 is not the study's start_sha256; give the file that the study names",
            ExitCode.BAD_CHECKPOINT,
        )
    known = {name: value for name, value in arrays.items() if name in weights}
    if not known or any(value.shape != weights[name].shape for name, value in known.items()):
        raise HemoFedError(
            f"{start}: does not fit the study's encoder; use weights of the same [encoder] and objective",
            ExitCode.RELEASE_DIFFERS,
        )
    return {name: value.astype(np.float32) for name, value in known.items()}


def keep_metrics_before(position: Position, out: Path) -> None:
    """Drop the lines of rounds that the checkpoint does not hold: they will be run, and written, again."""
    if not (out / METRICS_FILE).exists():
        return
    reached = (PHASES.index(position.phase), position.round_number)
    done = [row for row in load_metrics(out) if (PHASES.index(row.phase), row.round) <= reached]
    write_metrics(done, out)


def accept_sites(conductor: Conductor, described: Mapping[str, SiteDescription | SiteFailure]) -> None:
    """Leave out the sites that failed, run another release, or would send exact counts in a private study; stop where
    too few are left."""
    for name, site in sorted(described.items()):
        if isinstance(site, SiteFailure):
            conductor.left_out[name] = site.reason
        elif site.release_sha256 != release_sha256():
            conductor.left_out[name] = "it runs another release of hemofed"
        elif conductor.study.privacy is not None and site.disclosure != "noised":
            # Before anything is spent: its exact counts could not be added to the noisy ones of the others.
            conductor.left_out[name] = "its disclosure tier is not 'noised', which a private study needs"
        else:
            conductor.sites[name] = site
    for name, reason in conductor.left_out.items():
        conductor.watcher.on_notice(f"{name}: left out: {reason}")
    require_sites(conductor, len(conductor.sites), "can take part")
    conductor.watcher.on_sites(conductor.sites)


def fix_site_weights(conductor: Conductor, state: Checkpoint) -> Checkpoint:
    """Fix each site's weight at the study's start: rounded training patients, or one each."""
    if state.position.site_weights:
        return state
    weights: dict[str, float] = {}
    for site, described in conductor.sites.items():
        for phase in conductor.study.phases:
            count = {
                "distance": described.train_patients,
                "pretrain": described.pretrain_patients,
                "finetune": described.labelled_train_patients,
            }[phase]
            equal = conductor.study.federation.site_weights == "equal"
            weights[f"{phase}/{site}"] = float(min(count, 1) if equal else count)
            if count == 0:
                conductor.watcher.on_notice(f"{site}: not in {phase}: it has no training patients for it")
    if not any(weight for key, weight in weights.items() if key.startswith("finetune/")):
        raise HemoFedError(
            f"no site has training patients with {conductor.study.target.column}; ingest labels, or name "
            "another target.column",
            ExitCode.NO_USABLE_PATIENTS,
        )
    return state.at(site_weights=weights)


def run_phase(conductor: Conductor, state: Checkpoint, name: TrainingPhase, phase: Phase) -> Checkpoint:
    """The rounds of one phase that are still to do; a checkpoint after each."""
    if PHASES.index(state.position.phase) > PHASES.index(name):
        return state
    for number in range(state.position.round_number + 1, phase.rounds + 1):
        conductor.watcher.on_round_start(name, number, phase.rounds)
        state, metrics = run_round(conductor, state, name, phase, number)
        # Told first, saved after: a crash between leaves a line too many, which resuming drops, never a hole.
        conductor.watcher.on_round(metrics)
        checkpoints.save(state, conductor.out / "checkpoint")
    following = PHASES[PHASES.index(name) + 1]
    return Checkpoint(state.position, state.weights, {}, state.best_weights).at(phase=following, round_number=0)


def run_round(
    conductor: Conductor, state: Checkpoint, name: TrainingPhase, phase: Phase, number: int
) -> tuple[Checkpoint, RoundMetrics]:
    """One round: send weights, add up the answers, update, look at the validation split."""
    started = time.monotonic()
    study = conductor.study
    model = build_model(study)
    sent = {key: state.weights[key] for key in sent_names(study, name, model)}
    trained = {key: sent[key] for key in travelling_names(study, name, model)}
    instruction = instruct(conductor, name, number, phase.learning_rate_at(number))
    mean, reports, failed = RunningMean(), {}, []
    asked = participants(conductor, state, name)
    for answer in ask_sites(conductor, instruction, sent, asked):
        fault = unusable(answer, trained)
        if isinstance(answer, SiteReply) and answer.reply.training is not None and fault is None:
            weight = state.position.site_weights[f"{name}/{answer.site}"]
            mean.add(answer.arrays, weight)
            reports[answer.site] = (weight, answer.reply.training)
        else:
            failed.append(answer.site)
            conductor.watcher.on_notice(f"{answer.site}: not in round {number} of {name}: {fault}")
    # A site without labels cannot fine-tune, and the study is not short of it.
    needed = min(study.federation.minimum_sites, len(asked))
    require_sites(conductor, len(reports), f"finished round {number} of {name}", needed)
    new, moments = UPDATE_RULES[study.federation.rule](trained, mean.mean(), state.moments, number, study.federation)
    state = Checkpoint(state.position, {**state.weights, **new}, moments, state.best_weights)
    state = state.at(phase=name, round_number=number, ledger_tips=dict(conductor.ledger_tips))
    judged = name == "finetune" and study.evaluation.every_round
    score = validation_auroc(conductor, state, number) if judged else None
    state = remember_best(study, state, number, score)
    means = mean_report(list(reports.values()))
    metrics = RoundMetrics(
        phase=name,
        round=number,
        seconds=round(time.monotonic() - started, 3),
        learning_rate=instruction.learning_rate,
        sites_replied=tuple(reports),
        sites_failed=tuple(failed),
        validation_auroc=score,
        train_loss=means["loss"],
        violating_share=means["violating_share"],
        mean_cosine=means["mean_cosine"],
        hub_share=means["hub_share"],
        signal_to_noise=means["signal_to_noise"],
        warning="; ".join(f"{site}: {report.warning}" for site, (_, report) in reports.items() if report.warning)
        or None,
    )
    for site, (_, report) in reports.items():
        if report.warning:
            conductor.watcher.on_notice(f"{site}: round {number} of {name}: {report.warning}")
    return state, metrics


def unusable(answer: Answer, trained: Weights) -> str | None:
    """Why an answer must not touch the round's mean, or None."""
    if isinstance(answer, SiteFailure):
        return answer.reason
    return "it says nothing of its training" if answer.reply.training is None else fault_of(answer.arrays, trained)


def participants(conductor: Conductor, state: Checkpoint, name: str) -> list[str]:
    """Sites that are there and have something to train on in this phase, in name order."""
    weights = state.position.site_weights
    return [site for site in sorted(conductor.sites) if weights.get(f"{name}/{site}")]


def mean_report(reports: Sequence[tuple[float, TrainingReport]]) -> dict[str, float | None]:
    """Weighted means over the sites of what they report of a round's training."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(weight, value) for (weight, _), value in zip(reports, values, strict=True) if value is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * value for weight, value in known) / total if total else None

    names = ("loss", "violating_share", "mean_cosine", "hub_share", "signal_to_noise")
    return {name: mean([getattr(report, name) for _, report in reports]) for name in names}


def remember_best(study: Study, state: Checkpoint, number: int, score: float | None) -> Checkpoint:
    """Keep the weights of the round with the best validation score, where the study reports that one."""
    best = state.position.best_score
    if study.evaluation.model != "best_on_validation" or score is None or (best is not None and score <= best):
        return state
    kept = Checkpoint(state.position, state.weights, state.moments, dict(state.weights))
    return kept.at(best_round=number, best_score=score)
