"""What the entries of a privacy ledger add up to, and what they leave room for. Pure: knows no file."""

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from client.policy import Policy
from shared_model.accounting import Planned, Spend, epsilon_of, filter_limit, plan_of, renyi_at, spends_of
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Admission, Entry, Header
from shared_model.study import Study


def header_of(entries: Sequence[Entry]) -> Header:
    """The promise that the ledger began with."""
    header = entries[0].header
    assert header is not None  # an entry of another kind cannot be the first
    return header


def admissions(entries: Sequence[Entry]) -> dict[str, Admission]:
    """Admitted studies by digest, in their order."""
    return {entry.study: entry.admission for entry in entries if entry.admission is not None}


def reservations(entries: Sequence[Entry], study: str, task: str | None = None) -> list[Entry]:
    """What was reserved for a study, of one task or of all. It is spent, whether it was answered or not."""
    return [
        entry for entry in entries if entry.kind == "reserve" and entry.study == study and task in (None, entry.task)
    ]


def commitments(entries: Sequence[Entry]) -> dict[int, Entry]:
    """Commit entries by the sequence of the reservation that they answer."""
    return {entry.answered.reservation: entry for entry in entries if entry.answered is not None}


def shared(entries: Sequence[Entry]) -> tuple[Decimal, Decimal]:
    """Epsilon and delta that were given out as shares. Decimal, so that 0.1 + 0.2 fits into 0.3."""
    shares = admissions(entries).values()
    return sum((exact(a.epsilon) for a in shares), Decimal()), sum((exact(a.delta) for a in shares), Decimal())


def caps(entries: Sequence[Entry], policy: Policy) -> tuple[Decimal, Decimal]:
    """Epsilon and delta that all shares must stay within: the ledger's, or the policy's where it is lower or where
    there is no ledger yet."""
    promised: Policy | Header = header_of(entries) if entries else policy
    return min(exact(promised.epsilon), exact(policy.epsilon)), min(exact(promised.delta), exact(policy.delta))


def exact(number: float) -> Decimal:
    """The number as it is written."""
    return Decimal(repr(number))


def check_caps(entries: Sequence[Entry], policy: Policy) -> None:
    """Refuse a policy that allows more than the ledger promised when it was made.

    Raises:
        HemoFedError: POLICY_REFUSED.
    """
    header = header_of(entries)
    for name, asked, promised in (
        ("epsilon", policy.epsilon, header.epsilon),
        ("delta", policy.delta, header.delta),
    ):
        if asked > promised:
            raise HemoFedError(
                f"policy.toml: {name} = {asked:g} is above the {promised:g} that this cohort's ledger was made with; a "
                f"promise can be made stricter only: set it to {promised:g} or less",
                ExitCode.POLICY_REFUSED,
            )


def check_shares(entries: Sequence[Entry], policy: Policy, epsilon: float = 0.0, delta: float = 0.0) -> None:
    """Whether all shares, and one more, are within the caps.

    Raises:
        HemoFedError: they are not (BUDGET_EXCEEDED).
    """
    for name, given, cap, more in zip(
        ("epsilon", "delta"), shared(entries), caps(entries, policy), (epsilon, delta), strict=True
    ):
        total = given + exact(more)
        if total > cap:
            raise HemoFedError(
                f"privacy budget: {name} of all studies would be {float(total):g}, and the hospital allows "
                f"{float(cap):g}, of which {float(given):g} is given out; ask for a smaller share",
                ExitCode.BUDGET_EXCEEDED,
            )


def admission_of(study: Study) -> Admission:
    """A study's share and plan.

    Raises:
        HemoFedError: it has no [privacy] (LEDGER_REFUSED).
    """
    privacy = study.privacy
    if privacy is None:
        raise HemoFedError(
            f"study {study.name!r} has no [privacy], so there is no share to admit; add the table",
            ExitCode.LEDGER_REFUSED,
        )
    return Admission(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accounting=privacy.accounting,
        order=privacy.order,
        plan=plan_of(study),
    )


def check_plan(admission: Admission) -> None:
    """Whether a plan costs no more than its share; of a filter, whether its share leaves room for anything.

    Raises:
        HemoFedError: BUDGET_EXCEEDED.
    """
    epsilon, delta = admission.epsilon, admission.delta
    if admission.accounting == "filter":
        if filter_limit(epsilon, delta, admission.order) > 0:
            return
        line = f"at order {admission.order:g} the share leaves no room for any step; raise privacy.order or epsilon"
        raise HemoFedError(f"privacy budget: {line}", ExitCode.BUDGET_EXCEEDED)
    cost = epsilon_of(spends_of(admission.plan), delta)
    if not cost <= epsilon:
        raise HemoFedError(
            f"privacy budget: the plan costs epsilon {cost:.4g} at delta {delta:g}, its share is {epsilon:g}; raise "
            "the noise multipliers (hemofed-client budget --plan STUDY.toml --epsilon E), or take fewer rounds",
            ExitCode.BUDGET_EXCEEDED,
        )


def rounds_left(admission: Admission, spent: Sequence[Entry], line: Planned) -> int:
    """How many rounds of a plan's line may still be reserved; of a filter, how many would fit as planned."""
    if admission.accounting == "plan":
        return line.rounds - sum(entry.task == line.task for entry in spent)
    limit = filter_limit(admission.epsilon, admission.delta, admission.order)
    return max(0, math.floor((limit - renyi_used(admission, spent)) / renyi_at([line.each], admission.order)))


def line_of(admission: Admission, task: str) -> Planned | None:
    """The plan's line for a task, or None."""
    return next((line for line in admission.plan if line.task == task), None)


def check_round(admission: Admission, spent: Sequence[Entry], task: str, spend: Spend) -> None:
    """Whether one more round may be reserved, after all that was reserved for this study before.

    Guarantee
    ---------
    Unit: a patient; neighbours: one more or less. With "plan" no mechanism is used that the plan does not hold, and
    none more often, so that the study costs at most what the whole plan costs. With "filter" the Renyi divergence at
    the one order of the admission stays within `filter_limit`, whatever chose the spends (Feldman and Zrnic 2021).
    Reservations count, not answers: what a crash cut short is spent.

    Raises:
        HemoFedError: the task or the spend is not the plan's (LEDGER_REFUSED), or nothing is left (BUDGET_EXCEEDED).
    """
    line = line_of(admission, task)
    if line is None:
        raise HemoFedError(f"ledger: the admitted plan has no {task}; admit another study", ExitCode.LEDGER_REFUSED)
    if admission.accounting == "filter":
        _check_filter(admission, spent, spend)
        return
    if spend != line.each:
        raise HemoFedError(
            f"ledger: a round of {task} was asked for with other noise, sampling or steps than the admitted plan has; "
            "a changed plan is another study: admit that",
            ExitCode.LEDGER_REFUSED,
        )
    if sum(entry.task == task for entry in spent) >= line.rounds:
        raise HemoFedError(
            f"privacy budget: all {line.rounds} rounds of {task} that the plan paid for are used; more need a study "
            "with spare_rounds, and a share of its own",
            ExitCode.BUDGET_EXCEEDED,
        )


def _check_filter(admission: Admission, spent: Sequence[Entry], spend: Spend) -> None:
    noise = spend.noise_multiplier if spend.mechanism == "sampled_gaussian" else spend.epsilon
    if noise <= 0:
        raise HemoFedError("ledger: a spend without noise cannot be accounted", ExitCode.LEDGER_REFUSED)
    used, limit = renyi_used(admission, spent), filter_limit(admission.epsilon, admission.delta, admission.order)
    if not used + renyi_at([spend], admission.order) <= limit:
        raise HemoFedError(
            f"privacy budget: the filter at order {admission.order:g} has used {used:.4g} of {limit:.4g}, and this "
            "round does not fit; nothing further of this study can be answered, or only with more noise",
            ExitCode.BUDGET_EXCEEDED,
        )


def renyi_used(admission: Admission, spent: Sequence[Entry]) -> float:
    """Renyi divergence of all reservations of a study at its filter's order."""
    together: Counter[Spend] = Counter()  # equal spends are composed at once: that is a hundred times as fast
    for entry in spent:
        if entry.spend is not None:
            together[entry.spend.model_copy(update={"count": 1})] += entry.spend.count
    return renyi_at([once.model_copy(update={"count": count}) for once, count in together.items()], admission.order)
