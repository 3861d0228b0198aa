"""Example ECGs as a cardiologist reads them: 25 mm/s, 10 mm/mV, 3 x 4 leads and a rhythm strip of lead II.

Paper speed and gain: Kligfield et al., Recommendations for the standardization and interpretation of the
electrocardiogram, part I, Circulation 2007;115:1306-1324. One unit of the drawing is one millimetre, so that
a print at 100% is to scale.
"""

from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from shared_model.leads import LEADS, SAMPLING_RATE_HZ
from shared_model.svg import STYLE, inline_svg

MM_PER_S, MM_PER_MV = 25.0, 10.0
LEFT_MM, TOP_MM, ROW_MM, BOTTOM_MM = 15.0, 20.0, 30.0, 20.0
WIDTH_MM = LEFT_MM + 10 * MM_PER_S + 5
HEIGHT_MM = TOP_MM + 3 * ROW_MM + BOTTOM_MM
LAYOUT = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
RHYTHM_LEAD = "II"
COLUMN_S = 2.5

TRACE, FINE, COARSE = "#111111", "#f6d5d5", "#e8a3a3"
PAPER_COLOURS = {TRACE: "var(--trace)", FINE: "var(--grid-fine)", COARSE: "var(--grid-coarse)"}


@dataclass(frozen=True)
class ExampleEcg:
    """One ECG to print. `signal_mv`: (12, 2500) float32, mV, 250 Hz, leads in `LEADS` order, NaN missing."""

    caption: str
    signal_mv: NDArray[np.float32]


def ecg_paper(example: ExampleEcg, name: str) -> Markup:
    """The ECG on millimetre paper as SVG, WIDTH_MM by HEIGHT_MM. Raises ValueError on another shape."""
    signal = np.asarray(example.signal_mv)
    if signal.shape != (len(LEADS), 10 * SAMPLING_RATE_HZ):
        raise ValueError(f"an example ECG has shape (12, {10 * SAMPLING_RATE_HZ}), this one {signal.shape}")
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH_MM / 25.4, HEIGHT_MM / 25.4))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH_MM), ylim=(HEIGHT_MM, 0))
        axes.axis("off")
        draw_grid(axes)
        for row, leads in enumerate(LAYOUT):
            baseline_mm = TOP_MM + row * ROW_MM
            draw_pulse(axes, baseline_mm)
            for column, lead in enumerate(leads):
                draw_lead(axes, signal, lead, column * COLUMN_S, COLUMN_S, baseline_mm)
        draw_pulse(axes, TOP_MM + 3 * ROW_MM)
        draw_lead(axes, signal, RHYTHM_LEAD, 0.0, 10.0, TOP_MM + 3 * ROW_MM)
        axes.text(LEFT_MM, HEIGHT_MM - 2, "25 mm/s \u00b7 10 mm/mV \u00b7 250 Hz", color=TRACE, fontsize=8)
        described = f"12-lead ECG, 10 seconds, on paper at 25 mm/s and 10 mm/mV. {example.caption}"
        return inline_svg(canvas, name, "12-lead ECG", described, PAPER_COLOURS)


def draw_grid(axes: Axes) -> None:
    """Lines a millimetre apart, every fifth one strong."""
    for spacing, colour, width in ((1, FINE, 0.35), (5, COARSE, 0.5)):
        for limits, horizontal in ((WIDTH_MM, False), (HEIGHT_MM, True)):
            places = np.arange(0, limits + 0.5, spacing)
            across = HEIGHT_MM if not horizontal else WIDTH_MM
            # One path for all lines: each from edge to edge, then a break.
            along = np.repeat(places, 3)
            from_to = np.tile([0, across, np.nan], len(places))
            x, y = (from_to, along) if horizontal else (along, from_to)
            axes.plot(x, y, color=colour, lw=width)


def draw_pulse(axes: Axes, baseline_mm: float) -> None:
    """The calibration pulse: 1 mV for 0.2 s."""
    x = np.array([5, 7, 7, 12, 12, 14])
    y = baseline_mm - np.array([0, 0, 1, 1, 0, 0]) * MM_PER_MV
    axes.plot(x, y, color=TRACE, lw=0.8)


def draw_lead(
    axes: Axes, signal_mv: NDArray[np.float32], lead: str, start_s: float, length_s: float, baseline_mm: float
) -> None:
    """One lead's stretch of the 10 s, at its place on the paper, with its name."""
    first, last = (round(second * SAMPLING_RATE_HZ) for second in (start_s, start_s + length_s))
    time_s = np.arange(first, last) / SAMPLING_RATE_HZ
    x = LEFT_MM + time_s * MM_PER_S
    axes.plot(x, baseline_mm - signal_mv[LEADS.index(lead), first:last] * MM_PER_MV, color=TRACE, lw=0.8)
    left = LEFT_MM + start_s * MM_PER_S
    if start_s > 0:
        axes.plot([left, left], [baseline_mm - 3, baseline_mm + 3], color=TRACE, lw=0.6)
    axes.text(left + 1.5, baseline_mm - 11.5, lead, color=TRACE, fontsize=9, fontweight="bold")
