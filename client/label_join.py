"""Which ECG a measurement labels: of one patient, the nearest in time. Arrays only: no file, no database."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError

Side = Literal["before", "either"]
SIDES: tuple[Side, ...] = get_args(Side)
SHORTEST_WINDOW_HOURS, LONGEST_WINDOW_HOURS = 1.0, 168.0
HOUR_S = 3600.0
NONE = -1


@dataclass(frozen=True)
class JoinSettings:
    """How far from a measurement an ECG may lie, and on which side.

    Raises:
        HemoFedError: the window is not within 1 to 168 h, or the side is not one of `SIDES`.
    """

    window_hours: float = 24.0
    side: Side = "before"
    """`before`: only ECGs recorded at or before the measurement; `either`: later ones too."""

    def __post_init__(self) -> None:
        if not SHORTEST_WINDOW_HOURS <= self.window_hours <= LONGEST_WINDOW_HOURS:  # NaN is not within either
            raise HemoFedError(
                f"--window-hours {self.window_hours:g}: use {SHORTEST_WINDOW_HOURS:g} to {LONGEST_WINDOW_HOURS:g}",
                ExitCode.USAGE,
            )
        if self.side not in SIDES:
            raise HemoFedError(f"--side {self.side}: use {' or '.join(SIDES)}", ExitCode.USAGE)


@dataclass(frozen=True)
class Moments:
    """Points in time of patients; both arrays of one length."""

    patient: NDArray[np.int64]
    """A code; two sets of moments that are compared use the same codes."""
    at: NDArray[np.float64]
    """Unix seconds, never NaN."""

    def __len__(self) -> int:
        return len(self.at)

    def where(self, chosen: NDArray[np.bool_]) -> "Moments":
        """Those that are chosen."""
        return Moments(self.patient[chosen], self.at[chosen])


@dataclass(frozen=True)
class Nearest:
    """For each event the nearest ECG of its patient."""

    ecg: NDArray[np.int64]
    """Its place among the ECGs, NONE where there is none."""
    after_s: NDArray[np.float64]
    """How long after the event it was recorded; negative: before; inf where there is none."""


def nearest(ecgs: Moments, events: Moments, side: Side) -> Nearest:
    """The nearest ECG of each event's patient, whatever the distance.

    `before` looks at ECGs recorded at or before the event only. Of two ECGs equally far the earlier is taken, of
    two at the same time the one that is listed first.
    """
    before = _last_before(ecgs, events)
    after_s = np.where(before == NONE, np.inf, _at(ecgs, before) - events.at)
    if side == "before":
        return Nearest(before, after_s)
    later = _last_before(Moments(ecgs.patient, -ecgs.at), Moments(events.patient, -events.at))
    later_s = np.where(later == NONE, np.inf, _at(ecgs, later) - events.at)
    nearer = later_s < np.abs(after_s)
    return Nearest(np.where(nearer, later, before), np.where(nearer, later_s, after_s))


def choose(found: Nearest, ecg_count: int, preferred: NDArray[np.bool_], window_s: float) -> NDArray[np.int64]:
    """For each ECG the event that labels it, NONE where there is none: (ecg_count,).

    An event labels its nearest ECG and no other. An ECG that is the nearest of several events within the window
    takes a preferred one before another, then the nearest, then the one that is listed first.

    Guarantee: with `found` of the side `before`, no ECG that is given an event was recorded after it.
    """
    distance_s = np.abs(found.after_s)
    candidates = np.flatnonzero(distance_s <= window_s)
    order = np.lexsort((candidates, distance_s[candidates], ~preferred[candidates], found.ecg[candidates]))
    ecg, first = np.unique(found.ecg[candidates][order], return_index=True)
    event_of_ecg = np.full(ecg_count, NONE, np.int64)
    event_of_ecg[ecg] = candidates[order][first]
    return event_of_ecg


def _last_before(ecgs: Moments, events: Moments) -> NDArray[np.int64]:
    """The last ECG at or before each event of the same patient, NONE where there is none."""
    count = len(ecgs)
    patient = np.concatenate([ecgs.patient, events.patient])
    at = np.concatenate([ecgs.at, events.at])
    is_event = np.arange(len(at)) >= count
    # Of ECGs at one time the first listed comes last, so that it is the one found; an event comes after its ECGs.
    place = np.where(is_event, 0, -np.arange(len(at)))
    order = np.lexsort((place, is_event, at, patient))
    latest = np.maximum.accumulate(np.where(is_event[order], -1, np.arange(len(at))))
    found = np.empty(len(at), np.int64)
    found[order] = np.where(latest < 0, NONE, order[latest])
    ecg = found[count:]
    same = (ecg != NONE) & (patient[ecg] == events.patient)
    return np.where(same, ecg, NONE)


def _at(ecgs: Moments, place: NDArray[np.int64]) -> NDArray[np.float64]:
    """The times of ECGs, inf for NONE."""
    return np.append(ecgs.at, math.inf)[place]
