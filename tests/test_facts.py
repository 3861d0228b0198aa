"""Facts of ECGs as relations: what is equal, what is unknown, and that no label slips in where none is asked for."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from client.facts import can_be_compared, cohort_of, columns_of, fact_table
from client.store import RecordIndex
from shared_model.objectives.facts import absolute_difference, equal_distance
from shared_model.study import Study, study_from_table

INF, NAN = float("inf"), float("nan")


def index(**columns: Any) -> RecordIndex:
    usual = {
        "record": np.array([0, 0, 1, 2]),
        "patient": np.array([0, 0, 0, 1]),
        "recorded_at": np.array([10.0, 10.0, 20.0, 30.0]),
        "measured_at": np.array([12.0, 12.0, 25.0, 31.0]),
        "age_years": np.array([59.0, 59.0, 61.0, NAN], np.float32),
        "sex": np.array(["female", "female", "male", "unknown"]),
        "labels": {
            "mpcwp_mmhg": np.array([18.0, 18.0, 19.0, NAN], np.float32),
            "rhythm": np.array([1, 1, NAN, 2], np.float32),
        },
    }
    return cast(RecordIndex, _Index(**{**usual, **columns}))


class _Index(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.record)


def column(study: Study, name: str, **columns: Any) -> list[float]:
    return fact_table(study, index(**columns), (name,))[:, 0].tolist()


def test_facts_are_what_the_index_says() -> None:
    study = study_from_table(
        {"name": "x", "objective": {"name": "good_views_rhythm", "group_column": "rhythm"}}, "test"
    )
    assert column(study, "record") == [0, 0, 1, 2]
    assert column(study, "patient") == [0, 0, 0, 1]
    np.testing.assert_equal(column(study, "age_band"), [5, 5, 6, NAN])
    np.testing.assert_equal(column(study, "female"), [1, 1, 0, NAN])
    np.testing.assert_equal(column(study, "value"), [18, 18, 19, NAN])
    np.testing.assert_equal(column(study, "positive"), [0, 0, 1, NAN])  # strictly above 18
    np.testing.assert_equal(column(study, "group"), [1, 1, NAN, 2])
    assert fact_table(study, index(), ()).shape == (4, 0)
    with pytest.raises(KeyError):
        column(study, "weight")


def test_a_site_without_the_label_knows_none() -> None:
    assert np.isnan(column(Study(name="x"), "value", labels={})).all()


def test_equality_is_0_or_1_and_the_unknown_is_compared_with_nobody() -> None:
    facts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [NAN, 0.0]])
    expected = torch.tensor([[0, 0, 1, INF], [0, 0, 1, INF], [1, 1, 0, INF], [INF, INF, INF, INF]])
    torch.testing.assert_close(equal_distance(facts), expected)


def test_label_distance_is_in_the_labels_own_units() -> None:
    expected = torch.tensor([[0, 4.5, INF], [4.5, 0, INF], [INF, INF, INF]])
    torch.testing.assert_close(absolute_difference(torch.tensor([[18.0], [22.5], [NAN]])), expected)


def test_codes_beyond_single_precision_stay_apart() -> None:
    """Patient codes go up to millions; in float32 the two would be one."""
    facts = torch.tensor([[16_777_216.0], [16_777_217.0]], dtype=torch.float64)
    assert equal_distance(facts)[0, 1] == 1


def test_an_ecg_without_a_label_brings_no_event() -> None:
    cohort = cohort_of(Study(name="x"), index(), np.array([3, 0]))
    np.testing.assert_equal(cohort.event_at, [NAN, 12.0])
    assert cohort.patient.tolist() == [1, 0]
    assert cohort.record.tolist() == [2, 0]
    assert replace(cohort, rows=cohort.rows).rows.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("objective", "columns", "comparable"),
    [
        ({"name": "simclr"}, (), [True] * 4),
        ({"name": "ssl_dml_l2"}, (), [True] * 4),
        ({"name": "good_views_demographics"}, ("age_years", "sex"), [True, True, True, False]),
        ({"name": "good_views_rhythm", "group_column": "rhythm"}, ("rhythm",), [True, True, False, True]),
        ({"name": "good_views_rhythm", "group_column": "rythm"}, ("rythm",), [False] * 4),
        ({"name": "rank_n_contrast"}, ("mpcwp_mmhg",), [True, True, True, False]),
        ({"name": "supervised_dml_npair"}, ("mpcwp_mmhg",), [True, True, True, False]),
    ],
)
def test_an_ecg_whose_fact_is_unknown_is_not_learned_from(
    objective: dict[str, str], columns: tuple[str, ...], comparable: list[bool]
) -> None:
    """A site without the column once took part at full weight and taught nothing."""
    study = study_from_table({"name": "x", "objective": objective}, "test")
    assert can_be_compared(study, index()).tolist() == comparable
    assert columns_of(study) == columns
