"""hemofed-sim: run a federation on this machine, on hospitals that are simulated or on site folders of your own."""

import json
import math
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.bank import FEWEST_ECGS
from client.site import load_site
from server.report.files import RESULTS_FILE
from shared_model.errors import ExitCode, HemoFedError
from shared_model.objectives.catalogue import METHODS, Method
from shared_model.objectives.settings import ObjectiveSettings, settings_of
from shared_model.terminal import run_cli
from simulation.audit import Asked as AskedAudit
from simulation.audit import refuse, run_audit
from simulation.audit_canaries import What
from simulation.audit_output import FIGURE_FILE as AUDIT_FIGURE
from simulation.audit_output import JSON_FILE as AUDIT_JSON
from simulation.audit_output import print_table as print_audit
from simulation.bank import bank_of, make_bank, write_bank
from simulation.comparison import Asked
from simulation.comparison import compare as comparison_of
from simulation.comparison_output import JSON_FILE, MARKDOWN_FILE
from simulation.comparison_output import print_table as print_comparison
from simulation.experiment import Experiment, run_experiment
from simulation.plan import load_comparison, load_plan, load_tradeoff
from simulation.table import print_table
from simulation.tradeoff import AskedTradeoff
from simulation.tradeoff import tradeoff as tradeoff_of
from simulation.tradeoff_output import JSON_FILE as TRADEOFF_JSON
from simulation.tradeoff_output import MARKDOWN_FILE as TRADEOFF_MARKDOWN

NAME = "hemofed-sim"
CORES = len(os.sched_getaffinity(0))
app = typer.Typer(
    name=NAME, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__
)


@app.callback()
def _group() -> None:
    """Run a federation on this machine."""


@app.command()
def run(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study, and its simulated hospitals.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json, report.html, model/ and metrics.jsonl.")],
    site: Annotated[
        list[Path] | None, typer.Option("--site", help="A site folder of your own; may be repeated.")
    ] = None,
    engine: Annotated[str, typer.Option(help="in-process, or ray (Flower's simulation engine).")] = "in-process",
    workers: Annotated[int, typer.Option(min=1, help="Clients that train at the same time.")] = CORES,
    baselines: Annotated[bool, typer.Option(help="Also train every hospital alone, and on all data pooled.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study that OUT holds.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="Weights to begin with, where the study names their start_sha256.")
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option("--bank", help="The bank that a private study names; it is put into every site folder."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Run a study: pretrain, fine-tune, evaluate, report."""
    study, plan = load_plan(study_file)
    if engine not in ("in-process", "ray"):
        raise HemoFedError(f"--engine {engine}: use in-process or ray", ExitCode.USAGE)
    if (out / RESULTS_FILE).exists() and not resume:
        raise HemoFedError(
            f"{out}: holds results already; add --resume to complete them, or give another --out",
            ExitCode.USAGE,
        )
    make_folder(out)
    console = Console(stderr=True, quiet=quiet)
    experiment = Experiment(study, None if site else plan, out, engine, workers, baselines, resume, start, bank)
    results = run_experiment(experiment, own_sites(site or []), console)
    if as_json:
        print((out / RESULTS_FILE).read_text(encoding="utf-8"))
    else:
        print_table(results, Console())
        Console(soft_wrap=True).print(f"report: {out / 'report.html'}   figures: {out / RESULTS_FILE}", highlight=False)


@app.command()
def compare(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="A study with a [comparison] table.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for comparison.md, .csv, .json, .svg and all jobs.")],
    site: Annotated[
        list[Path] | None, typer.Option("--site", help="A site folder of your own; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Jobs at the same time.")] = CORES,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes after which no further job is begun; the most telling come first."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison that OUT holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Compare methods: local, federated and pooled, at several shares of labels, under several seeds."""
    study, plan, comparison = load_comparison(study_file)
    own = own_sites(site or [])
    if (out / "identity.json").exists() and not resume:
        raise HemoFedError(
            f"{out}: holds a comparison already; add --resume to go on, or give another --out", ExitCode.USAGE
        )
    make_folder(out)
    asked = Asked(study, None if own else plan, comparison, out, workers, budget)
    table = comparison_of(asked, own, Console(stderr=True, quiet=quiet))
    if as_json:
        print((out / JSON_FILE).read_text(encoding="utf-8"))
    else:
        print_comparison(table, Console())
        Console(soft_wrap=True).print(f"tables: {out / MARKDOWN_FILE}   figures: {out / JSON_FILE}", highlight=False)


@app.command()
def tradeoff(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="A study with [privacy] and [tradeoff].")],
    out: Annotated[Path, typer.Option("--out", help="Folder for tradeoff.md, .json, .svg and all cells.")],
    workers: Annotated[int, typer.Option(min=1, help="Cells at the same time.")] = CORES,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trade-off that OUT holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print tradeoff.json instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """What privacy costs in accuracy, on simulated hospitals: epsilon by start and by what is trained."""
    study, plan, settings = load_tradeoff(study_file)
    if (out / "identity.json").exists() and not resume:
        raise HemoFedError(
            f"{out}: holds a trade-off already; add --resume to go on, or give another --out", ExitCode.USAGE
        )
    make_folder(out)
    tradeoff_of(AskedTradeoff(study, plan, settings, out, workers), Console(stderr=True, quiet=quiet))
    print((out / (TRADEOFF_JSON if as_json else TRADEOFF_MARKDOWN)).read_text(encoding="utf-8"))


@app.command()
def audit(
    out: Annotated[Path, typer.Option("--out", help="Folder for audit.json, canaries.csv and audit.svg.")],
    what: Annotated[str, typer.Option(help="What is attacked: finetune, or pretrain (SSL-DML).")] = "finetune",
    canaries: Annotated[int, typer.Option(min=20, max=20_000, help="Fake patients; a coin puts each in or not.")] = 800,
    steps: Annotated[int, typer.Option(min=1, help="Training steps with noise, and of their control.")] = 20,
    plain_steps: Annotated[int, typer.Option(min=1, help="Training steps without privacy.")] = 240,
    epsilon: Annotated[str, typer.Option(help="Claims that are put to the test, at delta 1e-5.")] = "8,1",
    shadows: Annotated[
        int, typer.Option(min=0, max=256, help="Models that the attacker trains for each arm; even.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Attack our own training in staging: a lower bound on epsilon beside what is claimed."""
    if (out / AUDIT_JSON).exists():
        raise HemoFedError(f"{out}: holds an audit already; give another --out", ExitCode.USAGE)
    asked = AskedAudit(what_of(what), out, canaries, steps, plain_steps, epsilons_of(epsilon), even(shadows))
    make_folder(out)
    found = run_audit(asked, Console(stderr=True, quiet=quiet))
    if as_json:
        print((out / AUDIT_JSON).read_text(encoding="utf-8"))
    else:
        print_audit(found, Console())
        Console(soft_wrap=True).print(f"figures: {out / AUDIT_JSON}, {out / AUDIT_FIGURE}", highlight=False)
    refuse(found)


def what_of(text: str) -> What:
    """`--what` of an audit."""
    if text == "finetune":
        return "finetune"
    if text == "pretrain":
        return "pretrain"
    raise HemoFedError(f"--what {text}: use finetune or pretrain", ExitCode.USAGE)


def epsilons_of(text: str) -> tuple[float, ...]:
    """`8,1` -> (8.0, 1.0): positive numbers."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise HemoFedError(f"--epsilon {text}: give positive numbers with commas, such as 8,1", ExitCode.USAGE)
    return values


def even(shadows: int) -> int:
    """`--shadows`: every canary is in half of them."""
    if shadows % 2:
        raise HemoFedError(f"--shadows {shadows}: give an even number", ExitCode.USAGE)
    return shadows


@app.command(name="bank")
def make_a_bank(
    out: Annotated[Path, typer.Option("--out", help="The bank's file, *.safetensors.")],
    ecgs: Annotated[int, typer.Option(min=FEWEST_ECGS, max=65_535, help="Public ECGs, one a patient.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Draws the patients.")] = 1,
    site: Annotated[
        Path | None, typer.Option(help="A site folder of public ECGs to take them from, in place of simulated ones.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Put their labels in, for supervised metric learning.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the bank of public ECGs that private pretraining compares with."""
    sha256 = write_bank(bank_of(site, ecgs, seed, labels) if site else make_bank(ecgs, seed, labels=labels), out)
    if as_json:
        print(json.dumps({"file": str(out), "sha256": sha256}))
        return
    typer.echo(f"bank: {out}\nName it in the study, and put the file into banks/ of every site folder:")
    typer.echo(f'[privacy]\nbank_sha256 = "{sha256}"')


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False) -> None:
    """List the objectives that a study may name."""
    if as_json:
        print(json.dumps([row_of(method) for method in METHODS.values()], indent=1))
        return
    for method in METHODS.values():
        typer.echo(f"{method.name}\n    {method.citation}\n    departs: {method.departures}")


def row_of(method: Method) -> dict[str, object]:
    """A row of the catalogue as plain values; `settings` are those it looks at, with what it starts from."""
    usual = {name: field.default for name, field in ObjectiveSettings.model_fields.items()} | dict(method.defaults)
    row: dict[str, object] = {key: value for key, value in vars(method).items() if key not in ("defaults", "published")}
    settings = {key: usual[key] for key in sorted(settings_of(method))}
    return row | {"settings": settings, "published": dict(method.published)}


def make_folder(out: Path) -> None:
    """Make the folder for the outcome, or say why it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HemoFedError(
            f"--out {out}: {error.strerror}; give a folder that can be written", ExitCode.USAGE
        ) from None


def own_sites(folders: list[Path]) -> dict[str, Path]:
    """Site folders by the name in their site.toml.

    Raises:
        HemoFedError: a folder is no site, or two have one name.
    """
    sites: dict[str, Path] = {}
    for folder in folders:
        name = load_site(folder).name
        if name in sites:
            raise HemoFedError(
                f"{sites[name]} and {folder}: both are called {name!r}; rename one in its site.toml",
                ExitCode.BAD_SITE,
            )
        sites[name] = folder
    return sites


def main() -> None:
    """Entry point."""
    run_cli(app, NAME, "run the same command again with --resume to go on")


if __name__ == "__main__":
    main()
