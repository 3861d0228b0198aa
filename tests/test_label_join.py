"""The join of measurements and ECGs, against explicit loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.label_join import NONE, SIDES, JoinSettings, Moments, Side, choose, nearest
from shared_model.errors import ExitCode, HemoFedError

# Few patients and few moments, so that ties are common; fractions of a second, as ECG segments have.
MOMENT = st.tuples(st.integers(0, 2), st.integers(0, 12).map(lambda quarter: quarter / 4))
TIMES = st.lists(MOMENT, max_size=14)
WINDOW = st.sampled_from([0.0, 0.25, 1.0, 2.5, 100.0])


def moments(pairs: list[tuple[int, float]]) -> Moments:
    return Moments(np.array([who for who, _ in pairs], np.int64), np.array([at for _, at in pairs], np.float64))


def slow_nearest(ecgs: list[tuple[int, float]], events: list[tuple[int, float]], side: Side) -> list[int]:
    """Each event's ECG, by looking at every pair."""
    found = []
    for who, at in events:
        best, best_key = NONE, (math.inf, math.inf, math.inf)
        for place, (patient, recorded_at) in enumerate(ecgs):
            if patient != who or (side == "before" and recorded_at > at):
                continue
            key = (abs(recorded_at - at), recorded_at, place)
            if key < best_key:
                best, best_key = place, key
        found.append(best)
    return found


def slow_join(
    ecgs: list[tuple[int, float]],
    events: list[tuple[int, float]],
    preferred: list[bool],
    side: Side,
    window: float,
) -> list[int]:
    """Each ECG's event, likewise."""
    of_event = slow_nearest(ecgs, events, side)
    chosen = []
    for place, (_, recorded_at) in enumerate(ecgs):
        best, best_key = NONE, (True, math.inf, math.inf)
        for event, (_, at) in enumerate(events):
            distance = abs(recorded_at - at)
            if of_event[event] == place and distance <= window:
                key = (not preferred[event], distance, event)
                if key < best_key:
                    best, best_key = event, key
        chosen.append(best)
    return chosen


@settings(max_examples=600)
@given(ecgs=TIMES, events=TIMES, side=st.sampled_from(SIDES), window=WINDOW, data=st.data())
def test_the_join_is_that_of_explicit_loops(
    ecgs: list[tuple[int, float]], events: list[tuple[int, float]], side: Side, window: float, data: st.DataObject
) -> None:
    preferred = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    found = nearest(moments(ecgs), moments(events), side)
    assert found.ecg.tolist() == slow_nearest(ecgs, events, side)
    chosen = choose(found, len(ecgs), np.array(preferred, np.bool_), window)
    assert chosen.tolist() == slow_join(ecgs, events, preferred, side, window)


@given(ecgs=TIMES, events=TIMES, window=WINDOW, side=st.sampled_from(SIDES))
def test_before_never_takes_a_later_ecg_and_no_event_labels_two(
    ecgs: list[tuple[int, float]], events: list[tuple[int, float]], window: float, side: Side
) -> None:
    found = nearest(moments(ecgs), moments(events), side)
    chosen = choose(found, len(ecgs), np.zeros(len(events), np.bool_), window)
    joined = [(ecgs[ecg], events[event]) for ecg, event in enumerate(chosen.tolist()) if event != NONE]
    assert all(patient == who and abs(at - moment) <= window for (patient, at), (who, moment) in joined)
    if side == "before":
        assert all(at <= moment for (_, at), (_, moment) in joined)
    taken = chosen[chosen != NONE].tolist()
    assert len(set(taken)) == len(taken)


def test_an_ecg_after_the_event_is_taken_on_either_side_only() -> None:
    ecgs, events = moments([(0, 10.0)]), moments([(0, 9.0)])
    assert nearest(ecgs, events, "before").ecg.tolist() == [NONE]
    assert nearest(ecgs, events, "either").after_s.tolist() == [1.0]


def test_an_event_with_a_wedge_goes_before_a_nearer_one() -> None:
    found = nearest(moments([(0, 0.0)]), moments([(0, 1.0), (0, 2.0)]), "before")
    assert choose(found, 1, np.array([False, False]), 5.0).tolist() == [0]
    assert choose(found, 1, np.array([False, True]), 5.0).tolist() == [1]
    assert choose(found, 1, np.array([False, True]), 1.5).tolist() == [0]


@pytest.mark.parametrize("window_hours", [-1, 0, 0.99, 168.5, math.inf, math.nan])
def test_windows_that_are_refused(window_hours: float) -> None:
    with pytest.raises(HemoFedError, match="1 to 168") as caught:
        JoinSettings(window_hours)
    assert caught.value.exit_code == ExitCode.USAGE


def test_sides_that_are_refused() -> None:
    with pytest.raises(HemoFedError, match="before or either"):
        JoinSettings(24, "after")  # type: ignore[arg-type]
