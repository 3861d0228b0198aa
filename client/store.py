"""The site store: an SQLite index and one memory-mapped int16 signal file, opened for reading.

`signals.i16` is (row, 12, 2500) int16, 1 uV a step, leads in canonical order, MISSING where there is none.
Written by client/ingest.py only. Layout, provenance and what leaves: docs/site-store.md.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.schema import INDEX_FILE, check_schema, damaged
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, SAMPLES

SIGNAL_FILE = "signals.i16"
DERIVED_FOLDER = "derived"
ROW_SHAPE = (len(LEADS), SAMPLES)
ROW_BYTES = len(LEADS) * SAMPLES * 2
DERIVED_CHUNK = 256
LABEL_SIDE = "label_side"
"""In `meta`: `before` (also where it is not set) or `either`."""
SIMULTANEOUS_S = 60.0
"""An ECG that begins at most this long after a measurement is of the same moment: a minute around the wedge."""

Progress = Callable[[int, int], None]
Float = TypeVar("Float", np.float32, np.float64)
Code = TypeVar("Code", str, tuple[int, str])
Compute = Callable[[NDArray[np.int16]], NDArray[np.float32]]


@dataclass(frozen=True)
class RecordIndex:
    """One entry a stored 10 s ECG, in the order they were stored; all arrays have the same length n."""

    row: NDArray[np.int64]
    """0 to n - 1: what `Store.read` is asked for."""
    record: NDArray[np.int64]
    """Code of the source record; the segments of a longer record share it."""
    segment: NDArray[np.uint8]
    patient: NDArray[np.int64]
    """Code 0..P-1 into `patient_keys`."""
    patient_keys: tuple[str, ...]
    """Pseudonym of each patient code, hexadecimal."""
    split: NDArray[np.uint8]
    """0 train, 1 validation, 2 test; the same for all entries of a patient."""
    recorded_at: NDArray[np.float64]
    """Unix seconds, NaN unknown."""
    age_years: NDArray[np.float32]
    sex: NDArray[np.str_]
    """'female', 'male' or 'unknown'."""
    race: NDArray[np.str_]
    """As the source spells it, in lower case, or 'unknown'."""
    labels: dict[str, NDArray[np.float32]]
    """Each label column, NaN where absent."""
    measured_at: NDArray[np.float64]
    """Unix seconds of the measurement behind the labels, NaN unknown."""
    source_rate_hz: NDArray[np.float32]
    lead_mask: NDArray[np.uint16]
    """Bit i: LEADS[i] is present."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class StoreFolder:
    """One site's folder with its signals mapped: (places, 12, 2500) int16, read-only."""

    site_dir: Path
    signals: NDArray[np.int16]
    places: NDArray[np.int64]
    """Where in `signals` each stored ECG lies, ascending; a forgotten patient leaves a gap."""
    content_digest: str
    """Names the content: caches made from other rows are not used."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int16]:
        """(n, 12, 2500), copied."""
        return self.signals.take(self.places[rows], axis=0)


class Store:
    """What training and evaluation read. One site folder, or several pooled (simulation only)."""

    def __init__(self, folders: Sequence[StoreFolder], index: RecordIndex) -> None:
        self.index = index
        self._folders = tuple(folders)
        lengths = [len(folder.places) for folder in self._folders]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @property
    def site_dir(self) -> Path:
        """The site's folder (of a pooled store: the first site's)."""
        return self._folders[0].site_dir

    @property
    def rows_in_file(self) -> int:
        """Rows of the site's signal file that are in use or were (of a pooled store: the first site's)."""
        return len(self._folders[0].signals)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int16]:
        """The stored steps of `rows` in the order asked for, repeats allowed: (n, 12, 2500) int16.

        Raises IndexError for a row that is not there.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self._starts[-1]):
            raise IndexError(f"row outside 0..{self._starts[-1] - 1}")
        if len(self._folders) == 1:
            return self._folders[0].read(rows)
        steps = np.empty((len(rows), *ROW_SHAPE), np.int16)
        folder_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for number, folder in enumerate(self._folders):
            here = folder_of_row == number
            steps[here] = folder.read(rows[here] - self._starts[number])
        return steps

    def measurements(self, names: Sequence[str]) -> NDArray[np.float32]:
        """What the archives brought, by name of `client.records.record.MEASUREMENTS`: (n_records, len(names)) float32,
        NaN where an archive did not bring it."""
        return np.concatenate([_measurements(folder, names) for folder in self._folders])

    def derived(self, name: str, width: int, compute: Compute, progress: Progress | None = None) -> NDArray[np.float32]:
        """`compute` of every row, (n_records, width) float32, made at first use and then memory-mapped.

        Cached in `site_dir/derived/`, named by name, version, width and the store's content, so that a store
        that grew is computed again. `compute` takes (m, 12, 2500) int16 and returns (m, width) float32.
        The file appears only when it is whole. Of a pooled store each site's own cache is used and joined.
        """
        total, tables = int(self._starts[-1]), []
        for folder, start in zip(self._folders, self._starts.tolist(), strict=False):
            path = folder.site_dir / DERIVED_FOLDER / f"{name}-{width}-{folder.content_digest}.npy"
            if not path.exists():
                _write_derived(path, folder, width, compute, start, total, progress)
            tables.append(np.load(path, mmap_mode="r"))
        return tables[0] if len(tables) == 1 else np.concatenate(tables)


def _measurements(folder: StoreFolder, names: Sequence[str]) -> NDArray[np.float32]:
    wanted = ", ".join("?" * len(names))
    query = f"SELECT name, row, value FROM measurements WHERE name IN ({wanted}) AND row <= ?"
    table = np.full((len(folder.places), len(names)), np.nan, np.float32)
    if len(folder.places):
        with closing(sqlite3.connect(folder.site_dir / INDEX_FILE)) as connection:
            # An ingest that is running has rows that this store did not open.
            values = connection.execute(query, (*names, int(folder.places[-1])))
            known = _columns(values, folder.places, np.float32)
        for column, name in enumerate(names):
            table[:, column] = known.get(name, np.nan)
    return table


def _write_derived(
    path: Path,
    folder: StoreFolder,
    width: int,
    compute: Compute,
    done: int,
    total: int,
    progress: Progress | None,
) -> None:
    """Compute a cache file in chunks; it is renamed into place when it is whole."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    table = np.lib.format.open_memmap(partial, "w+", np.float32, (len(folder.places), width))
    try:
        for start in range(0, len(folder.places), DERIVED_CHUNK):
            chunk = folder.read(np.arange(start, min(start + DERIVED_CHUNK, len(folder.places))))
            table[start : start + len(chunk)] = compute(chunk)
            if progress is not None:
                progress(done + start + len(chunk), total)
        table.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    stem = path.name.rsplit("-", 1)[0]
    for stale in path.parent.glob(f"{stem}-*.npy"):
        if stale != path:
            stale.unlink(missing_ok=True)


def open_store(site_dir: Path | str) -> Store:
    """Open a site's store for reading.

    Raises:
        HemoFedError: there is no store, it is of another release, or its signal file is cut short.
    """
    site_dir = Path(site_dir)
    path = site_dir / INDEX_FILE
    if not path.is_file():
        raise HemoFedError(
            f"{site_dir}: no site store here; make one: hemofed-client ingest SOURCE --site-dir {site_dir}",
            ExitCode.BAD_SITE,
        )
    with closing(sqlite3.connect(path)) as connection:
        check_schema(connection, path)
        try:
            index, places, digest = _load_index(connection)
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from None
    signals = _map_signals(site_dir, int(places[-1]) + 1 if len(places) else 0)
    return Store([StoreFolder(site_dir, signals, places, digest)], index)


def record_ids(site_dir: Path | str) -> list[str]:
    """The source's name of each entry's record; it may spell a patient id and stays at the site."""
    with closing(sqlite3.connect(Path(site_dir) / INDEX_FILE)) as connection:
        return [name for (name,) in connection.execute("SELECT record_id FROM records ORDER BY row")]


def _map_signals(site_dir: Path, count: int) -> NDArray[np.int16]:
    path = site_dir / SIGNAL_FILE
    if count == 0:
        return np.empty((0, *ROW_SHAPE), np.int16)
    size = path.stat().st_size if path.exists() else 0
    if size < count * ROW_BYTES:  # longer is fine: an ingest was cut off, or is running
        raise HemoFedError(
            f"{path}: holds {size // ROW_BYTES} of {count} ECGs; restore it from a backup or ingest again "
            "into a new site folder",
            ExitCode.BAD_SITE,
        )
    return np.asarray(np.memmap(path, np.int16, "r", shape=(count, *ROW_SHAPE)))


def _load_index(connection: sqlite3.Connection) -> tuple[RecordIndex, NDArray[np.int64], str]:
    """The whole index, where its ECGs lie, and a digest of their content; read in one transaction, so that a
    running ingest does not split it."""
    connection.execute("BEGIN")
    columns = (
        "row, archive, record_id, segment, patient, split, recorded_at, age_years, sex, race, measured_at, "
        "source_rate_hz, lead_mask, content"
    )
    entries = connection.execute(f"SELECT {columns} FROM records ORDER BY row").fetchall()
    field = dict(zip(columns.split(", "), zip(*entries, strict=True), strict=True)) if entries else {}
    patient_keys, patient = _codes(field.get("patient", ()))
    _, record = _codes(tuple(zip(field.get("archive", ()), field.get("record_id", ()), strict=True)))
    digest = hashlib.sha256(b"".join(field.get("content", ()))).hexdigest()[:16]
    places = np.array(field.get("row", ()), np.int64)
    recorded_at = np.array(field.get("recorded_at", ()), np.float64)  # None becomes NaN
    own_measured_at = np.array(field.get("measured_at", ()), np.float64)
    labels, measured_at = label_columns(connection, places, recorded_at, own_measured_at)
    index = RecordIndex(
        row=np.arange(len(entries)),
        record=record,
        segment=np.array(field.get("segment", ()), np.uint8),
        patient=patient,
        patient_keys=patient_keys,
        split=np.array(field.get("split", ()), np.uint8),
        recorded_at=recorded_at,
        age_years=np.array(field.get("age_years", ()), np.float32),
        sex=np.array(field.get("sex", ()), np.str_),
        race=np.array(field.get("race", ()), np.str_),
        labels=labels,
        measured_at=measured_at,
        source_rate_hz=np.array(field.get("source_rate_hz", ()), np.float32),
        lead_mask=np.array(field.get("lead_mask", ()), np.uint16),
    )
    return index, places, digest


def _codes(values: Sequence[Code]) -> tuple[tuple[Code, ...], NDArray[np.int64]]:
    """Distinct values in order of first appearance, and each value's place among them."""
    code: dict[Code, int] = {}
    places = np.array([code.setdefault(value, len(code)) for value in values], np.int64)
    return tuple(code), places


def label_columns(
    connection: sqlite3.Connection,
    places: NDArray[np.int64],
    recorded_at: NDArray[np.float64],
    measured_at: NDArray[np.float64],
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float64]]:
    """Each label, and when it was measured: what the record brought itself (`measured_at`), else what its event says.

    `places` are the rows as the index numbers them, ascending.

    Guarantee: unless the site chose `either`, no ECG has a label that was measured more than SIMULTANEOUS_S before it.
    Where one of the two times is unknown this cannot be seen, and the label stays.
    """
    side = connection.execute("SELECT value FROM meta WHERE key = ?", (LABEL_SIDE,)).fetchone()
    late = recorded_at - measured_at > (np.inf if side == ("either",) else SIMULTANEOUS_S)
    own = _columns(connection.execute("SELECT name, row, value FROM labels"), places, np.float32)
    for values in own.values():
        values[late] = np.nan
    labelled = np.any([~np.isnan(values) for values in own.values()], axis=0) if own else np.full(len(places), False)
    measured_at = np.where(late, np.nan, measured_at)
    times_of_events = "SELECT '', row, measured_at FROM record_events JOIN events USING (event)"
    event_at = _columns(connection.execute(times_of_events), places, np.float64).get("", np.full(len(places), np.nan))
    from_event = ~np.isnan(event_at) & ~(labelled & ~np.isnan(measured_at))
    values_of_events = "SELECT name, row, value FROM record_events JOIN event_values USING (event)"
    labels = _columns(connection.execute(values_of_events), places, np.float32)
    for name, values in own.items():
        labels[name] = np.where(np.isnan(values), labels[name], values) if name in labels else values
    return dict(sorted(labels.items())), np.where(from_event, event_at, measured_at)


def _columns(
    entries: Iterable[tuple[str, int, float]], places: NDArray[np.int64], dtype: type[Float]
) -> dict[str, NDArray[Float]]:
    """Values by name, one for each of `places`, NaN where there is none; `entries` are name, row and value."""
    wide: dict[str, NDArray[Float]] = {}
    for name, row, value in entries:
        if name not in wide:
            wide[name] = np.full(int(places[-1]) + 1, np.nan, dtype)
        wide[name][row] = value
    return {name: values[places] for name, values in wide.items()}


def open_pooled(site_dirs: Sequence[Path | str]) -> Store:
    """Several sites as one store, rows renumbered in the order given; patients of two sites stay distinct.

    For the pooled baseline of a simulation only: no hospital's data are pooled in a real study.
    """
    stores = [open_store(site_dir) for site_dir in site_dirs]
    if not stores:
        raise HemoFedError("no site folders to pool; give one or more --site DIR", ExitCode.USAGE)
    folders = [folder for store in stores for folder in store._folders]
    return Store(folders, _join([store.index for store in stores]))


def _join(indexes: Sequence[RecordIndex]) -> RecordIndex:
    def joined(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(index, name) for index in indexes])

    def shifted(name: str, sizes: Sequence[int]) -> NDArray[np.int64]:
        starts = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([getattr(index, name) + start for index, start in zip(indexes, starts, strict=True)])

    names = sorted({name for index in indexes for name in index.labels})
    plain = (
        "segment",
        "split",
        "recorded_at",
        "age_years",
        "sex",
        "race",
        "measured_at",
        "source_rate_hz",
        "lead_mask",
    )
    columns: dict[str, NDArray[np.generic]] = {name: joined(name) for name in plain}
    labels = {
        name: np.concatenate([index.labels.get(name, np.full(len(index), np.nan, np.float32)) for index in indexes])
        for name in names
    }
    return RecordIndex(
        row=shifted("row", [len(index) for index in indexes]),
        record=shifted("record", [int(index.record.max(initial=-1)) + 1 for index in indexes]),
        patient=shifted("patient", [len(index.patient_keys) for index in indexes]),
        patient_keys=tuple(f"{site}:{key}" for site, index in enumerate(indexes) for key in index.patient_keys),
        labels=labels,
        **columns,  # type: ignore[arg-type]
    )
