"""A lower bound on epsilon from one run with canaries, as Steinke, Nasr and Jagielski (2023, arXiv:2305.08846) have it.

Each of m canaries was put into the training data by the toss of a fair coin. An attacker guesses for some of them
whether they were in. Under (epsilon, delta) differential privacy few guesses can be right beyond chance; the largest
epsilon under which what was seen is too unlikely is the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

GUESSED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
LARGEST_EPSILON = 100.0
HALVINGS = 30


@dataclass(frozen=True)
class Bound:
    """`epsilon` is refuted, so that the truth is larger; 0 where nothing is. `correct` of `guesses` were right."""

    epsilon: float
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely that many right guesses are at most, if training is (epsilon, delta) private.

    The paper's main theorem: beta + 2 m delta max_i (P[B >= v - i] - beta) / i, where B is binomial of r trials at
    e^epsilon / (1 + e^epsilon), beta = P[B >= v], and i runs from 1 to v: beyond v the numerator grows no more.

    Args:
        canaries: m, all whose coins were tossed.
        guesses: r, those that a guess was made for.
        correct: v, those of r that were guessed right.
    """
    right = float(expit(epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    if not correct:
        return 1.0
    steps = np.arange(1, correct + 1)
    rise = (binom.sf(correct - steps - 1, guesses, right) - beta) / steps
    return min(1.0, beta + 2 * canaries * delta * float(rise.max()))


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """The largest epsilon whose p-value is at most `alpha`; 0 where there is none."""
    low, high = 0.0, LARGEST_EPSILON
    if p_value(canaries, guesses, correct, low, delta) > alpha:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= alpha:
            low = middle
        else:
            high = middle
    return low


def guess_grid(canaries: int) -> tuple[int, ...]:
    """Numbers of guesses that are tried, fixed before anything is seen: even, the largest all canaries."""
    return tuple(sorted({max(2, 2 * int(share * canaries / 2)) for share in GUESSED_SHARES}))


def correct_guesses(scores: NDArray[np.float64], included: NDArray[np.bool_], guesses: int) -> int:
    """Of `guesses`, how many are right: half on the highest scores, said to be in, half on the lowest, said to be out.

    Equal scores are taken in the canaries' order, which knows nothing of the coins.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int((~included[order[:half]]).sum() + included[order[len(order) - half :]].sum())


def bound_of(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    delta: float,
    alpha: float,
    grid: Sequence[int] | None = None,
) -> Bound:
    """The best bound over a grid of numbers of guesses, each at `alpha` divided by their number (Bonferroni).

    Args:
        scores: (m,), high for canaries that look as if they were in.
        included: (m,), what the coins said.
        alpha: chance that the bound lies above the truth.
        grid: numbers of guesses; `guess_grid` where None.
    """
    grid = guess_grid(len(scores)) if grid is None else grid
    best = Bound(0.0, grid[-1], correct_guesses(scores, included, grid[-1]))
    for guesses in grid:
        correct = correct_guesses(scores, included, guesses)
        epsilon = lower_bound(len(scores), guesses, correct, delta, alpha / len(grid))
        if epsilon > best.epsilon:
            best = Bound(epsilon, guesses, correct)
    return best


def ceiling(canaries: int, delta: float, alpha: float = 0.05) -> float:
    """The bound if every guess on every canary is right: more cannot be shown with that many."""
    return lower_bound(canaries, canaries, canaries, delta, alpha)
