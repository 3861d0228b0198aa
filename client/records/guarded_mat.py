"""MATLAB files (level 5: v5 to v7) looked through before scipy reads them.

scipy's reader trusts the types and dimensions of a file: one wrong byte there ends the whole process (segmentation
fault), not just the record. Layout: MathWorks "MAT-File Format", level 5.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scipy.io.matlab import MatReadError, matfile_version

from client.records.record import Reason, Unusable

LARGEST_BYTES = 512 * 2**20
LARGEST_UNPACKED_BYTES = 256 * 2**20  # all arrays of a file together: scipy loads them all
HEADER_BYTES, TAG_BYTES = 128, 8
LEVEL_5 = 1  # scipy's number for it
# Type of a data element -> bytes a value; 16 to 18 are UTF-8, UTF-16 and UTF-32.
INT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 5, 6, 14, 15
BYTES_A_VALUE = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}
TEXT_TYPES = frozenset({*BYTES_A_VALUE, 16, 17, 18})
CELL, STRUCT, CHAR, FIRST_NUMERIC, LAST_NUMERIC = 1, 2, 4, 6, 15
COMPLEX = 0x08
DEEPEST = 16
SMALL_LIMIT = 4


class _Damaged(Exception):
    """The bytes are not laid out as the format has it."""


class _Left(Exception):
    """A class that no ECG is stored in (sparse, object, function, string array): its variable is left out."""


@dataclass(frozen=True)
class _Element:
    kind: int
    data: memoryview
    after: int
    """Where the next element begins."""


def safe_variables(path: Path) -> list[str] | None:
    """The variables of a level-5 file that scipy can be trusted with; None for a file of another level.

    Raises:
        Unusable: the file cannot be read, is too large, or is damaged.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise Unusable(Reason.UNREADABLE, f"larger than {LARGEST_BYTES >> 20} MB; save one ECG a file")
        content = memoryview(path.read_bytes())
        level, _ = matfile_version(path)
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, f"cannot be read ({error.strerror}); check the file's permissions") from None
    except (ValueError, IndexError, MatReadError):
        return None
    if level != LEVEL_5:
        return None
    order = "<" if bytes(content[126:128]) == b"IM" else ">"
    try:
        return [name for name in _variables(content, order) if name is not None]
    except (_Damaged, struct.error, zlib.error) as error:
        detail = f"not a whole MATLAB file ({error or type(error).__name__}); copy it again"
        raise Unusable(Reason.UNREADABLE, detail) from None


def _variables(content: memoryview, order: str) -> Iterator[str | None]:
    at, total = HEADER_BYTES, 0
    while at < len(content):
        element = _element(content, at, order, padded=False)
        packed = element.kind == COMPRESSED
        matrix = _element(_unpacked(element.data, order, total), 0, order) if packed else element
        if matrix.kind != MATRIX:
            raise _Damaged(f"an element of type {matrix.kind}")
        total += len(matrix.data)
        _refuse_larger(total)
        try:
            yield _matrix(matrix.data, order, DEEPEST)
        except _Left:
            yield None
        at = element.after


def _unpacked(data: memoryview, order: str, total: int) -> memoryview:
    """A compressed element; its tag says how long it is before the rest is unpacked. `total`: bytes before it."""
    tag = zlib.decompressobj().decompress(data, TAG_BYTES)
    _, length = struct.unpack(f"{order}2I", tag)
    _refuse_larger(total + length)
    return memoryview(zlib.decompressobj().decompress(data, TAG_BYTES + length))


def _refuse_larger(unpacked: int) -> None:
    if unpacked > LARGEST_UNPACKED_BYTES:
        detail = f"arrays of {unpacked >> 20} MB, more than {LARGEST_UNPACKED_BYTES >> 20} MB; save one ECG a file"
        raise Unusable(Reason.UNREADABLE, detail)


def _element(data: memoryview, at: int, order: str, padded: bool = True) -> _Element:
    (word,) = struct.unpack_from(f"{order}I", data, at)
    kind, length, begin = word & 0xFFFF, word >> 16, at + 4
    small = length > 0
    if not small:
        kind, (length,), begin = word, struct.unpack_from(f"{order}I", data, at + 4), at + 8
    if begin + length > len(data) or (small and length > SMALL_LIMIT):
        raise _Damaged(f"{length} bytes where {len(data) - begin} are left")
    after = at + 8 if small else begin + length
    return _Element(kind, data[begin : begin + length], after + (-after % 8 if padded else 0))


def _matrix(data: memoryview, order: str, depth: int) -> str:
    """Look through a matrix; returns its name."""
    if not len(data):
        return ""
    if not depth:
        raise _Damaged("structs in structs without end")
    flags = _element(data, 0, order)
    if (flags.kind, len(flags.data)) != (UINT32, 8):
        raise _Damaged("array flags of another type")
    (word,) = struct.unpack_from(f"{order}I", flags.data)
    array_class, is_complex = word & 0xFF, bool(word >> 8 & COMPLEX)
    if array_class not in (CELL, STRUCT, CHAR) and not FIRST_NUMERIC <= array_class <= LAST_NUMERIC:
        raise _Left
    sizes = _element(data, flags.after, order)
    if sizes.kind != INT32 or len(sizes.data) % 4 or not 8 <= len(sizes.data) <= 128:
        raise _Damaged("dimensions of another type")
    dimensions = struct.unpack(f"{order}{len(sizes.data) // 4}i", sizes.data)
    name = _element(data, sizes.after, order)
    if min(dimensions) < 0 or name.kind != INT8:
        raise _Damaged("a negative dimension or a name of another type")
    count = math.prod(dimensions)
    if array_class in (CELL, STRUCT):
        _nested(data, name.after, order, depth, count, is_struct=array_class == STRUCT)
    else:
        _values(data, name.after, order, count, 1 + is_complex, is_text=array_class == CHAR)
    return bytes(name.data).decode("latin-1")


def _nested(data: memoryview, at: int, order: str, depth: int, count: int, is_struct: bool) -> None:
    if is_struct:
        length = _element(data, at, order)
        if (length.kind, len(length.data)) != (INT32, 4):
            raise _Damaged("a field name's length of another type")
        (name_bytes,) = struct.unpack(f"{order}i", length.data)
        names = _element(data, length.after, order)
        if names.kind != INT8 or name_bytes < 1 or len(names.data) % name_bytes:
            raise _Damaged("field names of another length")
        count, at = count * (len(names.data) // name_bytes), names.after
    if count > len(data):
        raise _Damaged(f"{count} fields")
    for _ in range(count):
        element = _element(data, at, order)
        if element.kind != MATRIX:
            raise _Damaged(f"a field of type {element.kind}")
        _matrix(element.data, order, depth - 1)
        at = element.after


def _values(data: memoryview, at: int, order: str, count: int, parts: int, is_text: bool) -> None:
    for _ in range(parts):
        element = _element(data, at, order)
        if element.kind not in (TEXT_TYPES if is_text else BYTES_A_VALUE):
            raise _Damaged(f"values of type {element.kind}")
        if is_text and count > len(element.data):
            raise _Damaged(f"{count} letters in {len(element.data)} bytes")
        if not is_text and count * BYTES_A_VALUE[element.kind] != len(element.data):
            raise _Damaged(f"{count} values in {len(element.data)} bytes")
        at = element.after
