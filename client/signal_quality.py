"""How good an ECG is: a score and findings that a person can check on paper. Measures: client/signal_measures.py.

What is looked for is what the entries to the Computing in Cardiology Challenge 2011 found telling (Silva, Moody,
Celi, CinC 2011;38:273): flat and saturated leads, values outside any ECG, noise, baseline wander. Limits are
chosen by what can be read on ECG paper (10 mm/mV), and are the same for every lead.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from client.quality_policy import Finding, Quality
from client.signal_measures import COMPARED, Measures, measure
from shared_model.leads import LEADS, SAMPLES

LIMITS: Mapping[Finding, float] = {
    Finding.FLAT_LEAD: 0.3,  # share of the time
    Finding.MISSING_SAMPLES: 1.0,  # missing to present time
    Finding.CLIPPED: 0.02,  # share of the samples: 16 ms of each beat at 75/min
    Finding.OFF_SCALE: 0.1,  # share of the samples; pacing spikes, two a beat, take less
    Finding.NOISE: 0.1,  # mV; 1 mm on paper
    Finding.BASELINE_WANDER: 1.5,  # mV; 15 mm on paper
}
"""The score of a lead is the product of 1 / (1 + (value / limit)^2): a half at a limit, above which it is a finding."""
SMALLEST_QRS_MV = 0.03
# The largest sum of all published: 601 mm at 10 mm/mV, of 17 hearts of 1,000 g or more (Roberts and Podolak,
# Am J Cardiol 1985;55:485). Normal is up to 175 mm.
LARGEST_QRS_SUM_MV = 60.1
LARGEST_RESIDUAL = 0.5
OPPOSED = -0.4
FLAT_LIMB_SHARE = 0.05
# Einthoven and Goldberger: each of these and its parts in I and II (Kligfield et al., Circulation 2007;115:1306).
_MADE_OF = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
_SPOILT = (Finding.FLAT_LEAD, Finding.MISSING_SAMPLES, Finding.CLIPPED, Finding.OFF_SCALE)
_LIMB_LEADS = LEADS[:6]
_LEAD_LIMITS = np.array(list(LIMITS.values()))


def assess(steps: NDArray[np.int16], recorded: NDArray[np.bool_]) -> Quality:
    """Judge one ECG before flat leads are masked and limb leads derived.

    `steps` (12, n): 250 Hz, 1 uV a step, MISSING for an absent lead or a missing sample; `recorded` (12,): the
    leads that the source has. A record without any has the score 0.

    Raises:
        ValueError: not 12 leads, or shorter than a second.
    """
    measures = measure(steps, recorded)
    excess = _excess(measures)
    findings: dict[Finding, tuple[str, ...]] = {}
    above = (excess > 1) & recorded[:, None]
    for column in np.flatnonzero(above.any(axis=0)):
        findings[tuple(LIMITS)[column]] = tuple(LEADS[lead] for lead in np.flatnonzero(above[:, column]))
    if _qrs_sum_mv(measures, findings) > LARGEST_QRS_SUM_MV:
        findings[Finding.WRONG_GAIN] = ()
    findings |= _limb_findings(measures, findings, recorded)
    if steps.shape[1] < SAMPLES:
        findings[Finding.SHORT_DURATION] = ()
    of_leads = (1 / (1 + excess * excess)).prod(axis=1)[recorded]
    score = (float(of_leads.mean()) + float(of_leads.min())) / 2 if of_leads.size else 0.0
    return Quality(score, findings, tuple(LEADS[lead] for lead in np.flatnonzero(recorded)))


def _excess(measures: Measures) -> NDArray[np.float64]:
    """(12, 6): how many times its limit each measure is, in the order of LIMITS."""
    excess = np.stack(
        (
            measures.flat_share,
            measures.missing_share / np.maximum(1 - measures.missing_share, 1e-6),
            measures.rail_share,
            measures.off_scale_share,
            measures.noise_mv,
            measures.wander_mv,
        ),
        axis=1,
    )
    excess /= _LEAD_LIMITS
    too_small = SMALLEST_QRS_MV / np.maximum(measures.span_mv, 1e-6)
    too_small[measures.missing_share == 1] = 0
    np.maximum(excess[:, 0], too_small, out=excess[:, 0])
    return excess


def _qrs_sum_mv(measures: Measures, findings: Mapping[Finding, tuple[str, ...]]) -> float:
    """The QRS complexes of all leads, recorded or derived, from peak to peak; a noisy lead's span is not its QRS."""
    noisy = findings.get(Finding.NOISE, ())
    return sum(span for lead, span in zip(LEADS, measures.span_mv.tolist(), strict=True) if lead not in noisy)


def _limb_findings(
    measures: Measures, findings: Mapping[Finding, tuple[str, ...]], recorded: NDArray[np.bool_]
) -> dict[Finding, tuple[str, ...]]:
    """What the limb leads say about each other and against V5 and V6.

    Electrodes exchanged on the patient give limb leads that still fit each other: they show against the chest
    leads only. Leads exchanged in the file, or taken from elsewhere, do not fit each other.
    """
    spoilt = {lead for finding in _SPOILT for lead in findings.get(finding, ())}
    usable = {lead for lead, there in zip(LEADS, recorded.tolist(), strict=True) if there and lead not in spoilt}
    if not {"I", "II"} <= usable:
        return {}
    found: dict[Finding, tuple[str, ...]] = {}
    wrong = tuple(
        lead for lead, parts in _MADE_OF.items() if lead in usable and _residual(measures.products, lead, parts)
    )
    if wrong:
        return {Finding.INCONSISTENT_LIMB_LEADS: wrong}
    if _arm_on_right_leg(measures.span_mv) or ({"V5", "V6"} <= usable and _upside_down(measures)):
        found[Finding.LIMB_LEAD_REVERSAL] = tuple(lead for lead in _LIMB_LEADS if recorded[LEADS.index(lead)])
    return found


def _residual(products: NDArray[np.float64], lead: str, parts: tuple[float, float]) -> bool:
    """Whether more than half of the energy of a lead is not what I and II make it."""
    one, two = parts
    row = COMPARED.index(lead)
    made = one * one * products[0, 0] + 2 * one * two * products[0, 1] + two * two * products[1, 1]
    both = one * products[0, row] + two * products[1, row]
    residual = products[row, row] - 2 * both + made
    return bool(residual > LARGEST_RESIDUAL * max(products[row, row], made))


def _arm_on_right_leg(span_mv: NDArray[np.float64]) -> bool:
    """An arm electrode on the right leg makes II (right arm) or III (left arm) the difference of two legs: flat."""
    one, two, three = span_mv[:3].tolist()
    return two < FLAT_LIMB_SHARE * max(one, three) or 0 < three < FLAT_LIMB_SHARE * max(one, two)


def _upside_down(measures: Measures) -> bool:
    """Whether I, or II with aVR upright, is the opposite of both V5 and V6 while V6 is upright.

    Exchanged arms turn I over, right arm and left leg exchanged turn II over. In dextrocardia and where V6 is
    negative for another reason, I and V6 agree or V6 is not upright.
    """
    if measures.upright[LEADS.index("V6")] <= 0:
        return False
    products = measures.products
    size = np.sqrt(np.diag(products))
    if not size[[0, 1, 6, 7]].all():
        return False
    against_i, against_ii = (products[row, 6:] / (size[row] * size[6:]) for row in (0, 1))
    avr_upright = products[0, 7] + products[1, 7] < 0  # aVR = -(I + II) / 2
    return bool((against_i < OPPOSED).all() or ((against_ii < OPPOSED).all() and avr_upright))
