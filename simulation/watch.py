"""Progress of a running study on the terminal: rounds, and how far each site is, read from what they write."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from client.tasks import PROGRESS_FILE as SITE_PROGRESS
from server.logbook import NOTICES_FILE
from server.logbook import PROGRESS_FILE as STUDY_PROGRESS
from shared_model.study import Study

INTERVAL_S = 0.5


def bars(console: Console) -> Progress:
    """Bars with time left, that vanish when they are done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def watched(study: Study, out: Path, site_dirs: Mapping[str, Path], console: Console) -> Iterator[None]:
    """While the block runs, show the study's rounds and each site's steps; notices appear as they are written."""
    done = threading.Event()
    with bars(console) as progress:
        watcher = Watching(study, out, site_dirs, progress)
        thread = threading.Thread(target=watcher.follow, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            watcher.look()


class Watching:
    """The bars of one study."""

    def __init__(self, study: Study, out: Path, site_dirs: Mapping[str, Path], progress: Progress) -> None:
        self.study, self.out, self.progress = study, out, progress
        self.site_dirs = site_dirs
        self.rounds = progress.add_task("rounds", total=sum(phase.rounds for phase in study.phases.values()))
        self.sites: dict[str, TaskID] = {}
        notices = out / NOTICES_FILE
        self.notices_read = notices.stat().st_size if notices.exists() else 0

    def follow(self, done: threading.Event) -> None:
        """Look twice a second until told to stop."""
        while not done.wait(INTERVAL_S):
            self.look()

    def look(self) -> None:
        """Read the files once and move the bars."""
        study = read_json(self.out / STUDY_PROGRESS)
        if study:
            rounds = {name: phase.rounds for name, phase in self.study.phases.items()}
            total, names = sum(rounds.values()), list(rounds)
            finished = None
            if study["phase"] in names:
                finished = sum(rounds[name] for name in names[: names.index(study["phase"])]) + int(study["round"]) - 1
            name = f"{study['phase']} round {study['round']} of {study['rounds']}" if study["rounds"] else "beginning"
            self.progress.update(
                self.rounds, description=name, completed=max(0, total if finished is None else finished)
            )
        for name, site_dir in self.site_dirs.items():
            site = read_json(site_dir / SITE_PROGRESS)
            if site:
                if name not in self.sites:
                    self.sites[name] = self.progress.add_task(name, total=site["total"])
                self.progress.update(
                    self.sites[name],
                    description=f"  {name}: {site['doing']}",
                    completed=site["done"],
                    total=site["total"],
                )
        self.show_notices()

    def show_notices(self) -> None:
        """Print what the centre has written to notices.log since the last look."""
        path = self.out / NOTICES_FILE
        if path.exists() and path.stat().st_size > self.notices_read:
            with path.open(encoding="utf-8") as file:
                file.seek(self.notices_read)
                text = file.read()
                self.notices_read = file.tell()
            self.progress.console.print(text.rstrip(), style="yellow", markup=False, highlight=False)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that another process replaces now and then; None where there is none yet."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None
