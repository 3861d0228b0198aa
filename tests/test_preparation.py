"""What several reading processes give is what one gives, in the same order, whatever fits into their shared memory."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import preparation
from client.handover import lay_down, rows_laid_down, shared_memory, slots_of, take_up
from client.preparation import Prepared, prepared_in_order
from client.records.record import EcgRecord, Item, Noticed, Remark, TurnedAway
from client.segments import Segments, cut_segments
from shared_model.errors import HemoFedError
from shared_model.leads import LEADS
from shared_model.workers import worker_pool
from tests.wfdb_fixtures import ecg_steps

READINGS = 150


def read(number: int) -> Iterator[Item]:
    """A reading that needs no file: 10 s, or 60 s in the second half; some too short, some with a remark."""
    if number % 7 == 3:
        yield Remark(f"r{number}", Noticed.TEXT_LABEL, "a remark")
    seconds = 2 if number % 11 == 5 else 60 if number >= READINGS // 2 else 10
    signal_mv = ecg_steps(seconds, 250, seed=number).astype(np.float32) / 1000
    yield EcgRecord(f"r{number}", f"r{number}.hea", signal_mv, LEADS, 250.0, f"p{number}")


def end_process(number: int) -> Iterator[Item]:
    """What a lack of memory does to a reading process; this one reads on."""
    if os.environ.get("READS_HERE") != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    yield from read(number)


def told(outcomes: list[preparation.Outcome]) -> list[object]:
    """What can be compared of the outcomes of one reading."""
    return [
        (outcome.source, outcome.content, outcome.segments.starts_s, outcome.segments.steps.tobytes())
        if isinstance(outcome, Prepared)
        else outcome
        for outcome in outcomes
    ]


@pytest.fixture
def all_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are there from the beginning, as so few readings would be done before; chunks are small."""

    def started(*given: object) -> object:
        pool = worker_pool(*given)  # type: ignore[arg-type]
        pool.submit(int).result()
        return pool

    monkeypatch.setattr(preparation, "worker_pool", started)
    monkeypatch.setattr(preparation, "READINGS_AT_ONCE", 4)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_processes_give_what_one_gives(all_started: None, workers: int) -> None:
    """Every slot has several turns and is overflown by the 60 s records; the last chunk is not full."""
    readings = [partial(read, number) for number in range(READINGS)]
    alone = list(map(told, prepared_in_order(iter(readings), 1)))
    shared = list(map(told, prepared_in_order(iter(readings), workers)))
    assert shared == alone
    assert {len(outcomes) for outcomes in alone} == {1, 2}
    assert any(
        isinstance(outcome, TurnedAway) for outcomes in prepared_in_order(iter(readings[:6]), 1) for outcome in outcomes
    )


def test_a_process_that_dies_is_one_clear_error(all_started: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READS_HERE", str(os.getpid()))
    with pytest.raises(HemoFedError, match="a reading process died"):
        list(prepared_in_order(iter([partial(end_process, number) for number in range(200)]), 2))


def test_no_reading_at_all() -> None:
    assert list(prepared_in_order(iter([]), 2)) == []


def segments_of(seconds: int, seed: int) -> Segments:
    signal_mv = ecg_steps(seconds, 250, seed=seed).astype(np.float32) / 1000
    return cut_segments(EcgRecord("r", "r", signal_mv, LEADS, 250.0, "p"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=8))
def test_what_is_laid_down_is_taken_up(counts: list[int]) -> None:
    """Of records of so many 10 s ECGs, in a slot of eight rows; what does not fit stays with its record."""
    free = rows = slots_of(shared_memory(2, 8), 2)[1]
    records = [segments_of(10 * count, seed) for seed, count in enumerate(counts)]
    handed = []
    for segments in records:
        handed.append(lay_down(segments, free))
        free = free[rows_laid_down(handed[-1]) :]
    assert sum(map(rows_laid_down, handed)) == len(rows) - len(free) <= 8
    taken = []
    for segments in handed:
        taken.append(take_up(segments, rows))
        rows = rows[rows_laid_down(segments) :]
    free.base[:] = 0  # the next chunk comes
    for segments, once in zip(taken, records, strict=True):
        np.testing.assert_array_equal(segments.steps, once.steps)
        assert segments.content == once.content


def test_slots_do_not_overlap() -> None:
    slots = slots_of(shared_memory(3, 2), 3)
    slots[:] = np.arange(3)[:, None, None, None]
    assert [set(slot.ravel().tolist()) for slot in slots] == [{0}, {1}, {2}]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_memory_has_no_name_that_could_outlive_a_kill() -> None:
    memory = shared_memory(2, 64)
    place = np.frombuffer(memoryview(memory), np.int16).__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(word, 16) for word in line.split()[0].split("-"))
        if first <= place < last:
            assert line.endswith("(deleted)"), line
            return
    pytest.fail("the memory is not mapped")
