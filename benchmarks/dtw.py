"""DTW of whole batches against dtaidistance's C code, on one core each, in one process.

`python -m benchmarks.dtw`; about two minutes. A cell is one pair of samples inside the band, whatever the leads.
"""

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from dtaidistance import dtw, dtw_ndim
from numpy.typing import NDArray

from benchmarks.timing import compare, seconds
from shared_model import dtw_numba
from shared_model.dtw import band_samples
from shared_model.dtw_native import NoKernelError, load_kernel
from shared_model.dtw_torch import pairwise_dtw_torch

Series = NDArray[np.float32]
# name, leads, time, band as a share of it, batch
SETTINGS = (
    ("1 lead, 62.5 Hz, band 10%", 1, 625, 0.1, 64),
    ("3 leads, 62.5 Hz, band 10%", 3, 625, 0.1, 64),
    ("12 leads, 62.5 Hz, band 10%", 12, 625, 0.1, 64),
    ("1 lead, 250 Hz, band 5%", 1, 2500, 0.05, 32),
    ("12 leads, 250 Hz, band 5%", 12, 2500, 0.05, 32),
)


def say(**row: object) -> None:
    """Print one JSON line."""
    print(json.dumps(row), flush=True)


def processor_name() -> str:
    """What the ratios were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def walks(batch: int, leads: int, time: int) -> Series:
    """Random walks: (batch, lead, time)."""
    return np.random.default_rng(leads).normal(size=(batch, leads, time)).cumsum(-1).astype(np.float32)


def band_cells(time: int, band: int) -> int:
    """Cells of one pair inside the band."""
    return time * (2 * band + 1) - band * (band + 1)


def rival_distances(x: Series, band: int) -> list[float]:
    """dtaidistance's fastest call for one pair, for each pair below the diagonal; time first, float64."""
    if x.shape[1] == 1:
        series = [row[0].astype(np.float64) for row in x]
        distance = partial(dtw.distance_fast, window=band + 1)
    else:
        series = [np.ascontiguousarray(row.T, dtype=np.float64) for row in x]
        distance = partial(dtw_ndim.distance, window=band + 1, use_c=True)
    return [distance(series[i], series[j]) for i in range(len(x)) for j in range(i)]


def backends() -> dict[str, Callable[[Series, int], Series]]:
    """Each kernel that this machine has."""
    found = {"numba": dtw_numba.pairwise}
    try:
        kernel = load_kernel()
    except NoKernelError as error:
        say(benchmark="DTW, C", skipped=str(error))
        return found
    say(benchmark="DTW, C", built=kernel.built, processor=processor_name())
    return {"C": kernel.pairwise, **found}


def compare_with_dtaidistance(name: str, pairwise: Callable[[Series, int], Series]) -> None:
    """Every setting: the ratio, the speed in cells, and how far the distances are apart."""
    for setting, leads, time, band_share, batch in SETTINGS:
        x, band = walks(batch, leads, time), band_samples(band_share, time)
        label = f"DTW in {name}, {setting}, batch {batch}"
        row = compare(label, partial(pairwise, x, band), partial(rival_distances, x, band), "dtaidistance C", repeats=5)
        cells = band_cells(time, band) * batch * (batch - 1) / 2
        expected = np.array(rival_distances(x, band))
        apart = np.abs(pairwise(x, band)[np.tril_indices(batch, -1)] / expected - 1).max()
        say(
            benchmark=label,
            gcells_per_s=round(cells / float(str(row["ours_s"])) / 1e9, 3),
            rival_gcells_per_s=round(cells / float(str(row["rival_s"])) / 1e9, 3),
            largest_relative_difference=float(f"{apart:.1e}"),
        )


def small_torch_operations() -> None:
    """What a second OpenMP runtime makes many times slower at two threads."""
    x = torch.ones(64, 2048)
    for _ in range(100):
        x.add(1.0).relu()


def small_operations_after(name: str, work: Callable[[], object]) -> None:
    """Small torch operations at two threads before and after something else: before / after should be near 1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    small_torch_operations()
    before = min(seconds(small_torch_operations) for _ in range(15))
    work()
    after = min(seconds(small_torch_operations) for _ in range(15))
    torch.set_num_threads(threads)
    say(benchmark=f"small torch operations after {name}", times_faster=round(before / after, 3))


def parallel_loop() -> None:
    """What the kernels must not do: numba's parallel loop starts an OpenMP runtime beside torch's."""

    @numba.njit(parallel=True)
    def total(x):  # type: ignore[no-untyped-def]
        found = 0.0
        for i in numba.prange(len(x)):
            found += x[i]
        return found

    total(np.ones(10_000))


def torch_against(name: str, pairwise: Callable[[Series, int], Series]) -> None:
    """The torch form where it is meant to run, against one core; skipped without a GPU."""
    if not torch.cuda.is_available():
        say(benchmark="DTW in torch on a GPU", skipped="no CUDA device here")
        return
    for setting, leads, time, band_share, batch in SETTINGS:
        x, band = walks(batch, leads, time), band_samples(band_share, time)
        on_gpu = torch.from_numpy(x).cuda()
        compare(
            f"DTW in torch on {torch.cuda.get_device_name()}, {setting}, batch {batch}",
            partial(_finished, on_gpu, band_share),
            partial(pairwise, x, band),
            f"{name} on one core",
        )


def _finished(x: torch.Tensor, band_share: float) -> None:
    pairwise_dtw_torch(x, band_share)
    torch.cuda.synchronize()


def main() -> None:
    """Print JSON lines."""
    torch.set_num_threads(1)
    kernels = backends()
    for name, pairwise in kernels.items():
        small_operations_after(f"DTW in {name}", partial(pairwise, walks(8, 3, 625), 62))
    for name, pairwise in kernels.items():
        compare_with_dtaidistance(name, pairwise)
    torch_against(*next(iter(kernels.items())))
    small_operations_after("numba's parallel loop, for comparison", parallel_loop)  # last: it stays in the process


if __name__ == "__main__":
    main()
