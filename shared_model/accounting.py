"""What a plan of noisy steps costs: epsilon at delta for one patient, added or removed.

Google's dp-accounting does the mathematics: privacy loss distributions (PLD; Koskela et al. 2020, Doroshenko et al.
2022) for a plan that is fixed beforehand, Renyi DP (Mironov et al. 2019) at one fixed order for a filter (Feldman and
Zrnic 2021). The Gaussian (CLT) accountant is not used: its value is no bound.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Literal

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.rdp import RdpAccountant
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import brentq

from shared_model.errors import ExitCode, HemoFedError

if TYPE_CHECKING:
    from shared_model.study import Study

SMALLEST_SIGMA, LARGEST_SIGMA = 0.3, 1000.0
SIGMA_STEP = 1e-3
MOST_ROUNDS = 10_000
LOG_TOLERANCE, TINY = 1e-5, 1e-12
BRACKET = 0.3  # of the logarithm; small, since little noise takes long to account for


class Spend(BaseModel):
    """A mechanism that is used `count` times on one hospital's patients.

    Attributes:
        mechanism: `sampled_gaussian`: a sum over a Poisson sample of patients, each of L2 norm at most C, plus Gaussian
            noise of SD `noise_multiplier` * C. `discrete_laplace`: counts that one patient changes by an L1 of s, plus
            discrete Laplace noise of scale s / `epsilon`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mechanism: Literal["sampled_gaussian", "discrete_laplace"]
    count: int = Field(ge=1)
    noise_multiplier: float = Field(default=0.0, ge=0)
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    epsilon: float = Field(default=0.0, ge=0)


class Planned(BaseModel):
    """One line of a plan: what each round of a task spends, and how many rounds it is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["pretrain", "finetune", "evaluate"]
    rounds: int = Field(ge=1)
    each: Spend


def plan_of(study: "Study") -> tuple[Planned, ...]:
    """All that a private study spends at each hospital, spare rounds included; empty where it has no `[privacy]`."""
    privacy = study.privacy
    if privacy is None:
        return ()
    plan = []
    for task, phase in study.phases.items():
        private = privacy.phase(task)
        if private is not None and task != "distance" and phase.rounds:
            spend = Spend(
                mechanism="sampled_gaussian",
                count=private.steps_per_round,
                noise_multiplier=private.noise_multiplier,
                sampling_rate=private.sampling_rate,
            )
            plan.append(Planned(task=task, rounds=phase.rounds + private.spare_rounds, each=spend))
    release = Spend(mechanism="discrete_laplace", count=1, epsilon=privacy.release_epsilon)
    return (*plan, Planned(task="evaluate", rounds=2, each=release))


def spends_of(plan: Sequence[Planned]) -> list[Spend]:
    """A plan as mechanisms and how often each is used."""
    return [line.each.model_copy(update={"count": line.rounds * line.each.count}) for line in plan]


def loss_of(spend: Spend) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The privacy loss distribution of a mechanism used `count` times.

    Counts are taken as any mechanism of pure epsilon: a patient may be in several tables, and the loss is then no
    single Laplace's.
    """
    if spend.mechanism == "discrete_laplace":
        once = privacy_loss_distribution.from_privacy_parameters(DifferentialPrivacyParameters(spend.epsilon, 0.0))
    else:
        once = privacy_loss_distribution.from_gaussian_mechanism(
            spend.noise_multiplier,
            sampling_prob=spend.sampling_rate,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    return once.self_compose(spend.count)


def epsilon_of(spends: Sequence[Spend], delta: float) -> float:
    """The smallest epsilon that holds at `delta` for all of them together, by privacy loss distributions.

    Guarantee
    ---------
    Unit: a patient; neighbours: one patient more or less at one hospital. Holds for parameters that were fixed before
    the first of the mechanisms was used, also where only some of them are used in the end (what was used is then a
    function of the whole). It is broken by parameters chosen after looking, and by a patient who is at two hospitals:
    their epsilons add.
    """
    if not spends:
        return 0.0
    total = reduce(lambda one, other: one.compose(other), map(loss_of, spends))
    return float(total.get_epsilon_for_delta(delta))


def renyi_at(spends: Sequence[Spend], order: float) -> float:
    """Renyi divergence of all of them together at one order: it adds, whatever chose the parameters."""
    if not spends:
        return 0.0
    total, accountant = 0.0, RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
    for spend in spends:
        if spend.mechanism == "discrete_laplace":  # of pure epsilon: Bun and Steinke 2016, proposition 3.3
            total += spend.count * min(spend.epsilon, order * spend.epsilon**2 / 2)
        else:
            event = PoissonSampledDpEvent(spend.sampling_rate, GaussianDpEvent(spend.noise_multiplier))
            accountant.compose(event, spend.count)
    return total + float(accountant.rdp[0])


def filter_limit(epsilon: float, delta: float, order: float) -> float:
    """The Renyi divergence at `order` that (epsilon, delta) leaves room for (Mironov 2017, proposition 3): a filter
    that stops before it is exceeded is (epsilon, delta) private even if each mechanism was chosen after seeing the last
    (Feldman and Zrnic 2021, theorem 4.3)."""
    return max(0.0, epsilon - math.log(1 / delta) / (order - 1))


def calibrate(plan: Sequence[Planned], epsilon: float, delta: float) -> tuple[Planned, ...]:
    """The plan with all noise multipliers times one factor, the smallest such that it costs at most `epsilon`.

    Multipliers are rounded up to three decimals, within 0.3 to 1000, and what they cost is computed again. Releases
    of counts stay as they are. The plan has at least one phase of training.

    Raises:
        HemoFedError: no factor is enough: the releases cost too much, or the steps are too many (BUDGET_EXCEEDED).
    """

    def excess(log_factor: float) -> float:
        return math.log(epsilon_of(spends_of(_scaled(plan, math.exp(log_factor))), delta) / epsilon + TINY)

    sigmas = [line.each.noise_multiplier for line in plan if line.each.mechanism == "sampled_gaussian"]
    least, most = math.log(SMALLEST_SIGMA / min(sigmas)), math.log(LARGEST_SIGMA / max(sigmas))
    low = high = min(max(0.0, least), most)
    while excess(high) > 0 and high < most:
        low, high = high, min(high + 1, most)
    while excess(low) <= 0 and low > least:
        low, high = max(low - BRACKET, least), low
    if excess(high) > 0:
        raise HemoFedError(
            f"privacy budget: no noise multiplier up to {LARGEST_SIGMA:g} makes the plan cost {epsilon:g} or less; "
            "lower privacy.release_epsilon, or take fewer steps",
            ExitCode.BUDGET_EXCEEDED,
        )
    factor = low if excess(low) <= 0 else brentq(excess, low, high, xtol=LOG_TOLERANCE)
    while epsilon_of(spends_of(found := _scaled(plan, math.exp(factor), rounded_up=True)), delta) > epsilon:
        factor += LOG_TOLERANCE
    return found


def _scaled(plan: Sequence[Planned], factor: float, rounded_up: bool = False) -> tuple[Planned, ...]:
    """The plan with its noise multipliers times a factor."""
    lines = []
    for line in plan:
        sigma = line.each.noise_multiplier * factor
        sigma = math.ceil(sigma / SIGMA_STEP) * SIGMA_STEP if rounded_up else sigma
        each = line.each.model_copy(update={"noise_multiplier": round(sigma, 9)})
        lines.append(line.model_copy(update={"each": each}))
    return tuple(lines)


def rounds_that_fit(plan: Sequence[Planned], task: str, epsilon: float, delta: float) -> int:
    """The most rounds of a task, at most 10000, with which the plan costs at most `epsilon`, its other lines being as
    they are. It may be fewer than the plan has; 0 where the other lines alone cost more."""
    once = loss_of(next(line.each for line in plan if line.task == task))
    others = [loss_of(spend) for spend in spends_of([line for line in plan if line.task != task])]

    rest = [reduce(lambda one, other: one.compose(other), others)] if others else []

    def fits(rounds: int) -> bool:
        total = reduce(lambda one, other: one.compose(other), rest, once.self_compose(rounds))
        return float(total.get_epsilon_for_delta(delta)) <= epsilon

    fitting, beyond = 0, 1
    while beyond <= MOST_ROUNDS and fits(beyond):
        fitting, beyond = beyond, 2 * beyond
    beyond = min(beyond, MOST_ROUNDS + 1)
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting
