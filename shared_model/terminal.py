"""What every hemofed command line shares: one line for a mistake, exit codes, progress bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shared_model.errors import ExitCode, HemoFedError

GO_ON = "run the same command again to go on"


def run_cli(app: typer.Typer, name: str, go_on: str = GO_ON) -> NoReturn:
    """Run a command line and end the process.

    A person's mistake is one line on stderr, `name: what, where, what to do`, and the exit code of
    shared_model/errors.py; Ctrl-C ends with 130 and says `go_on`. A fault of the program keeps its traceback.
    """
    try:
        code = app(prog_name=name, standalone_mode=False)
    except HemoFedError as error:
        _end(name, error.message, error.exit_code)
    except click.ClickException as error:
        if not error.format_message():  # called without arguments: the help was printed
            sys.exit(error.exit_code)
        _end(name, f"{error.format_message().rstrip('.')}; see {name} --help", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end(name, f"interrupted; {go_on}", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        _end(name, "the reader of the output went away", ExitCode.UNEXPECTED)
    if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into an exit code of its own
        _end(name, f"interrupted; {go_on}", ExitCode.INTERRUPTED)
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)


def _end(name: str, message: str, code: int) -> NoReturn:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(int(code))


@contextmanager
def progress_bar(description: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with count and time left; yields `progress(done, total)`. Quiet: nothing is drawn."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)
    task = bars.add_task(description, total=None)

    def show(done: int, total: int) -> None:
        bars.start()  # only now: a mistake found before any work shows no bar
        bars.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()
