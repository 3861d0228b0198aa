"""ECGs whose quality is known: a clean one that fits itself, electrodes swapped, and a slow measure of quality."""

import csv
from pathlib import Path

import numpy as np

from client.records.record import EcgRecord
from client.signal_measures import COLUMNS, COMPARED
from shared_model.leads import LEADS, MISSING, SAMPLING_RATE_HZ, arrange, derive_limb_leads, resample, to_steps

ALL = np.ones(12, bool)
ONLY_III_TO_AVF = np.array([2 <= lead <= 5 for lead in range(12)])
# V1 to V6 of a normal heart: r and S in V1, R in V6.
R_MV = {"I": 0.7, "II": 1.1, "V1": 0.3, "V2": 0.6, "V3": 1.0, "V4": 1.6, "V5": 1.5, "V6": 1.2}
S_MV = {"I": 0.1, "II": 0.2, "V1": 1.0, "V2": 1.4, "V3": 0.9, "V4": 0.5, "V5": 0.2, "V6": 0.1}


def bump(time_s: np.ndarray, centre_s: float, width_s: float) -> np.ndarray:
    return np.exp(-(((time_s % 0.8) - centre_s) ** 2) / (2 * width_s**2))


def clean_mv(seconds: float = 10, noise_mv: float = 0.005, seed: int = 0) -> np.ndarray:
    """(12, time) at 250 Hz, 75/min: P, R, S and T; Einthoven and Goldberger hold."""
    time_s = np.arange(round(seconds * SAMPLING_RATE_HZ)) / SAMPLING_RATE_HZ
    signal = np.zeros((12, time_s.size), np.float32)
    random = np.random.default_rng(seed)
    for lead, height in R_MV.items():
        waves = 0.1 * bump(time_s, 0.14, 0.025) + height * bump(time_s, 0.3, 0.012)
        waves += -S_MV[lead] * bump(time_s, 0.34, 0.012) + 0.25 * bump(time_s, 0.55, 0.05)
        signal[LEADS.index(lead)] = waves + random.normal(0, noise_mv, time_s.size)
    return derive_limb_leads(signal, ONLY_III_TO_AVF)


def clean_steps(seconds: float = 10) -> np.ndarray:
    return to_steps(clean_mv(seconds))


def first_segment(record: EcgRecord) -> tuple[np.ndarray, np.ndarray]:
    """Steps and recorded leads of the first 10 s, as they are before anything is masked or turned away."""
    signal = resample(arrange(record.signal_mv, record.lead_names), record.sampling_rate_hz, SAMPLING_RATE_HZ)
    return to_steps(signal[:, :2500]), np.array([lead in record.lead_names for lead in LEADS])


def with_electrodes(steps: np.ndarray, right_arm: str, left_arm: str, left_leg: str) -> np.ndarray:
    """The ECG had the limb electrodes lain elsewhere: each argument is the limb where that electrode lies.

    With the left leg as zero, RA = -II and LA = I - II. The chest leads stay: the central terminal is the mean of
    the same three limbs (Sensors 2019;19:2920).
    """
    one, two = steps[0].astype(float), steps[1].astype(float)
    limb = {"RA": -two, "LA": one - two, "LL": np.zeros_like(two)}
    ra, la, ll = limb[right_arm], limb[left_arm], limb[left_leg]
    swapped = steps.astype(np.float32)
    swapped[0], swapped[1] = la - ra, ll - ra
    return np.rint(derive_limb_leads(swapped, ONLY_III_TO_AVF)).clip(-32767, 32767).astype(np.int16)


def slow_measures(steps: np.ndarray, recorded: np.ndarray, edge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What `client.signal_measures.measure` says, written out with sorting and sliding windows in float64.

    `edge` moves the limit of 1 mV from the middle for a rail: the middle is a mean, whose last digit hangs on the order
    of its sum.
    """
    table = np.zeros((12, len(COLUMNS)))
    signal = np.where(steps == MISSING, np.nan, steps.astype(float))
    for lead in range(12):
        if recorded[lead]:
            table[lead] = _slow_lead(signal[lead], edge)
        elif 2 <= lead <= 5 and recorded[:2].all():
            one, two = signal[0], signal[1]
            derived = (two - one, -(one + two) // 2, one - two // 2, two - one // 2)[lead - 2]
            table[lead, 6] = _slow_lead(np.clip(derived, -32767, 32767))[6]
    return table, _slow_products(signal / 1000, recorded, table)


def _slow_lead(signal: np.ndarray, edge: float = 0.0) -> np.ndarray:
    windows = signal[: len(signal) // 50 * 50].reshape(-1, 50)
    present = ~np.isnan(windows).any(axis=1)
    if not present.any():
        return np.array([0, 1, 0, 0, 0, 0, 0, 0.0])
    three = np.lib.stride_tricks.sliding_window_view(windows, 3, axis=1)
    high, low = three.min(axis=2).max(axis=1), three.max(axis=2).min(axis=1)
    held = np.maximum(high - low, 0)
    span = np.where(np.ptp(windows, axis=1) > 1.5 * held, held, np.ptp(windows, axis=1))[present]
    span_mv = np.sort(span)[::-1][: min(5, span.size)][-1] / 1000
    second = np.abs(windows[:, 4:] - 2 * windows[:, 2:-2] + windows[:, :-4]).mean(axis=1)
    whole = [slice(i, i + 5) for i in range(0, len(windows) - 4, 5)]
    whole = [piece for piece in whole if present[piece].sum() >= 3]
    levels = [windows[piece][present[piece]].mean() for piece in whole]
    quietest = sorted(second[piece][present[piece]].min() for piece in whole)
    middle = np.median(levels) if whole else windows[present].mean()
    noise_mv = quietest[-int(np.ceil(0.3 * len(whole)))] / (3.8 * 2 / np.pi) / 1000 if whole else 0.0
    up, down = (((edge[present] - middle) ** 2).sum() for edge in (high, low))
    return np.array(
        [
            _slow_flat(windows, present) if span_mv >= 0.01 else 1.0,
            1 - present.mean(),
            _slow_rail(signal, windows[present].min(), windows[present].max(), middle, edge),
            (np.abs(signal - middle) > 10_000).mean(),
            noise_mv,
            np.ptp(levels) / 1000 if whole else 0.0,
            span_mv,
            (up - down) / (up + down) if up + down else 0.0,
        ]
    )


def _slow_flat(windows: np.ndarray, present: np.ndarray) -> float:
    still = (np.abs(np.diff(windows, axis=1)) <= 1).all(axis=1) & present
    flat = {i + k for i in range(len(still) - 4) if still[i : i + 5].all() for k in range(5)}
    return len(flat) / present.sum()


def _slow_rail(signal: np.ndarray, floor: float, ceiling: float, middle: float, edge: float) -> float:
    tolerance = max(2, 0.002 * (ceiling - floor))
    clipped = 0
    for near, distance in (
        ((signal >= ceiling - tolerance) & (signal <= ceiling), ceiling - middle),
        ((signal <= floor + tolerance) & (signal >= floor), middle - floor),
    ):
        text = "".join("x" if value else " " for value in near)
        runs = [len(run) for run in text.split() if len(run) >= 4]
        if distance > 1000 + edge and runs and (len(runs) >= 3 or max(runs) >= 125):
            clipped += sum(runs)
    return clipped / len(signal)


def _slow_products(signal_mv: np.ndarray, recorded: np.ndarray, table: np.ndarray) -> np.ndarray:
    rows = [LEADS.index(lead) for lead in COMPARED]
    used = np.array([recorded[row] and table[row, 1] < 1 for row in rows])
    change = signal_mv[rows][:, 5:] - signal_mv[rows][:, :-5]
    largest = np.maximum(np.floor(1.5 * np.round(1000 * table[rows, 6])), 100)[:, None]
    usable = (np.abs(np.round(1000 * change[used])) <= largest[used]).all(axis=0)
    change = np.where(used[:, None] & usable, change, 0)
    return change @ change.T


def table_column(path: Path, key: str, column: str) -> dict[str, str]:
    """Two columns of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row[key]: row[column] for row in csv.DictReader(file)}
