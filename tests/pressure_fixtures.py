"""Right-heart pressures of known mean."""

from collections.abc import Sequence

import numpy as np


def pressure_mmhg(
    mean_mmhg: float,
    *,
    pulse_mmhg: float = 18,
    seconds: float = 15,
    rate_hz: float = 125,
    beat_s: float | Sequence[float] = 0.8,
    wedge: bool = False,
    breathing_mmhg: float = 0,
) -> np.ndarray:
    """(time,) mmHg. Each whole beat has exactly `mean_mmhg`, whatever its length; breathing is a sine of 4 s.

    An artery has a steep rise, a peak, a notch and a run-off; a wedge tracing an a wave and a higher v wave.
    """
    lengths = np.resize(np.asarray(beat_s, float), 4 * round(seconds / np.mean(beat_s) + 4))
    begins = np.concatenate(([0.0], lengths.cumsum()))
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    beat = np.searchsorted(begins, time, side="right") - 1
    phase = (time - begins[beat]) / lengths[beat]
    grid = np.arange(4000) / 4000
    shape = _shape(grid, wedge)
    scaled = (_shape(phase, wedge) - shape.mean()) / np.ptp(shape)
    return mean_mmhg + pulse_mmhg * scaled + breathing_mmhg * np.sin(2 * np.pi * time / 4)


def _shape(phase: np.ndarray, wedge: bool) -> np.ndarray:
    def wave(center: float, width: float) -> np.ndarray:
        return np.exp(-(((phase - center) / width) ** 2) / 2)

    if wedge:
        return 0.6 * wave(0.25, 0.07) + wave(0.7, 0.09)
    run_off = 0.3 * (1 - (phase - 0.3) % 1)
    return wave(0.3, 0.09) + 0.35 * wave(0.52, 0.08) + run_off * (1 - wave(0.3, 0.05))
