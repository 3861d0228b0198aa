"""Records into the site store, with a reason for each record turned away."""

import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from client.ingest_summary import IngestSummary
from client.labels import import_events
from client.lock import hold_lock
from client.preparation import prepared_in_order, workers_for
from client.pseudonym import SplitShares, parse_shares, read_patient_key
from client.pseudonym import patient_key as settle_patient_key
from client.records import choose_format, open_archive
from client.records.labels_csv import LABELS_FILE, is_event_form
from client.records.options import ReaderOptions
from client.records.record import Remark
from client.schema import INDEX_FILE, check_key, connect, damaged
from client.site import SITE_FILE, Disclosure, SiteSettings, load_site, write_site
from client.store import Progress
from client.store_writer import StoreWriter, open_signals
from shared_model.errors import ExitCode, HemoFedError


def ingest(
    source: Path | str,
    site_dir: Path | str,
    *,
    name: str | None = None,
    format: str = "auto",
    options: ReaderOptions = ReaderOptions(),
    disclosure: Disclosure = "clear",
    patient_key: bytes | None = None,
    split: str | None = None,
    minimum_cell: int = 11,
    simulated: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Read a source folder into a site's store; what is there already is left as it is.

    `name`, `disclosure`, `minimum_cell` and `simulated` go into the site.toml of a new site folder; an existing
    one is kept.
    `patient_key` (32 bytes) fixes the pseudonyms and the split, for simulated hospitals; a real site leaves
    it out and gets a random key. `split` is train/validation/test in percent, 60/20/20 if it is not given; a
    store keeps the shares of its first ingest, or a patient's later records could change sides.
    `options` select rows of a table, or declare what the files do not say.
    `workers` processes read the records, by default all cores of a large archive; the store is the same however many.
    `progress(done, total)` is called after each reading.

    Raises:
        HemoFedError: the source or the site folder is unusable, the disk is full, or another ingest is at
            work in the folder. That nothing was stored is not raised: see `IngestSummary.usable`.
    """
    source, site_dir = Path(source).resolve(), Path(site_dir)
    try:
        format_name = choose_format(source, format)
        archive = open_archive(source, format_name, options)
    except OSError as error:
        raise HemoFedError(
            f"{error.filename or source}: {error.strerror}; make the folder readable for this user",
            ExitCode.BAD_SOURCE,
        ) from None
    try:
        site_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with hold_lock(site_dir):
            settings = _settle_site(site_dir, name, disclosure, minimum_cell, simulated)
            if (site_dir / INDEX_FILE).exists():
                read_patient_key(site_dir)  # with a new key every patient of the store would count as another
            key = settle_patient_key(site_dir, patient_key)
            with closing(connect(site_dir)) as connection, open_signals(site_dir, connection) as signals:
                check_key(connection, key, site_dir)
                key = replace(key, shares=_settle_shares(site_dir, connection, split))
                if is_event_form(source / LABELS_FILE):
                    import_events(connection, key, source / LABELS_FILE, empty_ok=True)
                writer = StoreWriter(connection, signals, key, source, format_name, options.selection())
                done, reading_with = 0, workers_for(archive.count, workers)
                for outcomes in prepared_in_order(archive.readings, reading_with, settings.quality):
                    writer.add(outcomes)
                    done += sum(not isinstance(outcome, Remark) for outcome in outcomes)
                    if progress is not None:
                        progress(done, archive.count)
                return writer.finish(site_dir)
    except sqlite3.Error as error:
        raise damaged(site_dir, error) from None
    except OSError as error:
        raise HemoFedError(
            f"{error.filename or site_dir}: {error.strerror}; what was stored before is intact: mend this "
            "and run the same command again",
            ExitCode.BAD_SITE,
        ) from None


def _settle_shares(site_dir: Path, connection: sqlite3.Connection, wanted: str | None) -> SplitShares:
    """The store's split shares, fixed at its first ingest; HemoFedError where others are asked for later."""
    asked = parse_shares(wanted) if wanted is not None else None
    row = connection.execute("SELECT value FROM meta WHERE key = 'split'").fetchone()
    if row is None:
        shares = asked or SplitShares()
        connection.execute("INSERT INTO meta VALUES ('split', ?)", (str(shares),))
        return shares
    kept = parse_shares(row[0])
    if asked is not None and asked != kept:
        raise HemoFedError(
            f"{site_dir}: this store is split {kept}, and a patient must not change sides; leave --split out, or use "
            "another --site-dir",
            ExitCode.BAD_SITE,
        )
    return kept


def _settle_site(
    site_dir: Path, name: str | None, disclosure: Disclosure, minimum_cell: int, simulated: bool
) -> SiteSettings:
    """The settings: written to site.toml at the first ingest, later read from there if the same site is meant."""
    if (site_dir / SITE_FILE).exists():
        settings = load_site(site_dir)
        if name is not None and name != settings.name:
            raise HemoFedError(
                f"{site_dir / SITE_FILE}: this site is called {settings.name!r}, not {name!r}; use its name "
                "or another --site-dir",
                ExitCode.BAD_SITE,
            )
        return settings
    folder_name = re.sub(r"[^\w .\-]", "-", site_dir.resolve().name)[:60] or "site"
    try:
        settings = SiteSettings(
            name=name or folder_name, disclosure=disclosure, minimum_cell=minimum_cell, simulated=simulated
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise HemoFedError(
            f"{fault['loc'][0]} {fault['input']!r}: {fault['msg']}; choose another", ExitCode.USAGE
        ) from None
    write_site(site_dir, settings)
    return settings
