"""Compiles dtw_kernel.c at first use, for the processor that it runs on, and loads it.

Wheels stay pure Python, and a hospital's machine gets its own vector instructions. What is built lies in the
user's cache folder, under a name that holds a hash of all that it depends on; since the process loads what lies
there, folder and file must be the user's own. Whatever stands in the way is a NoKernelError, and numba takes over.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float32]
SOURCE = Path(__file__).with_name("dtw_kernel.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
LIMIT_S = 120
MATRIX = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")


class NoKernelError(Exception):
    """Why there is no C kernel here, in a few words."""


@dataclass(frozen=True)
class Kernel:
    """The loaded functions, and with what they were built."""

    built: str
    pairwise: Callable[[Series, int], Series]
    cross: Callable[[Series, Series, int], Series]


def load_kernel() -> Kernel:
    """Build what has not been built yet, load it, and let it show that it computes DTW.

    Raises:
        NoKernelError: no compiler, no folder of our own, a compile error, or wrong distances.
    """
    try:
        compiler, version = find_compiler()
        key = "\0".join((SOURCE.read_text(encoding="utf-8"), *FLAGS, version, processor()))
        library = private_folder() / f"dtw-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not library.exists():
            build(compiler, library)
        try:
            kernel = loaded(library, version)
        except NoKernelError:  # damaged since it was built, or no longer ours alone
            build(compiler, library)
            kernel = loaded(library, version)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: a user without a home
        raise NoKernelError(" ".join(str(error).split())[:200]) from error
    if not computes_dtw(kernel):
        raise NoKernelError(f"what {version} built gives wrong distances")
    return kernel


def find_compiler() -> tuple[str, str]:
    """Path of a C compiler and the first line of its --version."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=False)
            if run.returncode == 0 and run.stdout:
                return path, run.stdout.splitlines()[0]
    raise NoKernelError(f"no C compiler ({', '.join(COMPILERS)})")


def processor() -> str:
    """What -march=native depends on: a home folder may serve unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    # The first processor only; x86 says "flags" and "model name", ARM "Features" and "CPU part".
    kinds = ("flags", "model name", "Features", "CPU part")
    first = {kind: next((line for line in lines if line.startswith(kind)), "") for kind in kinds}
    return "\n".join((platform.system(), platform.machine(), platform.processor(), *first.values()))


def private_folder() -> Path:
    """$XDG_CACHE_HOME/hemofed or ~/.cache/hemofed, made where it is missing, and nobody else's to write."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "hemofed"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_what_others_can_write(folder)
    return folder


def refuse_what_others_can_write(path: Path) -> None:
    """NoKernelError for a link, and for what belongs to or can be written by somebody else."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise NoKernelError(f"{path} is a link")
    if not hasattr(os, "geteuid") or found.st_uid != os.geteuid():
        raise NoKernelError(f"{path} belongs to somebody else")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoKernelError(f"{path} can be written by others (chmod go-w)")


def build(compiler: str, library: Path) -> None:
    """Compile aside and rename, so that two processes can build at once and neither loads half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if run.returncode != 0 or not made.exists():
            said = next((line for line in run.stderr.splitlines() if "error:" in line), "no error given")
            raise NoKernelError(f"{compiler} failed: {said[:160]}")
        made.chmod(0o700)
        made.replace(library)


def loaded(library: Path, version: str) -> Kernel:
    """The kernel in a file, or NoKernelError where the file is not a library or not the user's own."""
    refuse_what_others_can_write(library)
    try:
        functions = ctypes.CDLL(str(library))  # releases the interpreter's lock during a call
        pairwise, cross, lanes = functions.dtw_pairwise, functions.dtw_cross, functions.dtw_lanes
    except (OSError, AttributeError) as error:
        raise NoKernelError(f"cannot load {library}") from error
    size = ctypes.c_long
    pairwise.argtypes = [MATRIX, size, size, size, size, MATRIX]
    cross.argtypes = [MATRIX, size, MATRIX, size, size, size, size, MATRIX]

    def pairwise_distances(x: Series, band: int) -> Series:
        distance = np.zeros((len(x), len(x)), np.float32)
        _finish(pairwise(x, *x.shape, band, distance))
        return distance

    def cross_distances(a: Series, b: Series, band: int) -> Series:
        distance = np.zeros((len(a), len(b)), np.float32)
        _finish(cross(a, len(a), b, *b.shape, band, distance))
        return distance

    return Kernel(f"{version}, {lanes()} lanes", pairwise_distances, cross_distances)


def _finish(status: int) -> None:
    if status != 0:
        raise MemoryError("DTW: no memory for a tile")


def computes_dtw(kernel: Kernel) -> bool:
    """Whether a kernel agrees with `explicit_dtw` on small series of one and three leads; takes milliseconds."""
    for leads, band in ((1, 2), (3, 3)):
        x = np.random.default_rng(leads).normal(size=(19, leads, 8)).astype(np.float32)
        expected = explicit_dtw(x, x, band)
        for found in (kernel.pairwise(x, band), kernel.cross(x, x, band)):
            if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return False
    return True


def explicit_dtw(a: Series, b: Series, band: int) -> NDArray[np.float64]:
    """The textbook recursion, a cell at a time: (n, lead, time), (m, lead, time) -> (n, m)."""
    n, _, time = a.shape
    total = np.full((time + 1, time + 1, n, len(b)), np.inf)
    total[0, 0] = 0
    for i in range(time):
        for j in range(max(0, i - band), min(time, i + band + 1)):
            cost = np.square(a[:, None, :, i].astype(float) - b[None, :, :, j]).sum(-1)
            total[i + 1, j + 1] = cost + np.minimum(np.minimum(total[i, j], total[i, j + 1]), total[i + 1, j])
    return np.asarray(np.sqrt(total[time, time]))
