"""ECGs to look at: some of the store, and some that were turned away, read again from their source."""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.card_labels import LabelTable
from client.pseudonym import read_patient_key
from client.records import READERS, open_archive
from client.records.options import ReaderOptions
from client.records.record import UNKNOWN, Archive, EcgRecord, Reading, TurnedAway
from client.spread import column
from client.store import ROW_SHAPE, SIGNAL_FILE
from shared_model.errors import HemoFedError
from shared_model.leads import SAMPLES, SAMPLING_RATE_HZ, arrange, resample, to_millivolt

MOST_READINGS = 64
# What would run over the neighbouring leads is brought back onto the paper, and the caption says so.
LARGEST_OFFSET_MV, LARGEST_DRAWN_MV = 2.0, 4.0


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One ECG of the gallery."""

    title: str
    """Row of the store, or the file of a record that was turned away."""
    caption: str
    signal_mv: NDArray[np.float32] | None
    """(12, 2500) in mV at 250 Hz, NaN missing; None where there is nothing to draw."""
    remark: str = ""
    """What was done to the drawing, or why there is none."""


@dataclass(frozen=True)
class Refused:
    """A record in the table of those turned away."""

    archive: str
    format: str
    selection: str
    source: str
    reason: str
    detail: str


def random_rows(connection: sqlite3.Connection, count: int, seed: int) -> list[int]:
    """Rows of the store drawn without replacement, ascending: the same for one store and seed."""
    rows = column(connection, "SELECT row FROM records ORDER BY row").astype(np.int64)
    return sorted(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False).tolist())


def worst_rows(connection: sqlite3.Connection, count: int) -> list[int]:
    """The rows of lowest quality, lowest first; those that were never assessed are left out."""
    asked = "SELECT row FROM records WHERE quality IS NOT NULL ORDER BY quality, row LIMIT ?"
    return [row for (row,) in connection.execute(asked, (count,))]


def stored_ecgs(
    site_dir: Path, connection: sqlite3.Connection, table: LabelTable, rows: Sequence[int], show_ids: bool = False
) -> list[Exhibit]:
    """The ECGs of these rows. Their records' names, which may spell a patient id, only with `show_ids`."""
    exhibits = []
    for row in rows:
        steps = np.memmap(site_dir / SIGNAL_FILE, np.int16, "r", offset=row * 2 * math.prod(ROW_SHAPE), shape=ROW_SHAPE)
        signal_mv, present = to_millivolt(np.asarray(steps))
        signal_mv[~present] = np.nan
        asked = (
            "SELECT record_id, source, sex, age_years, recorded_at, source_rate_hz, device, quality FROM records "
            "WHERE row = ?"
        )
        record_id, source, *known = connection.execute(asked, (row,)).fetchone()
        title = f"Row {row}" + (f": {record_id} ({source})" if show_ids else "")
        drawn_mv, remark = on_paper(signal_mv)
        exhibits.append(Exhibit(title, in_words(table.at(row), *known), drawn_mv, remark))
    return exhibits


def in_words(
    labels: Mapping[str, float],
    sex: str,
    age_years: float | None,
    recorded_at: float | None,
    rate_hz: float,
    device: str,
    quality: float | None,
) -> str:
    """What is known of an ECG, in a line."""
    said = [
        "" if sex == UNKNOWN else sex,
        "" if age_years is None else f"{age_years:.0f} years",
        "" if recorded_at is None else datetime.fromtimestamp(recorded_at, UTC).strftime("%Y"),
        f"from {rate_hz:g} Hz",
        "" if device == UNKNOWN else device,
        "quality not assessed" if quality is None else f"quality {quality:.2f}",
        *(f"{name} {value:g}" for name, value in labels.items()),
    ]
    return ", ".join(part for part in said if part)


def refused_records(connection: sqlite3.Connection, count: int, seed: int) -> list[Refused]:
    """Records that were turned away: in turn one of each reason, the most frequent reason first, drawn at random."""
    random = np.random.default_rng(seed)
    by_reason: list[list[Refused]] = []
    reasons = connection.execute("SELECT reason FROM turned_away GROUP BY 1 ORDER BY count(*) DESC, 1").fetchall()
    for (reason,) in reasons:
        keys = connection.execute(
            "SELECT archive, source FROM turned_away WHERE reason = ? ORDER BY archive, source", (reason,)
        ).fetchall()
        chosen = random.choice(len(keys), min(count, len(keys)), replace=False)
        by_reason.append([refused_record(connection, *keys[place]) for place in chosen.tolist()])
    in_turn = chain.from_iterable(zip_longest(*by_reason))
    return list(islice((each for each in in_turn if each is not None), count))


def refused_record(connection: sqlite3.Connection, archive: int, source: str) -> Refused:
    """One row of the table of those turned away, with the ingest that it came from."""
    asked = (
        "SELECT archives.source, format, selection, turned_away.source, reason, detail FROM turned_away "
        "JOIN archives USING (archive) JOIN ingests USING (ingest) "
        "WHERE turned_away.archive = ? AND turned_away.source = ?"
    )
    return Refused(*connection.execute(asked, (archive, source)).fetchone())


def refused_ecgs(site_dir: Path, connection: sqlite3.Connection, refused: Sequence[Refused]) -> list[Exhibit]:
    """The records as their source has them now; what cannot be read has no signal, and a remark that says why.

    Guarantee: no ECG of a patient who was forgotten is drawn, also where the record was turned away before its
    patient was known; so HemoFedError is raised where the patient key is gone and somebody was forgotten.
    """
    found: dict[Refused, EcgRecord | str] = {}
    for opened in dict.fromkeys((each.archive, each.format, each.selection) for each in refused):
        wanted = {each.source: each for each in refused if (each.archive, each.format, each.selection) == opened}
        found |= {wanted[source]: what for source, what in read_again(*opened, wanted=list(wanted)).items()}
    forgotten = {patient for (patient,) in connection.execute("SELECT patient FROM forgotten")}
    key = read_patient_key(site_dir) if forgotten else None
    for each, record in found.items():
        if key is not None and isinstance(record, EcgRecord) and key.pseudonym(record.patient_id) in forgotten:
            found[each] = "its patient was forgotten"
    return [exhibit_of(each, found[each]) for each in refused]


def exhibit_of(refused: Refused, found: EcgRecord | str) -> Exhibit:
    """A record that was turned away, with its signal where it has one."""
    caption = f"{refused.reason}: {refused.detail}"
    title = f"{refused.source}, in {refused.archive}"
    if isinstance(found, str):
        return Exhibit(title, caption, None, found)
    if not found.signal_mv.shape[-1]:
        return Exhibit(title, caption, None, "it has no samples")
    signal_mv = resample(arrange(found.signal_mv, found.lead_names), found.sampling_rate_hz, SAMPLING_RATE_HZ)
    whole_s = signal_mv.shape[1] / SAMPLING_RATE_HZ
    drawn_mv, remark = on_paper(padded(signal_mv))
    length = f"the first 10 of {whole_s:.1f} s" if signal_mv.shape[1] > SAMPLES else f"{whole_s:.1f} s"
    return Exhibit(title, caption, drawn_mv, "; ".join(part for part in (length, remark) if part))


def read_again(archive: str, format_name: str, selection: str, wanted: Sequence[str]) -> Mapping[str, EcgRecord | str]:
    """Each wanted source's record as its archive has it now, or why there is none."""
    if not Path(archive).is_dir():
        return dict.fromkeys(wanted, "the source folder is not there any more, so there is nothing to draw")
    if format_name not in READERS:
        return dict.fromkeys(wanted, f"this release has no reader for {format_name}")
    try:
        options = ReaderOptions.from_selection(json.loads(selection))
        items = found_in(open_archive(Path(archive), format_name, options), wanted)
    except (HemoFedError, OSError, ValueError) as error:
        return dict.fromkeys(wanted, f"its source cannot be opened again: {error}")
    found: dict[str, EcgRecord | str] = dict.fromkeys(wanted, "it was not found again in its source")
    for source, item in items.items():
        found[source] = item if isinstance(item, EcgRecord) else f"it cannot be drawn ({item.reason})"
    return found


def found_in(archive: Archive, wanted: Sequence[str]) -> dict[str, EcgRecord | TurnedAway]:
    """The items of the wanted sources. Only readings that name one in their arguments are done, so that a few
    records of a large archive are found without reading all of it; at most MOST_READINGS."""
    names = set(chain.from_iterable(names_of(source) for source in wanted))
    found: dict[str, EcgRecord | TurnedAway] = {}
    fitting = (reading for reading in archive.readings if not names.isdisjoint(texts_in(reading)))
    for reading in islice(fitting, MOST_READINGS):
        for item in reading():
            if isinstance(item, EcgRecord | TurnedAway) and item.source in wanted:
                found[item.source] = item
        if len(found) == len(set(wanted)):
            break
    return found


def names_of(source: str) -> tuple[str, ...]:
    """How a reading may call a source: as it is, without extension, or by the id in `TABLE: COLUMN ID`."""
    return source, source.rpartition(".")[0] or source, source.rpartition(" ")[2]


def texts_in(reading: Reading) -> Iterator[str]:
    """The texts among a reading's arguments, also those in lists and tuples."""
    waiting: list[object] = [*reading.args, *reading.keywords.values()] if isinstance(reading, partial) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, TurnedAway):
            yield value.source
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def padded(signal_mv: NDArray[np.float32]) -> NDArray[np.float32]:
    """(12, time) cut or filled with NaN to 10 s."""
    cut = signal_mv[:, :SAMPLES]
    return np.pad(cut, ((0, 0), (0, SAMPLES - cut.shape[1])), constant_values=np.nan)


def on_paper(signal_mv: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """The signal so that each lead keeps to its place, and what was done for that ("" if nothing was)."""
    known = ~np.isnan(signal_mv).all(axis=1)
    offset_mv = np.zeros((len(signal_mv), 1), np.float32)
    offset_mv[known] = np.nanmedian(signal_mv[known], axis=1, keepdims=True)
    offset_mv[np.abs(offset_mv) <= LARGEST_OFFSET_MV] = 0
    centred = signal_mv - offset_mv
    drawn = np.clip(centred, -LARGEST_DRAWN_MV, LARGEST_DRAWN_MV)
    moved, cut = np.abs(offset_mv).max(), np.nanmax(np.abs(centred[known]), initial=0.0)
    said = [f"offsets of up to {moved:.3g} mV removed for the drawing"] if moved else []
    said += [f"peaks of {cut:.3g} mV cut off at {LARGEST_DRAWN_MV:g} mV"] if cut > LARGEST_DRAWN_MV else []
    return drawn, "; ".join(said)
