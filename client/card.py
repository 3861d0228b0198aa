"""The data card: what a site store holds, in figures. For the hospital's own eyes; nothing here is suppressed.

Every figure is one statement over the index, or one pass over a column of it, so that a store of 800,000 ECGs takes
seconds and tens of megabytes. A record is what the source calls one; a recording longer than 10 s is several ECGs.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from client.card_labels import LabelCard, LabelTable, WithheldGroup, label_cards, read_label_table, withheld_by_target
from client.pseudonym import SPLIT_NAMES
from client.records.record import Reason
from client.schema import INDEX_FILE, check_schema, damaged
from client.site import SiteSettings, load_site
from client.spread import Histogram, Spread, column, histogram_of, spread_of
from client.store import ROW_BYTES, SIGNAL_FILE
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from shared_model.subgroups import AGE_BANDS, UNKNOWN, age_bands

AGE_BIN_YEARS, HEART_RATE_BIN_BPM, QUALITY_BIN = 5.0, 10.0, 0.1
# Records of one patient: the lowest count of each bin.
RECORDS_OF_A_PATIENT = (1, 2, 3, 4, 5, 6, 11, 21, 51)


@dataclass(frozen=True)
class Duplicates:
    """Records turned away because their signal is stored already."""

    records: int
    groups: int
    """Stored records that have such twins."""


@dataclass(frozen=True)
class Events:
    """Measurements of the heart with their own times."""

    events: int
    patients: int
    values: dict[str, int]
    """Name -> events that have it."""
    joined_ecgs: int
    """10 s ECGs that have the labels of an event."""


@dataclass(frozen=True)
class Ingest:
    """One run of `hemofed-client ingest`; `finished_at` is None where it was cut off or is at work."""

    source: str
    format: str
    selection: str
    started_at: str
    finished_at: str | None


@dataclass(frozen=True)
class DataCard:
    """What is in a store. `ecgs` are 10 s ECGs; patients are counted under each value they have."""

    site: str
    simulated: bool
    disclosure: str
    minimum_cell: int
    ecgs: int
    records: int
    patients: int
    patients_by_split: dict[str, int]
    patients_by_sex: dict[str, int]
    patients_by_race: dict[str, int]
    patients_by_age: dict[str, int]
    """Band of subgroups.py -> patients, at their first stored ECG."""
    age_years: Spread | None
    ages: Histogram | None
    records_per_patient: Spread | None
    patients_by_records: dict[str, int]
    """Records of a patient, in bins -> patients."""
    records_by_year: dict[str, int]
    ecgs_by_source_rate_hz: dict[str, int]
    ecgs_by_device: dict[str, int]
    ecgs_without_lead: dict[str, int]
    """Lead -> 10 s ECGs in which it is masked."""
    ecgs_labelled: dict[str, int]
    labels: dict[str, LabelCard]
    ecgs_measured: dict[str, int]
    """Measurement of the cart -> 10 s ECGs that have it."""
    heart_rate_bpm: Spread | None
    heart_rates: Histogram | None
    quality: Spread | None
    qualities: Histogram | None
    quality_not_assessed: int
    withheld: dict[str, dict[str, WithheldGroup]]
    """Target -> groups of the test split that evaluation would not show."""
    turned_away: dict[str, int]
    noticed: dict[str, int]
    duplicates: Duplicates
    ingests: tuple[Ingest, ...]
    events: Events
    forgotten_patients: int


@contextmanager
def open_index(site_dir: Path) -> Iterator[sqlite3.Connection]:
    """The index of a store, in one transaction, so that a running ingest does not split what is read.

    Raises:
        HemoFedError: there is no store, it is of another release or damaged, or its signal file is cut short.
    """
    path = site_dir / INDEX_FILE
    if not path.is_file():
        raise HemoFedError(
            f"{site_dir}: no site store here; make one: hemofed-client ingest SOURCE --site-dir {site_dir}",
            ExitCode.BAD_SITE,
        )
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        check_schema(connection, path)
        try:
            connection.execute("BEGIN")
            refuse_short_signals(site_dir, connection)
            yield connection
        except sqlite3.DatabaseError as error:
            raise damaged(path, error) from None


def refuse_short_signals(site_dir: Path, connection: sqlite3.Connection) -> None:
    """Raises HemoFedError if the signal file is shorter than the index says; longer is fine (an ingest at work)."""
    path = site_dir / SIGNAL_FILE
    needed = connection.execute("SELECT ifnull(max(row) + 1, 0) FROM records").fetchone()[0]
    there = path.stat().st_size // ROW_BYTES if path.exists() else 0
    if there < needed:
        raise HemoFedError(
            f"{path}: holds {there} of {needed} ECGs; restore it from a backup or ingest again into a new site folder",
            ExitCode.BAD_SITE,
        )


def data_card(site_dir: Path) -> DataCard:
    """The card of a site folder. Raises HemoFedError as `load_site` and `open_index` do."""
    settings = load_site(site_dir)
    with open_index(site_dir) as connection:
        return card_of(connection, settings, read_label_table(connection))


def card_of(connection: sqlite3.Connection, settings: SiteSettings, table: LabelTable) -> DataCard:
    """The card of an open index; `table` holds its labels."""
    ages = column(connection, "SELECT age_years FROM (SELECT age_years, min(row) FROM records GROUP BY patient)")
    labels = label_cards(table)
    heart_rates = column(connection, "SELECT value FROM measurements WHERE name = 'heart_rate_bpm'")
    qualities = column(connection, "SELECT quality FROM records WHERE quality IS NOT NULL")
    per_patient = column(connection, "SELECT count(*) FROM records WHERE segment = 0 GROUP BY patient")
    ecgs = one(connection, "SELECT count(*) FROM records")
    return DataCard(
        site=settings.name,
        simulated=settings.simulated,
        disclosure=settings.disclosure,
        minimum_cell=settings.minimum_cell,
        ecgs=ecgs,
        records=one(connection, "SELECT count(*) FROM records WHERE segment = 0"),
        patients=len(ages),
        patients_by_split={SPLIT_NAMES[split]: n for split, n in patients_by(connection, "split").items()},
        patients_by_sex=patients_by(connection, "sex"),
        patients_by_race=patients_by(connection, "race"),
        patients_by_age=in_bands(ages),
        age_years=spread_of(ages),
        ages=histogram_of(ages, AGE_BIN_YEARS),
        records_per_patient=spread_of(per_patient),
        patients_by_records=in_bins(per_patient),
        records_by_year=records_by_year(connection),
        ecgs_by_source_rate_hz={f"{rate:g}": n for rate, n in sorted(ecgs_by(connection, "source_rate_hz").items())},
        ecgs_by_device=ecgs_by(connection, "device"),
        ecgs_without_lead=without_lead(ecgs_by(connection, "lead_mask")),
        ecgs_labelled={name: label.ecgs for name, label in labels.items()},
        labels=labels,
        ecgs_measured=counts(connection, "SELECT name, count(*) FROM measurements GROUP BY name"),
        heart_rate_bpm=spread_of(heart_rates),
        heart_rates=histogram_of(heart_rates, HEART_RATE_BIN_BPM),
        quality=spread_of(qualities),
        qualities=histogram_of(qualities, QUALITY_BIN),
        quality_not_assessed=ecgs - len(qualities),
        withheld=withheld_by_target(connection, table, settings.minimum_cell),
        turned_away=counts(connection, "SELECT reason, count(*) FROM turned_away GROUP BY 1 ORDER BY 2 DESC, 1"),
        noticed=counts(connection, "SELECT noticed, count(*) FROM remarks GROUP BY 1 ORDER BY 2 DESC, 1"),
        duplicates=duplicates(connection),
        ingests=ingests(connection),
        events=events(connection),
        forgotten_patients=one(connection, "SELECT count(*) FROM forgotten"),
    )


def one(connection: sqlite3.Connection, sql: str, *values: object) -> int:
    """The single number of a statement."""
    return int(connection.execute(sql, values).fetchone()[0])


def counts(connection: sqlite3.Connection, sql: str) -> dict[Any, int]:
    """The rows of a statement, value and count, in its order."""
    return dict(connection.execute(sql).fetchall())


def ecgs_by(connection: sqlite3.Connection, name: str) -> dict[Any, int]:
    """10 s ECGs by the values of a column, most first."""
    return counts(connection, f"SELECT {name}, count(*) FROM records GROUP BY 1 ORDER BY 2 DESC, 1")


def patients_by(connection: sqlite3.Connection, name: str) -> dict[Any, int]:
    """Patients by the values of a column, in its order."""
    return counts(
        connection, f"SELECT {name}, count(*) FROM (SELECT DISTINCT {name}, patient FROM records) GROUP BY 1 ORDER BY 1"
    )


def records_by_year(connection: sqlite3.Connection) -> dict[str, int]:
    """Records by the year they were made in, or 'unknown', which comes last."""
    year = "ifnull(strftime('%Y', recorded_at, 'unixepoch'), 'unknown')"
    return counts(connection, f"SELECT {year}, count(*) FROM records WHERE segment = 0 GROUP BY 1 ORDER BY 1")


def in_bands(ages: ArrayLike) -> dict[str, int]:
    """Patients of each age band that occurs, youngest first, 'unknown' last."""
    bands = age_bands(ages).tolist()
    return {band: bands.count(band) for band in (*AGE_BANDS, UNKNOWN) if band in bands}


def in_bins(per_patient: NDArray[np.float64]) -> dict[str, int]:
    """Patients by how many records they have; empty bins at the end are left out."""
    edges = (*RECORDS_OF_A_PATIENT, np.inf)
    found = np.histogram(per_patient, edges)[0].tolist()
    while found and not found[-1]:
        found.pop()
    lasts = [first - 1 for first in RECORDS_OF_A_PATIENT[1:]]
    names = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(RECORDS_OF_A_PATIENT, lasts, strict=False)]
    names.append(f"{RECORDS_OF_A_PATIENT[-1]} or more")
    return dict(zip(names, found, strict=False))


def without_lead(by_mask: Mapping[int, int]) -> dict[str, int]:
    """ECGs in which a lead is masked; leads that are always there are left out."""
    missing = {lead: sum(n for mask, n in by_mask.items() if not mask >> bit & 1) for bit, lead in enumerate(LEADS)}
    return {lead: n for lead, n in missing.items() if n}


def duplicates(connection: sqlite3.Connection) -> Duplicates:
    """A duplicate's detail names its stored twin, so that the twins of one record share it."""
    found = "FROM turned_away WHERE reason = ?"
    return Duplicates(
        records=one(connection, f"SELECT count(*) {found}", Reason.DUPLICATE),
        groups=one(connection, f"SELECT count(DISTINCT archive || detail) {found}", Reason.DUPLICATE),
    )


def ingests(connection: sqlite3.Connection) -> tuple[Ingest, ...]:
    """All ingests, oldest first."""
    rows = connection.execute(
        "SELECT source, format, selection, started_at, finished_at FROM ingests JOIN archives USING (archive) "
        "ORDER BY ingest"
    )
    return tuple(Ingest(*row) for row in rows)


def events(connection: sqlite3.Connection) -> Events:
    """The events of the store, counted."""
    return Events(
        events=one(connection, "SELECT count(*) FROM events"),
        patients=one(connection, "SELECT count(DISTINCT patient) FROM events"),
        values=counts(connection, "SELECT name, count(*) FROM event_values GROUP BY name"),
        joined_ecgs=one(connection, "SELECT count(*) FROM record_events"),
    )
