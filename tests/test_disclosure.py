"""Attacks on what a site releases and what a centre prints: subtraction by brute force, and linear
algebra."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, roc_auc_score

from shared_model.disclosure import (
    Suppressed,
    check_tier,
    protect,
    publishable_counts,
    publishable_curve,
    round_count,
    suppress_published,
    suppressed_groups,
)
from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import ScoreHistogram, cells, clean_edges, empty_histogram, histogram_of
from shared_model.score_grid import COARSE_EDGES, bin_of
from shared_model.statistics import auprc_range, auroc, operating_point
from shared_model.subgroups import ALL, attributes_of, group_levels, group_masks, group_names, partition_of

Tables = dict[str, dict[tuple[int, int], tuple[int, int]]]  # group -> (from edge, to edge) -> class counts


def site(seed: int, size: int, partitions: list[str]) -> dict[str, ScoreHistogram]:
    rng = np.random.default_rng(seed)
    outcomes = (rng.random(size) < 0.4).astype(float)
    scores = expit(rng.normal(size=size) + 1.5 * outcomes - 0.7)
    sex = rng.choice(["female", "male", "unknown"], size, p=[0.5, 0.44, 0.06])
    age = rng.choice([25, 40, 60, 80], size, p=[0.1, 0.2, 0.5, 0.2])
    race = rng.choice(["white", "black", "asian"], size, p=[0.7, 0.2, 0.1])
    masks = group_masks(attributes_of(sex, age, race), partitions)
    return {name: histogram_of(scores[m], outcomes[m]) for name, m in masks.items()}


def released_tables(released: dict[str, ScoreHistogram]) -> Tables:
    """What the receiver sees, as class counts of each cell with anybody in it."""
    tables: Tables = {}
    for name, histogram in released.items():
        edges = clean_edges(histogram)
        totals = cells(histogram, edges)
        tables[name] = {
            (int(a), int(b)): (int(row[0]), int(row[1]))
            for a, b, row in zip(edges[:-1], edges[1:], totals, strict=True)
            if row[:2].any()
        }
    return tables


def subtraction_attack(truth: dict[str, ScoreHistogram], shown: set[str], edges: dict[str, list[int]], k: int) -> int:
    """Count class counts of 1 to k - 1 that follow from: interval of "all" minus any set of shown groups of a
    partition.

    Every pair of edges common to "all" and the partition is tried with every set of shown groups.
    """
    broken = 0
    for partition in {partition_of(name) for name in shown} - {ALL}:
        groups = [name for name in shown if partition_of(name) == partition]
        common = sorted(set(edges[ALL]) & set(edges[partition]))
        for size in range(len(groups) + 1):
            for chosen in combinations(groups, size):
                rest = truth[ALL].table[[0, 2]] - sum(truth[name].table[[0, 2]] for name in chosen)
                for low, high in combinations(common, 2):
                    left = rest[:, low:high].sum(axis=1)
                    broken += int(((left > 0) & (left < k)).sum())
    return broken


def edges_of(released: dict[str, ScoreHistogram]) -> dict[str, list[int]]:
    """The coarse edges a receiver can use, by partition: those that no group of it straddles."""
    found: dict[str, set[int]] = {}
    for name, histogram in released.items():
        clean = set(clean_edges(histogram).tolist()) & set(COARSE_EDGES.tolist())
        found[partition_of(name)] = found.get(partition_of(name), clean) & clean
    return {partition: sorted(clean) for partition, clean in found.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 900), st.sampled_from([5, 11]))
def test_the_clear_tier_never_shows_a_small_cell(seed: int, size: int, k: int) -> None:
    released, suppressed = protect(site(seed, size, ["sex", "age", "race", "sex x age"]), k, keep_edge=500)
    for table in released_tables(released).values():
        for counts in table.values():
            assert min(counts) >= k
    assert not set(released) & set(suppressed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 900))
def test_subtraction_from_the_clear_tier_yields_no_small_count(seed: int, size: int) -> None:
    truth = site(seed, size, ["sex", "age", "race"])
    released, _ = protect(truth, 11)
    assert subtraction_attack(truth, set(released), edges_of(released), 11) == 0


def test_the_subtraction_attack_succeeds_without_suppression_and_merging() -> None:
    """Negative control: the attack above can win."""
    truth = site(3, 160, ["sex", "age", "race"])
    released, _ = protect(truth, 1)
    assert subtraction_attack(truth, set(released), edges_of(released), 11) > 0
    only_small = {n for n, h in truth.items() if min(h.positives, h.negatives) < 11}
    assert only_small
    kept = set(truth) - only_small  # suppression that forgets the complement
    assert subtraction_attack(truth, kept, {p: [0, 1024] for p in ("all", "sex", "age", "race")}, 11) > 0


def test_cells_chosen_group_by_group_would_fall_to_subtraction() -> None:
    """Why the groups of a partition share their cells."""
    broken = 0
    for seed in range(10):
        truth = site(seed, 600, ["sex"])
        alone = {name: protect({ALL: h}, 11)[0].get(ALL) for name, h in truth.items()}
        shown = {name: h for name, h in alone.items() if h is not None}
        common = {name: set(clean_edges(h).tolist()) & set(COARSE_EDGES.tolist()) for name, h in shown.items()}
        for name in set(shown) - {ALL}:
            rest = truth[ALL].table[[0, 2]] - truth[name].table[[0, 2]]
            for low, high in combinations(sorted(common[ALL] & common[name]), 2):
                left = rest[:, low:high].sum(axis=1)
                broken += int(((left > 0) & (left < 11)).sum())
    assert broken > 0


SCORES = expit([-5.25, 0.25, 5.25])  # three score levels, far apart
LEVELS = {"sex": ["female", "male"], "age": ["18-35", "35-50"]}


def members(name: str) -> np.ndarray:
    """`(sex, age)`: which of the four kinds of patients a group holds."""
    stated = group_levels(name)
    held = [[stated.get(factor, level) == level for level in levels] for factor, levels in LEVELS.items()]
    return np.logical_and.outer(*held)


def histograms_of(counts: np.ndarray) -> dict[str, ScoreHistogram]:
    """All groups of a population `(sex, age, score level, class)`."""
    partitions = ["sex", "age", "sex x age"]
    histograms = {}
    for name in [
        ALL,
        *(n for n in group_names(LEVELS, partitions) if "unknown" not in n and members(n).any()),
    ]:
        chosen = counts[members(name)].sum(axis=0)  # (score level, class)
        scores = np.repeat(np.concatenate([SCORES, SCORES]), chosen.T.ravel())
        histograms[name] = histogram_of(scores, np.repeat([0, 1], chosen.sum(axis=0)))
    return histograms


def derivable_counts(released: dict[str, ScoreHistogram], counts: np.ndarray, label: int) -> set[int]:
    """Counts of every set of atoms (kind of patient at a score level) that the release determines by linear
    algebra.

    All 2^12 sets are tried. An empty cell tells the receiver that each atom in it is empty.
    """
    bins, known = bin_of(SCORES), []
    for name, histogram in released.items():
        edges = clean_edges(histogram)
        totals = cells(histogram, edges)
        for low, high, row in zip(edges[:-1], edges[1:], totals, strict=True):
            inside = np.logical_and.outer(members(name), (bins >= low) & (bins < high)).ravel()
            known += [inside] if row[label] else list(np.eye(12, dtype=bool)[inside])
    basis = np.stack(known, axis=1).astype(float)
    sets = ((np.arange(2**12)[:, None] >> np.arange(12)) & 1).astype(float)
    exact = np.abs(sets @ (basis @ np.linalg.pinv(basis)) - sets).max(axis=1) < 1e-9
    return set((sets[exact] @ counts[..., label].ravel()).astype(int).tolist())


def population(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    largest = rng.choice([4, 14, 14], size=(2, 2, 1, 1))  # some kinds of patients are rare
    return rng.integers(0, largest, size=(2, 2, 3, 2)) * (rng.random((2, 2, 3, 1)) < 0.8)


@pytest.mark.parametrize("seed", range(40))
def test_no_linear_combination_of_a_clear_release_singles_out_few_patients(seed: int) -> None:
    counts, k = population(seed), 5
    released, _ = protect(histograms_of(counts), k)
    for label in (0, 1):
        found = derivable_counts(released, counts, label) if released else set()
        assert not [count for count in found if 0 < count < k]


def test_linear_algebra_breaks_a_release_without_protection() -> None:
    """Negative control: exact histograms, and sex and age protected each by itself, both fall."""
    exact = derivable_counts(histograms_of(population(0)), population(0), 0)
    unprotected = sum(0 < count < 5 for count in exact)
    apart = 0
    for seed in range(4):
        truth = histograms_of(population(seed))
        released = {name: protect({ALL: h}, 5)[0].get(ALL) for name, h in truth.items()}
        shown = {name: h for name, h in released.items() if h is not None}
        apart += sum(0 < count < 5 for count in derivable_counts(shown, population(seed), 0))
    assert unprotected > 0
    assert apart > 0


def test_bounds_of_sums_of_differently_blurred_sites_hold_the_pooled_truth() -> None:
    for seed in range(15):
        merged, scores, outcomes = empty_histogram(), [], []
        for number, size in enumerate((500, 200, 90)):
            rng = np.random.default_rng(100 * seed + number)
            truth = (rng.random(size) < 0.4).astype(float)
            score = expit(rng.normal(size=size) + 1.5 * truth - 0.7 + 0.5 * number)
            merged = merged + protect({ALL: histogram_of(score, truth)}, 11, keep_edge=512)[0][ALL]
            scores.append(score)
            outcomes.append(truth)
        pooled, labels = np.concatenate(scores), np.concatenate(outcomes)
        area = auroc(merged)
        assert area.value is not None
        assert area.bound is not None
        assert abs(area.value - roc_auc_score(labels, pooled)) <= area.bound
        low, high = auprc_range(merged)
        assert low <= average_precision_score(labels, pooled) <= high
        point = operating_point(merged, 512)
        assert point.true_positives[0] <= ((pooled >= 0.5) & (labels == 1)).sum() <= point.true_positives[1]


def test_the_threshold_stays_an_edge_where_counts_allow() -> None:
    truth = site(1, 800, [])
    released, _ = protect(truth, 11, keep_edge=530)
    assert operating_point(released[ALL], 530).exact
    assert not operating_point(protect(truth, 11)[0][ALL], 530).exact
    assert protect(site(1, 60, []), 11, keep_edge=1)[0][ALL].size == 60


def test_a_group_that_lacks_a_class_is_suppressed_and_an_empty_one_is_not() -> None:
    sizes = {ALL: (60, 90), "sex=female": (30, 40), "sex=male": (30, 50), "sex=unknown": (0, 0)}
    assert suppressed_groups(sizes, 11) == {}
    one_sided = {ALL: (60, 90), "sex=female": (60, 30), "sex=male": (0, 60)}
    assert set(suppressed_groups(one_sided, 11)) == {"sex=female", "sex=male"}


def test_the_next_smallest_group_covers_a_single_suppressed_one() -> None:
    sizes = {ALL: (100, 200), "sex=female": (50, 90), "sex=male": (45, 80), "sex=unknown": (5, 30)}
    hidden = suppressed_groups(sizes, 11)
    assert set(hidden) == {"sex=unknown", "sex=male"}
    assert "fewer than 11" in hidden["sex=unknown"].reason
    assert "subtraction" in hidden["sex=male"].reason
    assert set(suppressed_groups(dict.fromkeys(sizes, (4, 4)), 11)) == set(sizes)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_what_is_printed_gives_no_small_group_away(seed: int, scale: int) -> None:
    """Row and column attack on a two-way table: solve for every suppressed small group by least squares."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, scale, size=(3, 4, 2)) * (rng.random((3, 4, 1)) < 0.9)
    sizes = {ALL: tuple(table.sum((0, 1)).tolist())}
    sizes |= {f"sex=s{i}": tuple(table[i].sum(0).tolist()) for i in range(3)}
    sizes |= {f"age=a{j}": tuple(table[:, j].sum(0).tolist()) for j in range(4)}
    sizes |= {f"sex=s{i} & age=a{j}": tuple(table[i, j].tolist()) for i in range(3) for j in range(4)}
    hidden = suppressed_groups(sizes, 11)
    small = {name for name, size in sizes.items() if max(size) > 0 and min(size) < 11}
    assert small <= set(hidden)
    unit = np.eye(12).reshape(3, 4, 12)
    member = {ALL: unit.sum((0, 1))}
    member |= {f"sex=s{i}": unit[i].sum(0) for i in range(3)}
    member |= {f"age=a{j}": unit[:, j].sum(0) for j in range(4)}
    member |= {f"sex=s{i} & age=a{j}": unit[i, j] for i in range(3) for j in range(4)}
    shown = [member[name] for name in sizes if name not in hidden]
    if not shown:
        return
    basis = np.stack(shown, axis=1)
    for name in small:
        weights = np.linalg.lstsq(basis, member[name], rcond=None)[0]
        assert np.abs(basis @ weights - member[name]).max() > 1e-6, name


def test_suppressed_is_not_zero() -> None:
    truth = site(2, 200, ["sex"])
    shown = suppress_published(truth, 11)
    assert isinstance(shown["sex=unknown"], Suppressed)
    assert shown[ALL] is truth[ALL]
    assert Suppressed("x") != 0


def test_published_counts_and_curves() -> None:
    assert [round_count(n) for n in (0, 2, 3, 11, 12, 13)] == [0, 0, 5, 10, 10, 15]
    assert publishable_counts({"tp": 40, "fn": 12, "fp": 0, "tn": 33}, 11) == {
        "tp": 40,
        "fn": 10,
        "fp": 0,
        "tn": 35,
    }
    assert isinstance(publishable_counts({"tp": 40, "fn": 10, "fp": 0, "tn": 33}, 11), Suppressed)
    truth = site(4, 500, [])[ALL]
    curve = publishable_curve(truth, 11)
    assert isinstance(curve, ScoreHistogram)
    assert all(min(c) >= 11 for c in released_tables({ALL: curve})[ALL].values())
    assert isinstance(publishable_curve(histogram_of([0.2, 0.8], [0, 1]), 11), Suppressed)


@pytest.mark.parametrize(
    ("tier", "minimum_cell", "secure", "reason"),
    [
        (None, 11, True, "disclosure tier is None"),
        ("", 11, True, "disclosure tier"),
        ("Clear", 11, True, "disclosure tier"),
        ("clear", None, True, "minimum_cell"),
        ("clear", 0, True, "minimum_cell"),
        ("masked", 11, False, "secure sum"),
        ("noised", 11, True, "privacy ledger"),
    ],
)
def test_tiers_fail_closed(tier: str | None, minimum_cell: int | None, secure: bool, reason: str) -> None:
    with pytest.raises(HemoFedError, match=reason) as caught:
        check_tier(tier, minimum_cell, secure)
    assert caught.value.exit_code is ExitCode.DISCLOSURE_REFUSED


@pytest.mark.parametrize("tier", ["clear", "masked", None])
def test_a_private_study_takes_noisy_counts_alone(tier: str | None) -> None:
    with pytest.raises(HemoFedError, match="exact counts" if tier else "disclosure tier is None") as caught:
        check_tier(tier, 11, True, private=True)
    assert caught.value.exit_code is ExitCode.DISCLOSURE_REFUSED
    assert check_tier("noised", 11, False, private=True) == "noised"


def test_tiers_that_are_allowed() -> None:
    assert check_tier("clear", 11, False) == "clear"
    assert check_tier("masked", 11, True) == "masked"
