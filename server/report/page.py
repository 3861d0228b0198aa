"""One study as one page: report.html, self-contained, readable offline, on a phone, aloud and in print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from server.report import words
from server.report.figures import comparison, forest, receiver_operating, reliability, training
from server.report.files import write_whole
from server.report.results import Results, RoundMetrics
from shared_model.ecg_paper import ExampleEcg, ecg_paper
from shared_model.errors import ExitCode, HemoFedError
from shared_model.page import environment

PAGE_FILE = "report.html"
MOST_EXAMPLES = 6


def write_page(results: Results, metrics: Sequence[RoundMetrics], examples: Sequence[ExampleEcg], folder: Path) -> Path:
    """Write report.html into `folder` (made if absent) and return its path.

    Guarantee: the page asks for nothing from any network and runs no script (a Content-Security-Policy says
    so to the browser), and every text of `results`, `metrics` and `examples` is escaped.

    Args:
        results: the outcome, as in results.json.
        metrics: the rounds, as in metrics.jsonl; may be empty.
        examples: at most MOST_EXAMPLES ECGs are printed. Give none of real patients.
        folder: where the page goes.

    Raises:
        HemoFedError: example ECGs were given for hospitals that are not simulated.
    """
    if examples and not results.simulated:
        raise HemoFedError(
            "ECGs of real patients must not be in the report; give no examples", ExitCode.DISCLOSURE_REFUSED
        )
    path = folder / PAGE_FILE
    write_whole(path, page_text(results, metrics, examples))
    return path


def page_text(results: Results, metrics: Sequence[RoundMetrics], examples: Sequence[ExampleEcg]) -> str:
    """The page as HTML."""
    template = report_templates().get_template("report.html.j2")
    return template.render(
        results=results,
        own=results.own,
        label=words.target_label(results.own_target),
        figures={
            "comparison": comparison(results),
            "roc": receiver_operating(results.own),
            "reliability": reliability(results.own),
            "forest": forest(results),
            "pretrain": training(metrics, "pretrain"),
            "finetune": training(metrics, "finetune"),
        },
        examples=[
            (example.caption, ecg_paper(example, f"ecg-{place}"))
            for place, example in enumerate(examples[:MOST_EXAMPLES], start=1)
        ],
        site_reasons=[(site.name, site.reason) for site in results.sites],
        group_reasons=[
            (f"{group.partition} {words.group_label(group.group)}", group.reason)
            for group in results.subgroups
            if not group.suppressed and group.auroc is not None
        ],
        settings=flat_settings(results.study),
    )


def report_templates() -> Environment:
    """The report's templates, with the functions of words.py as filters."""
    made = environment("server.report")
    for function in (
        words.with_interval,
        words.target_label,
        words.group_label,
        words.upper_first,
        words.suppressed_text,
    ):
        made.filters[function.__name__] = function
    made.globals["words"] = words
    return made


def flat_settings(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A study's settings as (dotted key, value), in the study's order."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += flat_settings(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(str(item) for item in value)))
        else:
            rows.append((prefix + key, str(value)))
    return rows
