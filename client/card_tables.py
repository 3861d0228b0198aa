"""The tables of the data card's page, as text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from client.card import DataCard
from client.card_labels import ANY_ECG, LabelCard
from shared_model.page import count, percent
from shared_model.subgroups import ALL


@dataclass(frozen=True)
class PageTable:
    """A table with its caption."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def card_tables(card: DataCard) -> dict[str, PageTable]:
    """Every table of the page by name."""
    return {
        "split": patients_table("Patients by split.", "Split", card.patients_by_split, card.patients),
        "sex": patients_table("Patients by sex.", "Sex", card.patients_by_sex, card.patients),
        "race": patients_table(
            "Patients by race, as the source spells it.", "Race", card.patients_by_race, card.patients
        ),
        "age": patients_table("Patients by age at their first ECG.", "Age", card.patients_by_age, card.patients),
        "measurements": counts_table("Measurements by the cart.", ("Measurement", "10 s ECGs"), card.ecgs_measured),
        "labels": labels_table(card),
        "events": counts_table(
            "Events: measurements of the heart with their own times.", ("Value", "Events"), card.events.values
        ),
        "noticed": counts_table("Remarks that turned no record away.", ("Noticed", "Times"), card.noticed),
        "turned_away": counts_table("Records turned away.", ("Reason", "Records"), card.turned_away),
        "ingests": ingests_table(card),
    }


def counts_table(caption: str, columns: tuple[str, str], counts: Mapping[str, int]) -> PageTable:
    """Names and counts; a row that says so where there are none."""
    rows = tuple((name, count(number)) for name, number in counts.items())
    return PageTable(caption, columns, rows or (("none", "0"),))


def patients_table(caption: str, head: str, counts: Mapping[str, int], patients: int) -> PageTable:
    """Patients by a value, with their share of all."""
    rows = tuple((name, count(number), percent(number / patients)) for name, number in counts.items())
    return PageTable(caption, (head, "Patients", "Share"), rows)


def labels_table(card: DataCard) -> PageTable:
    """Coverage, distribution and prevalence of each label."""
    columns = (
        "Label",
        "10 s ECGs",
        "Patients",
        "Train / validation / test",
        "Min, quartiles, max",
        "Patients above, or with 1",
    )
    rows = tuple(
        (
            name,
            count(label.ecgs),
            count(label.patients),
            " / ".join(count(number) for number in label.patients_by_split.values()),
            spread_text(label),
            above_text(label),
        )
        for name, label in card.labels.items()
    )
    return PageTable(
        "Coverage, distribution and prevalence. Patients above a threshold: of labelled ones, at their index ECG.",
        columns,
        rows,
    )


def spread_text(label: LabelCard) -> str:
    """Smallest, quartiles and largest value."""
    if label.histogram is None:
        return "0 or 1"
    of = label.spread
    values = (of.minimum, of.lower_quartile, of.median, of.upper_quartile, of.maximum)
    return ", ".join(f"{value:.3g}" for value in values)


def above_text(label: LabelCard) -> str:
    """Who is above each threshold."""
    return "; ".join(
        ("" if label.histogram is None else f"> {threshold}: ")
        + f"{count(above.patients)} ({percent(above.share_of_patients)})"
        for threshold, above in label.above.items()
    )


def withheld_tables(card: DataCard) -> list[tuple[str, PageTable]]:
    """For each target a summary, and the groups that evaluation would not show."""
    columns = ("Group", "Patients", "Positive", "Why")
    tables = []
    for target, groups in card.withheld.items():
        name = "Any ECG" if target == ANY_ECG else target
        rows = tuple(
            (group, count(each.patients), "" if each.positives is None else count(each.positives), each.reason)
            for group, each in groups.items()
        )
        summary = f"{name}: {'everything' if ALL in groups else len(rows) or 'nothing'} withheld"
        tables.append((summary, PageTable(f"Groups withheld: {name}.", columns, rows)))
    return tables


def ingests_table(card: DataCard) -> PageTable:
    """All ingests, oldest first."""
    rows = tuple(
        (
            each.source,
            each.format,
            ", ".join(json.loads(each.selection)) or "all",
            each.started_at,
            each.finished_at or "cut off, or at work: run it again",
        )
        for each in card.ingests
    )
    return PageTable("Ingests, oldest first.", ("Source", "Format", "Selection", "Started", "Finished"), rows)
