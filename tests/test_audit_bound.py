"""The lower bound on epsilon: published values, exact arithmetic, properties, and that it is seldom too high."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulation.audit_bound import (
    bound_of,
    ceiling,
    correct_guesses,
    guess_grid,
    lower_bound,
    p_value,
)

DELTA = 1e-5


def exact_p_value(m: int, r: int, v: int, right: Fraction, delta: Fraction) -> Fraction:
    """The paper's formula in rational numbers, every term written out; i runs over all m."""
    chance = [Fraction(math.comb(r, k)) * right**k * (1 - right) ** (r - k) for k in range(r + 1)]

    def at_least(k: int) -> Fraction:
        return sum(chance[max(0, k) :], Fraction(0))

    beta = at_least(v)
    largest = max((at_least(v - i) - beta) / i for i in range(1, m + 1))
    return min(Fraction(1), beta + 2 * m * delta * largest)


@pytest.mark.parametrize(
    ("m", "r", "v"), [(20, 20, 20), (20, 10, 9), (50, 24, 24), (50, 50, 31), (80, 40, 21), (60, 8, 0), (60, 8, 1)]
)
@pytest.mark.parametrize("right", [Fraction(1, 2), Fraction(3, 5), Fraction(9, 10), Fraction(99, 100)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 100_000), Fraction(1, 200)])
def test_the_p_value_is_the_papers_in_exact_arithmetic(
    m: int, r: int, v: int, right: Fraction, delta: Fraction
) -> None:
    epsilon = math.log(right / (1 - right))
    expected = float(exact_p_value(m, r, v, right, delta))
    assert p_value(m, r, v, epsilon, float(delta)) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("m", "r", "v"), [(20, 10, 10), (40, 40, 36), (60, 30, 29)])
def test_the_bound_is_where_the_exact_p_value_crosses_alpha(m: int, r: int, v: int) -> None:
    found = lower_bound(m, r, v, DELTA, 0.05)
    assert found > 0.1
    for epsilon, refuted in ((found - 1e-6, True), (found + 1e-6, False)):
        right = Fraction(1 / (1 + math.exp(-epsilon)))
        assert (exact_p_value(m, r, v, right, Fraction(DELTA)) <= Fraction(0.05)) is refuted


@pytest.mark.parametrize(
    ("m", "tabulated"),
    [(50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10), (1000, 5.78), (2000, 6.45), (5000, 7.28), (10000, 7.83)],
)
def test_the_ceiling_is_the_tabulated_one(m: int, tabulated: float) -> None:
    assert ceiling(m, DELTA) == pytest.approx(tabulated, abs=0.005)


def test_the_ceiling_without_delta_is_in_closed_form() -> None:
    """All of m right has chance q^m, so that q = alpha^(1/m)."""
    for m in (10, 100, 3000):
        right = 0.05 ** (1 / m)
        assert ceiling(m, 0.0) == pytest.approx(math.log(right / (1 - right)), rel=1e-6)


Cases = st.integers(2, 400).flatmap(
    lambda m: st.integers(1, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)


@given(Cases, st.floats(0, 12), st.floats(0, 12), st.floats(0, 1e-3))
@settings(max_examples=150, deadline=None)
def test_a_larger_epsilon_is_never_less_likely(
    case: tuple[int, int, int], one: float, other: float, delta: float
) -> None:
    """What bisection needs."""
    low, high = sorted((one, other))
    assert p_value(*case, low, delta) <= p_value(*case, high, delta) + 1e-9


@given(Cases, st.floats(0, 1e-3), st.floats(0.001, 0.2))
@settings(max_examples=60, deadline=None)
def test_the_bound_moves_as_it_should(case: tuple[int, int, int], delta: float, alpha: float) -> None:
    m, r, v = case
    found = lower_bound(m, r, v, delta, alpha)
    slack = 1e-6
    if v < r:
        assert lower_bound(m, r, v + 1, delta, alpha) >= found - slack  # more right guesses
    assert lower_bound(m, r, v, delta / 2, alpha) >= found - slack  # less delta
    assert lower_bound(m, r, v, delta, alpha / 2) <= found + slack  # surer
    assert lower_bound(m + 50, r, v, delta, alpha) <= found + slack  # more canaries that nothing is guessed of
    if 2 * v <= r:
        assert found == 0  # no better than a coin


def test_guesses_are_the_highest_and_the_lowest_scores() -> None:
    scores = np.array([0.1, 5.0, -3.0, 0.2, 4.0, -2.0])
    included = np.array([True, True, False, True, False, True])
    assert correct_guesses(scores, included, 2) == 2
    assert correct_guesses(scores, included, 4) == 2
    assert correct_guesses(scores, included, 6) == 3
    assert correct_guesses(-scores, included, 2) == 0


def test_the_grid_is_even_ascending_and_ends_with_everybody() -> None:
    assert guess_grid(800) == (50, 100, 200, 400, 800)
    assert guess_grid(61) == (2, 6, 14, 30, 60)
    assert guess_grid(2) == (2,)


def test_perfect_scores_give_nearly_the_ceiling_and_random_ones_nothing() -> None:
    rng = np.random.default_rng(0)
    included = rng.random(800) < 0.5
    order = np.argsort(included, kind="stable")
    # Half of the guesses are "in": with unequal numbers of in and out a few at the border are wrong.
    perfect = np.empty(800)
    perfect[order] = np.arange(800)
    found = bound_of(perfect, included, DELTA, 0.05)
    assert found.correct == found.guesses
    assert lower_bound(800, found.guesses, found.guesses, DELTA, 0.01) == pytest.approx(found.epsilon)
    assert 4 < found.epsilon < ceiling(800, DELTA)
    assert bound_of(rng.random(800), included, DELTA, 0.05).epsilon == 0
    assert bound_of(np.zeros(800), np.arange(800) % 2 == 0, DELTA, 0.05).epsilon == 0


@pytest.mark.parametrize(("epsilon", "m"), [(0.5, 200), (1.0, 100), (3.0, 200)])
def test_the_bound_is_above_the_truth_in_at_most_five_per_cent_of_runs(epsilon: float, m: int) -> None:
    """Randomised response at exactly epsilon, whose answers are the scores, beside a random order among equals."""
    rng, runs = np.random.default_rng(1), 250
    found = []
    for _ in range(runs):
        included = rng.random(m) < 0.5
        told = np.where(rng.random(m) < 1 / (1 + math.exp(-epsilon)), included, ~included)
        found.append(bound_of(told + rng.random(m) / 2, included, 0.0, 0.05).epsilon)
    assert sum(each > epsilon for each in found) <= stats.binom.ppf(0.999, runs, 0.05)
    assert np.median(found) > 0.25 * epsilon  # and it is not valid by saying nothing


def test_the_bound_without_its_delta_term_would_be_too_high() -> None:
    """With chance delta a canary is told outright: the delta term pays for it, and at delta = 0 epsilon is refuted."""
    rng, runs, m, epsilon, delta = np.random.default_rng(2), 100, 200, 1.0, 0.1
    with_term = without = 0
    for _ in range(runs):
        included = rng.random(m) < 0.5
        told = np.where(rng.random(m) < 1 / (1 + math.exp(-epsilon)), included, ~included).astype(float)
        outright = rng.random(m) < delta
        scores = np.where(outright, 10.0 * (2 * included - 1), told + rng.random(m) / 2)
        with_term += bound_of(scores, included, delta, 0.05).epsilon > epsilon
        without += bound_of(scores, included, 0.0, 0.05).epsilon > epsilon
    assert with_term <= stats.binom.ppf(0.999, runs, 0.05)
    assert without > 0.5 * runs
