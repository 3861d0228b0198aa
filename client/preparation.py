"""From a reading to what the store takes: read, cut to segments, hashed; in this process or in several, in order."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from client.quality_policy import QualityPolicy
from client.records.record import EcgRecord, Reading, Remark, TurnedAway, Unusable
from client.segments import Segments, cut_segments
from shared_model.errors import ExitCode, HemoFedError
from shared_model.workers import worker_pool

READINGS_AT_ONCE = 32
CHUNKS_WAITING = 4  # a worker: enough to never stand idle, few enough to fit in memory
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

    Raises:
        HemoFedError: a process died, for want of memory or by another's hand.
    """
    if workers == 1:
        yield from (prepare(reading, policy) for reading in readings)
        return
    pool = worker_pool(workers)
    waiting: deque[Future[list[list[Outcome]]]] = deque()
    try:
        while chunk := list(islice(readings, READINGS_AT_ONCE)):
            waiting.append(pool.submit(_prepare_all, chunk, policy))
            if len(waiting) > CHUNKS_WAITING * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise HemoFedError(
            "a reading process died (out of memory?); what was stored before is intact: run the same command "
            "again, with --workers 1 if it happens again",
            ExitCode.UNEXPECTED,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_all(readings: Sequence[Reading], policy: QualityPolicy) -> list[list[Outcome]]:
    return [[_without_signal(outcome) for outcome in prepare(reading, policy)] for reading in readings]


def _without_signal(outcome: Outcome) -> Outcome:
    """What another process needs: the source's own signal is several times the stored one, and is not used again."""
    if isinstance(outcome, Prepared):
        return replace(outcome, record=replace(outcome.record, signal_mv=NO_SIGNAL))
    return outcome
