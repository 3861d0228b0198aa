"""A folder of MATLAB files (v4 to v7), one ECG a file, as an array.

Such a file says neither rate nor unit nor which axis is time: the person declares them, nothing is guessed.
An optional labels.csv brings patients, age, sex, times and labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from client.records.files import files_below
from client.records.guarded_mat import safe_variables
from client.records.labels_csv import LABELS_FILE, LabelRow, LabelTable, read_labels
from client.records.options import ReaderOptions
from client.records.record import (
    Archive,
    EcgRecord,
    Item,
    Reading,
    Reason,
    TurnedAway,
    Unusable,
    known_age,
    known_sex,
    told,
)
from client.records.table_join import joined
from client.records.wfdb_folder import readable, rows_without_record
from client.records.wfdb_signal import LONGEST_READ_S
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, millivolt_per_unit

SUFFIX = ".mat"
NEEDED = ("--sampling-rate-hz", "--unit", "--variable", "--axis")
TAKES = frozenset({*NEEDED, "--leads"})


def recognises(source: Path) -> bool:
    """Whether there is a MATLAB file anywhere below that is not the signal file of a WFDB header."""
    return next(_files(source), None) is not None


def _files(source: Path) -> Iterator[Path]:
    paths = map(Path, files_below(source, SUFFIX))
    return (path for path in paths if not path.with_suffix(".hea").exists())


def open_archive(source: Path, options: ReaderOptions) -> Archive:
    """List the files.

    Raises:
        HemoFedError: rate, unit, variable or axis is not declared, or labels.csv is broken.
    """
    files = list(_files(source))
    undeclared = [name for name in NEEDED if name not in options.declared()]
    if undeclared and files:
        raise HemoFedError(
            f"{source}: a MATLAB file does not say its rate, unit, variable and axis; give {', '.join(undeclared)} "
            f"({files[0].name} holds {_contents(files[0])})",
            ExitCode.FORMAT_UNDECLARED,
        )
    return Archive(len(files), _readings(source, files, options, read_labels(source / LABELS_FILE)))


def _contents(path: Path) -> str:
    """The arrays of a file, for the person who must name one: "val 5000x12, ECG.data 12x5000"."""
    try:
        arrays = dict(_arrays("", _load(path)))
    except Unusable as unusable:
        return f"nothing that can be read: {unusable.detail}"
    return ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in arrays.items())[:200] or "no array"


def _arrays(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _arrays(f"{prefix}{name}.", value)
        elif isinstance(value, np.ndarray) and value.ndim == 2:
            yield f"{prefix}{name}", value


def _readings(source: Path, files: Sequence[Path], options: ReaderOptions, table: LabelTable) -> Iterator[Reading]:
    yield told(table.remarks)
    present = set()
    for path in files:
        name = readable(path.relative_to(source))
        record_id = name.removesuffix(SUFFIX)
        present.add(record_id)
        yield partial(_read_record, path, record_id, name, options, table.rows.get(record_id))
    yield told(rows_without_record(table, present, SUFFIX))


def _read_record(
    path: Path, record_id: str, source: str, options: ReaderOptions, row: LabelRow | None
) -> Iterator[Item]:
    try:
        array, beside = _find(_load(path), options.variable)
        signal_mv, lead_names = _signal(array, options)
    except Unusable as unusable:
        yield TurnedAway(source, unusable.reason, unusable.detail)
        return
    record = EcgRecord(
        record_id=record_id,
        source=source,
        signal_mv=signal_mv,
        lead_names=lead_names,
        sampling_rate_hz=float(options.sampling_rate_hz or 0),
        patient_id="",
        age_years=known_age(str(beside.get("age", ""))),
        sex=known_sex(str(beside.get("sex", ""))),
    )
    yield from joined(record, row, LABELS_FILE)


def _load(path: Path) -> dict[str, Any]:
    """All variables of a file; structs as dictionaries."""
    variables = safe_variables(path)
    try:
        loaded = scipy.io.loadmat(path, simplify_cells=True, variable_names=variables)
    except NotImplementedError:
        detail = "MATLAB 7.3, which is HDF5 inside; save it again with -v7"
        raise Unusable(Reason.UNREADABLE, detail) from None
    except (Exception, MemoryError) as error:  # damage makes scipy raise whatever its parsers raise
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise Unusable(Reason.UNREADABLE, f"not a whole MATLAB file ({said}); copy it again") from None
    return {name: value for name, value in loaded.items() if not name.startswith("__")}


def _find(values: Mapping[str, Any], variable: str) -> tuple[NDArray[Any], Mapping[str, Any]]:
    """The declared array and what stands beside it: in a struct, the fields `age` and `sex` of CPSC 2018."""
    *structs, name = variable.split(".")
    for struct in structs:
        inner = values.get(struct)
        values = inner if isinstance(inner, dict) else {}
    array = values.get(name)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        listed = ", ".join(f"{name}" for name, _ in _arrays("", values)) or "none"
        detail = f"no array of numbers {variable!r} in it (there: {listed[:80]}); mend --variable or leave the file out"
        raise Unusable(Reason.NOT_AS_DECLARED, detail)
    return array, values if structs else {}


def _signal(array: NDArray[Any], options: ReaderOptions) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """(lead, time) in mV as declared, the first 60 s."""
    lead_names = options.leads or LEADS
    if array.ndim == 1 and len(lead_names) == 1:
        array = array[None, :]
    elif options.axis == "time-lead":
        array = array.T
    if array.ndim != 2 or array.shape[0] != len(lead_names):
        shape = "x".join(map(str, array.shape if options.axis == "lead-time" else array.shape[::-1]))
        detail = (
            f"{options.variable} is {shape}, not {options.axis} with {len(lead_names)} leads; mend --axis or --leads"
        )
        raise Unusable(Reason.NOT_AS_DECLARED, detail)
    rate_hz, factor = options.sampling_rate_hz or 0.0, millivolt_per_unit(options.unit) or 0.0
    with np.errstate(over="ignore"):  # what float32 cannot hold is missing, too
        signal_mv = (array[:, : round(LONGEST_READ_S * rate_hz)] * factor).astype(np.float32)
    signal_mv[~np.isfinite(signal_mv)] = np.nan
    return signal_mv, lead_names
