"""From a source record to 10 s segments of the signal contract, or a reason why not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.records.record import EcgRecord, Reason, Unusable
from shared_model.kernels import extremes
from shared_model.leads import (
    DURATION_S,
    LARGEST_STEP,
    LEADS,
    MISSING,
    SAMPLES,
    SAMPLING_RATE_HZ,
    STEPS_PER_MV,
    arrange,
    derive_limb_leads,
    resample,
    to_steps,
)

SHORTEST_S = 5
MOST_SEGMENTS = 6
MOST_MISSING = 0.5
LARGEST_PLAUSIBLE_MV = 15.0
FLAT_MV = 1e-3  # below one step of the store: nothing was recorded
# The QRS fills about a tenth of a beat: the 99th centile still sees it, a few spikes or pacing pulses do not.
PEAK_CENTILE = 99.0
ALL_LEADS = (1 << len(LEADS)) - 1
NONE_ABSENT = np.zeros(len(LEADS), bool)


@dataclass(frozen=True)
class Segments:
    """What is stored of one record."""

    steps: NDArray[np.int16]
    """(segment, 12, 2500), 1 uV a step."""
    starts_s: tuple[float, ...]
    """Where each segment begins in the record."""
    lead_masks: tuple[int, ...]
    """Of each segment; bit i: LEADS[i] is present."""
    flat_leads: tuple[str, ...]
    """Leads masked in some segment because they were constant."""
    left_out: int
    """Segments that did not pass while others did."""


def cut_segments(record: EcgRecord) -> Segments:
    """Reorder, resample to 250 Hz, and cut into at most 6 consecutive 10 s segments.

    A piece of 5 to 10 s (a short record, or the end of a longer one) is padded at its end with MISSING. A
    lead that is constant over a segment is masked. Limb leads that the source lacks are derived from I and
    II. One usable lead is enough: the mask is stored, and a study decides how many leads it asks for.

    Raises:
        Unusable: shorter than 5 s, or no segment has a lead that is neither flat nor mostly missing.
    """
    duration_s = record.signal_mv.shape[1] / record.sampling_rate_hz
    if duration_s < SHORTEST_S:
        raise Unusable(
            Reason.TOO_SHORT, f"{duration_s:.1f} s; an ECG of at least {SHORTEST_S} s is needed: leave it out"
        )
    signal = resample(record.signal_mv, record.sampling_rate_hz, SAMPLING_RATE_HZ)
    absent = NONE_ABSENT
    if record.lead_names != LEADS:
        signal = arrange(signal, record.lead_names)
        absent = np.array([lead not in record.lead_names for lead in LEADS])
    kept: list[tuple[float, NDArray[np.int16]]] = []
    flat: set[str] = set()
    faults: list[Unusable] = []
    for start in range(0, min(signal.shape[1], MOST_SEGMENTS * SAMPLES), SAMPLES):
        piece = np.ascontiguousarray(signal[:, start : start + SAMPLES])
        if piece.shape[1] < SHORTEST_S * SAMPLING_RATE_HZ:
            break
        try:
            cleaned, flat_here = _checked(piece, absent)
        except Unusable as unusable:
            faults.append(unusable)
            continue
        flat.update(flat_here)
        kept.append((start / SAMPLING_RATE_HZ, _padded(to_steps(cleaned))))
    if not kept:
        raise faults[0]
    steps = np.stack([piece for _, piece in kept])
    return Segments(
        steps=steps,
        starts_s=tuple(start for start, _ in kept),
        lead_masks=tuple(lead_mask(piece) for piece in steps),
        flat_leads=tuple(lead for lead in LEADS if lead in flat),
        left_out=len(faults),
    )


def lead_mask(steps: NDArray[np.int16]) -> int:
    """Bit i is set where LEADS[i] of (12, 2500) has any sample."""
    if (steps[:, 0] != MISSING).all():  # nearly always, and much faster to see
        return ALL_LEADS
    present = (steps != MISSING).any(axis=1)
    return int(present @ (1 << np.arange(len(LEADS))))


def _checked(piece: NDArray[np.float32], absent: NDArray[np.bool_]) -> tuple[NDArray[np.float32], list[str]]:
    """One segment with flat leads masked and limb leads derived; raises Unusable if nothing is left."""
    least, largest, missing = extremes(piece)
    span = largest - least
    usable = span >= FLAT_MV  # false for NaN, a lead without samples
    if not usable.all():
        recorded = ~np.isnan(span)
        if not recorded.any():
            raise Unusable(Reason.MOSTLY_MISSING, f"no sample in {DURATION_S} s; export it again")
        if not usable.any():
            raise Unusable(Reason.ALL_LEADS_FLAT, "every lead is a constant; check the electrodes and record again")
    share = missing[usable].sum() / (usable.sum() * piece.shape[1])
    if share > MOST_MISSING:
        raise Unusable(Reason.MOSTLY_MISSING, f"{share:.0%} of the samples are missing; export it again")
    if max(largest[usable].max(), -least[usable].min()) > LARGEST_PLAUSIBLE_MV:
        _refuse_implausible(piece[usable])
    if usable.all():
        return piece, []
    flat = recorded & ~usable
    piece = piece.copy()
    piece[flat] = np.nan
    return derive_limb_leads(piece, absent), [LEADS[lead] for lead in np.flatnonzero(flat)]


def _refuse_implausible(signal_mv: NDArray[np.float32]) -> None:
    """No surface ECG is larger than 15 mV; such values come from a wrong gain or unit, or a raw DC offset.

    A spike or a pacing pulse may be: it is the 99th centile around the middle that counts.
    """
    middle = np.nanmedian(signal_mv, axis=1, keepdims=True)
    peak_mv = float(np.nanpercentile(np.abs(signal_mv - middle), PEAK_CENTILE, axis=1).max())
    offset_mv = float(np.abs(middle).max())
    if peak_mv > LARGEST_PLAUSIBLE_MV or peak_mv + offset_mv > LARGEST_STEP / STEPS_PER_MV:
        raise Unusable(
            Reason.IMPLAUSIBLE_AMPLITUDE,
            f"peaks of {peak_mv:.0f} mV around {offset_mv:.0f} mV; check gain and unit in the header, and "
            "remove any electrode offset",
        )


def _padded(steps: NDArray[np.int16]) -> NDArray[np.int16]:
    if steps.shape[1] == SAMPLES:
        return steps
    return np.pad(steps, ((0, 0), (0, SAMPLES - steps.shape[1])), constant_values=MISSING)
