"""Is this machine fit for the work, and is the site folder in order? Looks only, and uses no network.

Each check is a function of what it looks at, so that a test can show it an unfit machine.
"""

import importlib.metadata
import locale
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from client.doctor_site import examine_site
from client.finding import Finding, Level, ok, problem, warning
from client.store import ROW_BYTES
from shared_model.dtw import dtw_backend
from shared_model.errors import HemoFedError

# The lower bounds of pyproject.toml for what a site runs (a test holds them equal).
OLDEST_PYTHON = (3, 11)
OLDEST_PACKAGES = {
    "torch": "2.11",
    "wfdb": "4.3",
    "numpy": "2.1",
    "scipy": "1.15",
    "numba": "0.61",
    "flwr": "1.41",
    "opacus": "1.6",
    "cryptography": "50",
}
OPTIONAL_PACKAGES = {"h5py": "CODE-15% archives", "pydicom": "DICOM ECGs"}
GB = 10**9
LEAST_DISK_GB, COMFORTABLE_DISK_GB = 1, 10
LEAST_MEMORY_GB, COMFORTABLE_MEMORY_GB = 2, 4
YEARS = range(2025, 2100)
CLOCK_LOOKED_AT_S, MOST_DRIFT_S, MOST_SKEW_S = 0.3, 0.1, 2.0
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}

Installed = Callable[[str], str | None]


def examine(site_dir: Path | None) -> list[Finding]:
    """Look at the machine, and at the site folder if one is given."""
    folder = existing_folder(site_dir)
    findings = [
        python_version(sys.version_info[:3]),
        *packages(installed_version),
        *optional_packages(installed_version),
        free_disk(folder, shutil.disk_usage(folder).free, store_bytes(site_dir)),
        memory(memory_bytes()),
        cores(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        gpu(cuda_devices),
        dtw(dtw_backend),
        clock_rate(time.time, time.monotonic, time.sleep),
        clock_date(datetime.now(UTC), datetime.now().astimezone().strftime("%z")),
        file_time(folder, time.time),
        text_encoding(locale.getpreferredencoding(False), sys.getfilesystemencoding()),
    ]
    return findings if site_dir is None else findings + examine_site(site_dir, has_gpu=bool(cuda_devices()))


def worst(findings: list[Finding]) -> Level:
    """The worst level among the findings."""
    return max((finding.level for finding in findings), key=list(Level).index, default=Level.OK)


def findings_table(findings: list[Finding]) -> Table:
    """The findings for a terminal, one line each with what to do below it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=name != "found")
    for finding in findings:
        remedy = f"\n[bold]{escape(finding.remedy)}[/bold]" if finding.remedy else ""
        level = f"[{COLOURS[finding.level]}]{finding.level}[/]"
        table.add_row(finding.check, level, escape(finding.found) + remedy)
    return table


def existing_folder(site_dir: Path | None) -> Path:
    """The site folder, or the nearest folder above that is there; without one, the folder we are in."""
    folder = (site_dir or Path()).resolve()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def store_bytes(site_dir: Path | None) -> int:
    """How large the files of a site folder are."""
    if site_dir is None or not site_dir.is_dir():
        return 0
    return sum(path.stat().st_size for path in site_dir.iterdir() if path.is_file())


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers_of(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(digits) for digits in leading[0].split(".")) if leading else ()


def python_version(version: tuple[int, ...]) -> Finding:
    """Python itself."""
    text, oldest = ".".join(map(str, version)), ".".join(map(str, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        return problem("python", text, f"install Python {oldest} or later and make the environment again")
    return ok("python", text)


def packages(installed: Installed) -> list[Finding]:
    """The packages that a site cannot do without."""
    findings = []
    for package, oldest in OLDEST_PACKAGES.items():
        version = installed(package)
        if version is None:
            findings.append(problem(package, "not installed", "run: pip install hemofed"))
        elif numbers_of(version) < numbers_of(oldest):
            remedy = f"this release needs {oldest} or later; run: pip install --upgrade hemofed"
            findings.append(problem(package, version, remedy))
        else:
            findings.append(ok(package, version))
    return findings


def optional_packages(installed: Installed) -> list[Finding]:
    """Packages of the extra `records`."""
    findings = []
    for package, purpose in OPTIONAL_PACKAGES.items():
        version = installed(package)
        remedy = f"only for {purpose}; run: pip install 'hemofed[records]'"
        findings.append(ok(package, version) if version else warning(package, "not installed", remedy))
    return findings


def free_disk(folder: Path, free_bytes: int, stored_bytes: int) -> Finding:
    """Room for more ECGs: ROW_BYTES each, and as much again as is there for a study's caches to grow in."""
    found = (
        f"{free_bytes / GB:.1f} GB free at {folder}: room for {free_bytes // ROW_BYTES:,} more ECGs of "
        f"{ROW_BYTES // 1000} kB; the store takes {stored_bytes / GB:.1f} GB"
    )
    if free_bytes < LEAST_DISK_GB * GB:
        return problem("disk", found, "free space, or put the site folder on another disk")
    if free_bytes < max(COMFORTABLE_DISK_GB * GB, stored_bytes // 10):
        return warning("disk", found, "free space before a large ingest: it stops when the disk is full")
    return ok("disk", found)


def memory_bytes(limit_file: Path = CGROUP_LIMIT) -> int:
    """Memory of the machine, or of the container where that is less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = limit_file.read_text(encoding="ascii").strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdecimal() else whole


def memory(total_bytes: int) -> Finding:
    """Memory against what training and ingest take."""
    found = f"{total_bytes / GB:.1f} GB"
    if total_bytes < LEAST_MEMORY_GB * GB:
        return problem("memory", found, f"at least {LEAST_MEMORY_GB} GB are needed to train")
    if total_bytes < COMFORTABLE_MEMORY_GB * GB:
        return warning("memory", found, "set physical_batch = 16 in site.toml, so that a batch fits")
    return ok("memory", found)


def cores(count: int) -> Finding:
    """Processor cores that this process may use."""
    if count < 2:
        return warning("cores", str(count), "it works, at half the speed: an ingest reads on two cores")
    return ok("cores", str(count))


def cuda_devices() -> list[str]:
    """Name and memory of each CUDA device; none where torch cannot use one."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count()))
    return [f"{each.name}, {each.total_memory / GB:.0f} GB" for each in properties]


def gpu(devices: Callable[[], list[str]]) -> Finding:
    """CUDA devices. None is no fault; one that torch cannot start is worth a line."""
    try:
        found = devices()
    except RuntimeError as error:
        said = " ".join(str(error).split())[:120]
        return warning("gpu", f"torch cannot use it: {said}", 'update the driver, or set device = "cpu" in site.toml')
    return ok("gpu", "; ".join(found) or "none; the CPU works")


def dtw(backend: Callable[[], str]) -> Finding:
    """What computes DTW on the CPU: a C kernel compiled here, or numba."""
    try:
        found = backend()
    except HemoFedError as error:
        return problem("dtw", error.message, "unset HEMOFED_DTW, or set it to numba")
    except ImportError as error:
        return problem("dtw", f"no C kernel, and no numba either ({error})", "run: pip install hemofed")
    if "no C kernel" in found:
        return warning("dtw", found, "it works, but three to six times slower; only studies that use DTW would notice")
    return ok("dtw", found)


def clock_rate(wall: Callable[[], float], monotonic: Callable[[], float], sleep: Callable[[float], None]) -> Finding:
    """Whether the clock runs as time passes, or is being set or stands still."""
    wall_s, steady_s = wall(), monotonic()
    sleep(CLOCK_LOOKED_AT_S)
    drift_s = (wall() - wall_s) - (monotonic() - steady_s)
    if abs(drift_s) > MOST_DRIFT_S:
        remedy = "let the time service finish, or mend it, before a study: certificates and time limits depend on it"
        return warning("clock", f"moved {drift_s:+.2f} s beside the time that passed", remedy)
    return ok("clock", "runs as time passes")


def clock_date(now: datetime, utc_offset: str) -> Finding:
    """Whether the date can be right. Skew against the centre shows when a connection is made: no network here."""
    found = f"{now:%Y-%m-%d %H:%M} UTC, local time {utc_offset[:3]}:{utc_offset[3:]}"
    if now.year not in YEARS:
        return problem("date", found, "set the clock: certificates would be refused")
    return ok("date", f"{found}; skew against the centre is checked at connection")


def file_time(folder: Path, wall: Callable[[], float]) -> Finding:
    """The file system's clock, which on a network share is another machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
            skew_s = os.stat(file.name).st_mtime - wall()
    except OSError as error:
        return problem(
            "files", f"{folder}: cannot be written ({error.strerror})", f"give yourself the right to {folder}"
        )
    if abs(skew_s) > MOST_SKEW_S:
        found = f"a file just written at {folder} is dated {skew_s:+.0f} s off"
        return warning("files", found, "set the file server's clock: progress and logs would mislead")
    return ok("files", f"{folder} can be written, and dates its files by this clock")


def text_encoding(preferred: str, file_system: str) -> Finding:
    """Names of patients and files are not all ASCII."""
    found = f"text {preferred}, file names {file_system}"
    if {preferred.lower().replace("-", ""), file_system.lower().replace("-", "")} != {"utf8"}:
        return warning("locale", found, "set LC_ALL=C.UTF-8 (or PYTHONUTF8=1), or accented names will not be read")
    return ok("locale", found)
