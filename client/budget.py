"""What a hospital's privacy budget has given out and has left, and what a plan would cost. Reads no record."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client import ledger_account as account
from client.ledger import LedgerContent, read_ledger
from client.policy import Policy, breaches, load_policy
from shared_model.accounting import (
    Planned,
    calibrate,
    epsilon_of,
    filter_limit,
    renyi_at,
    rounds_that_fit,
    spends_of,
)
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Admission, Entry
from shared_model.study import Study, read_toml, study_from_table

EXAMPLE_PATIENTS = (200, 1000, 5000)


@dataclass(frozen=True)
class TaskRounds:
    """Rounds of a task of an admitted study. With a filter `left` is how many rounds as planned still fit."""

    task: str
    planned: int
    reserved: int
    answered: int
    left: int


@dataclass(frozen=True)
class StudyShare:
    """An admitted study: its share of the budget, which is gone whether its rounds are used or not."""

    digest: str
    name: str
    epsilon: float
    delta: float
    accounting: str
    tasks: tuple[TaskRounds, ...]


@dataclass(frozen=True)
class Budget:
    """The whole: caps are the ledger's or, where it was lowered since, the policy's."""

    epsilon: float
    delta: float
    epsilon_shared: float
    delta_shared: float
    epsilon_left: float
    delta_left: float
    entries: int
    studies: tuple[StudyShare, ...]


@dataclass(frozen=True)
class PhaseCost:
    """One line of a plan.

    Attributes:
        epsilon: what it costs by itself, at the study's delta.
        more_rounds: how many rounds more than planned the study's share would hold, the other lines as they are;
            negative where the plan costs more than the share.
        noise_to_signal: sigma / (q * N), the SD of the noise in units of the longest mean gradient, by patients N.
    """

    task: str
    rounds: int
    steps_per_round: int
    sampling_rate: float
    noise_multiplier: float
    epsilon: float
    more_rounds: int
    noise_to_signal: dict[str, float]


@dataclass(frozen=True)
class PlanCost:
    """What a study's plan costs: together less than the sum of its lines.

    Attributes:
        within_share: the plan costs no more than privacy.epsilon.
        admitted: the ledger has this very study already.
        refused: why the hospital would not admit it; empty where it would.
    """

    study: str
    digest: str
    share_epsilon: float
    delta: float
    epsilon: float
    within_share: bool
    admitted: bool
    refused: tuple[str, ...]
    phases: tuple[PhaseCost, ...]


def budget_of(site_dir: Path) -> Budget:
    """Caps, shares, and rounds by study and task. Verifies the whole ledger; takes no lock and writes nothing.

    Raises:
        HemoFedError: policy or ledger are not whole (see `load_policy`, `open_ledger`).
    """
    policy = load_policy(site_dir)
    content = read_ledger(site_dir, policy)
    epsilon, delta = account.caps(content.entries, policy)
    given_epsilon, given_delta = account.shared(content.entries)
    return Budget(
        epsilon=float(epsilon),
        delta=float(delta),
        epsilon_shared=float(given_epsilon),
        delta_shared=float(given_delta),
        epsilon_left=max(0.0, float(epsilon - given_epsilon)),
        delta_left=max(0.0, float(delta - given_delta)),
        entries=len(content.entries),
        studies=tuple(_share(content, digest) for digest in account.admissions(content.entries)),
    )


def _share(content: LedgerContent, digest: str) -> StudyShare:
    admission = account.admissions(content.entries)[digest]
    spent, answers = account.reservations(content.entries, digest), account.commitments(content.entries)
    tasks = []
    for line in admission.plan:
        own = [entry for entry in spent if entry.task == line.task]
        answered = sum(entry.sequence in answers for entry in own)
        left = account.rounds_left(admission, spent, line)
        tasks.append(TaskRounds(line.task, line.rounds, len(own), answered, left))
    return StudyShare(
        digest=digest,
        name=content.study_names[digest],
        epsilon=admission.epsilon,
        delta=admission.delta,
        accounting=admission.accounting,
        tasks=tuple(tasks),
    )


def study_of(path: Path) -> Study:
    """The study in a file as hospitals receive it: without what only a simulation reads."""
    table = read_toml(path)
    return study_from_table({k: v for k, v in table.items() if k not in ("simulation", "comparison")}, str(path))


def plan_cost(site_dir: Path, study: Study, epsilon: float | None = None) -> PlanCost:
    """What a study's plan would cost here; with `epsilon`, after changing its noise so that it costs at most that.

    Raises:
        HemoFedError: the study has no [privacy] (LEDGER_REFUSED); no noise is enough (BUDGET_EXCEEDED); `epsilon` with
            a filter, whose parameters are not fixed (USAGE); policy or ledger are not whole.
    """
    policy = load_policy(site_dir)
    entries = read_ledger(site_dir, policy).entries
    admission = account.admission_of(study)
    if epsilon is not None:
        if admission.accounting == "filter":
            raise HemoFedError('--epsilon: noise is calibrated for accounting = "plan" only', ExitCode.USAGE)
        plan = calibrate(admission.plan, epsilon, admission.delta)
        admission = admission.model_copy(update={"plan": plan, "epsilon": epsilon})
    together = cost_of(admission, admission.plan)
    admitted = study.digest in account.admissions(entries) and epsilon is None
    return PlanCost(
        study=study.name,
        digest=study.digest,
        share_epsilon=admission.epsilon,
        delta=admission.delta,
        epsilon=together,
        within_share=together <= admission.epsilon,
        admitted=admitted,
        refused=tuple(_reasons(policy, entries, study, admission, admitted)),
        phases=tuple(_phase(policy, admission, line) for line in admission.plan),
    )


def cost_of(admission: Admission, plan: Sequence[Planned]) -> float:
    """Epsilon of a plan at the study's delta, by the study's own accounting."""
    if admission.accounting == "plan":
        return epsilon_of(spends_of(plan), admission.delta)
    at_order = renyi_at(spends_of(plan), admission.order)
    return at_order + math.log(1 / admission.delta) / (admission.order - 1)


def _reasons(
    policy: Policy, entries: Sequence[Entry], study: Study, admission: Admission, admitted: bool
) -> Iterator[str]:
    """Why the hospital would not admit the study with this share."""
    assert study.privacy is not None  # it has an admission
    privacy = study.privacy.model_copy(update={"epsilon": admission.epsilon})
    yield from breaches(policy, study.model_copy(update={"privacy": privacy}))
    new = (0.0, 0.0) if admitted else (admission.epsilon, admission.delta)
    try:
        account.check_shares(entries, policy, *new)
    except HemoFedError as error:
        yield error.message
    try:
        account.check_plan(admission)
    except HemoFedError as error:
        yield error.message


def _phase(policy: Policy, admission: Admission, line: Planned) -> PhaseCost:
    each = line.each
    noise: dict[str, float] = {}
    if each.mechanism == "sampled_gaussian":
        for patients in (*EXAMPLE_PATIENTS, policy.declared(line.task)):
            if patients:
                noise[str(patients)] = each.noise_multiplier / (each.sampling_rate * patients)
    return PhaseCost(
        task=line.task,
        rounds=line.rounds,
        steps_per_round=each.count,
        sampling_rate=each.sampling_rate,
        noise_multiplier=each.noise_multiplier,
        epsilon=cost_of(admission, [line]),
        more_rounds=_rounds_in_share(admission, line) - line.rounds,
        noise_to_signal=noise,
    )


def _rounds_in_share(admission: Admission, line: Planned) -> int:
    """The most rounds of one line with which the plan stays within its share."""
    if admission.accounting == "plan":
        return rounds_that_fit(admission.plan, line.task, admission.epsilon, admission.delta)
    others = spends_of([each for each in admission.plan if each.task != line.task])
    room = filter_limit(admission.epsilon, admission.delta, admission.order) - renyi_at(others, admission.order)
    return max(0, math.floor(room / renyi_at([line.each], admission.order)))
