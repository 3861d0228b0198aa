"""hemofed-server: the command line at the coordinating centre."""

import json
from pathlib import Path
from typing import Annotated

import typer

from server.report.card import write_card
from server.report.files import load_metrics, load_results
from server.report.page import write_page
from shared_model.errors import ExitCode, HemoFedError
from shared_model.terminal import run_cli

NAME = "hemofed-server"
app = typer.Typer(
    name=NAME, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__
)


@app.callback()
def _group() -> None:
    """Work at the coordinating centre."""


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", file_okay=False, help="A study's folder, with results.json and metrics.jsonl."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as one JSON object.")] = False,
) -> None:
    """Write report.html and the model card again from the figures in DIR. Example ECGs are left out."""
    results, metrics = load_results(folder), load_metrics(folder)
    try:
        card_json, card = write_card(results, folder / "model")
        page = write_page(results, metrics, (), folder)
    except OSError as error:
        raise HemoFedError(
            f"{folder}: cannot write here ({error.strerror}); free space, or copy the folder to a place of your own",
            ExitCode.USAGE,
        ) from None
    if as_json:
        print(json.dumps({"report": str(page), "card": str(card), "card_json": str(card_json)}))
    else:
        typer.echo(f"report: {page}   card: {card}")


def main() -> None:
    """The console script `hemofed-server`."""
    run_cli(app, NAME)


if __name__ == "__main__":
    main()
