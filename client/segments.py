"""From a source record to 10 s segments of the signal contract, or a reason why not."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.quality_policy import Finding, Quality, QualityPolicy, apply_policy
from client.records.record import EcgRecord, Reason, Unusable
from client.records.wfdb_header import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
from client.signal_quality import assess
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
    qualities: tuple[float, ...]
    """Of each segment, 0 useless to 1 clean."""
    findings: Mapping[Finding, tuple[str, ...]]
    """What was found in some segment, and in which leads."""
    masked: tuple[str, ...]
    """Leads masked in some segment."""
    left_out: tuple[str, ...]
    """Why segments did not pass while others did."""
    content: bytes
    """SHA-256 of the whole signal as it was before any lead was masked, so that the site's policy has no part in it."""


@dataclass(frozen=True)
class Segment:
    """One 10 s ECG that passed."""

    start_s: float
    steps: NDArray[np.int16]
    quality: Quality
    masked: tuple[str, ...]


def cut_segments(record: EcgRecord, policy: QualityPolicy = QualityPolicy()) -> Segments:
    """Reorder, resample to 250 Hz, cut into at most 6 consecutive 10 s segments, and judge each by the site's policy.

    A piece of 5 to 10 s (a short record, or the end of a longer one) is padded at its end with MISSING. A
    lead that is constant over a segment is masked, and so is what the policy wants masked. Limb leads that the
    source lacks are derived from I and II. One usable lead is enough: the mask is stored, and a study decides how
    many leads it asks for.

    Raises:
        Unusable: shorter than 5 s, or no segment has a lead that is neither flat nor mostly missing, or passes, or
            the gain of one is wrong.
    """
    if not LOWEST_RATE_HZ <= record.sampling_rate_hz <= HIGHEST_RATE_HZ:
        raise Unusable(Reason.NO_SAMPLING_RATE, f"{record.sampling_rate_hz:g} Hz is no rate of an ECG; export it again")
    if record.signal_mv.ndim != 2 or len(record.signal_mv) != len(record.lead_names):
        shape = "x".join(map(str, record.signal_mv.shape))
        detail = f"a signal of shape {shape} for {len(record.lead_names)} leads; export it again"
        raise Unusable(Reason.UNREADABLE, detail)
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
    kept: list[Segment] = []
    content = hashlib.sha256()
    faults: list[Unusable] = []
    for start in range(0, min(signal.shape[1], MOST_SEGMENTS * SAMPLES), SAMPLES):
        piece = np.ascontiguousarray(signal[:, start : start + SAMPLES])
        if piece.shape[1] < SHORTEST_S * SAMPLING_RATE_HZ:
            break
        steps = to_steps(piece)
        content.update(steps.data)
        try:
            kept.append(_segment(start / SAMPLING_RATE_HZ, piece, steps, absent, policy))
        except Unusable as unusable:
            faults.append(unusable)
            if unusable.reason == Reason.WRONG_GAIN:  # what is wrong in one piece is wrong in all of them
                raise
    if not kept:
        raise faults[0]
    return _joined(kept, tuple(fault.reason for fault in faults), content.digest())


def _joined(kept: Sequence[Segment], left_out: tuple[str, ...], content: bytes) -> Segments:
    leads_of: dict[Finding, set[str]] = {}
    for segment in kept:
        for finding, leads in segment.quality.findings.items():
            leads_of.setdefault(finding, set()).update(leads)
    masked = {lead for segment in kept for lead in segment.masked}
    return Segments(
        steps=kept[0].steps[np.newaxis] if len(kept) == 1 else np.stack([segment.steps for segment in kept]),
        starts_s=tuple(segment.start_s for segment in kept),
        lead_masks=tuple(lead_mask(segment.steps) for segment in kept),
        qualities=tuple(segment.quality.score for segment in kept),
        findings={finding: tuple(lead for lead in LEADS if lead in leads) for finding, leads in leads_of.items()},
        masked=tuple(lead for lead in LEADS if lead in masked),
        left_out=left_out,
        content=content,
    )


def lead_mask(steps: NDArray[np.int16]) -> int:
    """Bit i is set where LEADS[i] of (12, 2500) has any sample."""
    if (steps[:, 0] != MISSING).all():  # nearly always, and much faster to see
        return ALL_LEADS
    present = (steps != MISSING).any(axis=1)
    return int(present @ (1 << np.arange(len(LEADS))))


def _segment(
    start_s: float,
    piece: NDArray[np.float32],
    steps: NDArray[np.int16],
    absent: NDArray[np.bool_],
    policy: QualityPolicy,
) -> Segment:
    """One piece judged, with leads masked and limb leads derived; raises Unusable if nothing is left."""
    constant = _constant_leads(steps, piece)
    quality = assess(steps, ~absent)
    masked = {*constant, *apply_policy(policy, quality)}
    if masked.issuperset(quality.recorded):
        raise Unusable(Reason.LOW_QUALITY, "no lead is usable; check the electrodes and record again")
    if masked or absent.any():
        cleaned = piece.copy()
        cleaned[[lead in masked for lead in LEADS]] = np.nan
        steps = to_steps(derive_limb_leads(cleaned, absent))
    return Segment(start_s, _padded(steps), quality, tuple(masked))


def _constant_leads(steps: NDArray[np.int16], piece: NDArray[np.float32]) -> list[str]:
    """The leads that hold one value throughout. Raises Unusable where that, or what is missing, leaves nothing."""
    least, largest = steps.min(axis=1).tolist(), steps.max(axis=1).tolist()  # lists: twelve numbers are few for numpy
    present = steps != MISSING if min(least) == MISSING else None
    if present is not None:
        least = np.where(present, steps, LARGEST_STEP).min(axis=1).tolist()
    usable = [high > low for low, high in zip(least, largest, strict=True)]
    if present is not None:
        _refuse_mostly_missing(present, usable)
    if not any(usable):
        recorded = piece[[high != MISSING for high in largest]]
        if (np.nanmax(recorded, axis=1) - np.nanmin(recorded, axis=1) > 1 / STEPS_PER_MV).any():
            _refuse_implausible(recorded)  # clipped to one value: too large rather than flat
        raise Unusable(Reason.ALL_LEADS_FLAT, "every lead is a constant; check the electrodes and record again")
    if max(*largest, -min(least)) > LARGEST_PLAUSIBLE_MV * STEPS_PER_MV:
        _refuse_implausible(piece[usable])
    return [lead for lead, low, high in zip(LEADS, least, largest, strict=True) if low == high]


def _refuse_mostly_missing(present: NDArray[np.bool_], usable: list[bool]) -> None:
    if not present.any():
        raise Unusable(Reason.MOSTLY_MISSING, f"no sample in {DURATION_S} s; export it again")
    share = 1 - present[usable].mean() if any(usable) else 0.0
    if share > MOST_MISSING:
        raise Unusable(Reason.MOSTLY_MISSING, f"{share:.0%} of the samples are missing; export it again")


def _refuse_implausible(signal_mv: NDArray[np.float32]) -> None:
    """Raises Unusable where leads with samples above 15 mV are that large throughout.

    No surface ECG is: such values come from a wrong gain or unit, or a raw DC offset. A spike or a pacing pulse may
    be that large, so it is the 99th centile around the middle that counts.
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
