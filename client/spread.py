"""Columns of the index as numbers: quartiles and histograms."""

import math
import sqlite3
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BINS = 40


@dataclass(frozen=True)
class Spread:
    """How values lie; `count` of them are known."""

    count: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie from `edges[i]` (included) to `edges[i + 1]` (not, but in the last bin)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def column(connection: sqlite3.Connection, sql: str) -> NDArray[np.float64]:
    """The numbers of a statement with one column, NULL as NaN, without a Python list of them."""
    rows = connection.execute(sql)
    return np.fromiter((math.nan if value is None else value for (value,) in rows), np.float64)


def spread_of(values: NDArray[np.floating]) -> Spread | None:
    """Smallest, quartiles and largest of the known values; None where there is none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    return Spread(len(known), *(float(value) for value in np.percentile(known, (0, 25, 50, 75, 100))))


def histogram_of(values: NDArray[np.floating], width: float | None = None) -> Histogram | None:
    """The known values in bins of one width, which start at a multiple of it; None where there is none.

    Without `width` it is 1, 2 or 5 times a power of ten, so that there are at most MOST_BINS.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    width = width or round_width((high - low) / (MOST_BINS - 1))
    first, last = math.floor(low / width + 1e-9), math.floor(high / width + 1e-9)
    edges = [round(place * width, 9) for place in range(first, last + 2)]
    inside = np.clip(known, edges[0], edges[-1])  # rounding may leave the outermost values a hair outside
    return Histogram(tuple(edges), tuple(np.histogram(inside, edges)[0].tolist()))


def round_width(width: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `width`; 1 for 0."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= width * (1 - 1e-9))
