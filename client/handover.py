"""Samples on their way from the processes that read to the one that writes: in memory that all of them see.

Pickled through a pipe they cost more than a second process saves. The memory has no name in any folder: it is gone with
the last of the processes, however they end.
"""

from ctypes import Array, c_int16
from dataclasses import replace
from math import prod
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from client.segments import Segments
from client.store import ROW_SHAPE

Memory = Array[c_int16]
IN_THE_SLOT = np.empty((0, *ROW_SHAPE), np.int16)
"""Stands for steps that were laid down."""


def shared_memory(slots: int, rows: int) -> Memory:
    """Room for `slots` times `rows` 10 s ECGs. A spawned process is given it as it starts; a task cannot carry it."""
    return get_context("spawn").RawArray(c_int16, slots * rows * prod(ROW_SHAPE))


def slots_of(memory: Memory, slots: int) -> NDArray[np.int16]:
    """The memory as (slot, row, 12, 2500)."""
    return np.frombuffer(memoryview(memory), np.int16).reshape(slots, -1, *ROW_SHAPE)


def lay_down(segments: Segments, free: NDArray[np.int16]) -> Segments:
    """Copy the steps to the first of the `free` rows (row, 12, 2500); where these are too few, they stay with it."""
    count = len(segments.steps)
    if count > len(free):
        return segments
    free[:count] = segments.steps
    return replace(segments, steps=IN_THE_SLOT)


def rows_laid_down(segments: Segments) -> int:
    """How many rows of its slot it takes; 0 where its steps stayed with it."""
    return 0 if len(segments.steps) else len(segments.starts_s)


def take_up(segments: Segments, rows: NDArray[np.int16]) -> Segments:
    """Undo `lay_down` with a copy of the first `rows`, so that the slot is free again."""
    count = rows_laid_down(segments)
    return replace(segments, steps=rows[:count].copy()) if count else segments
