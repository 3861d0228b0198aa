"""The processes that work beside this one, made in one way."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end at once, and without a word of their own, when a person presses Ctrl-C.

    Spawned, not forked: a forked child inherits torch's threads in a state they cannot run in.
    """
    return ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
