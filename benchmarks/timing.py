"""Ratios from one run: ours and the rival in turn, warm-up first, median of many."""

import json
import platform
import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], object], rival: Callable[[], object], rival_name: str, repeats: int = 7
) -> dict[str, object]:
    """Time two calls in turn and print the ratio rival/ours (above 1: ours is faster) as one JSON line.

    The ratio is taken pair by pair, so that a machine that drifts does not decide the outcome.
    """
    ours(), rival()  # warm-up: compilation, page cache, thread pools
    pairs = [(seconds(ours), seconds(rival)) for _ in range(repeats)]
    ratios = sorted(rival_s / ours_s for ours_s, rival_s in pairs)
    row = {
        "benchmark": name,
        "rival": rival_name,
        "times_faster": round(statistics.median(ratios), 2),
        "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "ours_s": round(statistics.median(pair[0] for pair in pairs), 6),
        "rival_s": round(statistics.median(pair[1] for pair in pairs), 6),
        "repeats": repeats,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(row), flush=True)
    return row
