"""Figures for a page: matplotlib, drawn as SVG that lives inside it.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers, and are handed to the page as CSS
variables, so that one drawing serves light, dark and paper.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

# What matplotlib draws -> what the page shows.
INK, MUTED, RULE, PAGE = "#101010", "#6b6b6b", "#cccccc", "#fefefe"
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAGE: "var(--page)",
    BLUE: "var(--blue)",
    VERMILLION: "var(--vermillion)",
    GREEN: "var(--green)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
COLUMN_WIDTH_INCHES = 3.5


@dataclass(frozen=True)
class Drawing:
    """One figure: inline SVG, and its numbers as a table for whoever cannot or will not see it."""

    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def draw(name: str, height_inches: float, title: str, description: str, paint: Callable[[Canvas], None]) -> Markup:
    """Run `paint` on an empty canvas one column wide and return it as SVG for the page."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(COLUMN_WIDTH_INCHES, height_inches), layout="constrained")
        paint(canvas)
        return inline_svg(canvas, name, title, description, PAGE_COLOURS)


def inline_svg(canvas: Canvas, name: str, title: str, description: str, colours: dict[str, str]) -> Markup:
    """A canvas as SVG to stand in HTML: own ids, CSS colours, no metadata, a title and description."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    opening = re.search(r"<svg\b[^>]*>", text)
    if opening is None:
        raise RuntimeError("matplotlib wrote no <svg>")
    body = text[opening.end() :]
    # matplotlib's own style sheet would reach every element of the page, so it is left out.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body).replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r'\bd="[^"]*"', lambda match: re.sub(r"(\.\d{2})\d+", r"\1", match[0]), body)
    body = re.sub("|".join(colours), lambda match: colours[match[0].lower()], body, flags=re.I)
    width, height = (72 * inches for inches in canvas.get_size_inches())
    return Markup(
        f'<svg viewBox="0 0 {width:.2f} {height:.2f}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{body}"
    )


def label_rows(axes: Axes, labels: Sequence[str], width_points: float) -> None:
    """Named rows from top to bottom, flush left in a margin of that width, without a frame."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=width_points)
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")


def short(text: str, length: int) -> str:
    """Text as one line, cut to fit beside a plot; the table keeps it whole."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "\u2026"
