"""The model card that goes with the weights, as JSON for machines and Markdown for people.

Headings after Mitchell et al., Model Cards for Model Reporting, FAT* 2019; items after TRIPOD+AI (Collins et
al., BMJ 2024;385:e078378).
"""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from server.report import words
from server.report.files import write_whole
from server.report.results import (
    Estimate,
    ModelSummary,
    OperatingPoint,
    Record,
    Results,
    SiteSummary,
    SubgroupResult,
    Threshold,
)
from shared_model.leads import DURATION_S, LEADS, SAMPLING_RATE_HZ

CARD_JSON, CARD_MARKDOWN = "card.json", "card.md"

OUT_OF_SCOPE = (
    "Decisions about a patient: diagnosis, triage, treatment.",
    "People under 18, paced rhythms and ECGs with fewer than 12 leads, unless trained on here.",
    "Hospitals, devices and groups that are not in the tables below.",
    "Any use to identify a person from an ECG.",
)


class InputSpecification(Record):
    """What the model reads."""

    leads: tuple[str, ...] = LEADS
    unit: str = "mV"
    sampling_rate_hz: int = SAMPLING_RATE_HZ
    duration_s: int = DURATION_S
    shape: str = "(batch, lead, time) float32"
    missing: str = "a missing sample or lead is 0"


class TripodItem(Record):
    """One item of TRIPOD+AI: where it is answered, or that a person must."""

    topic: str
    answered: bool
    where: str


class ModelCard(Record):
    """Everything the card says."""

    name: str
    created_at: str
    hemofed_version: str
    release_sha256: str | None
    simulated: bool
    summary: str
    intended_use: str
    out_of_scope: tuple[str, ...]
    input: InputSpecification
    output: str
    model: ModelSummary | None
    threshold: Threshold
    target: str
    auroc: Estimate
    operating_point: OperatingPoint
    sites: tuple[SiteSummary, ...]
    subgroups: tuple[SubgroupResult, ...]
    privacy: str
    limits: tuple[str, ...]
    tripod_ai: tuple[TripodItem, ...]


def model_card(results: Results) -> ModelCard:
    """The card of the federated model of a study."""
    label = words.target_label(results.own_target)
    output = f"the probability of {label}"
    if results.own.kind == "regression":
        output = f"{label} in its own unit"
    return ModelCard(
        name=results.name,
        created_at=results.created_at,
        hemofed_version=results.hemofed_version,
        release_sha256=results.release_sha256,
        simulated=results.simulated,
        summary=words.headline(results),
        intended_use=f"Research into reading {label} from the resting 12-lead ECG of adults.",
        out_of_scope=OUT_OF_SCOPE,
        input=InputSpecification(),
        output=output,
        model=results.model,
        threshold=results.threshold,
        target=results.own_target,
        auroc=results.own.auroc,
        operating_point=results.own.operating_point,
        sites=results.sites,
        subgroups=results.subgroups,
        privacy=words.privacy_statement(results),
        limits=tuple(words.limits(results)),
        tripod_ai=tripod_items(results),
    )


def tripod_items(results: Results) -> tuple[TripodItem, ...]:
    """Which TRIPOD+AI topics the results answer, and which a person has to write."""
    computed = results.own.auroc.value is not None
    calibrated = results.own.calibration.slope is not None
    answers = (
        ("Title: what is predicted, in whom", True, "title and summary"),
        ("Background, intended use, known inequalities", False, "intended use only; write the background"),
        ("Source of data, dates, setting, eligibility", False, "sites and counts only; write the rest"),
        ("Data preparation", True, "input; the study's settings in results.json"),
        ("Outcome and its definition", True, "target; for pressure also name the wedge convention"),
        ("Predictors", True, "input: the ECG and nothing else"),
        ("Sample size", True, "training sites"),
        ("Missing data", True, "input; patients without a label serve pretraining only"),
        ("Analytical methods, federated training", True, "the study's settings in results.json"),
        ("Class imbalance", False, "no resampling is done; say whether that suits"),
        ("Fairness", bool(results.subgroups), "performance by subgroup"),
        ("Model output and threshold", results.threshold.probability is not None, "threshold"),
        ("Ethics approval", False, "write it"),
        ("Funding, conflicts, protocol, registration", False, "write it"),
        ("Patient and public involvement", False, "write it"),
        ("Participants", bool(results.sites), "training sites; a flow diagram is left to write"),
        (
            "Full model",
            results.model is not None,
            "model: encoder, size and hash; the weights beside this card",
        ),
        ("Discrimination with intervals", computed, "performance"),
        ("Calibration", calibrated, "results.json, test.*.calibration"),
        ("Heterogeneity between sites", bool(results.site_results), "results.json, site_results"),
        ("Limitations", True, "limits"),
        ("Usability in current care", False, "none is claimed; write the next steps"),
    )
    return tuple(TripodItem(topic=topic, answered=answered, where=where) for topic, answered, where in answers)


def write_card(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write card.json and card.md into `folder` (made if absent); returns both paths."""
    card = model_card(results)
    as_json, as_markdown = folder / CARD_JSON, folder / CARD_MARKDOWN
    write_whole(as_json, card.model_dump_json(indent=2) + "\n")
    write_whole(as_markdown, card_markdown(card))
    return as_json, as_markdown


def card_markdown(card: ModelCard) -> str:
    """The card as Markdown; no text in it can become markup, a link or an image."""
    made = Environment(
        loader=PackageLoader("server.report"),
        autoescape=False,  # not HTML: `plain` makes every value safe in Markdown
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made.get_template("card.md.j2").render(card=card, words=words)


def plain(value: object) -> str:
    """A value as one line of Markdown that means only itself."""
    text = " ".join(str(value).splitlines()).replace("\\", "\\\\")
    for mark in "`*_[]|#!":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;")
