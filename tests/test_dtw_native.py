"""The C kernel is built once, privately and whole; whatever stands in its way, DTW stays right, by numba."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client import doctor
from client.finding import Level
from shared_model import dtw, dtw_native
from shared_model.dtw import cross_dtw, dtw_backend, pairwise_dtw
from shared_model.dtw_native import NoKernelError, load_kernel
from shared_model.errors import HemoFedError

X = np.random.default_rng(0).normal(size=(6, 3, 20)).astype(np.float32)
EXPECTED = dtw_native.explicit_dtw(X, X, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of the user, and a process that has not chosen a backend yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(dtw.SETTING, raising=False)
    dtw._chosen_backend.cache_clear()
    yield tmp_path / "cache" / "hemofed"
    dtw._chosen_backend.cache_clear()


@pytest.fixture
def compiler() -> str:
    try:
        return dtw_native.find_compiler()[0]
    except NoKernelError as error:
        pytest.skip(str(error))


def libraries(cache: Path) -> list[Path]:
    """What lies in the cache folder: nothing but finished libraries."""
    found = sorted(cache.iterdir())
    assert all(path.suffix == ".so" for path in found)
    return found


def falls_back_because(reason: str) -> bool:
    """Numba takes over, says why, and is right."""
    with pytest.raises(NoKernelError, match=reason):
        load_kernel()
    np.testing.assert_allclose(pairwise_dtw(X, 0.2), EXPECTED, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cross_dtw(X, X, 0.2), EXPECTED, rtol=1e-5, atol=1e-6)
    return dtw_backend().startswith("numba: no C kernel: ")


def test_it_is_built_at_first_use_and_then_kept(cache: Path, compiler: str) -> None:
    assert dtw_backend().startswith("C: ")
    np.testing.assert_allclose(pairwise_dtw(X, 0.2), EXPECTED, rtol=1e-5, atol=1e-6)
    (library,) = libraries(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    built = library.stat()
    load_kernel()
    assert libraries(cache) == [library]
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (built.st_ino, built.st_mtime_ns)


def test_another_processor_compiler_or_source_gets_its_own_library(
    cache: Path, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernel()
    monkeypatch.setattr(dtw_native, "processor", lambda: "another one")
    load_kernel()
    monkeypatch.setattr(dtw_native, "find_compiler", lambda: (compiler, "cc 99"))
    load_kernel()
    monkeypatch.setattr(dtw_native, "FLAGS", (*dtw_native.FLAGS, "-g0"))
    load_kernel()
    source = tmp_path / "kernel.c"
    source.write_text(dtw_native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(dtw_native, "SOURCE", source)
    load_kernel()
    assert len(libraries(cache)) == 5


def test_processes_that_start_together_all_get_a_whole_library(cache: Path, compiler: str) -> None:
    command = [sys.executable, "-c", "from shared_model.dtw_native import load_kernel; load_kernel()"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert len(libraries(cache)) == 1


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF"])
def test_a_damaged_library_is_built_again(content: bytes, cache: Path, compiler: str) -> None:
    """In processes of their own, since one that has loaded a library keeps it."""
    load = [sys.executable, "-c", "from shared_model.dtw import dtw_backend; print(dtw_backend())"]
    subprocess.check_call(load)
    (library,) = libraries(cache)
    sound = library.read_bytes()
    library.write_bytes(content)
    assert subprocess.check_output(load, text=True).startswith("C: ")
    assert libraries(cache) == [library]
    assert len(library.read_bytes()) == len(sound)


def test_a_library_that_others_can_write_is_not_loaded_but_replaced(cache: Path, compiler: str) -> None:
    load_kernel()
    (library,) = libraries(cache)
    library.chmod(0o777)
    before = library.stat().st_ino
    load_kernel()
    assert library.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_ino != before


def test_a_folder_that_others_can_write_is_refused(cache: Path, compiler: str) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o770)
    assert falls_back_because("can be written by others")
    assert libraries(cache) == []


def test_a_folder_of_somebody_else_is_refused(cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert falls_back_because("belongs to somebody else")
    assert libraries(cache) == []


def test_a_folder_that_is_a_link_is_refused(cache: Path, compiler: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    assert falls_back_because("is a link")


def test_no_folder_can_be_made(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert falls_back_because("Not a directory")


def test_a_home_that_is_read_only(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir(mode=0o500)
    if os.access(tmp_path / "home", os.W_OK):
        pytest.skip("root may write anywhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert falls_back_because("Permission denied")


def test_a_cache_folder_that_is_not_absolute_is_passed_over(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    load_kernel()
    assert libraries(tmp_path / ".cache" / "hemofed")
    assert not (tmp_path / "relative").exists()


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert falls_back_because(r"no C compiler \(cc, gcc, clang\)")
    assert not cache.exists()


def test_a_compiler_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cc").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert falls_back_because("no C compiler")


def test_a_compile_error(cache: Path, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.c"
    source.write_text("int dtw_pairwise(void) { return absent; }\n")
    monkeypatch.setattr(dtw_native, "SOURCE", source)
    assert falls_back_because("failed: .*error.*absent")
    assert libraries(cache) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("sqrtf(", "("), ("i > band ? i - band : 0", "0"), ("% filled", "% LANES"), ("int dtw_cross", "int other_cross")],
)
def test_a_kernel_that_computes_something_else_is_not_used(
    right: str, wrong: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dtw_native.SOURCE.read_text()
    assert right in text
    source = tmp_path / "kernel.c"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(dtw_native, "SOURCE", source)
    assert falls_back_because("cannot load|gives wrong distances")


# --- the choice


def test_the_setting_chooses(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dtw.SETTING, "numba")
    assert dtw_backend() == "numba: HEMOFED_DTW asks for it"
    np.testing.assert_allclose(pairwise_dtw(X, 0.2), EXPECTED, rtol=1e-5, atol=1e-6)
    monkeypatch.setenv(dtw.SETTING, "c")
    assert dtw_backend().startswith("C: ")


def test_a_setting_that_cannot_be_met_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dtw.SETTING, "fortran")
    with pytest.raises(HemoFedError, match="HEMOFED_DTW is 'fortran': set it to c or numba"):
        pairwise_dtw(X)
    monkeypatch.setenv(dtw.SETTING, "c")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HemoFedError, match="asks for C, but there is no kernel: no C compiler"):
        cross_dtw(X, X)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
@pytest.mark.parametrize("backend", ["c", "numba"])
def test_no_openmp_runtime_is_brought_into_the_process(backend: str, compiler: str) -> None:
    """Two of them in one process make small torch operations many times slower."""
    program = (
        "import numpy as np; from shared_model.dtw import pairwise_dtw; pairwise_dtw(np.zeros((9, 2, 9), np.float32));"
        "print(open('/proc/self/maps').read())"
    )
    environment = {**os.environ, dtw.SETTING: backend}
    maps = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    loaded = {Path(line.split()[-1]).name for line in maps.splitlines() if ".so" in line}
    assert any("multiarray" in name for name in loaded)  # numpy's, which must be there
    assert not [name for name in loaded if re.match(r"lib[gi]?omp|omppool", name)]


# --- the doctor


@pytest.mark.parametrize(
    ("backend", "level"),
    [
        ("C: gcc 12, 16 lanes", Level.OK),
        ("numba: HEMOFED_DTW asks for it", Level.OK),
        ("numba: no C kernel: no C compiler (cc, gcc, clang)", Level.WARNING),
    ],
)
def test_the_doctor_says_what_computes(backend: str, level: Level) -> None:
    finding = doctor.dtw(lambda: backend)
    assert (finding.level, finding.found) == (level, backend)


@pytest.mark.parametrize("error", [HemoFedError("HEMOFED_DTW is 'x'"), ImportError("No module named 'numba'")])
def test_the_doctor_says_why_nothing_computes(error: Exception) -> None:
    def broken() -> str:
        raise error

    finding = doctor.dtw(broken)
    assert finding.level == Level.PROBLEM
    assert str(error) in finding.found
