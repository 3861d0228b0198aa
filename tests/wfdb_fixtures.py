"""Small WFDB records for tests, written by hand: a header, and interleaved little-endian int16."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared_model.leads import LEADS


def ecg_steps(seconds: float = 10, rate_hz: int = 500, leads: int = 12, seed: int = 0) -> np.ndarray:
    """(lead, time) int16 in uV: a beat-like bump a second, with noise that differs by lead and seed.

    Of twelve leads the limb leads are what I and II make them.
    """
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    beat = 1000 * np.exp(-(((time % 1) - 0.3) ** 2) / 0.0004)
    gains = np.linspace(0.5, 1.5, leads)[:, None]
    noise = random.normal(0, 20, (leads, len(time))).cumsum(axis=1) % 100
    steps = gains * beat + noise
    if leads == 12:
        one, two = steps[0], steps[1]
        steps[2:6] = two - one, -(one + two) / 2, one - two / 2, two - one / 2
    return np.rint(steps).astype(np.int16)


def write_record(
    folder: Path,
    name: str,
    steps: np.ndarray | None = None,
    *,
    rate_hz: float = 500,
    lead_names: Sequence[str] = LEADS,
    gain: str = "1000(0)/mV",
    record_line: str | None = None,
    comments: Sequence[str] = (),
) -> Path:
    """Write NAME.hea and NAME.dat; returns the header's path."""
    steps = ecg_steps(rate_hz=int(rate_hz), leads=len(lead_names)) if steps is None else steps
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(name).name
    header = folder / f"{name}.hea"
    header.parent.mkdir(parents=True, exist_ok=True)
    steps.T.astype("<i2").tofile(header.with_suffix(".dat"))
    lines = [record_line or f"{stem} {len(lead_names)} {rate_hz:g} {steps.shape[1]}"]
    lines += [f"{stem}.dat 16 {gain} 16 0 {row[0]} 0 0 {lead}" for lead, row in zip(lead_names, steps, strict=True)]
    header.write_text("\n".join([*lines, *(f"# {comment}" for comment in comments)]) + "\n", encoding="utf-8")
    return header
