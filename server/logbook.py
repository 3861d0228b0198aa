"""What the centre writes while a study runs: metrics.jsonl, notices.log and progress.json, for whoever watches."""

import json
from collections.abc import Mapping
from pathlib import Path

from server.conductor import Watcher
from server.report.files import append_metrics
from shared_model.wire import SiteDescription

NOTICES_FILE = "notices.log"
PROGRESS_FILE = "progress.json"


def file_watcher(out: Path) -> Watcher:
    """A watcher that writes to the study's folder, so that every engine is watched in one way."""
    out.mkdir(parents=True, exist_ok=True)

    def say(**facts: object) -> None:
        unfinished = out / f"{PROGRESS_FILE}.unfinished"
        unfinished.write_text(json.dumps(facts))
        unfinished.replace(out / PROGRESS_FILE)

    def on_sites(sites: Mapping[str, SiteDescription]) -> None:
        say(phase="begin", round=0, rounds=0, sites=sorted(sites))

    def on_notice(text: str) -> None:
        with (out / NOTICES_FILE).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return Watcher(
        on_sites=on_sites,
        on_round_start=lambda phase, number, rounds: say(phase=phase, round=number, rounds=rounds),
        on_round=lambda metrics: append_metrics(metrics, out),
        on_notice=on_notice,
    )
