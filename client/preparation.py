"""From a reading to what the store takes: read, cut to segments, hashed; in this process or in several, in order."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from client.handover import Memory, lay_down, rows_laid_down, shared_memory, slots_of, take_up
from client.quality_policy import QualityPolicy
from client.records.record import EcgRecord, Reading, Remark, TurnedAway, Unusable
from client.segments import Segments, cut_segments
from shared_model.errors import ExitCode, HemoFedError
from shared_model.workers import worker_pool

READINGS_AT_ONCE = 32  # in a chunk
ROWS_A_READING = 2  # room for 10 s ECGs in shared memory; what is longer throughout is pickled
CHUNKS_WAITING = 4  # a process: enough to never stand idle, few enough to fit in memory
WORTH_WORKERS = 4000  # records: fewer are read before the other processes have started
NO_SIGNAL = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Prepared:
    """A record ready for the store; of its signal the segments are kept."""

    record: EcgRecord
    segments: Segments

    @property
    def content(self) -> bytes:
        """SHA-256 of the signal."""
        return self.segments.content

    @property
    def source(self) -> str:
        """The file a person would open."""
        return self.record.source

    @property
    def patient_id(self) -> str:
        """Whose it is."""
        return self.record.patient_id


Outcome = Prepared | TurnedAway | Remark
Chunk = list[list[Outcome]]
"""What came of each of several readings."""
_seen = np.empty((0, 0), np.int16)


def prepare(reading: Reading, policy: QualityPolicy) -> list[Outcome]:
    """Read, and make of each record what the store takes, or the reason why not."""
    return [_prepared(item, policy) if isinstance(item, EcgRecord) else item for item in reading()]


def _prepared(record: EcgRecord, policy: QualityPolicy) -> Prepared | TurnedAway:
    try:
        segments = cut_segments(record, policy)
    except Unusable as unusable:
        return TurnedAway(record.source, unusable.reason, unusable.detail, record.patient_id)
    return Prepared(record, segments)


def workers_for(count: int, wanted: int | None) -> int:
    """How many processes to read `count` records with; 1 is this one alone."""
    if wanted is not None:
        return wanted
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return allowed if count >= WORTH_WORKERS else 1


def prepared_in_order(
    readings: Iterator[Reading], workers: int, policy: QualityPolicy = QualityPolicy()
) -> Iterator[list[Outcome]]:
    """The outcome of each reading, in the order of the readings however many processes share the work.

    This process is one of them: it reads alone until the first of the others has started, and then whenever there is
    nothing to hand on.

    Raises:
        HemoFedError: a process died, for want of memory or by another's hand.
    """
    if workers == 1:
        yield from (prepare(reading, policy) for reading in readings)
        return
    slots = CHUNKS_WAITING * (workers - 1)
    memory = shared_memory(slots, ROWS_A_READING * READINGS_AT_ONCE)
    pool = worker_pool(workers - 1, partial(_see, memory, slots))
    try:
        started = pool.submit(_prepare_all, (), policy, 0)
        while not started.done() and (reading := next(readings, None)) is not None:
            yield prepare(reading, policy)
        started.result()
        yield from _shared_out(pool, slots_of(memory, slots), readings, policy)
    except BrokenProcessPool:
        raise HemoFedError(
            "a reading process died (out of memory?); what was stored before is intact: run the same command "
            "again, with --workers 1 if it happens again",
            ExitCode.UNEXPECTED,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _shared_out(
    pool: ProcessPoolExecutor, slots: NDArray[np.int16], readings: Iterator[Reading], policy: QualityPolicy
) -> Iterator[list[Outcome]]:
    """The outcomes in order. Each slot is with one chunk from its submission until its samples were taken up."""
    chunks = iter(lambda: list(islice(readings, READINGS_AT_ONCE)), [])
    free, own = deque(range(len(slots))), 0
    waiting: deque[tuple[int | None, Future[Chunk]]] = deque()  # no slot: read here
    while True:
        while free and (chunk := next(chunks, None)):
            slot = free.popleft()
            waiting.append((slot, pool.submit(_prepare_all, chunk, policy, slot)))
        if not waiting:
            return
        ready = waiting[0][1].done() or own == len(slots)
        if not ready and (chunk := next(chunks, None)):
            waiting.append((None, _read_here(chunk, policy)))
            own += 1
            continue
        place, future = waiting.popleft()
        outcomes = future.result()
        if place is None:
            own -= 1
        else:
            _take_up(outcomes, slots[place])
            free.append(place)
        yield from outcomes


def _read_here(readings: Sequence[Reading], policy: QualityPolicy) -> Future[Chunk]:
    done: Future[Chunk] = Future()
    done.set_result([[_without_signal(outcome) for outcome in prepare(reading, policy)] for reading in readings])
    return done


def _see(memory: Memory, slots: int) -> None:
    """A reading process is given the memory once, as it starts: a task can only name a slot of it."""
    global _seen  # its own, in a process that does nothing else
    _seen = slots_of(memory, slots)


def _prepare_all(readings: Sequence[Reading], policy: QualityPolicy, slot: int) -> Chunk:
    """In a reading process: what came of each reading, its samples in the slot as far as there is room."""
    free = _seen[slot]
    chunk: Chunk = []
    for reading in readings:
        outcomes: list[Outcome] = []
        for outcome in map(_without_signal, prepare(reading, policy)):
            if isinstance(outcome, Prepared):
                outcome = replace(outcome, segments=lay_down(outcome.segments, free))
                free = free[rows_laid_down(outcome.segments) :]
            outcomes.append(outcome)
        chunk.append(outcomes)
    return chunk


def _take_up(chunk: Chunk, rows: NDArray[np.int16]) -> None:
    """Put the samples back in, which were laid down in this order."""
    for outcomes in chunk:
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, Prepared):
                outcomes[place] = replace(outcome, segments=take_up(outcome.segments, rows))
                rows = rows[rows_laid_down(outcome.segments) :]


def _without_signal(outcome: Outcome) -> Outcome:
    """What waits for its turn: the source's own signal is several times the stored one, and is not used again."""
    if isinstance(outcome, Prepared):
        return replace(outcome, record=replace(outcome.record, signal_mv=NO_SIGNAL))
    return outcome
