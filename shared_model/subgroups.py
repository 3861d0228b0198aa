"""Who is in which subgroup: sex, age band, race as recorded, further factors a site defines, and
intersections.

A partition is a factor ("sex") or several joined by " x " ("sex x age"); its groups are disjoint and hold
everybody. A group is named by its levels: "all", "sex=female", "sex=female & age=50-75".
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_model.errors import HemoFedError

ALL = "all"
UNKNOWN = "unknown"
SEXES = ("female", "male", UNKNOWN)
AGE_EDGES_YEARS = (18.0, 35.0, 50.0, 75.0)  # lower edges; a band holds its lower edge and not its upper
AGE_BANDS = ("under 18", "18-35", "35-50", "50-75", "75+")
PARTITIONS = ("sex", "age", "race", "sex x age")
RACES = ("asian", "black", "hispanic", "white")
MOST_GROUPS = 500

_LEVEL = re.compile(r"[a-z0-9+.,()/_-]+( [a-z0-9+.,()/_-]+)*")
_FACTOR = re.compile(r"[a-z][a-z0-9_]*")
Levels = NDArray[np.str_]


def age_bands(age_years: ArrayLike) -> Levels:
    """Band of each age in years; NaN and negative ages are "unknown"."""
    ages = np.asarray(age_years, dtype=np.float64)
    known = ages >= 0  # False for NaN
    bands = np.array(AGE_BANDS)[np.searchsorted(AGE_EDGES_YEARS, np.where(known, ages, 0.0), side="right")]
    return np.where(known, bands, UNKNOWN)


def attributes_of(sex: ArrayLike, age_years: ArrayLike, race: ArrayLike) -> dict[str, Levels]:
    """The standard factors of n records: levels in lower case, race as the site recorded it.

    An empty or missing value is "unknown"; a level that cannot be a name (odd characters, over 40) is
    "other".
    """
    return {"sex": _cleaned(sex), "age": age_bands(age_years), "race": _cleaned(race)}


def group_masks(
    attributes: Mapping[str, Levels], partitions: Sequence[str] = PARTITIONS
) -> dict[str, NDArray[np.bool_]]:
    """Membership `(n,)` of "all" and of each group that occurs, in a stable order.

    Raises HemoFedError for a partition over a factor that `attributes` lacks.
    """
    lengths = {len(levels) for levels in attributes.values()}
    if len(lengths) != 1:
        raise HemoFedError("subgroup attributes are missing or differ in length")
    masks = {ALL: np.ones(lengths.pop(), dtype=np.bool_)}
    for partition in partitions:
        factors = factors_of(partition)
        for factor in factors:
            if factor not in attributes:
                raise HemoFedError(
                    f"partition '{partition}' asks for '{factor}'; known factors: {', '.join(attributes)}"
                )
        columns = [attributes[factor] for factor in factors]
        for combination in product(*(_ordered(factor, attributes[factor]) for factor in factors)):
            member = np.logical_and.reduce([c == level for c, level in zip(columns, combination, strict=True)])
            if member.any():
                masks[group_name(dict(zip(factors, combination, strict=True)))] = member
    return masks


def group_names(levels: Mapping[str, Sequence[str]], partitions: Sequence[str] = PARTITIONS) -> tuple[str, ...]:
    """Every group that may occur when each factor has the given levels, "all" first.

    A secure sum needs all sites to send the same names, so a study that uses one states the levels of race.
    "unknown" and, for race and site-defined factors, "other" are added.
    """
    known = {"sex": SEXES, "age": (*AGE_BANDS, UNKNOWN)}
    known |= {factor: (*given, "other", UNKNOWN) for factor, given in levels.items() if factor not in known}
    names = [ALL]
    for partition in partitions:
        factors = factors_of(partition)
        if missing := [factor for factor in factors if factor not in known]:
            raise HemoFedError(f"partition '{partition}': give the levels of {', '.join(missing)}")
        combinations = product(*(dict.fromkeys(known[factor]) for factor in factors))
        names += [group_name(dict(zip(factors, combination, strict=True))) for combination in combinations]
    return tuple(dict.fromkeys(names))


def restrict_levels(attributes: Mapping[str, Levels], levels: Mapping[str, Sequence[str]]) -> dict[str, Levels]:
    """The attributes with every level that the study does not name turned into "other" ("unknown" stays)."""
    kept = {
        factor: np.where(np.isin(attributes[factor], [*given, UNKNOWN]), attributes[factor], "other")
        for factor, given in levels.items()
        if factor in attributes
    }
    return {**attributes, **kept}


def group_name(levels: Mapping[str, str]) -> str:
    """Name of the group with these levels; "all" for none."""
    return " & ".join(f"{factor}={level}" for factor, level in levels.items()) or ALL


def group_levels(name: str) -> dict[str, str]:
    """The levels a group's name states; {} for "all". Raises HemoFedError for what is not a group's name."""
    if name == ALL:
        return {}
    levels = {}
    for part in name.split(" & "):
        factor, _, level = part.partition("=")
        if not _FACTOR.fullmatch(factor) or not _LEVEL.fullmatch(level) or len(level) > 40 or factor in levels:
            raise HemoFedError(f"{name[:80]!r} is not the name of a subgroup")
        levels[factor] = level
    return levels


def partition_of(name: str) -> str:
    """The partition a group belongs to: "sex x age" for "sex=female & age=50-75", "all" for "all"."""
    return " x ".join(group_levels(name)) or ALL


def factors_of(partition: str) -> tuple[str, ...]:
    """The factors of a partition; () for "all"."""
    factors = () if partition == ALL else tuple(factor.strip() for factor in partition.split(" x "))
    if len(set(factors)) != len(factors) or not all(_FACTOR.fullmatch(factor) for factor in factors):
        raise HemoFedError(f"partition '{partition}' is not a factor or factors joined by ' x '")
    return factors


def _cleaned(values: ArrayLike) -> Levels:
    texts = [str(value).strip().lower() for value in np.asarray(values).tolist()]
    missing = {"", "nan", "none", UNKNOWN}
    levels = [
        UNKNOWN if text in missing else text if _LEVEL.fullmatch(text) and len(text) <= 40 else "other"
        for text in texts
    ]
    return np.array(levels, dtype=np.str_)


def _ordered(factor: str, levels: Levels) -> list[str]:
    """The levels that occur: the usual order for sex and age, else the alphabet; "other" and "unknown"
    last."""
    usual = {"sex": SEXES, "age": AGE_BANDS}.get(factor, ())
    present = set(levels.tolist())
    first = [level for level in usual if level in present and level != UNKNOWN]
    last = [level for level in ("other", UNKNOWN) if level in present and level not in first]
    return first + sorted(present - set(first) - set(last)) + last
