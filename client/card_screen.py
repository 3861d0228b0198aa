"""The data card on a terminal: one screen, two columns."""

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from client.card import DataCard
from client.card_labels import ANY_ECG, LabelCard, target_name
from client.plain_text import shown
from client.pseudonym import SPLIT_NAMES, TEST
from client.spread import Histogram, Spread
from shared_model.subgroups import ALL

MOST_LINES = 6
BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def card_screen(card: DataCard) -> Group:
    """The whole card: two columns of counts, and the labels below them."""
    screen = Table.grid(padding=(0, 3), expand=True)
    screen.add_column(ratio=1)
    screen.add_column(ratio=1)
    left = [
        section("Store", store_lines(card)),
        section("Patients by split", lines(card.patients_by_split)),
        section("Patients by sex", lines(card.patients_by_sex)),
        section("Patients by race", lines(card.patients_by_race)),
        section("Patients by age", age_lines(card)),
    ]
    right = [
        section("Records by year", year_lines(card.records_by_year)),
        section("Patients by number of records", record_lines(card)),
        section("10 s ECGs by source rate", rate_lines(card)),
        section("10 s ECGs by device", lines(card.ecgs_by_device)),
        section("10 s ECGs without a lead", lines(card.ecgs_without_lead) or [("none", "")]),
        section("Quality, 0 useless to 1 clean", quality_lines(card)),
        section("Turned away", lines(card.turned_away) or [("nothing", "")]),
        section("Noticed", lines(card.noticed) or [("nothing", "")]),
    ]
    screen.add_row(stacked(left), stacked(right))
    return Group(screen, label_table(card))


def label_table(card: DataCard) -> Table:
    """Coverage, distribution and prevalence of each label, and how many groups evaluation would withhold."""
    table = Table(title=Text("Labels", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="ellipsis", no_wrap=True)
    columns = ("ECGs", "patients", "of these test", "median (quartiles)", "above", "groups withheld")
    for column in columns:
        table.add_column(column, justify="right")
    tested = f"{card.patients_by_split.get(SPLIT_NAMES[TEST], 0):,}"
    table.add_row("any ECG", f"{card.ecgs:,}", f"{card.patients:,}", tested, "", "", withheld_text(card, [ANY_ECG]))
    for name, label in list(card.labels.items())[:MOST_LINES]:
        table.add_row(
            shown(name),
            f"{label.ecgs:,}",
            f"{label.patients:,}",
            f"{label.patients_by_split[SPLIT_NAMES[TEST]]:,}",
            "0 or 1" if label.histogram is None else quartiles(label.spread, "{:.3g}"),
            "\n".join(above_text(label, edge) for edge in label.above),
            withheld_text(card, [target_name(name, edge) for edge in label.above] or [name]),
        )
    if len(card.labels) > MOST_LINES:
        table.add_row(f"{len(card.labels) - MOST_LINES} more (--json)")
    return table


def above_text(label: LabelCard, threshold: str) -> str:
    """The share of patients above a threshold, at their index ECG."""
    share = f"{label.above[threshold].share_of_patients:.0%}"
    return share if label.histogram is None else f">{threshold}: {share}"


def withheld_text(card: DataCard, targets: Iterable[str]) -> str:
    """A line a target: how many groups of the test split would not be shown."""
    found = [card.withheld.get(target) for target in targets]
    return "\n".join(
        "not computed" if groups is None else "all" if ALL in groups else str(len(groups)) for groups in found
    )


def stacked(sections: Iterable[Table | None]) -> Group:
    """Sections under each other; those without lines are left out."""
    return Group(*(each for each in sections if each is not None))


def section(title: str, rows: list[tuple[str, str]]) -> Table | None:
    """A heading and lines of name and figure."""
    if not rows:
        return None
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.expand = True
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column(justify="right", no_wrap=True)
    for name, figure in rows:
        table.add_row(shown(name), figure)
    return table


def lines(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The first lines of a table of counts, and how many more there are."""
    rows = [(name, f"{count:,}") for name, count in list(counts.items())[:MOST_LINES]]
    rest = list(counts.values())[MOST_LINES:]
    return [*rows, (f"{len(rest)} more (--json)", f"{sum(rest):,}")] if rest else rows


def store_lines(card: DataCard) -> list[tuple[str, str]]:
    """How much there is, and what happened to it."""
    cut_off = sum(ingest.finished_at is None for ingest in card.ingests)
    rows = [("10 s ECGs", card.ecgs), ("records", card.records), ("patients", card.patients)]
    rows += [("ingests", len(card.ingests))]
    rows += [("ingests at work or cut off: run them again", cut_off)] if cut_off else []
    rows += [("duplicates turned away", card.duplicates.records)] if card.duplicates.records else []
    rows += (
        [("events", card.events.events), ("ECGs joined to one", card.events.joined_ecgs)] if card.events.events else []
    )
    rows += [("patients forgotten", card.forgotten_patients)] if card.forgotten_patients else []
    return [(name, f"{count:,}") for name, count in rows]


def age_lines(card: DataCard) -> list[tuple[str, str]]:
    """Age bands, then the quartiles and the shape."""
    return [*lines(card.patients_by_age), *in_short(card.age_years), *shape(card.ages)]


def rate_lines(card: DataCard) -> list[tuple[str, str]]:
    """Sampling rates of the sources."""
    return lines({f"{rate} Hz": count for rate, count in card.ecgs_by_source_rate_hz.items()})


def quality_lines(card: DataCard) -> list[tuple[str, str]]:
    """Quartiles, shape, and how many were never assessed."""
    rows = [*in_short(card.quality, "{:.2f}"), *shape(card.qualities)]
    return [*rows, ("not assessed", f"{card.quality_not_assessed:,}")] if card.quality_not_assessed else rows


def record_lines(card: DataCard) -> list[tuple[str, str]]:
    """Patients with one record and with more, and the quartiles."""
    repeated = {name: count for name, count in card.patients_by_records.items() if name != "1"}
    rows = {"1": card.patients_by_records.get("1", 0), "2 or more": sum(repeated.values())}
    return [*lines({name: count for name, count in rows.items() if count}), *in_short(card.records_per_patient)]


def year_lines(by_year: Mapping[str, int]) -> list[tuple[str, str]]:
    """First and last year, the shape between, and how many are of unknown time."""
    known = {int(year): count for year, count in by_year.items() if year != "unknown"}
    rows: list[tuple[str, str]] = []
    if known:
        first, last = min(known), max(known)
        rows.append((f"{first} to {last}", f"{sum(known.values()):,}"))
        if last - first < 40:
            rows += shape_of([known.get(year, 0) for year in range(first, last + 1)])
    if "unknown" in by_year:
        rows.append(("unknown", f"{by_year['unknown']:,}"))
    return rows


def in_short(spread: Spread | None, form: str = "{:.0f}") -> list[tuple[str, str]]:
    """Median and quartiles in one line."""
    if spread is None:
        return []
    return [("median (quartiles)", quartiles(spread, form))]


def quartiles(spread: Spread, form: str) -> str:
    """For example `14 (10-19)`."""
    low, middle, high = map(form.format, (spread.lower_quartile, spread.median, spread.upper_quartile))
    return f"{middle} ({low}-{high})"


def shape(histogram: Histogram | None) -> list[tuple[str, str]]:
    """A histogram as blocks, from its first edge to its last."""
    if histogram is None:
        return []
    return [(f"shape, {histogram.edges[0]:g} to {histogram.edges[-1]:g}", blocks(histogram.counts))]


def shape_of(counts: Iterable[int]) -> list[tuple[str, str]]:
    """Counts as blocks."""
    return [("shape", blocks(tuple(counts)))]


def blocks(counts: tuple[int, ...]) -> str:
    """One block a count, as high as the count is large; what is not zero is never blank."""
    highest = max((*counts, 1))
    return "".join(BLOCKS[-(-8 * count // highest)] for count in counts)
