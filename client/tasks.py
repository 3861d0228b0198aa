"""What a site does when asked: describe itself, train a round, count its scores. Knows no network."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client import local_state
from client.bank import load_bank
from client.evaluation import Scores, count, pressure_score, release
from client.facts import can_be_compared, cohort_of, columns_of, fact_table
from client.noised import release_noised
from client.policy import POLICY_FILE, Policy, check_study, load_policy
from client.private_round import answer_once, train_patients
from client.site import SiteSettings, load_site
from client.store import RecordIndex, Store, open_pooled, open_store
from client.training import (
    PREDICT_BATCH,
    Describe,
    LocalWork,
    Outcome,
    Progress,
    finetune,
    predict,
    pretrain,
    train_distance,
)
from client.uses import note_use
from shared_model.disclosure import check_tier, round_count
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import to_millivolt
from shared_model.model import (
    TRAINING_TASKS,
    build_model,
    part_of,
    put_arrays,
    sent_names,
    take_arrays,
    trained_parts,
    travelling_names,
)
from shared_model.objectives.draws import Rows, drawable_patients
from shared_model.objectives.losses import collapse_warning
from shared_model.release import release_sha256
from shared_model.study import Study, TrainingPhase, derive_seed
from shared_model.subgroups import ALL, attributes_of, restrict_levels
from shared_model.wire import Arrays, Instruction, Reply, SiteDescription, Task, TrainingReport

SPLITS = {"train": 0, "validation": 1, "test": 2}
POOLED_FILE = "pooled.json"
PROGRESS_FILE = "progress.json"


def describe(instruction: Instruction, _arrays: Arrays, site_dir: Path, _secure_sum: bool) -> tuple[Reply, Arrays]:
    """Say what this site has.

    Guarantee: every count is rounded to the site's own `count_rounding`; nothing else of the store is said. To a
    private study a site says what its policy declares, and its store is not opened.
    """
    settings = load_site(site_dir)
    if instruction.study.privacy is not None:
        return Reply(site=settings.name, description=declared(settings, site_dir, instruction.study)), {}
    index = open_site(site_dir).index
    labelled = has_label(index, instruction.study.target.column)

    def patients(where: NDArray[np.bool_]) -> int:
        return round_count(len(np.unique(index.patient[where])), settings.count_rounding)

    description = SiteDescription(
        release_sha256=release_sha256(),
        simulated=settings.simulated,
        disclosure=settings.disclosure,
        shares_own_figures=settings.share_site_results,
        minimum_cell=settings.minimum_cell,
        records=round_count(len(index), settings.count_rounding),
        patients=patients(np.full(len(index), True)),
        train_patients=patients(index.split == SPLITS["train"]),
        labelled_train_patients=patients(labelled & (index.split == SPLITS["train"])),
        pretrain_patients=round_count(pretrain_patients(instruction.study, index), settings.count_rounding),
        validation_patients=patients(labelled & (index.split == SPLITS["validation"])),
        test_patients=patients(labelled & (index.split == SPLITS["test"])),
    )
    return Reply(site=settings.name, description=description), {}


def declared(settings: SiteSettings, site_dir: Path, study: Study) -> SiteDescription:
    """What a site says of itself to a private study: what its policy declares, and nothing of its store."""
    policy = load_policy(site_dir)
    check_study(policy, study)
    return SiteDescription(
        release_sha256=release_sha256(),
        simulated=settings.simulated,
        disclosure=settings.disclosure,
        shares_own_figures=settings.share_site_results,
        minimum_cell=settings.minimum_cell,
        train_patients=policy.declared_patients,
        labelled_train_patients=policy.declared_labelled_patients,
        pretrain_patients=policy.declared_patients,
    )


def pretrain_patients(study: Study, index: RecordIndex) -> int:
    """How many training patients the study's objective can learn from, before any rounding."""
    objective = study.objective
    cohort = cohort_of(study, index, index.row[learned_from(index, study, "pretrain")])
    return drawable_patients(objective.method.draw, cohort, objective.draw_settings)


def train(instruction: Instruction, arrays: Arrays, site_dir: Path, _secure_sum: bool) -> tuple[Reply, Arrays]:
    """One round of local training, of whichever phase; the new weights go back, what is local stays.

    Guarantee: where the study has `[privacy]`, as `private_round.answer_once` and `private.train_private`.
    """
    study = instruction.study
    if study.privacy is None:
        allow(site_dir, study)
        return train_here(instruction, arrays, site_dir, None)
    if instruction.task == "pretrain" and study.objective.method.private == "bank":
        load_bank(site_dir, study.privacy.bank_sha256)  # before anything is spent on a round that could not be done
    return answer_once(instruction, arrays, site_dir, lambda policy: train_here(instruction, arrays, site_dir, policy))


def train_here(instruction: Instruction, arrays: Arrays, site_dir: Path, policy: Policy | None) -> tuple[Reply, Arrays]:
    """Train on the site's ECGs: privately where a policy is given, which says for how many patients."""
    settings, store, study = load_site(site_dir), open_site(site_dir), instruction.study
    task, number = training_task(instruction.task), instruction.round_number
    device = prepare_device(settings, study)
    refuse_chunked_batch_norm(settings, study)
    model, names = site_model(instruction, arrays, site_dir)
    note_use(site_dir, store, instruction.run_id, study.name, task, "train")
    kept = local_state.load_before(site_dir, instruction.run_id, task, number)
    rows = training_rows(store.index, study, task) if policy is None else private_rows(store.index, study, task)
    work = LocalWork(
        phase=study.phases[task],
        rows=rows,
        learning_rate=instruction.learning_rate,
        seed=derive_seed(study.seed, task, number, settings.name),
        precision=study.federation.precision,
        proximal_mu=study.federation.proximal_mu if study.federation.rule == "fedprox" else 0.0,
        optimizer_state=with_prefix(kept, "optimizer.") if study.federation.keep_optimizer_state else {},
        physical_batch=settings.physical_batch,
        on_step=progress_file(site_dir, f"{task} round {number}"),
    )
    model.to(device)
    if policy is not None:
        describing = progress_file(site_dir, "comparing ECGs with the bank")
        outcome = train_patients(instruction, model, store, site_dir, policy, work, describing)
    elif task == "distance":
        outcome = train_distance(study, model, store, work, device)
    elif task == "pretrain":
        outcome = pretrain(study, model, store, work, device, describer(store, study, site_dir))
    else:
        outcome = finetune(study, model, store, work, device)
    keep_local(instruction, site_dir, model, names, outcome)
    return Reply(site=settings.name, training=report_of(outcome, late=2 * number > work.phase.rounds)), take_arrays(
        model, names
    )


def allow(site_dir: Path, study: Study) -> None:
    """Hold a study against the hospital's policy. A hospital without one lets in what asks for no privacy budget."""
    if (site_dir / POLICY_FILE).exists():
        check_study(load_policy(site_dir), study)


def private_rows(index: RecordIndex, study: Study, task: str) -> Rows:
    """As `training_rows`, and none where there are none: that nobody is there must not show."""
    rows: Rows = index.row[learned_from(index, study, task)]
    return rows


def evaluate(instruction: Instruction, arrays: Arrays, site_dir: Path, secure_sum: bool) -> tuple[Reply, Arrays]:
    """Score the labelled ECGs of one split and hand over the counts that the site's tier lets out.

    Guarantee: as `client.evaluation.release`; the tier is the site's own, and without one nothing leaves. Where the
    study has `[privacy]`, as `private_round.answer_once` and `noised.release_noised`.
    """
    study = instruction.study
    if study.privacy is None:
        allow(site_dir, study)
        return evaluate_here(instruction, arrays, site_dir, secure_sum)
    settings, epsilon = load_site(site_dir), study.privacy.release_epsilon
    check_tier(settings.disclosure, 1, False, private=True)  # before anything is spent on counts that may not leave

    def work(_policy: Policy) -> tuple[Reply, Arrays]:
        scores = scored(instruction, arrays, site_dir)
        return Reply(site=settings.name), release_noised(
            scores, study, instruction.split, settings.disclosure, reserved_epsilon=epsilon
        )

    return answer_once(instruction, arrays, site_dir, work)


def evaluate_here(instruction: Instruction, arrays: Arrays, site_dir: Path, secure_sum: bool) -> tuple[Reply, Arrays]:
    """The counts of one split under the site's tier, which is not `noised`."""
    settings, study = load_site(site_dir), instruction.study
    # The centre looks at validation every round: it gets the whole cohort's counts and nothing finer.
    judged = instruction.split == "test"
    replicates = study.evaluation.bootstrap_replicates if judged else 0
    partitions = study.evaluation.partitions if judged else ()
    counts = count(scored(instruction, arrays, site_dir), partitions, replicates, study.seed)
    return Reply(site=settings.name), release(
        counts,
        settings.disclosure,
        settings.minimum_cell,
        secure_sum_available=secure_sum,
        threshold_edge=instruction.threshold_edge,
        groups=study.evaluation.groups if judged else (ALL,),
    )


def scored(instruction: Instruction, arrays: Arrays, site_dir: Path) -> Scores:
    """What the model says of the labelled ECGs of the instruction's split."""
    settings, store, study = load_site(site_dir), open_site(site_dir), instruction.study
    device = prepare_device(settings, study)
    model, _ = site_model(instruction, arrays, site_dir)
    index = store.index
    chosen = has_label(index, study.target.column) & (index.split == SPLITS[instruction.split])
    batch = settings.physical_batch or PREDICT_BATCH
    note_use(site_dir, store, instruction.run_id, study.name, instruction.task, instruction.split)
    scores = predict(study, model.to(device), store, index.row[chosen], device, batch)
    return scored_records(study, index, chosen, scores)


def scored_records(study: Study, index: RecordIndex, chosen: NDArray[np.bool_], scores: NDArray[np.float64]) -> Scores:
    """What the model said of the chosen ECGs, beside who they are of and what was measured."""
    target = study.target
    values = index.labels[target.column][chosen].astype(np.float64) if chosen.any() else np.empty(0)
    attributes = attributes_of(index.sex[chosen], index.age_years[chosen], index.race[chosen])
    regression = target.kind == "regression"
    return Scores(
        patients=index.patient[chosen],
        patient_keys=index.patient_keys,
        recorded_at=index.recorded_at[chosen],
        measured_at=index.measured_at[chosen],
        attributes=restrict_levels(attributes, {"race": study.evaluation.races}),
        outcomes=(values > target.threshold).astype(np.float64),
        probabilities=pressure_score(scores, target.threshold) if regression else scores,
        measured_mmhg=values if regression else None,
        predicted_mmhg=scores if regression else None,
    )


def open_site(site_dir: Path) -> Store:
    """The site's store; in a simulation's pooled baseline, the stores that `pooled.json` lists, as one."""
    listing = site_dir / POOLED_FILE
    return open_pooled(json.loads(listing.read_text())) if listing.exists() else open_store(site_dir)


def has_label(index: RecordIndex, column: str) -> NDArray[np.bool_]:
    """Which stored ECGs have a value in the target's column; none where the site has no such column."""
    return ~np.isnan(index.labels[column]) if column in index.labels else np.full(len(index), False)


def training_rows(index: RecordIndex, study: Study, task: str) -> Rows:
    """Rows of the ECGs that a task learns from here.

    Raises:
        HemoFedError: there are fewer than two, so that nothing can be learned here.
    """
    chosen = learned_from(index, study, task)
    if chosen.sum() < 2:
        columns = {"distance": (), "pretrain": columns_of(study), "finetune": (study.target.column,)}[task]
        raise HemoFedError(
            f"{chosen.sum()} training ECGs for {task}; ingest more records"
            + (f" with a value in {' and '.join(columns)}" if columns else ""),
            ExitCode.NO_USABLE_PATIENTS,
        )
    rows: Rows = index.row[chosen]
    return rows


def learned_from(index: RecordIndex, study: Study, task: str) -> NDArray[np.bool_]:
    """(n,): the training split; in fine-tuning its labelled ECGs, in pretraining those that the objective can compare.
    Whatever looks at the target's labels sees those of the study's `labelled_share` only."""
    chosen: NDArray[np.bool_] = index.split == SPLITS["train"]
    if task == "distance":
        return chosen
    chosen = chosen & (has_label(index, study.target.column) if task == "finetune" else can_be_compared(study, index))
    labels = task == "finetune" or study.target.column in columns_of(study)
    if labels and study.finetune.labelled_share < 1:
        chosen &= in_labelled_share(index, study, chosen)
    return chosen


def in_labelled_share(index: RecordIndex, study: Study, labelled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """ECGs of the patients whose labels the study may see, of those with one.

    Patients are ranked by a hash of seed and pseudonym, so that the draw is the same for every objective, differs
    with the seed, and a smaller share lies inside a larger one."""
    patients = np.unique(index.patient[labelled])
    rank = sorted(patients.tolist(), key=lambda code: derive_seed(study.seed, "labelled", index.patient_keys[code]))
    kept = rank[: math.ceil(study.finetune.labelled_share * len(rank))]
    return np.isin(index.patient, kept)


def prepare_device(settings: SiteSettings, study: Study) -> torch.device:
    """Where to compute, by the site's own word. Threads are the study's: they decide the last bit of a sum.

    Raises:
        HemoFedError: site.toml asks for CUDA and there is none.
    """
    torch.set_num_threads(settings.threads or study.federation.threads_per_client)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise HemoFedError(
            'site.toml: device = "cuda", but torch sees no CUDA device; use "auto" or "cpu"',
            ExitCode.DEVICE_MISSING,
        )
    use_cuda = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def refuse_chunked_batch_norm(settings: SiteSettings, study: Study) -> None:
    """Batch norm over a chunk is not batch norm over the batch: HemoFedError where a site asks for both."""
    if settings.physical_batch is not None and study.encoder.norm == "batch":
        raise HemoFedError(
            'site.toml: physical_batch would change what batch norm computes; remove it, or use encoder.norm = "group"',
            ExitCode.BAD_SITE,
        )


def training_task(task: Task) -> TrainingPhase:
    """The task, which is one that trains."""
    if task == "distance" or task == "pretrain" or task == "finetune":
        return task
    raise HemoFedError(f"{task} trains nothing", ExitCode.SITE_FAILED)


def site_model(instruction: Instruction, arrays: Arrays, site_dir: Path) -> tuple[nn.ModuleDict, tuple[str, ...]]:
    """The model of this instruction: the arrays that came, and the arrays that stayed here at earlier rounds.

    Raises:
        HemoFedError: the arrays are not those that travel in this task.
    """
    study, task = instruction.study, instruction.task
    model = build_model(study)
    names = travelling_names(study, task, model)
    if set(arrays) != set(sent_names(study, task, model)):
        raise HemoFedError(
            "weights: not the arrays that travel in this task; both ends must run one release",
            ExitCode.RELEASE_DIFFERS,
        )
    # What stayed here: of earlier phases the last round, of this phase the round before, of the judged model its own.
    number = instruction.round_number
    before = TRAINING_TASKS[: TRAINING_TASKS.index("finetune" if task == "evaluate" else task)]
    limits: dict[str, int | None] = dict.fromkeys(before)
    limits |= {"finetune": number + 1} if task == "evaluate" else {task: number}
    for phase, limit in limits.items():
        kept = local_state.load_before(site_dir, instruction.run_id, phase, limit)
        put_arrays(model, {name: value.numpy() for name, value in with_prefix(kept, "model.").items()})
    put_arrays(model, arrays)
    return model, names


def keep_local(
    instruction: Instruction, site_dir: Path, model: nn.ModuleDict, names: tuple[str, ...], outcome: Outcome
) -> None:
    """Keep what does not travel: local arrays of the model, and the optimiser's moments where the study says so."""
    study = instruction.study
    state: dict[str, Tensor] = {
        f"model.{name}": value.detach().cpu()
        for name, value in model.state_dict().items()
        if name not in names and part_of(name) in trained_parts(study, instruction.task)
    }
    if study.federation.keep_optimizer_state:
        state |= {f"optimizer.{name}": value for name, value in outcome.optimizer_state.items()}
    if state:
        keep_all = study.evaluation.model == "best_on_validation"
        local_state.save(site_dir, instruction.run_id, instruction.task, instruction.round_number, state, keep_all)


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def describer(store: Store, study: Study, site_dir: Path) -> Describe:
    """How a batch is described for its relation: by what is known of the ECGs, from the site's cache where describing
    them is slow, else on the device.

    What the archive measured comes first where the relation can use it; what is computed fills the rest.
    """
    relation = study.objective.relation
    if relation.facts:
        facts = fact_table(study, store.index, relation.facts)
        return lambda rows, signals, present: torch.from_numpy(facts[rows]).to(signals.device)
    if not relation.cached:
        return lambda rows, signals, present: relation.describe(signals, present)

    def compute(steps: NDArray[np.int16]) -> NDArray[np.float32]:
        signal, present = to_millivolt(steps)
        return relation.describe(torch.from_numpy(signal), torch.from_numpy(present)).numpy()

    progress = progress_file(site_dir, f"describing ECGs ({relation.name})")
    table = store.derived(relation.cache_name, relation.width, compute, progress)
    if relation.measured:
        names, units = zip(*relation.measured, strict=True)
        measured = store.measurements(names) / np.array(units, np.float32)
        table = np.array(table)  # the cache itself stays as computed
        table[:, : len(names)] = np.where(np.isnan(measured), table[:, : len(names)], measured)
    return lambda rows, signals, present: torch.from_numpy(table[rows]).to(signals.device)


def report_of(outcome: Outcome, late: bool) -> TrainingReport:
    """What the centre is told of a round: means over steps. Collapse is judged late: every run starts collapsed."""
    health = outcome.diagnostics
    known = {name: value for name, value in health.items() if math.isfinite(value)}
    return TrainingReport(
        loss=outcome.loss,
        violating_share=known.get("violating_share"),
        mean_cosine=known.get("mean_cosine"),
        hub_share=known.get("hub_share"),
        signal_to_noise=known.get("signal_to_noise"),
        warning=warning_of(health, late) if "skipped_batches" in health else None,
    )


def warning_of(health: Mapping[str, float], late: bool) -> str | None:
    """What the centre should be told of a round of pretraining, or None."""
    if health["skipped_batches"]:
        return "batches without ECGs to tell apart taught nothing; raise batch_size or add records"
    return collapse_warning(health) if late else None


def progress_file(site_dir: Path, doing: str) -> Progress:
    """A callback that writes how far this site is to `progress.json`, at most twice a second, for whoever watches."""
    path, last = site_dir / PROGRESS_FILE, 0.0

    def write(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.5 and done < total:
            return
        last = now
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"doing": doing, "done": done, "total": total}))
        unfinished.replace(path)

    return write
