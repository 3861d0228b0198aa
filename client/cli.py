"""hemofed-client: the command line inside a hospital."""

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.forget import forget as forget_patient
from client.ingest import ingest as ingest_folder
from client.ingest_summary import IngestSummary
from client.label_command import label_site, print_report
from client.lock import hold_lock
from client.pseudonym import SPLIT_NAMES
from client.records import READERS
from client.records.options import ReaderOptions
from client.schema import INDEX_FILE, SCHEMA_VERSION, connect
from client.site import Disclosure, load_site
from client.store import RecordIndex, open_store
from shared_model.errors import ExitCode, HemoFedError
from shared_model.terminal import progress_bar, run_cli

NAME = "hemofed-client"
app = typer.Typer(
    name=NAME, help="HemoFed inside a hospital: ECGs in, a site store out.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _group() -> None:
    """HemoFed inside a hospital: ECGs in, a site store out."""


@app.command()
def ingest(
    source: Annotated[Path, typer.Argument(help="Folder with the records; with labels.csv where there are labels.")],
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's own folder; made if it is absent.")],
    format: Annotated[str, typer.Option(help=f"auto, or one of: {', '.join(READERS)}.")] = "auto",
    where: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=VALUE: only such rows of the archive's table. Again for one column: alternatives."),
    ] = None,
    sampling_rate_hz: Annotated[float | None, typer.Option(help="Rate of MATLAB arrays.")] = None,
    unit: Annotated[str, typer.Option(help="Unit of MATLAB arrays, or of CODE-15 other than mV: mV, uV or V.")] = "",
    variable: Annotated[str, typer.Option(help="The array in a MATLAB file; in a struct STRUCT.FIELD.")] = "",
    axis: Annotated[str, typer.Option(help="Of MATLAB arrays: lead-time (a row a lead) or time-lead.")] = "",
    leads: Annotated[
        str,
        typer.Option(help="Leads of MATLAB arrays in their order, with commas; else I,II,III,aVR,aVL,aVF,V1 to V6."),
    ] = "",
    name: Annotated[str | None, typer.Option(help="Name of a new site; else its folder's name.")] = None,
    disclosure: Annotated[
        str, typer.Option(help="How a new site lets counts leave: clear, masked or noised.")
    ] = "clear",
    minimum_cell: Annotated[
        int,
        typer.Option(min=1, help="Of a new site: fewer patients than this are not shown."),
    ] = 11,
    split: Annotated[
        str | None, typer.Option(help="Train/validation/test patients of a new store, percent; else 60/20/20.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read records; else all cores for a large archive.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no table.")] = False,
) -> None:
    """Read the ECG records in the folder SOURCE into the site store. Run it again to add what is new."""
    if disclosure not in get_args(Disclosure):
        raise HemoFedError(f"--disclosure {disclosure}: use one of {', '.join(get_args(Disclosure))}", ExitCode.USAGE)
    options = ReaderOptions(
        where=tuple(where or ()),
        sampling_rate_hz=sampling_rate_hz,
        unit=unit,
        variable=variable,
        axis=axis,
        leads=tuple(name for name in leads.split(",") if name),
    )
    with progress_bar("ingest", quiet) as progress:
        summary = ingest_folder(
            source,
            site_dir,
            name=name,
            format=format,
            options=options,
            split=split,
            minimum_cell=minimum_cell,
            workers=workers,
            disclosure=disclosure,  # type: ignore[arg-type]  # checked above
            progress=progress,
        )
    if as_json:
        print(json.dumps(asdict(summary)))
    elif not quiet:
        _print_summary(summary, site_dir)
    for line in (*summary.examples, *summary.remarks):
        typer.echo(f"{NAME}: {line}", err=True)
    if not summary.usable:
        raise HemoFedError(f"{source}: none of {summary.read} records could be stored", ExitCode.NOTHING_STORED)


def _print_summary(summary: IngestSummary, site_dir: Path) -> None:
    table = Table(title=f"{escape(summary.source)} ({summary.format}) -> {escape(str(site_dir))}", title_justify="left")
    table.add_column("records")
    table.add_column("count", justify="right")
    table.add_row("read", str(summary.read))
    table.add_row("stored", str(summary.stored))
    if summary.already_stored:
        table.add_row("stored before", str(summary.already_stored))
    table.add_row("10 s ECGs stored", str(summary.segments))
    for reason, count in summary.turned_away.items():
        table.add_row(f"turned away: {reason}", str(count))
    for noticed, count in summary.noticed.items():
        table.add_row(f"noticed: {noticed}", str(count))
    table.add_section()
    table.add_row("patients in the store", str(summary.patients))
    for split, count in summary.splits.items():
        table.add_row(f"patients for {split}", str(count))
    for rate, count in summary.source_rates_hz.items():
        table.add_row(f"10 s ECGs recorded at {rate} Hz", str(count))
    for label, count in summary.labels.items():
        table.add_row(f"10 s ECGs with {escape(label)}", str(count))
    Console().print(table)


@app.command()
def check(
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the site store holds. For the hospital's own eyes: small counts are not suppressed here."""
    settings = load_site(site_dir)
    index = open_store(site_dir).index
    card = {
        "site": settings.name,
        "disclosure": settings.disclosure,
        **data_card(index),
        **_kept_out(site_dir),
    }
    if as_json:
        print(json.dumps(card))
        return
    table = Table(title=f"{settings.name} (disclosure: {settings.disclosure})", title_justify="left")
    for column in ("what", "value", "count"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for what, value in card.items():
        if isinstance(value, dict):
            table.add_section()
            for key, count in value.items():
                table.add_row(what.replace("_", " "), escape(str(key)), str(count))
        elif isinstance(value, int):
            table.add_row(what.replace("_", " "), "", str(value))
    Console().print(table)
    if not len(index):
        raise HemoFedError(f"{site_dir}: the store is empty; ingest records first", ExitCode.NO_USABLE_PATIENTS)


def data_card(index: RecordIndex) -> dict[str, int | dict[str, int]]:
    """Counts of a store: 10 s ECGs and patients, in all, per split, sex, race and source rate; labels."""

    def patients_by(values: list[str]) -> dict[str, int]:
        pairs = sorted(set(zip(values, index.patient.tolist(), strict=True)))
        return {value: sum(pair[0] == value for pair in pairs) for value in dict.fromkeys(pair[0] for pair in pairs)}

    return {
        "ecgs": len(index),
        "records": len(np.unique(index.record)),
        "patients": len(index.patient_keys),
        "patients_by_split": patients_by([SPLIT_NAMES[split] for split in index.split]),
        "patients_by_sex": patients_by(index.sex.tolist()),
        "patients_by_race": patients_by(index.race.tolist()),
        "ecgs_by_source_rate_hz": {
            f"{rate:g}": int((index.source_rate_hz == rate).sum()) for rate in np.unique(index.source_rate_hz)
        },
        "ecgs_labelled": {name: int((~np.isnan(values)).sum()) for name, values in index.labels.items()},
    }


def _kept_out(site_dir: Path) -> dict[str, dict[str, int]]:
    """Records turned away and remarks by reason, over all ingests."""
    with closing(sqlite3.connect(site_dir / INDEX_FILE)) as connection:
        return {
            "turned_away": dict(connection.execute("SELECT reason, count(*) FROM turned_away GROUP BY 1")),
            "noticed": dict(connection.execute("SELECT noticed, count(*) FROM remarks GROUP BY 1")),
        }


@app.command()
def forget(
    patient_id: Annotated[str, typer.Argument(help="The patient's id as the source writes it.")],
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
    also_unknown: Annotated[
        bool, typer.Option("--also-unknown", help="Keep later records out even if none is stored now.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Remove a patient from the store for good, and say which runs had used their ECGs."""
    outcome = forget_patient(site_dir, patient_id, also_unknown)
    if as_json:
        print(json.dumps({**asdict(outcome), "uses": [use.model_dump() for use in outcome.uses]}))
        return
    typer.echo(
        f"removed {outcome.ecgs} ECGs of {outcome.records} records and {outcome.events} measurements; later records "
        "of this patient will be turned away"
    )
    for use in outcome.uses:
        typer.echo(f"used before: run {use.run_id} ({use.study}), {use.task} on {use.split} from {use.first_at}")
    for folder in outcome.local_weights:
        typer.echo(f"weights learned with them are kept in {site_dir / folder}: delete it if they must go too")


@app.command()
def migrate(site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]) -> None:
    """Bring a store of an older release to this one's schema; a store that is up to date is left as it is."""
    load_site(site_dir)
    if not (site_dir / INDEX_FILE).is_file():
        raise HemoFedError(f"{site_dir}: no site store here; nothing to migrate", ExitCode.BAD_SITE)
    with hold_lock(site_dir), closing(connect(site_dir)):
        typer.echo(f"{site_dir}: schema {SCHEMA_VERSION}")


@app.command()
def labels(
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder, with its ECGs ingested.")],
    table: Annotated[
        Path | None,
        typer.Argument(
            help="Measurements by patient and time (csv, csv.gz), or MIMIC-IV's chartevents; else none new."
        ),
    ] = None,
    window_hours: Annotated[
        float | None, typer.Option(help="How far an ECG may lie from its measurement: 1 to 168; at first 24.")
    ] = None,
    side: Annotated[
        str | None, typer.Option(help="before: only ECGs recorded at or before it; either: later ones too.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="First remove what a table of this name brought before.")
    ] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Distributions, prevalence, and what other windows would find.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no tables.")] = False,
) -> None:
    """Label the stored ECGs by measurements of their patients, each by the nearest one in time."""
    with progress_bar("labels (MB)", quiet) as progress:
        report = label_site(
            site_dir,
            table,
            window_hours=window_hours,
            side=side,  # type: ignore[arg-type]  # checked by JoinSettings
            replace=replace,
            summary=summary,
            progress=progress,
        )
    if as_json:
        print(json.dumps(asdict(report)))
    elif not quiet:
        print_report(report)
    if report.hint:
        typer.echo(f"{NAME}: {report.hint}", err=True)


def main() -> None:
    """The console script `hemofed-client`."""
    run_cli(app, NAME)


if __name__ == "__main__":
    main()
