"""The processes that work beside this one, made in one way."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def worker_pool(workers: int, begin: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """Processes that end at once, and without a word of their own, when a person presses Ctrl-C or this one is killed.

    Spawned, not forked: a forked child inherits torch's threads in a state they cannot run in. Each calls
    `begin` first, which can carry what a task cannot: shared memory.
    """
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_settle, initargs=(begin,))


def _settle(begin: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin()


def _end_with_parent() -> None:
    """A pool's process waits for work for ever: nobody tells it that its parent was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
