"""`hemofed-client labels`: imports a table of measurements, joins it to the stored ECGs, and says what came of it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.label_join import JoinSettings, Side
from client.label_summary import (
    ELEVATED_MMHG,
    JoinCounts,
    LabelFigures,
    WindowFigures,
    join_counts,
    label_figures,
    own_wedges,
    window_figures,
)
from client.labels import ImportCounts, import_events, join, read_timeline, settings_of, settle, transaction
from client.lock import hold_lock
from client.plain_text import shown
from client.pseudonym import read_patient_key
from client.schema import INDEX_FILE, check_schema, connect, damaged
from client.store import Progress, open_store
from shared_model.errors import ExitCode, HemoFedError

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LabelReport:
    """What `hemofed-client labels` did and found. `labels` and `windows` are None where they were not asked for."""

    settings: JoinSettings
    imported: ImportCounts | None
    joined: JoinCounts
    labels: dict[str, LabelFigures] | None
    windows: list[WindowFigures] | None

    @property
    def hint(self) -> str:
        """One line where a table was imported and no ECG has a label of it; else empty."""
        if self.imported is None or self.joined.ecgs_labelled:
            return ""
        if self.joined.patients_without_ecg == self.joined.patients:
            return "no patient of the table has an ECG here: are the patient ids those of the ECGs?"
        return "no ECG lies within the window: see --summary for what another --window-hours or --side would find"


def label_site(
    site_dir: Path,
    table: Path | None = None,
    *,
    window_hours: float | None = None,
    side: Side | None = None,
    replace: bool = False,
    summary: bool = False,
    progress: Progress | None = None,
) -> LabelReport:
    """Import `table`, choose window and side, join; what is None stays as it is in the store.

    All of it is one transaction under the folder's lock; where there is nothing to change nothing is locked.

    Raises:
        HemoFedError: there is no site store, another ingest is at work there, an option or the table is unusable.
            Then the store is as it was.
    """
    if replace and table is None:
        raise HemoFedError("--replace: there is no table to take instead; name one", ExitCode.USAGE)
    _check_site(site_dir)
    imported = None
    with _one_line_errors(site_dir):
        if table is not None or window_hours is not None or side is not None:
            with hold_lock(site_dir), closing(connect(site_dir)) as connection, transaction(connection):
                kept = settings_of(connection)
                settings = JoinSettings(
                    kept.window_hours if window_hours is None else window_hours, kept.side if side is None else side
                )
                if settings != kept:
                    settle(connection, settings)
                if table is not None:
                    key = read_patient_key(site_dir)
                    imported = import_events(connection, key, table, replace=replace, progress=progress)
                join(connection)
        return _report(site_dir, imported, summary)


def _check_site(site_dir: Path) -> None:
    if not (site_dir / INDEX_FILE).is_file():
        raise HemoFedError(
            f"{site_dir}: no {INDEX_FILE} here; ingest ECGs first: hemofed-client ingest SOURCE --site-dir {site_dir}",
            ExitCode.BAD_SITE,
        )


@contextmanager
def _one_line_errors(site_dir: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise damaged(site_dir / INDEX_FILE, error) from None
    except OSError as error:
        raise HemoFedError(
            f"{error.filename or site_dir}: {error.strerror}; the store is as it was: mend this and run it again",
            ExitCode.BAD_SITE,
        ) from None


def _report(site_dir: Path, imported: ImportCounts | None, summary: bool) -> LabelReport:
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        check_schema(connection, site_dir / INDEX_FILE)
        settings, timeline = settings_of(connection), read_timeline(connection)
        joined = join_counts(connection, timeline, settings)
        if not summary:
            return LabelReport(settings, imported, joined, None, None)
        events = dict(connection.execute("SELECT name, count(*) FROM event_values GROUP BY name"))
        windows = list(window_figures(timeline, own_wedges(connection, timeline)))
    return LabelReport(settings, imported, joined, label_figures(open_store(site_dir).index, events), windows)


def print_report(report: LabelReport) -> None:
    """The report as tables."""
    console = Console()
    if report.imported is not None:
        console.print(_import_table(report.imported))
    console.print(_join_table(report.joined, report.settings))
    if report.labels:
        console.print(_label_table(report.labels))
        console.print(_distribution_table(report.labels))
    if report.windows is not None and any(figures.ecgs for figures in report.windows):
        console.print(_window_table(report.windows))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=shown(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _import_table(imported: ImportCounts) -> Table:
    table = _table(imported.source, "table", "count")
    table.add_row("rows", str(imported.rows))
    table.add_row("values read", str(imported.values_read))
    for reason, count in imported.dropped.items():
        table.add_row(f"dropped: {reason}", str(count))
    for column in imported.text_columns:
        table.add_row(f"text, so no label: {shown(column)}", "")
    table.add_section()
    table.add_row("events", str(imported.events))
    table.add_row("events new here", str(imported.events_new))
    if imported.events_differing:
        table.add_row(
            "events stored before with other values (--replace takes the new ones)", str(imported.events_differing)
        )
    if imported.events_of_forgotten:
        table.add_row("events of forgotten patients, not stored", str(imported.events_of_forgotten))
    return table


def _join_table(joined: JoinCounts, settings: JoinSettings) -> Table:
    side = "before it" if settings.side == "before" else "before or after it"
    table = _table(f"ECGs within {settings.window_hours:g} h of a measurement, {side}", "join", "count")
    table.add_row("events", str(joined.events))
    table.add_row("events that label an ECG", str(joined.events_joined))
    table.add_row("events whose ECG has another event", str(joined.events_passed_over))
    table.add_row("events without an ECG in the window", str(joined.events_outside_window))
    table.add_row("events of patients without any ECG", str(joined.events_without_patient))
    table.add_row("patients with events", str(joined.patients))
    table.add_row("patients with events without any ECG", str(joined.patients_without_ecg))
    table.add_section()
    table.add_row("ECGs labelled", str(joined.ecgs_labelled))
    if settings.side == "either":
        table.add_row("ECGs labelled that were recorded after their event", str(joined.ecgs_labelled_after_event))
    table.add_row("10 s ECGs labelled", str(joined.segments_labelled))
    table.add_row("patients labelled", str(joined.patients_labelled))
    return table


def _label_table(labels: dict[str, LabelFigures]) -> Table:
    columns = ("label", "events", "ECGs", "10 s ECGs", "patients")
    table = _table("labels of the store, by events and by the records themselves", *columns, *_limits())
    for name, figures in labels.items():
        counts = (figures.events, figures.ecgs, figures.segments, figures.patients)
        shares = _percentages(figures.share_above) if figures.share_above else [""] * len(ELEVATED_MMHG)
        table.add_row(shown(name), *map(str, counts), *shares)
    return table


def _distribution_table(labels: dict[str, LabelFigures]) -> Table:
    table = _table("their distribution over ECGs", "label", "min", "25%", "median", "75%", "max", "min to max")
    for name, figures in labels.items():
        spread = (figures.minimum, figures.lower_quartile, figures.median, figures.upper_quartile, figures.maximum)
        highest = max(figures.histogram)
        bars = "".join(BARS[-(-8 * count // highest)] for count in figures.histogram)
        table.add_row(shown(name), *(f"{value:.3g}" for value in spread), bars)
    return table


def _window_table(windows: list[WindowFigures]) -> Table:
    columns = ("window and side", "ECGs", "patients", "recorded after", *_limits())
    table = _table("ECGs with a wedge pressure (mmHg), for any window and side", *columns)
    for figures in windows:
        counts = (figures.ecgs, figures.patients, figures.ecgs_after_event)
        table.add_row(
            f"{figures.window_hours} h, {figures.side}", *map(str, counts), *_percentages(figures.share_above)
        )
    return table


def _limits() -> list[str]:
    return [f"> {limit}" for limit in ELEVATED_MMHG]


def _percentages(shares: dict[str, float]) -> list[str]:
    return [f"{shares[str(limit)]:.1%}" if shares else "-" for limit in ELEVATED_MMHG]
