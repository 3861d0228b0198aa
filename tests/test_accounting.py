"""What a plan costs, against published figures, another library, closed forms and brute force."""

import math

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.optimize import brentq
from scipy.stats import norm

from shared_model.accounting import (
    LARGEST_SIGMA,
    SMALLEST_SIGMA,
    Planned,
    Spend,
    calibrate,
    epsilon_of,
    filter_limit,
    plan_of,
    renyi_at,
    rounds_that_fit,
    spends_of,
)
from shared_model.errors import ExitCode, HemoFedError
from tests.private_studies import private_study

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
PRETRAIN, FINETUNE = (0.0128, 1.1, 4000), (0.032, 1.5, 600)
RELEASES = Spend(mechanism="discrete_laplace", count=2, epsilon=0.25)


def gaussian(sampling_rate: float, sigma: float, count: int) -> Spend:
    return Spend(mechanism="sampled_gaussian", count=count, noise_multiplier=sigma, sampling_rate=sampling_rate)


def line(task: str, rounds: int, each: Spend) -> Planned:
    return Planned.model_validate({"task": task, "rounds": rounds, "each": each})


# Where several libraries were run on the same settings, their exact accountants agree on these.
@pytest.mark.parametrize(
    ("spends", "delta", "epsilon"),
    [
        ([gaussian(0.0128, 1.0, 7813)], 1e-5, 7.176),
        ([gaussian(0.08, 2.0, 500)], 1e-4, 3.708),
        ([gaussian(*PRETRAIN), gaussian(*FINETUNE)], 1e-5, 4.990),
        ([gaussian(*PRETRAIN), gaussian(*FINETUNE), RELEASES], 1e-5, 5.234),
    ],
)
def test_figures_known_from_elsewhere(spends: list[Spend], delta: float, epsilon: float) -> None:
    assert epsilon_of(spends, delta) == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize(
    ("phases", "delta"),
    [
        ([(0.0128, 1.0, 7813)], 1e-5),
        ([(0.08, 2.0, 500)], 1e-4),
        ([PRETRAIN, FINETUNE], 1e-5),
        ([(0.5, 8.0, 100)], 1e-6),
    ],
)
def test_against_another_librarys_renyi_accountant(phases: list[tuple[float, float, int]], delta: float) -> None:
    """Renyi DP is a looser bound of the same mechanism: above, and not far."""
    rdp = np.sum(
        [compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=ORDERS) for q, sigma, steps in phases], 0
    )
    loose, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    exact = epsilon_of([gaussian(*phase) for phase in phases], delta)
    assert exact <= loose <= 1.15 * exact


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Delta of the Gaussian mechanism of sensitivity 1: Balle and Wang 2018, theorem 8."""
    shift, width = 1 / (2 * sigma), epsilon * sigma
    return float(norm.cdf(shift - width) - math.exp(epsilon) * norm.cdf(-shift - width))


@pytest.mark.parametrize("sigma", [0.8, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    """n Gaussian releases are one of sigma / sqrt(n)."""
    once = sigma / math.sqrt(steps)
    epsilon = brentq(lambda e: gaussian_delta(e, once) - 1e-5, 0.0, 100.0)
    assert epsilon_of([gaussian(1.0, sigma, steps)], 1e-5) == pytest.approx(epsilon, rel=2e-3)
    assert epsilon_of([gaussian(1.0, sigma, steps)], 1e-5) >= epsilon - 1e-9


def test_counts_cost_their_epsilon_and_nothing_costs_nothing() -> None:
    assert epsilon_of([], 1e-5) == 0.0
    assert renyi_at([], 8.0) == 0.0
    once = Spend(mechanism="discrete_laplace", count=1, epsilon=0.25)
    assert epsilon_of([once], 1e-9) == pytest.approx(0.25, rel=1e-3)
    assert 0.45 < epsilon_of([RELEASES], 1e-5) <= 0.5 + 1e-9


@pytest.mark.parametrize("order", [2, 8, 32])
def test_renyi_divergence_at_one_order(order: int) -> None:
    """Against the closed form of Mironov et al. 2019 for whole orders, and order / (2 sigma^2) without sampling."""
    assert renyi_at([gaussian(1.0, 2.0, 7)], order) == pytest.approx(7 * order / 8)
    q, sigma = 0.05, 1.5
    terms = [
        math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    ]
    closed = math.log(math.fsum(terms)) / (order - 1)
    assert renyi_at([gaussian(q, sigma, 30)], order) == pytest.approx(30 * closed, rel=1e-6)
    assert renyi_at([gaussian(q, sigma, 30), RELEASES], order) == pytest.approx(
        30 * closed + 2 * min(0.25, order * 0.25**2 / 2), rel=1e-6
    )


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("order", [1.5, 8.0, 40.0])
def test_the_bound_on_pure_epsilon_holds_for_randomised_response(epsilon: float, order: float) -> None:
    """The worst mechanism of pure epsilon, whose Renyi divergence can be written down."""
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    true = math.log(p**order * (1 - p) ** (1 - order) + (1 - p) ** order * p ** (1 - order)) / (order - 1)
    once = Spend(mechanism="discrete_laplace", count=1, epsilon=epsilon)
    assert true <= renyi_at([once], order) + 1e-12


def test_the_room_of_a_filter_is_what_its_epsilon_converts_to() -> None:
    assert filter_limit(8.0, 1e-5, 8.0) == pytest.approx(8.0 - math.log(1e5) / 7)
    assert filter_limit(1.0, 1e-5, 8.0) == 0.0
    spend = gaussian(0.05, 1.5, 100)
    epsilon = renyi_at([spend], 8.0) + math.log(1e5) / 7
    assert epsilon_of([spend], 1e-5) <= epsilon


def test_the_plan_of_a_study_holds_spare_rounds_and_two_releases() -> None:
    plan = plan_of(private_study(release_epsilon=0.1))
    assert [(each.task, each.rounds, each.each.count) for each in plan] == [
        ("pretrain", 5, 20),
        ("finetune", 3, 20),
        ("evaluate", 2, 1),
    ]
    assert [spend.count for spend in spends_of(plan)] == [100, 60, 2]
    assert plan_of(private_study().model_copy(update={"privacy": None})) == ()


# --- calibration

TWO_PHASES = (line("pretrain", 20, gaussian(0.0128, 1.1, 200)), line("finetune", 6, gaussian(0.032, 1.5, 100)))


def cost(plan: tuple[Planned, ...], delta: float, less: float = 0.0) -> float:
    """What a plan costs, with its noise multipliers so much smaller."""
    spends = [
        spend.model_copy(update={"noise_multiplier": spend.noise_multiplier - less})
        if spend.mechanism == "sampled_gaussian"
        else spend
        for spend in spends_of(plan)
    ]
    return epsilon_of(spends, delta)


@pytest.mark.parametrize(
    ("epsilon", "releases"), [(1.0, (line("evaluate", 2, RELEASES.model_copy(update={"count": 1})),)), (4.0, ())]
)
def test_calibration_costs_at_most_the_target_and_hardly_less(epsilon: float, releases: tuple[Planned, ...]) -> None:
    plan = (*TWO_PHASES, *releases)
    found = calibrate(plan, epsilon, 1e-5)
    assert cost(found, 1e-5) <= epsilon < cost(found, 1e-5, less=0.01)
    sigmas = [each.each.noise_multiplier for each in found[:2]]
    assert all(round(sigma, 3) == sigma for sigma in sigmas)
    assert sigmas[1] / sigmas[0] == pytest.approx(1.5 / 1.1, rel=3e-3)  # one factor for all
    assert found[2:] == releases
    assert [(each.task, each.rounds, each.each.count) for each in found] == [
        (each.task, each.rounds, each.each.count) for each in plan
    ]


@pytest.mark.parametrize(
    ("each", "rounds", "delta", "epsilon", "sigma"),
    [
        (gaussian(0.0128, 1.0, 1), 4000, 1e-5, 3.0, 1.338),
        (gaussian(0.08, 1.0, 1), 500, 1e-4, 1.0, 5.800),
        (gaussian(0.08, 9.0, 1), 500, 1e-4, 3.0, 2.345),
        (gaussian(1.0, 1.0, 1), 50, 1e-4, 3.0, 8.65),
    ],
)
def test_calibration_finds_known_noise(each: Spend, rounds: int, delta: float, epsilon: float, sigma: float) -> None:
    (found,) = calibrate([line("finetune", rounds, each)], epsilon, delta)
    assert found.each.noise_multiplier == pytest.approx(sigma, abs=0.003)


def test_calibration_stays_within_what_can_be_accounted() -> None:
    few = [line("finetune", 1, gaussian(0.01, 0.4, 1))]
    assert calibrate(few, 50.0, 1e-5)[0].each.noise_multiplier == SMALLEST_SIGMA
    once = Spend(mechanism="discrete_laplace", count=1, epsilon=1.0)
    costly = [line("finetune", 1, gaussian(0.01, 200.0, 1)), line("evaluate", 2, once)]
    with pytest.raises(HemoFedError, match=f"no noise multiplier up to {LARGEST_SIGMA:g}") as caught:
        calibrate(costly, 1.0, 1e-5)
    assert caught.value.exit_code == ExitCode.BUDGET_EXCEEDED


# --- rounds that fit


@pytest.mark.parametrize("task", ["pretrain", "finetune", "evaluate"])
def test_rounds_that_fit_do_and_one_more_does_not(task: str) -> None:
    plan = plan_of(private_study())
    most = rounds_that_fit(plan, task, 3.0, 1e-5)
    assert most >= 3

    def with_rounds(rounds: int) -> float:
        changed = [each.model_copy(update={"rounds": rounds}) if each.task == task else each for each in plan]
        return epsilon_of(spends_of(changed), 1e-5)

    assert with_rounds(most) <= 3.0 < with_rounds(most + 1)


def test_no_round_fits_where_the_rest_costs_too_much_and_never_more_than_the_search_looks_at() -> None:
    plan = plan_of(private_study())
    assert rounds_that_fit(plan, "evaluate", 0.5, 1e-5) == 0
    cheap = [line("finetune", 1, gaussian(1e-6, 100.0, 1))]
    assert rounds_that_fit(cheap, "finetune", 8.0, 1e-5) == 10_000
