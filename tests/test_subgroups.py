"""Subgroups: stable names, sharp age edges, partitions that hold everybody once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_model.errors import HemoFedError
from shared_model.subgroups import (
    ALL,
    age_bands,
    attributes_of,
    factors_of,
    group_levels,
    group_masks,
    group_name,
    group_names,
    partition_of,
    restrict_levels,
)


def test_age_bands_hold_their_lower_edge() -> None:
    ages = [0, 17.99, 18, 34.99, 35, 49.99, 50, 74.99, 75, 104, np.nan, -1]
    expected = ["under 18"] * 2 + ["18-35"] * 2 + ["35-50"] * 2 + ["50-75"] * 2 + ["75+"] * 2 + ["unknown"] * 2
    assert age_bands(ages).tolist() == expected


def test_race_is_kept_as_given_and_what_cannot_be_a_name_is_other() -> None:
    race = ["Black or African American", " White ", "", None, float("nan"), "x|y", "a" * 41, "Unknown"]
    levels = attributes_of(["female"] * 8, [60] * 8, np.array(race, dtype=object))["race"].tolist()
    assert levels == [
        "black or african american",
        "white",
        "unknown",
        "unknown",
        "unknown",
        "other",
        "other",
        "unknown",
    ]


people = st.lists(
    st.tuples(
        st.sampled_from(["female", "male", "unknown", ""]),
        st.floats(0, 100) | st.just(float("nan")),
        st.sampled_from(["white", "black", "asian", ""]),
    ),
    min_size=1,
    max_size=60,
)


@given(people)
def test_every_partition_holds_everybody_exactly_once(rows: list[tuple[str, float, str]]) -> None:
    sex, age, race = (list(column) for column in zip(*rows, strict=True))
    masks = group_masks(attributes_of(sex, age, race), ["sex", "age", "race", "sex x age", "sex x age x race"])
    assert next(iter(masks)) == ALL
    assert masks[ALL].all()
    for partition in ("sex", "age", "race", "sex x age", "sex x age x race"):
        members = [mask for name, mask in masks.items() if partition_of(name) == partition]
        assert np.array_equal(np.sum(members, axis=0), np.ones(len(rows)))
    for name, mask in masks.items():
        levels = group_levels(name)
        explicit = [
            all(
                {"sex": s or "unknown", "age": age_bands([a])[0], "race": r or "unknown"}[f] == v
                for f, v in levels.items()
            )
            for s, a, r in rows
        ]
        assert mask.tolist() == explicit
        assert group_name(levels) == name
    assert set(masks) <= set(
        group_names({"race": ["white", "black", "asian"]}, ["sex", "age", "race", "sex x age", "sex x age x race"])
    )


def test_names_are_stable() -> None:
    masks = group_masks(attributes_of(["male", "female", ""], [60, 80, 20], ["white"] * 3), ["sex", "sex x age"])
    assert list(masks) == [
        "all",
        "sex=female",
        "sex=male",
        "sex=unknown",
        "sex=female & age=75+",
        "sex=male & age=50-75",
        "sex=unknown & age=18-35",
    ]


def test_a_site_may_define_its_own_factor() -> None:
    attributes = attributes_of(["male"] * 2, [60, 61], ["white"] * 2) | {"rhythm": np.array(["af", "sinus"])}
    assert list(group_masks(attributes, ["rhythm"])) == ["all", "rhythm=af", "rhythm=sinus"]


def test_levels_outside_the_study_become_other() -> None:
    attributes = attributes_of(["male"] * 3, [60] * 3, ["white", "martian", ""])
    assert restrict_levels(attributes, {"race": ["white"]})["race"].tolist() == ["white", "other", "unknown"]
    assert "race=other" in group_names({"race": ["white"]}, ["race"])


@pytest.mark.parametrize(
    "name", ["", "sex", "sex=", "sex=a|b", "sex=a & sex=b", "Sex=a", "sex=a &age=b", "sex=" + "a" * 41]
)
def test_what_is_no_group_name_is_refused(name: str) -> None:
    with pytest.raises(HemoFedError, match="not the name of a subgroup"):
        group_levels(name)


def test_unknown_factors_and_partitions_are_refused() -> None:
    attributes = attributes_of(["male"], [60], ["white"])
    with pytest.raises(HemoFedError, match="known factors: sex, age, race"):
        group_masks(attributes, ["rhythm"])
    with pytest.raises(HemoFedError, match="not a factor"):
        factors_of("sex x sex")
    with pytest.raises(HemoFedError, match="levels of race"):
        group_names({}, ["race"])
