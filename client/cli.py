"""hemofed-client: the command line inside a hospital."""

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.forget import forget as forget_patient
from client.ingest import ingest as ingest_folder
from client.ingest_summary import IngestSummary
from client.label_command import label_site, print_report
from client.lock import hold_lock
from client.plain_text import printable, shown
from client.records import READERS
from client.records.options import ReaderOptions
from client.schema import INDEX_FILE, SCHEMA_VERSION, connect
from client.site import Disclosure, load_site
from shared_model.errors import ExitCode, HemoFedError
from shared_model.terminal import progress_bar, run_cli

NAME = "hemofed-client"
app = typer.Typer(
    name=NAME,
    help="HemoFed inside a hospital: ECGs in, a site store out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a traceback that is sent to somebody must not hold a patient id
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
        typer.echo(f"{NAME}: {printable(line)}", err=True)
    if not summary.usable:
        raise HemoFedError(f"{source}: none of {summary.read} records could be stored", ExitCode.NOTHING_STORED)


def _print_summary(summary: IngestSummary, site_dir: Path) -> None:
    table = Table(title=f"{shown(summary.source)} ({summary.format}) -> {escape(str(site_dir))}", title_justify="left")
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
        table.add_row(f"10 s ECGs with {shown(label)}", str(count))
    Console().print(table)


@app.command()
def check(
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with distributions and ECGs here.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the random ECGs of the page.")] = 1,
    show_ids: Annotated[
        bool, typer.Option("--show-ids", help="On the page, the source's name of each stored record.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no table.")] = False,
) -> None:
    """Show what the site store holds. For the hospital's own eyes: small counts are not suppressed here."""
    from client.card import data_card
    from client.card_screen import card_screen

    if html is None:
        card = data_card(site_dir)
    else:
        from client.card_page import write_card_page  # brings matplotlib, which takes a second

        with progress_bar("draw", quiet) as progress:
            card = write_card_page(site_dir, html, seed, show_ids, progress)
    if as_json:
        print(json.dumps(asdict(card)))
    elif not quiet:
        console = Console()
        console.print(f"[bold]{escape(card.site)}[/bold] (disclosure: {card.disclosure}); stays in the hospital")
        console.print(card_screen(card))
    if not card.ecgs:
        raise HemoFedError(f"{site_dir}: the store is empty; ingest records first", ExitCode.NO_USABLE_PATIENTS)


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
    from client.ledger_file import rounds_of_runs  # brings torch, which the other commands do without

    outcome = forget_patient(site_dir, patient_id, also_unknown)
    rounds = rounds_of_runs(site_dir, {use.run_id for use in outcome.uses})
    if as_json:
        uses = [use.model_dump() for use in outcome.uses]
        print(json.dumps({**asdict(outcome), "uses": uses, "ledger_entries": rounds}))
        return
    typer.echo(
        f"removed {outcome.ecgs} ECGs of {outcome.records} records and {outcome.events} measurements; later records "
        "of this patient will be turned away"
    )
    for use in outcome.uses:
        typer.echo(f"used before: run {use.run_id} ({use.study}), {use.task} on {use.split} from {use.first_at}")
    if rounds:
        listed = ", ".join(map(str, rounds))
        typer.echo(f"private rounds that these runs paid for: ledger entries {listed}; their cost stays spent")
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


@app.command()
def doctor(
    site_dir: Annotated[Path | None, typer.Option("--site-dir", help="Look at this site's folder too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and problems.")] = False,
) -> None:
    """Look at the machine and the site folder: what is well, what is not, and what to do. Uses no network."""
    from client.doctor import examine, findings_table, worst
    from client.finding import Level

    findings = examine(site_dir)
    if as_json:
        print(json.dumps({"worst": worst(findings), "findings": [asdict(finding) for finding in findings]}))
    else:
        Console().print(findings_table([each for each in findings if not quiet or each.level != Level.OK]))
    if worst(findings) == Level.PROBLEM:
        problems = [finding for finding in findings if finding.level == Level.PROBLEM]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise HemoFedError(f"{problems[0].check}: {problems[0].found}; {problems[0].remedy}{more}", ExitCode.UNFIT)


@app.command()
def budget(
    site_dir: Annotated[Path, typer.Option("--site-dir", help="The site's folder, with its policy.toml.")],
    plan: Annotated[Path | None, typer.Option("--plan", help="A study.toml: what would it cost here?")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="With --plan: the noise with which it costs at most this much.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the privacy budget: caps, shares of studies, rounds left; or what a study's plan would cost."""
    from client.budget import budget_of, plan_cost, study_of  # brings the accountant, which takes two seconds
    from client.budget_screen import budget_screen, plan_screen

    if epsilon is not None and (plan is None or not 0 < epsilon < float("inf")):
        raise HemoFedError("--epsilon: give a number above 0, and --plan STUDY.toml with it", ExitCode.USAGE)
    if plan is None:
        shown_budget = budget_of(site_dir)
        figures, screen = asdict(shown_budget), budget_screen(shown_budget)
    else:
        cost = plan_cost(site_dir, study_of(plan), epsilon)
        figures, screen = asdict(cost), plan_screen(cost)
    if as_json:
        print(json.dumps(figures))
    else:
        Console().print(screen)


def main() -> None:
    """The console script `hemofed-client`."""
    run_cli(app, NAME)


if __name__ == "__main__":
    main()
