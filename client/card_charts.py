"""The distributions of the data card as figures for its page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from client.card import DataCard
from client.spread import Histogram
from shared_model.page import count
from shared_model.svg import BLUE, MUTED, VERMILLION, Drawing, draw, label_rows, short

HEIGHT_INCHES = 1.9
MOST_ROWS = 12
MOST_LABELS = 8
MOST_YEARS = 60


def card_charts(card: DataCard) -> dict[str, Drawing | None]:
    """Every distribution of the card by name; None where nothing is known."""
    return {
        "ages": histogram("ages", "Age at the first ECG", card.ages, "Age (years)", "Patients"),
        "records": bars("records", "Records of a patient", card.patients_by_records, "Records", "Patients"),
        "years": years(card.records_by_year),
        "rates": rows(
            "rates", "Sampling rate of the source", with_unit(card.ecgs_by_source_rate_hz, "Hz"), "10 s ECGs"
        ),
        "devices": rows("devices", "Device", card.ecgs_by_device, "10 s ECGs"),
        "leads": rows("leads", "Missing leads", card.ecgs_without_lead, "10 s ECGs without it"),
        "heart_rates": histogram(
            "heart-rates", "Heart rate as the cart measured it", card.heart_rates, "Heart rate (/min)", "10 s ECGs"
        ),
        "quality": histogram("quality", "Quality", card.qualities, "Quality, 0 useless to 1 clean", "10 s ECGs"),
    }


def label_charts(card: DataCard) -> list[Drawing]:
    """A histogram of each label that is not just 0 or 1, at most MOST_LABELS, with its thresholds."""
    shown = [name for name, label in card.labels.items() if label.histogram is not None]
    drawings = []
    for place, name in enumerate(shown[:MOST_LABELS]):
        label = card.labels[name]
        marks = [float(threshold) for threshold in label.above]
        drawing = histogram(f"label-{place}", name, label.histogram, short(name, 40), "10 s ECGs", marks)
        if drawing is not None:
            drawings.append(drawing)
    return drawings


def histogram(
    name: str, title: str, values: Histogram | None, x_label: str, y_label: str, marks: Sequence[float] = ()
) -> Drawing | None:
    """Bins as bars side by side; `marks` are thresholds, drawn as dashed lines with their number."""
    if values is None:
        return None

    def paint(axes: Axes) -> None:
        edges = np.array(values.edges)
        axes.bar(edges[:-1], values.counts, np.diff(edges) * 0.94, align="edge", color=BLUE)
        for mark in marks:
            axes.axvline(mark, color=VERMILLION, lw=1, ls=(0, (3, 2)))
            above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
            axes.text(mark, 1.0, f"{mark:g}", color=VERMILLION, **above)
        axes.set_xlabel(x_label)

    cells = [
        (f"{low:g} to {high:g}", count(n))
        for low, high, n in zip(values.edges, values.edges[1:], values.counts, strict=False)
    ]
    return drawing_of(name, title, y_label, (short(x_label, 40), y_label), cells, paint)


def bars(name: str, title: str, values: Mapping[str, int], x_label: str, y_label: str) -> Drawing | None:
    """Named bars from left to right."""
    if not values:
        return None

    def paint(axes: Axes) -> None:
        axes.bar(range(len(values)), list(values.values()), 0.8, color=BLUE)
        axes.set_xticks(range(len(values)), [text.replace(" or more", "+") for text in values])
        axes.set_xlabel(x_label)

    return drawing_of(name, title, y_label, (x_label, y_label), named(values), paint)


def years(by_year: Mapping[str, int]) -> Drawing | None:
    """Records by year; of unknown time only in the table. More than MOST_YEARS are one bar a decade."""
    known = {int(year): n for year, n in by_year.items() if year != "unknown"}
    if not known:
        return None
    width = 1 if max(known) - min(known) < MOST_YEARS else 10

    def paint(axes: Axes) -> None:
        first = min(known) // width * width
        edges = np.arange(first, max(known) + width + 1, width)
        heights = np.histogram(list(known), edges, weights=list(known.values()))[0]
        axes.bar(edges[:-1], heights, 0.86 * width, align="center" if width == 1 else "edge", color=BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("Year" if width == 1 else "Decade")

    return drawing_of("years", "Year of the record", "Records", ("Year", "Records"), named(by_year), paint)


def rows(name: str, title: str, values: Mapping[str, int], x_label: str) -> Drawing | None:
    """Named bars from top to bottom, for names of any length; the first MOST_ROWS, the table has them all."""
    if not values:
        return None
    shown = dict(list(values.items())[:MOST_ROWS])

    def paint(axes: Axes) -> None:
        axes.barh(range(len(shown)), list(shown.values()), 0.7, color=BLUE)
        label_rows(axes, [short(text, 22) for text in shown], 92)
        axes.set_xlabel(x_label)

    height_inches = 0.6 + 0.19 * len(shown)
    return drawing_of(name, title, "", (title, x_label), named(values), paint, height_inches)


def drawing_of(
    name: str,
    title: str,
    y_label: str,
    columns: tuple[str, str],
    cells: Sequence[tuple[str, str]],
    paint: Callable[[Axes], None],
    height_inches: float = HEIGHT_INCHES,
) -> Drawing:
    """One set of axes as a figure with its table."""

    def paint_canvas(canvas: Canvas) -> None:
        axes: Axes = canvas.subplots()
        paint(axes)
        value_axis = axes.yaxis if y_label else axes.xaxis
        value_axis.set_major_formatter(lambda value, _: count(round(value)))
        value_axis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(y_label)
        axes.tick_params(axis="y" if y_label else "x", color=MUTED)

    described = "; ".join(f"{text}: {figure}" for text, figure in cells[:40])
    return Drawing(draw(name, height_inches, title, described, paint_canvas), columns, tuple(cells))


def with_unit(values: Mapping[str, int], unit: str) -> dict[str, int]:
    """The same counts with a unit behind each name."""
    return {f"{name} {unit}": n for name, n in values.items()}


def named(values: Mapping[str, int]) -> list[tuple[str, str]]:
    """A table of counts as text."""
    return [(name, count(n)) for name, n in values.items()]
