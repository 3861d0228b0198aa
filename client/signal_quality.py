"""How good an ECG is: a score and findings that a person can check on paper. Measures: client/signal_measures.py.

What is looked for is what the entries to the Computing in Cardiology Challenge 2011 found telling (Silva, Moody,
Celi, CinC 2011;38:273): flat and saturated leads, values outside any ECG, noise, baseline wander. Limits are
chosen by what can be read on ECG paper (10 mm/mV), and are the same for every lead.
"""

from collections.abc import Mapping
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from client.quality_policy import Finding, Quality
from client.signal_measures import COMPARED, Measures, measure
from shared_model.kernels import compiled
from shared_model.leads import LEADS, SAMPLES

LIMITS: Mapping[Finding, float] = {
    Finding.FLAT_LEAD: 0.3,  # share of the time
    Finding.MISSING_SAMPLES: 0.5,  # share of the time
    Finding.CLIPPED: 0.02,  # share of the samples: 16 ms of each beat at 75/min
    Finding.OFF_SCALE: 0.1,  # share of the samples; pacing spikes, two a beat, take less
    Finding.NOISE: 0.1,  # mV; 1 mm on paper
    Finding.BASELINE_WANDER: 1.5,  # mV; 15 mm on paper
}
"""In the order of the measures' columns. A measure above its limit is a finding."""
_SHARES = 4  # the first columns, which lie between 0 and 1
# The largest sum found published: 601 mm at 10 mm/mV, of 17 hearts of 1,000 g or more (Roberts and Podolak, The king
# of hearts, Am J Cardiol 1985;55:485). Normal is up to 175 mm.
LARGEST_QRS_SUM_MV = 60.1
LARGEST_RESIDUAL = 0.5
OPPOSED = -0.4  # correlation of differences
UPRIGHT = 0.2
FLAT_LIMB_SHARE = 0.05
# Einthoven and Goldberger: each of these and its parts in I and II (Kligfield et al., Circulation 2007;115:1306).
_MADE_OF = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
_SPOILT = (Finding.FLAT_LEAD, Finding.MISSING_SAMPLES, Finding.CLIPPED, Finding.OFF_SCALE)
_FINDINGS = tuple(LIMITS)
_LIMITS = np.array([limit / (1 - limit) if i < _SHARES else limit for i, limit in enumerate(LIMITS.values())])


def assess(steps: NDArray[np.int16], recorded: NDArray[np.bool_]) -> Quality:
    """Judge one ECG before flat leads are masked and limb leads derived.

    `steps` (12, n): 250 Hz, 1 uV a step, MISSING for an absent lead or a missing sample; `recorded` (12,): the
    leads that the source has. A record without any has the score 0.

    Raises:
        ValueError: not 12 leads, or shorter than a second.
    """
    measures = measure(steps, recorded)
    excess, of_all = _excess_and_scores(measures.table, _LIMITS)
    of_leads = of_all[recorded].tolist()
    findings: dict[Finding, tuple[str, ...]] = {}
    if min(of_leads, default=0) <= 0.5:  # one measure above its limit takes a lead there
        for column, lead in np.argwhere(excess.T > 1).tolist():
            findings[_FINDINGS[column]] = (*findings.get(_FINDINGS[column], ()), LEADS[lead])
    if _qrs_sum_mv(measures, findings) > LARGEST_QRS_SUM_MV:
        findings[Finding.WRONG_GAIN] = ()
    names = tuple(lead for lead, there in zip(LEADS, recorded.tolist(), strict=True) if there)
    findings |= _limb_findings(measures, findings, names)
    if steps.shape[1] < SAMPLES:
        findings[Finding.SHORT_DURATION] = ()
    score = (sum(of_leads) / len(of_leads) + min(of_leads)) / 2 if of_leads else 0.0
    return Quality(score, findings, names)


@compiled
def _excess_and_scores(
    table: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(12, 6): how many times its limit each measure is; (12,): the score of each lead.

    A share s counts as s / (1 - s). The score of a lead is the product of 1 / (1 + excess^2): a half at a limit, 0
    where all is flat or missing.
    """
    excess = np.empty((table.shape[0], limits.size))
    scores = np.ones(table.shape[0])
    for lead in range(table.shape[0]):
        for column in range(limits.size):
            value = table[lead, column]
            if column < _SHARES:
                value /= max(1 - value, 1e-9)
            excess[lead, column] = value / limits[column]
            scores[lead] /= 1 + excess[lead, column] ** 2
    return excess, scores


def _qrs_sum_mv(measures: Measures, findings: Mapping[Finding, tuple[str, ...]]) -> float:
    """The QRS complexes of all leads, recorded or derived, from peak to peak; a noisy lead's span is not its QRS."""
    noisy = findings.get(Finding.NOISE, ())
    spans_mv = measures.column("span_mv").tolist()
    return float(sum(span for lead, span in zip(LEADS, spans_mv, strict=True) if lead not in noisy))


def _limb_findings(
    measures: Measures, findings: Mapping[Finding, tuple[str, ...]], recorded: tuple[str, ...]
) -> dict[Finding, tuple[str, ...]]:
    """What the limb leads say about each other and against V5 and V6.

    Electrodes exchanged on the patient give limb leads that still fit each other: they show against the chest
    leads only. Leads exchanged in the file, or taken from elsewhere, do not fit each other.
    """
    usable = set(recorded).difference(*(findings.get(finding, ()) for finding in _SPOILT))
    if not {"I", "II"} <= usable:
        return {}
    products = measures.products.tolist()
    found: dict[Finding, tuple[str, ...]] = {}
    wrong = tuple(lead for lead in _MADE_OF if lead in usable and _contradicts(products, lead))
    if wrong:
        found[Finding.INCONSISTENT_LIMB_LEADS] = wrong
    if not {"III", "aVR"}.isdisjoint(wrong):  # then I and II themselves are in doubt
        return found
    upright = measures.column("upright")[LEADS.index("V6")] > UPRIGHT
    if _arm_on_right_leg(measures) or ({"V5", "V6"} <= usable and upright and _upside_down(products)):
        found[Finding.LIMB_LEAD_REVERSAL] = tuple(lead for lead in recorded if lead in LEADS[:6])
    return found


def _contradicts(products: list[list[float]], lead: str) -> bool:
    """Whether the energy of what is left of a lead without its parts is more than half of the lead's."""
    one, two = _MADE_OF[lead]
    row = COMPARED.index(lead)
    made = one * one * products[0][0] + 2 * one * two * products[0][1] + two * two * products[1][1]
    residual = products[row][row] - 2 * (one * products[0][row] + two * products[1][row]) + made
    return residual > LARGEST_RESIDUAL * max(products[row][row], made)


def _arm_on_right_leg(measures: Measures) -> bool:
    """An arm electrode on the right leg makes II (right arm) or III (left arm) the difference of two legs: flat."""
    one, two, three = map(float, measures.column("span_mv")[:3])
    return two < FLAT_LIMB_SHARE * max(one, three) or three < FLAT_LIMB_SHARE * max(one, two)


def _upside_down(products: list[list[float]]) -> bool:
    """Whether I, or II with aVR upright, is the opposite of both V5 and V6. It is asked where V6 is upright.

    Exchanged arms turn I over, right arm and left leg exchanged turn II over. In dextrocardia, and where V6 is
    negative for another reason, I and V6 agree or V6 is not upright.
    """
    opposed = [
        all(products[row][chest] < OPPOSED * sqrt(products[row][row] * products[chest][chest]) for chest in (6, 7))
        for row in (0, 1)
    ]
    avr_upright = products[0][7] + products[1][7] < 0  # aVR = -(I + II) / 2
    return opposed[0] or (opposed[1] and avr_upright)
