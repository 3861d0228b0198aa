"""What can be found wrong with an ECG, and what a hospital wants done about each: `[quality]` of site.toml."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from client.records.record import Reason, Unusable


class Finding(StrEnum):
    """What was found on an ECG. Each is explained, with its limit, in docs/quality.md."""

    FLAT_LEAD = "flat_lead"
    MISSING_SAMPLES = "missing_samples"
    CLIPPED = "clipped"
    OFF_SCALE = "off_scale"
    NOISE = "noise"
    BASELINE_WANDER = "baseline_wander"
    WRONG_GAIN = "wrong_gain"
    LIMB_LEAD_REVERSAL = "limb_lead_reversal"
    INCONSISTENT_LIMB_LEADS = "inconsistent_limb_leads"
    SHORT_DURATION = "short_duration"


EXPLANATIONS: Mapping[Finding, str] = {
    Finding.FLAT_LEAD: "no heart signal; check the electrode",
    Finding.MISSING_SAMPLES: "samples are missing more than half of the time; export it again",
    Finding.CLIPPED: "the peaks are cut off at the recorder's limit; record again at a lower gain",
    Finding.OFF_SCALE: "more than 10 mV from the baseline, which no heart gives; check electrode and offset",
    Finding.NOISE: "muscle or mains noise of more than 0.1 mV between the beats; record again at rest",
    Finding.BASELINE_WANDER: "the baseline wanders by more than 1.5 mV; record again at rest",
    Finding.WRONG_GAIN: (
        "the QRS complexes of all leads add up to more than any heart gives; check the gain and unit in the header "
        "(200/mV where 1000/mV is meant makes an ECG five times too large)"
    ),
    Finding.LIMB_LEAD_REVERSAL: (
        "upside down against V5 and V6, or flat, as if limb electrodes were exchanged; compare with an earlier ECG"
    ),
    Finding.INCONSISTENT_LIMB_LEADS: (
        "not what I and II make them (Einthoven, Goldberger), as if leads were named wrongly in the file; "
        "check the order of the leads"
    ),
    Finding.SHORT_DURATION: "shorter than 10 s; record 10 s",
}
"""One line each: what it is, and what to do."""

_REASONS = {Finding.WRONG_GAIN: Reason.WRONG_GAIN, Finding.SHORT_DURATION: Reason.TOO_SHORT}
LeadAction = Literal["accept", "mask", "turn_away"]
RecordAction = Literal["accept", "turn_away"]


@dataclass(frozen=True)
class Quality:
    """How good one ECG is, and what is wrong with it."""

    score: float
    """0 useless to 1 clean: half the mean over the recorded leads, half the worst of them. It says how well the
    traces can be read; gain, order of the leads and duration do not enter."""
    findings: Mapping[Finding, tuple[str, ...]]
    """The leads of each finding; none where it is about the whole record."""
    recorded: tuple[str, ...]
    """The leads that were looked at."""

    def explained(self) -> tuple[str, ...]:
        """One line a finding: what, where, what to do."""
        return tuple(explain(finding, leads) for finding, leads in self.findings.items())


def explain(finding: Finding, leads: tuple[str, ...]) -> str:
    """A finding in one line that a person understands."""
    return f"{finding}{' in ' if leads else ''}{', '.join(leads)}: {EXPLANATIONS[finding]}"


class QualityPolicy(BaseModel):
    """What a site does about each finding: store the ECG as it is, store it without the leads in question, or not.

    The defaults keep what is unusual and may be real, and part with what no heart can have made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum_score: float = Field(default=0.02, ge=0, le=1)
    """An ECG with a lower score is turned away. One clean lead of twelve has 0.04."""
    flat_lead: LeadAction = "mask"
    missing_samples: LeadAction = "accept"
    clipped: LeadAction = "accept"
    off_scale: LeadAction = "mask"
    noise: LeadAction = "accept"
    baseline_wander: LeadAction = "accept"
    wrong_gain: RecordAction = "turn_away"
    limb_lead_reversal: LeadAction = "accept"
    inconsistent_limb_leads: LeadAction = "accept"
    short_duration: RecordAction = "accept"


def apply_policy(policy: QualityPolicy, quality: Quality) -> tuple[str, ...]:
    """The leads to mask, in canonical order.

    Raises:
        Unusable: a finding is to be turned away, the score is below the minimum, or no lead is left.
    """
    to_mask: set[str] = set()
    for finding, leads in quality.findings.items():
        action = getattr(policy, finding.value)
        if action == "turn_away":
            reason = _REASONS.get(finding, Reason.LOW_QUALITY)
            raise Unusable(reason, EXPLANATIONS[finding] if finding in _REASONS else explain(finding, leads))
        if action == "mask":
            to_mask.update(leads)
    if quality.score < policy.minimum_score:
        raise Unusable(Reason.LOW_QUALITY, _summary(quality, f"quality {quality.score:.2f} of 1"))
    if to_mask.issuperset(quality.recorded):
        raise Unusable(Reason.LOW_QUALITY, _summary(quality, "no lead is usable"))
    return tuple(lead for lead in quality.recorded if lead in to_mask)


def _summary(quality: Quality, what: str) -> str:
    found = ", ".join(quality.findings) or "nothing by itself above its limit"
    return f"{what} ({found}); check the electrodes and record again"
