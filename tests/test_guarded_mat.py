"""MATLAB files are looked through before scipy reads them: a damaged one ends in a reason, not in a dead process."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from client.records import guarded_mat
from client.records.guarded_mat import safe_variables
from client.records.matlab_array import _load
from client.records.record import Unusable

# Each byte of a small file set to what is a type, a class, a size or a flag elsewhere; in a process of its own.
EVERY_BYTE = """
import sys, warnings
from pathlib import Path
from client.records.matlab_array import _load
from client.records.record import Unusable
warnings.simplefilter("ignore")
path, read = Path(sys.argv[1]), 0
content = path.read_bytes()
for place in range(len(content)):
    for value in (0, 1, 5, 8, 15, 17, 20, 128, 255):
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1:])
        try:
            _load(path)
            read += 1
        except Unusable:
            pass
print(read)
"""


def small_file(path: Path, **options: object) -> None:
    ecg = {"sex": "Male", "age": 52, "data": np.arange(8.0).reshape(2, 4)}
    scipy.io.savemat(path, {"ECG": ecg, "mixed": np.array([1, "a"], object), "i": np.ones((1, 2)) * 1j}, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_no_byte_of_a_file_ends_the_process(tmp_path: Path, packed: bool) -> None:
    small_file(tmp_path / "r.mat", do_compression=packed)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_BYTE, str(tmp_path / "r.mat")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 100  # most bytes are samples or text


ARRAYS = st.one_of(
    st.integers(0, 5).map(lambda rows: np.arange(3.0 * rows).reshape(rows, 3)),
    st.sampled_from([np.int8, np.uint16, np.int32, np.float32, np.complex128, np.bool_]).map(
        lambda t: np.ones((2, 3), t)
    ),
    st.sampled_from(["", "text", "M\u00fcller", 52, 1.5, np.array([1, "a"], object)]),
)
NAMES = st.text("abcdefg", min_size=1, max_size=12)
STRUCTS = st.recursive(ARRAYS, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=6)


@settings(max_examples=80, deadline=None)
@given(values=st.dictionaries(NAMES, STRUCTS, min_size=1, max_size=4), packed=st.booleans())
def test_every_whole_file_is_let_through(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("mat") / "r.mat"
    scipy.io.savemat(path, values, do_compression=packed)
    assert safe_variables(path) == list(values)
    assert set(_load(path)) == set(values)


def test_a_variable_of_another_class_is_left_out(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "r.mat", {"sparse": scipy.sparse.eye(3), "val": np.ones((2, 3))})
    assert list(_load(tmp_path / "r.mat")) == ["val"]


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy.io.savemat(tmp_path / "r.mat", {"val": np.zeros((1000, 1000))}, do_compression=True)
    assert list(_load(tmp_path / "r.mat")) == ["val"]
    monkeypatch.setattr(guarded_mat, "LARGEST_UNPACKED_BYTES", 2**20)
    with pytest.raises(Unusable, match="arrays of 7 MB, more than 1 MB; save one ECG a file"):
        _load(tmp_path / "r.mat")


@pytest.mark.parametrize("packed", [True, False])
def test_all_arrays_of_a_file_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    values = {f"a{number}": np.zeros((1000, 100)) for number in range(4)}
    scipy.io.savemat(tmp_path / "r.mat", values, do_compression=packed)
    monkeypatch.setattr(guarded_mat, "LARGEST_UNPACKED_BYTES", 4 * 2**20)
    assert set(_load(tmp_path / "r.mat")) == set(values)
    monkeypatch.setattr(guarded_mat, "LARGEST_UNPACKED_BYTES", 3 * 2**20)
    with pytest.raises(Unusable, match="more than 3 MB; save one ECG a file"):
        _load(tmp_path / "r.mat")


def test_structs_in_structs_without_end_are_refused(tmp_path: Path) -> None:
    inner: object = 1.0
    for _ in range(40):
        inner = {"a": inner}
    scipy.io.savemat(tmp_path / "r.mat", {"val": inner})
    with pytest.raises(Unusable, match="without end"):
        _load(tmp_path / "r.mat")


def test_other_levels_are_left_to_scipy(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "v4.mat", {"val": np.ones((2, 3))}, format="4")
    assert safe_variables(tmp_path / "v4.mat") is None
    (tmp_path / "none.mat").write_bytes(b"")
    assert safe_variables(tmp_path / "none.mat") is None
    (tmp_path / "packed.mat").write_bytes(zlib.compress(b"0" * 500))
    with pytest.raises(Unusable):
        _load(tmp_path / "packed.mat")
