"""What is measured on one ECG before it is judged: one pass over each lead, and how the limb leads relate.

Everything is counted in windows of 200 ms, which hold one QRS complex at most rates. A window with a missing
sample is left out of all measures but `missing_share`; so is the rest of a window at the end.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shared_model.kernels import compiled
from shared_model.leads import LARGEST_STEP, LEADS, MISSING, SAMPLING_RATE_HZ

WINDOW = SAMPLING_RATE_HZ // 5
WINDOWS_A_SECOND = 5
VALID_WINDOWS_OF_A_SECOND = 3
# The fifth largest of all windows: a beat at 30/min comes five times in 10 s, an artefact usually less often.
QRS_RANK = 5
# Of the peak to peak of a QRS, less than a third is narrower than 12 ms; of a pacing spike nearly all.
SPIKE_RATIO = 1.5
# The third noisiest second of ten, the second of five: a burst has to last to count.
NOISY_SHARE = 0.3
NOISE_LAG = 2
# |x[i] - 2 x[i-2] + x[i-4]| of a sine of amplitude A at 50 or 60 Hz is A * (3.62 or 3.98) * 2/pi on average.
NOISE_GAIN = 3.8 * 2 / np.pi
LARGEST_FLAT_STEP = 1
FLAT_WINDOWS = 5
LARGEST_SIGNAL = 10_000
SMALLEST_RAIL = 1_000
RAIL_TOLERANCE = 0.002
RAIL_RUN = 4
RAIL_RUNS = 3
LONG_RAIL_RUN = SAMPLING_RATE_HZ // 2
DIFFERENCE_LAG = 5
LARGEST_CHANGE = 1.5  # times the QRS from peak to peak
SMALLEST_CHANGE = 100
COMPARED = ("I", "II", "III", "aVR", "aVL", "aVF", "V5", "V6")
"""Rows and columns of `Measures.products`."""
_COMPARED_ROWS = np.array([LEADS.index(lead) for lead in COMPARED])
_MISSING = int(MISSING)
SMALLEST_QRS_MV = 0.01  # what follows I and II can be almost isoelectric at low voltage
COLUMNS = (
    "flat_share",
    "missing_share",
    "rail_share",
    "off_scale_share",
    "noise_mv",
    "wander_mv",
    "span_mv",
    "upright",
)


@dataclass(frozen=True)
class Measures:
    """What is measured of one ECG."""

    table: NDArray[np.float64]
    """(12, 8): leads in canonical order by COLUMNS, 0 where nothing could be measured.

    - flat_share: of the windows, those in a stretch of 1 s or more without a step above 1 uV from sample to sample;
      1 where the QRS is smaller than 0.01 mV.
    - missing_share: of the windows, those with a missing sample.
    - rail_share: of the samples, those on a plateau at the lead's maximum or minimum.
    - off_scale_share: of the samples, those more than 10 mV from the lead's middle, the median of the means of a
      second.
    - noise_mv: amplitude of a 50 or 60 Hz sine as noisy as the quietest window of the third noisiest second of ten.
    - wander_mv: between the lowest and the highest mean of a second.
    - span_mv: the QRS from peak to peak, taken as the fifth largest range of a window. Pacing spikes, narrower than
      12 ms, do not count. Also of limb leads that are not recorded but follow from I and II.
    - upright: -1 to 1, whether the largest deflections from the middle are negative or positive, spikes left out.
    """
    products: NDArray[np.float64]
    """(8, 8), leads of COMPARED: sum over time of products of the differences x[i] - x[i-5] (20 ms), mV squared.
    Instants that a lead misses, and artefacts larger than its QRS, are left out for all leads."""

    def column(self, name: str) -> NDArray[np.float64]:
        """(12,): one of COLUMNS."""
        return self.table[:, COLUMNS.index(name)]


def measure(steps: NDArray[np.int16], recorded: NDArray[np.bool_]) -> Measures:
    """Measure an ECG of (12, n) steps of 1 uV at 250 Hz; `recorded` (12,) says which leads the source has.

    Raises:
        ValueError: not 12 leads, or shorter than a second.
    """
    if steps.shape[0] != len(LEADS) or steps.shape[1] < SAMPLING_RATE_HZ:
        raise ValueError(f"steps of shape {steps.shape}; 12 leads of at least {SAMPLING_RATE_HZ} samples are needed")
    steps = np.ascontiguousarray(steps)
    table = np.zeros((len(LEADS), len(COLUMNS)))
    _measure_leads(steps, recorded, table)
    products = np.zeros((len(COMPARED), len(COMPARED)))
    _measure_products(steps, recorded, table, products)
    return Measures(table, products)


@compiled
def _measure_leads(steps: NDArray[np.int16], recorded: NDArray[np.bool_], table: NDArray[np.float64]) -> None:
    derived = np.empty(steps.shape[1], np.int16)
    for lead in range(steps.shape[0]):
        if recorded[lead]:
            _measure_lead(steps[lead], table[lead])
        elif 2 <= lead < 6 and recorded[0] and recorded[1]:
            _derive(lead, steps[0], steps[1], derived)
            scratch = np.zeros(table.shape[1])
            _measure_lead(derived, scratch)
            table[lead, 6] = scratch[6]


@compiled
def _derive(lead: int, first: NDArray[np.int16], second: NDArray[np.int16], derived: NDArray[np.int16]) -> None:
    """III, aVR, aVL or aVF (2 to 5) of I and II, in whole steps."""
    for i in range(first.size):
        one, two = int(first[i]), int(second[i])
        if one == _MISSING or two == _MISSING:
            derived[i] = np.int16(_MISSING)
            continue
        if lead == 2:
            value = two - one
        elif lead == 3:
            value = -(one + two) // 2
        elif lead == 4:
            value = one - two // 2
        else:
            value = two - one // 2
        derived[i] = np.int16(min(max(value, -32767), 32767))


@compiled
def _measure_lead(steps: NDArray[np.int16], measured: NDArray[np.float64]) -> None:
    windows = steps.size // WINDOW
    low = np.empty(windows, np.int32)
    high = np.empty(windows, np.int32)
    held_low = np.empty(windows, np.int32)
    held_high = np.empty(windows, np.int32)
    mean = np.empty(windows)
    noise = np.empty(windows)
    still = np.empty(windows, np.int32)
    for window in range(windows):
        piece = steps[window * WINDOW : (window + 1) * WINDOW]
        low[window], high[window], mean[window] = _range_and_mean(piece)
        held_low[window], held_high[window] = _held_range(piece)
        noise[window], still[window] = _noise_and_still(piece)
    present = low != _MISSING
    valid = present.sum()
    measured[1] = 1 - valid / windows
    if valid == 0:
        return
    measured[6] = _largest(low, high, held_low, held_high, min(QRS_RANK, valid)) / 1000
    measured[0] = _flat_windows(still, present) / valid if measured[6] >= SMALLEST_QRS_MV else 1.0
    measured[4], measured[5], middle = _by_second(noise, mean, present)
    floor, ceiling = _range(low, high)
    measured[2] = _rail_share(steps, floor, ceiling, middle)
    measured[3] = _off_scale_share(steps, floor, ceiling, middle)
    measured[7] = _upright(held_low, held_high, present, middle)


@compiled
def _range_and_mean(piece: NDArray[np.int16]) -> tuple[np.int16, np.int16, float]:
    low = np.int16(piece[0])
    high = np.int16(piece[0])
    total = np.int32(0)
    for i in range(WINDOW):
        value = piece[i]
        low = min(low, value)
        high = max(high, value)
        total += np.int32(value)
    return low, high, total / WINDOW


@compiled
def _held_range(piece: NDArray[np.int16]) -> tuple[np.int16, np.int16]:
    """The lowest and the highest value that three samples in a row (12 ms) go beyond."""
    low = np.int16(32767)
    high = np.int16(-32768)
    for i in range(2, WINDOW):
        low = min(low, max(piece[i], piece[i - 1], piece[i - 2]))
        high = max(high, min(piece[i], piece[i - 1], piece[i - 2]))
    return low, high


@compiled
def _range(low: NDArray[np.int32], high: NDArray[np.int32]) -> tuple[int, int]:
    floor, ceiling = np.int32(LARGEST_STEP), np.int32(-LARGEST_STEP)
    for window in range(low.size):
        if low[window] != _MISSING:
            floor = min(floor, low[window])
            ceiling = max(ceiling, high[window])
    return int(floor), int(ceiling)


@compiled
def _noise_and_still(piece: NDArray[np.int16]) -> tuple[float, int]:
    """Mean of |x[i] - 2 x[i-2] + x[i-4]|, and whether no sample differs from the one before it."""
    total = np.int32(0)
    for i in range(2 * NOISE_LAG, WINDOW):
        total += abs(
            np.int32(piece[i]) - np.int32(2) * np.int32(piece[i - NOISE_LAG]) + np.int32(piece[i - 2 * NOISE_LAG])
        )
    moving = np.int32(0)
    for i in range(1, WINDOW):
        moving += abs(np.int32(piece[i]) - np.int32(piece[i - 1])) > LARGEST_FLAT_STEP
    return total / (WINDOW - 2 * NOISE_LAG), moving == 0


@compiled
def _flat_windows(still: NDArray[np.int32], present: NDArray[np.bool_]) -> int:
    flat = 0
    run = 0
    for window in range(still.size):
        run = run + 1 if still[window] and present[window] else 0
        if run == FLAT_WINDOWS:
            flat += FLAT_WINDOWS
        elif run > FLAT_WINDOWS:
            flat += 1
    return flat


@compiled
def _largest(
    low: NDArray[np.int32],
    high: NDArray[np.int32],
    held_low: NDArray[np.int32],
    held_high: NDArray[np.int32],
    rank: int,
) -> np.int32:
    """The `rank`-th largest range of a window; that of 12 ms where the rest is a spike, which loses more than a QRS."""
    top = np.zeros(rank, np.int32)
    for window in range(low.size):
        span = high[window] - low[window]
        held = max(held_high[window] - held_low[window], 0)
        if span > SPIKE_RATIO * held:
            span = held
        if low[window] == _MISSING or span <= top[-1]:
            continue
        place = rank - 1
        while place > 0 and top[place - 1] < span:
            top[place] = top[place - 1]
            place -= 1
        top[place] = span
    return np.int32(top[-1])


@compiled
def _upright(low: NDArray[np.int32], high: NDArray[np.int32], present: NDArray[np.bool_], middle: float) -> float:
    up = 0.0
    down = 0.0
    for window in range(low.size):
        if present[window]:
            up += (high[window] - middle) ** 2
            down += (low[window] - middle) ** 2
    return (up - down) / (up + down) if up + down > 0 else 0.0


@compiled
def _by_second(
    noise: NDArray[np.float64], mean: NDArray[np.float64], present: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Noise and baseline wander in mV, and the lead's middle in steps."""
    quietest = np.empty(noise.size // WINDOWS_A_SECOND)
    level = np.empty(quietest.size)
    seconds = 0
    for start in range(0, quietest.size * WINDOWS_A_SECOND, WINDOWS_A_SECOND):
        valid = 0
        total = 0.0
        least = np.inf
        for window in range(start, start + WINDOWS_A_SECOND):
            if present[window]:
                valid += 1
                total += mean[window]
                least = min(least, noise[window])
        if valid >= VALID_WINDOWS_OF_A_SECOND:
            quietest[seconds] = least
            level[seconds] = total / valid
            seconds += 1
    if seconds == 0:
        return 0.0, 0.0, (mean * present).sum() / present.sum()
    _sort(quietest[:seconds])
    _sort(level[:seconds])
    noisy = quietest[seconds - int(np.ceil(NOISY_SHARE * seconds))]
    middle = (level[seconds // 2] + level[(seconds - 1) // 2]) / 2
    return noisy / NOISE_GAIN / 1000, (level[seconds - 1] - level[0]) / 1000, middle


@compiled
def _sort(values: NDArray[np.float64]) -> None:
    """In place; ten values, for which this compiles and runs faster than a library's sort."""
    for i in range(1, values.size):
        value = values[i]
        place = i
        while place > 0 and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


@compiled
def _rail_share(steps: NDArray[np.int16], floor: int, ceiling: int, middle: float) -> float:
    """Of all samples, those in plateaus at the maximum or minimum, if that is more than 1 mV from the middle.

    A plateau is 16 ms or more within 0.2% of the range; it counts if there are three, or one of half a second:
    a QRS, a T wave or a slow wander turns once, and faster.
    """
    tolerance = max(2.0, RAIL_TOLERANCE * (ceiling - floor))
    clipped = 0
    if ceiling - middle > SMALLEST_RAIL:
        clipped += _plateaus(steps, ceiling - tolerance, ceiling)
    if middle - floor > SMALLEST_RAIL:
        clipped += _plateaus(steps, floor, floor + tolerance)
    return clipped / steps.size


@compiled
def _plateaus(steps: NDArray[np.int16], lowest: float, highest: float) -> int:
    least, most = np.int16(np.ceil(lowest)), np.int16(np.floor(highest))
    near = np.int32(0)
    for i in range(steps.size):
        near += (steps[i] >= least) & (steps[i] <= most)
    if near < RAIL_RUN * RAIL_RUNS:
        return 0
    total = 0
    runs = 0
    longest = 0
    run = 0
    for i in range(steps.size + 1):
        if i < steps.size and least <= steps[i] <= most:
            run += 1
            continue
        if run >= RAIL_RUN:
            total += run
            runs += 1
            longest = max(longest, run)
        run = 0
    return total if runs >= RAIL_RUNS or longest >= LONG_RAIL_RUN else 0


@compiled
def _off_scale_share(steps: NDArray[np.int16], floor: int, ceiling: int, middle: float) -> float:
    if ceiling - middle <= LARGEST_SIGNAL and middle - floor <= LARGEST_SIGNAL:
        return 0.0
    outside = 0
    for i in range(steps.size):
        outside += steps[i] != _MISSING and abs(steps[i] - middle) > LARGEST_SIGNAL
    return outside / steps.size


@partial(compiled, fastmath={"reassoc", "contract"})  # a sum may be added up in any order
def _measure_products(
    steps: NDArray[np.int16], recorded: NDArray[np.bool_], table: NDArray[np.float64], products: NDArray[np.float64]
) -> None:
    """Differences over 20 ms take the baseline away and keep the QRS.

    An instant is left out for all leads if one lead misses it or changes by more there than its QRS can.
    """
    count = steps.shape[1] - DIFFERENCE_LAG
    difference = np.zeros((_COMPARED_ROWS.size, count), np.float32)
    usable = np.ones(count, np.bool_)
    for k, row in enumerate(_COMPARED_ROWS):
        if not recorded[row] or table[row, 1] == 1:
            continue
        largest = np.int32(max(LARGEST_CHANGE * round(table[row, 6] * 1000), SMALLEST_CHANGE))
        for i in range(count):
            before, after = steps[row, i], steps[row, i + DIFFERENCE_LAG]
            change = np.int32(after) - np.int32(before)
            usable[i] &= (before != _MISSING) & (after != _MISSING) & (abs(change) <= largest)
            difference[k, i] = np.float32(change) * np.float32(0.001)
    for k in range(_COMPARED_ROWS.size):
        for i in range(count):
            difference[k, i] *= usable[i]
        for m in range(k + 1):
            total = np.float32(0)
            for i in range(count):
                total += difference[k, i] * difference[m, i]
            products[k, m] = total
            products[m, k] = total
