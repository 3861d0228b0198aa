"""Counts with noise: what one patient can change, what the noise is, and what is refused at either end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from client.evaluation import Scores
from client.noised import discrete_laplace, exact_tables, noised_tables, release_noised
from shared_model.errors import ExitCode, HemoFedError
from shared_model.noised import (
    NOISED_EDGES,
    TABLE_SHAPE,
    NoisedTally,
    from_noised_arrays,
    judged_groups,
    noise_scale,
    noise_variance,
    noised_bins,
    smallest_total,
    tables_of,
    to_noised_arrays,
)
from shared_model.score_grid import COARSE_EDGES, bin_of, edge_probability
from shared_model.study import Study
from shared_model.subgroups import attributes_of, group_masks, group_name, group_names
from tests.federations import private_study
from tests.noised_fixtures import two_geometrics

GROUPS = group_names({"race": ["white", "black"]})
Tables = Mapping[str, NDArray[np.int64]]


# --- sensitivity

EcgList = list[tuple[float, float, float]]  # recorded at, outcome, probability; NaN where unknown
ECG = st.tuples(
    st.sampled_from([math.nan, 1.0, 2.0, 3.0]),
    st.sampled_from([math.nan, 0.0, 1.0]),
    st.sampled_from([math.nan, -0.1, 0.0, 0.05, 0.3, 0.5, 0.55, 0.9, 1.0, 7.0]),
)
PERSON = st.tuples(
    st.lists(ECG, min_size=1, max_size=4),
    st.sampled_from(["Female", "male", "", "intersex", "!!"]),
    st.sampled_from([math.nan, 10.0, 40.0, 60.0, 90.0]),
    st.sampled_from(["White", "black", "martian", ""]),
)
Person = tuple[EcgList, str, float, str]


def scores_of(people: Sequence[Person]) -> Scores:
    """All ECGs of these people, in their order."""
    rows = [(code, *ecg) for code, person in enumerate(people) for ecg in person[0]]
    codes = np.array([row[0] for row in rows], np.int64)
    columns = np.array([row[1:] for row in rows], np.float64).reshape(-1, 3)
    return Scores(
        patients=codes,
        patient_keys=[str(code) for code in range(len(people))],
        recorded_at=columns[:, 0],
        measured_at=np.full(len(rows), 2.0),
        attributes=attributes_of(
            [people[code][1] for code in codes],
            [people[code][2] for code in codes],
            [people[code][3] for code in codes],
        ),
        outcomes=columns[:, 1],
        probabilities=columns[:, 2],
    )


def l1_distance(first: Tables, second: Tables) -> float:
    """How far two releases are apart; infinite where even their names or shapes tell them apart."""
    if {name: table.shape for name, table in first.items()} != {name: table.shape for name, table in second.items()}:
        return math.inf
    return float(sum(np.abs(first[name] - second[name]).sum() for name in first))


@settings(max_examples=300, deadline=None)
@given(st.lists(PERSON, max_size=6), PERSON, st.integers(0, 6))
def test_one_patient_changes_the_counts_by_no_more_than_the_number_of_tables(
    people: list[Person], newcomer: Person, place: int
) -> None:
    neighbour = [*people[:place], newcomer, *people[place:]]
    distance = l1_distance(exact_tables(scores_of(people), GROUPS), exact_tables(scores_of(neighbour), GROUPS))
    labelled = any(not math.isnan(outcome) for _, outcome, _ in newcomer[0])
    assert distance == (tables_of(GROUPS) if labelled else 0) == (5 if labelled else 0)


ONE_WOMAN: Person = ([(1.0, 1.0, 0.9)], "female", 60.0, "white")
ONE_MAN: Person = ([(1.0, 0.0, 0.2), (3.0, 1.0, 0.9)], "male", 40.0, "black")


def test_a_grid_that_follows_from_who_was_seen_fails_the_neighbour_test() -> None:
    """Negative control: the levels that occur, as `group_masks` lists them."""

    def seen(people: list[Person]) -> Tables:
        scores = scores_of(people)
        return exact_tables(scores, list(group_masks(scores.attributes)))

    assert l1_distance(seen([ONE_WOMAN, ONE_WOMAN]), seen([ONE_WOMAN])) == 5  # the same levels: nothing shows
    assert math.isinf(l1_distance(seen([ONE_WOMAN, ONE_MAN]), seen([ONE_WOMAN])))


def test_counting_every_ecg_fails_the_neighbour_test() -> None:
    """Negative control: with a pseudonym for each ECG a patient counts as often as recorded."""

    def by_ecg(people: list[Person]) -> Tables:
        scores = scores_of(people)
        return exact_tables(replace(scores, patients=np.arange(len(scores.patients))), GROUPS)

    assert l1_distance(by_ecg([ONE_WOMAN, ONE_MAN]), by_ecg([ONE_WOMAN])) == 10
    assert l1_distance(exact_tables(scores_of([ONE_WOMAN, ONE_MAN]), GROUPS), by_ecg([ONE_WOMAN])) == 5


def test_every_patient_is_in_one_group_of_each_partition_and_in_the_cell_of_the_index_ecg() -> None:
    people = [ONE_WOMAN, ONE_MAN, ([(2.0, 1.0, math.nan)], "intersex", math.nan, "martian")]
    tables = exact_tables(scores_of(people), GROUPS)
    assert tuple(tables) == GROUPS
    assert tables["all"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    for name in ("sex=unknown", "age=unknown", "race=other", "sex=unknown & age=unknown"):
        assert tables[name].tolist() == [[0] * 8, [1, 0, 0, 0, 0, 0, 0, 0]]
    for partition in ("sex", "age", "race"):
        members = [table for name, table in tables.items() if name.startswith(f"{partition}=") and "&" not in name]
        assert np.array_equal(np.sum(members, axis=0), tables["all"])


def test_nobody_is_counted_where_nobody_has_a_label() -> None:
    nobody = scores_of([([(1.0, math.nan, 0.5)], "female", 60.0, "white")])
    noisy = noised_tables(nobody, GROUPS, 1.0)
    assert not any(table.any() for table in exact_tables(nobody, GROUPS).values())
    assert all(table.any() for table in noisy.values())  # empty cells have noise: 16 zeros are a 1 in 10^15 chance
    assert not any(table.any() for table in exact_tables(scores_of([]), GROUPS).values())


def test_the_bins_are_a_coarsening_of_the_score_grid() -> None:
    assert set(NOISED_EDGES.tolist()) <= set(COARSE_EDGES.tolist())
    probabilities = np.linspace(0, 1, 4001)
    expected = np.searchsorted(NOISED_EDGES, bin_of(probabilities), side="right") - 1
    assert np.array_equal(noised_bins(probabilities), expected)
    at_edges = [edge_probability(int(edge)) for edge in NOISED_EDGES[1:-1]]
    assert noised_bins(at_edges).tolist() == list(range(1, 8))  # a score at an edge belongs above it


# --- the noise

DRAWS, SENSITIVITY, EPSILON = 20_000, 3, 2.0


def chance(noise: NDArray[np.int64], scale: float) -> float:
    """p-value of noise being discrete Laplace of this scale: P(k) = (1 - a) / (1 + a) * a^|k|, a = exp(-1 / scale)."""
    a = math.exp(-1 / scale)
    reach = int(scale * math.log(DRAWS * (1 - a) / (1 + a) / 10))  # cells with 10 expected at least
    observed = [np.sum(noise == k) for k in range(-reach, reach + 1)]
    shares = [(1 - a) / (1 + a) * a ** abs(k) for k in range(-reach, reach + 1)]
    tail = a ** (reach + 1) / (1 + a)
    observed = [np.sum(noise < -reach), *observed, np.sum(noise > reach)]
    return float(chisquare(observed, len(noise) * np.array([tail, *shares, tail])).pvalue)


def test_the_noise_is_discrete_laplace_of_the_stated_scale() -> None:
    """A right sampler fails this once in a million runs."""
    scale = noise_scale(SENSITIVITY, EPSILON)
    oracle = two_geometrics(np.random.default_rng(0), scale, (DRAWS,))
    assert chance(oracle, scale) > 1e-6
    counts = np.arange(DRAWS, dtype=np.int64)
    noise = discrete_laplace(counts, SENSITIVITY, EPSILON) - counts
    assert chance(noise, scale) > 1e-6
    assert noise.var() == pytest.approx(noise_variance(scale), rel=0.15)
    # Negative controls: another scale, and continuous noise that is rounded.
    assert chance(noise, 1.15 * scale) < 1e-6
    rounded = np.rint(np.random.default_rng(0).laplace(scale=scale, size=DRAWS)).astype(np.int64)
    assert chance(rounded, scale) < 1e-6


@pytest.mark.parametrize(("tables", "epsilon"), [(1, 0.1), (3, 0.3), (5, 0.7), (5, 1.3), (17, 0.05), (2, 8.0)])
def test_the_scale_holds_the_epsilon_by_opendps_own_map(tables: int, epsilon: float) -> None:
    """0.3, 0.7 and 1.3 are those where the plain quotient is a rounding error short."""
    assert discrete_laplace(np.zeros(2, np.int64), tables, epsilon).shape == (2,)
    assert noise_scale(tables, epsilon) == pytest.approx(tables / epsilon)


def test_noise_of_a_smaller_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.noised.noise_scale", lambda tables, epsilon: 0.9 * tables / epsilon)
    with pytest.raises(HemoFedError, match="would not hold its epsilon") as caught:
        discrete_laplace(np.zeros(2, np.int64), 5, 1.0)
    assert caught.value.exit_code is ExitCode.DISCLOSURE_REFUSED


def test_every_cell_gets_its_own_noise_of_the_number_of_tables() -> None:
    asked: list[tuple[int, int, float]] = []

    def noise(counts: NDArray[np.int64], sensitivity: int, epsilon: float) -> NDArray[np.int64]:
        asked.append((len(counts), sensitivity, epsilon))
        return counts + np.arange(len(counts))

    tables = noised_tables(scores_of([]), GROUPS, 0.5, noise)
    assert asked == [(16 * len(GROUPS), 5, 0.5)]
    assert np.array_equal(np.concatenate([table.ravel() for table in tables.values()]), np.arange(16 * len(GROUPS)))


def test_two_releases_differ() -> None:
    """The entropy is the operating system's: there is no seed to repeat."""
    np.random.seed(0)  # noqa: NPY002  (that seeding has no say is the point)
    first = noised_tables(scores_of([ONE_WOMAN]), GROUPS, 0.1)
    np.random.seed(0)  # noqa: NPY002
    second = noised_tables(scores_of([ONE_WOMAN]), GROUPS, 0.1)
    assert l1_distance(first, second) > 100


# --- what may leave

SCORES = scores_of([ONE_WOMAN, ONE_MAN] * 20)


def test_a_private_study_gets_the_arrays_that_the_centre_reads() -> None:
    study = private_study()
    assert study.privacy is not None
    for split, tables in (("test", 5), ("validation", 1)):
        groups = judged_groups(study, split)  # type: ignore[arg-type]
        assert tables_of(groups) == tables
        scale = noise_scale(tables, study.privacy.release_epsilon)
        arrays = release_noised(SCORES, study, split, "noised", study.privacy.release_epsilon)  # type: ignore[arg-type]
        assert set(arrays) == {f"{name}|noised" for name in groups}
        assert from_noised_arrays(arrays, groups, scale).sites == 1


@pytest.mark.parametrize(
    ("study", "tier", "reserved", "said"),
    [
        (Study(name="x"), "noised", 1.0, "without"),
        (private_study(), "clear", 1.0, "exact counts"),
        (private_study(), "masked", 1.0, "exact counts"),
        (private_study(), None, 1.0, "is None"),
        (private_study(), "noised", 0.2, "0.2 is reserved"),
        (private_study(), "noised", math.nan, "nan is reserved"),
    ],
)
def test_what_is_not_paid_for_or_not_noised_does_not_leave(study: Study, tier: Any, reserved: float, said: str) -> None:
    with pytest.raises(HemoFedError, match=said) as caught:
        release_noised(SCORES, study, "test", tier, reserved)
    assert caught.value.exit_code is ExitCode.DISCLOSURE_REFUSED


# --- what may arrive


def honest() -> dict[str, NDArray[np.int64]]:
    tables = noised_tables(SCORES, GROUPS, 1.0)
    assert min(table.min() for table in tables.values()) < 0
    return to_noised_arrays(tables)


def edited(key: str, value: Any) -> dict[str, Any]:
    return {**honest(), key: value}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {key: value for key, value in honest().items() if key != "sex=male|noised"},
        edited("ward=3|noised", np.zeros(TABLE_SHAPE, np.int64)),
        edited("sites", np.array([1])),
        edited("all|cells", np.zeros((1024, 4), np.int64)),
        edited("all|noised", np.zeros((2, 9), np.int64)),
        edited("all|noised", np.zeros(16, np.int64)),
        edited("all|noised", np.zeros(TABLE_SHAPE)),
        edited("all|noised", np.zeros(TABLE_SHAPE, np.int32)),
        edited("all|noised", np.zeros(TABLE_SHAPE, object)),
        edited("all|noised", [[0] * 8] * 2),
        edited("all|noised", np.full(TABLE_SHAPE, 2 * 10**9, np.int64)),
        edited("all|noised", np.full(TABLE_SHAPE, -(2**63), np.int64)),
        edited("all|noised", np.full(TABLE_SHAPE, 10_000, np.int64)),
        edited("sex=male|noised", np.full(TABLE_SHAPE, -10_000, np.int64)),
    ],
)
def test_arrays_that_cannot_be_a_sites_noisy_counts_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(HemoFedError):
        from_noised_arrays(arrays, GROUPS, noise_scale(5, 1.0))


def test_honest_noisy_counts_are_read_and_add() -> None:
    """The control of the test above, at epsilons from 0.05 to 20."""
    for epsilon in (0.05, 0.25, 1.0, 20.0):
        tables = noised_tables(SCORES, GROUPS, epsilon)
        scale = noise_scale(5, epsilon)
        one = from_noised_arrays(to_noised_arrays(tables), GROUPS, scale)
        both = one + one
        assert both.sites == 2
        assert both.variance == pytest.approx(2 * one.variance)
        assert np.array_equal(both.tables["all"], 2 * tables["all"])
    with pytest.raises(HemoFedError, match="different"):
        one + NoisedTally(one.tables, 2 * scale)
    with pytest.raises(HemoFedError, match="different"):
        one + NoisedTally({"all": one.tables["all"]}, scale)


def test_the_least_total_grows_with_the_noise_and_never_below_the_minimum() -> None:
    assert smallest_total(0.0, 11) == 11
    assert smallest_total(100.0, 11) == pytest.approx(4 * 10 * math.sqrt(8))
    assert smallest_total(4 * 100.0, 11) == pytest.approx(2 * smallest_total(100.0, 11))


def test_a_partition_counts_once_however_it_is_written() -> None:
    twice = Study.model_validate({"name": "x", "evaluation": {"partitions": ["sex", "sex", "age x sex", "sex x age"]}})
    assert tables_of(twice.evaluation.groups) == 4
    assert group_name({"sex": "male"}) in twice.evaluation.groups
