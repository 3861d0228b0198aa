"""The signal contract: twelve leads by name, 250 Hz, 10 s, millivolt, stored as int16 steps of 1 uV.

Everything that enters a store passes through here, and everything read from a store is described here.
"""

import re
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared_model.kernels import decimate, rounded

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
INDEPENDENT_LEADS = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
"""The other four follow from I and II."""
LEAD_VECTORS = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
"""(independent lead, x left / y down / z back): Dower, Machado, Osborne, Clin Cardiol 1980;3:87."""
SAMPLING_RATE_HZ = 250
DURATION_S = 10
SAMPLES = SAMPLING_RATE_HZ * DURATION_S
STEPS_PER_MV = 1000
MISSING = np.int16(-32768)
LARGEST_STEP = 32767

_LEAD_BY_UPPER = {lead.upper(): lead for lead in LEADS} | {f"C{i}": f"V{i}" for i in range(1, 7)}
# "ECG lead II", "MDC_ECG_LEAD_V1" (ISO/IEEE 11073-10102), "Lead I", "C1" (IEC 60601-2-25 for V1).
_LEAD_NAME = re.compile(r"(?:MDC[ _-]?)?(?:ECG[ _-]?)?(?:LEAD[ _-]?)?(I{1,3}|AV[RLF]|[VC][1-6])")
_MILLIVOLT_BY_UNIT = {"mv": 1.0, "uv": 1e-3, "v": 1e3, "millivolt": 1.0, "microvolt": 1e-3, "volt": 1e3}
_MICRO = str.maketrans({"\u00b5": "u", "\u03bc": "u"})  # micro sign, Greek mu


def canonical_lead(name: str) -> str | None:
    """The canonical name of a lead ("AVR", "Lead I", "C1" ...), or None if it is not one of the twelve.

    A bare "V" or "MLII" is None: which of the twelve it stands for cannot be known. So is "-aVR".
    """
    match = _LEAD_NAME.fullmatch(name.strip().upper())
    return _LEAD_BY_UPPER[match.group(1)] if match else None


def millivolt_per_unit(unit: str) -> float | None:
    """How many millivolt one `unit` is ("mV", "uV", "V" in any case), or None for an unknown unit."""
    return _MILLIVOLT_BY_UNIT.get(unit.strip().translate(_MICRO).lower())


def resample(signal: NDArray[np.floating], from_hz: float, to_hz: float) -> NDArray[np.float32]:
    """Anti-aliased polyphase resampling of (lead, time); NaN marks a missing sample, before and after.

    Missing samples are bridged by straight lines for the filter and masked again afterwards. The signal is
    continued past its ends along its own line, so that an offset does not ring at the edges.
    Returns ceil(time * to_hz / from_hz) samples a lead, float32, in the unit that came in.
    """
    up, down = _ratio(from_hz, to_hz)
    if up == down:
        return signal.astype(np.float32)
    if up == 1:  # the common case, compiled; where a sample is missing NaN comes out, and the long way is taken
        output = decimate(np.ascontiguousarray(signal, np.float32), down)
        if not np.isnan(output).any():
            return output
    missing = np.isnan(signal)
    any_missing = bool(missing.any())
    bridged = _bridged(signal, missing) if any_missing else signal
    if up == 1:
        output = decimate(np.ascontiguousarray(bridged, np.float32), down)
    else:
        from scipy.signal import resample_poly  # 80 MB and half a second, which most archives do not need

        output = resample_poly(bridged, up, down, axis=-1, padtype="line").astype(np.float32)
    if any_missing:
        position = np.arange(output.shape[-1]) * (down / up)
        last = signal.shape[-1] - 1
        before = np.minimum(np.floor(position).astype(np.int64), last)
        after = np.minimum(np.ceil(position).astype(np.int64), last)
        output[missing[:, before] | missing[:, after]] = np.nan
    return output


@lru_cache(maxsize=32)
def _ratio(from_hz: float, to_hz: float) -> tuple[int, int]:
    ratio = Fraction(to_hz).limit_denominator(1000) / Fraction(from_hz).limit_denominator(1000)
    return ratio.limit_denominator(2000).as_integer_ratio()


def _bridged(signal: NDArray[np.floating], missing: NDArray[np.bool_]) -> NDArray[np.floating]:
    """`signal` with missing samples on straight lines between their neighbours; an all-missing lead is 0."""
    bridged = signal.copy()
    time = np.arange(signal.shape[-1])
    for lead, gaps in enumerate(missing):
        if gaps.all():
            bridged[lead] = 0
        elif gaps.any():
            bridged[lead, gaps] = np.interp(time[gaps], time[~gaps], signal[lead, ~gaps])
    return bridged


def arrange(signal_mv: NDArray[np.floating], lead_names: tuple[str, ...]) -> NDArray[np.float32]:
    """Put (lead, time) into canonical order by name: (12, time) float32, NaN where a lead is absent.

    Of two channels with the same lead name the first is used. Unknown names are left out.
    """
    arranged = np.full((len(LEADS), signal_mv.shape[-1]), np.nan, np.float32)
    for channel in reversed(range(len(lead_names))):
        lead = canonical_lead(lead_names[channel])
        if lead is not None:
            arranged[LEADS.index(lead)] = signal_mv[channel]
    return arranged


def derive_limb_leads(signal_mv: NDArray[np.float32], absent: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Fill absent III, aVR, aVL, aVF of (12, time) from I and II; returns a new array.

    Einthoven: III = II - I. Goldberger: aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2
    (Kligfield et al., Circulation 2007;115:1306).
    """
    lead_i, lead_ii = signal_mv[0], signal_mv[1]
    derived = (lead_ii - lead_i, -(lead_i + lead_ii) / 2, lead_i - lead_ii / 2, lead_ii - lead_i / 2)
    filled = signal_mv.copy()
    for lead, values in enumerate(derived, start=LEADS.index("III")):
        if absent[lead]:
            filled[lead] = values
    return filled


def to_steps(signal_mv: NDArray[np.floating]) -> NDArray[np.int16]:
    """Millivolt to int16 steps of 1 uV, same shape; NaN becomes MISSING, beyond +-32.767 mV is clipped."""
    flat = np.ascontiguousarray(signal_mv).reshape(-1)
    steps: NDArray[np.int16] = rounded(flat, np.float32(STEPS_PER_MV), np.float32(LARGEST_STEP), MISSING)
    return steps.reshape(signal_mv.shape)


def to_millivolt(steps: NDArray[np.int16]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Stored steps (..., 12, 2500) to (signal in mV float32 with 0 where missing, present bool)."""
    present = steps != MISSING
    signal_mv = np.multiply(steps, np.float32(1 / STEPS_PER_MV), dtype=np.float32)
    np.multiply(signal_mv, present, out=signal_mv)
    return signal_mv, present
