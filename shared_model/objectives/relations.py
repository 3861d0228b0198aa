"""Who is near whom: each relation describes an ECG once and measures distances between descriptions.

A lead that is all zero in a description is missing. Two ECGs are compared over the leads they share, scaled
to 12 leads; two that share none are infinitely far, so that mining leaves them out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.signal import firwin
from torch import Tensor

from shared_model.beats import DESCRIBED_SAMPLES, DESCRIPTOR_WIDTH, describe_beats
from shared_model.dtw import pairwise_dtw
from shared_model.dtw_torch import pairwise_dtw_torch
from shared_model.leads import LEADS
from shared_model.objectives.facts import absolute_difference, equal_distance
from shared_model.waves import MEASURED, UNITS, describe_waves, wave_distance

LEAD_COUNT = len(LEADS)
RAW_STRIDE = 4  # 250 Hz -> 62.5 Hz
RAW_SAMPLES = 625
LOW_PASS = torch.from_numpy(firwin(33, 25.0, fs=250.0)).float()  # 25 Hz is below the new Nyquist of 31.25 Hz
# Three nearly orthogonal looks at the heart.
DTW_LEADS = [LEADS.index(lead) for lead in ("II", "V1", "V5")]
DTW_BAND_SHARE = 0.1  # +-1 s of 10 s


@dataclass(frozen=True)
class Relation:
    """One way to say which ECGs are alike.

    Attributes:
        name: its name in studies.
        describe: (signals (n, 12, 2500) float32 mV 250 Hz 0 where missing, present (n, 12, 2500) bool)
            -> (n, width) float32.
        distance: (batch, width) float32 -> (batch, batch) float32, without gradient, diagonal 0, +inf where
            two ECGs cannot be compared.
        width: columns of a description.
        cached: True if describing is slow enough to be done once and stored at the site.
        facts: the description is these facts of an ECG (`client.facts`), not anything of its signal.
        learned: the distance is that of a network trained beforehand (`motif_distance`), not `distance`.
        version: raised whenever the description changes, so that what is stored is not mistaken for the new
            one.
        source: where it comes from.
        measured: for each of the first columns of a description the archive's measurement that replaces it where
            there is one, and the size of one unit of the column (`heart_rate_bpm`, 12.0).
    """

    name: str
    describe: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Tensor], Tensor]
    width: int
    cached: bool
    source: str
    version: int = 1
    facts: tuple[str, ...] = ()
    learned: bool = False
    measured: tuple[tuple[str, float], ...] = ()

    @property
    def cache_name(self) -> str:
        """Name under which a site stores the descriptions."""
        return f"{self.name}-{self.version}"


def describe_raw(signals: Tensor, present: Tensor) -> Tensor:  # noqa: ARG001
    """The whole ECG, low-passed at 25 Hz and taken at 62.5 Hz: (n, 12, 2500) -> (n, 12 * 625) mV."""
    n, leads, time = signals.shape
    kernel = LOW_PASS.to(signals.device)[None, None]
    slow = torch.nn.functional.conv1d(
        signals.reshape(n * leads, 1, time), kernel, stride=RAW_STRIDE, padding=kernel.shape[-1] // 2
    )
    return slow.reshape(n, -1)


def describe_dtw(signals: Tensor, present: Tensor) -> Tensor:
    """Leads II, V1 and V5 at 62.5 Hz: (n, 12, 2500) -> (n, 3 * 625) mV."""
    return describe_raw(signals[:, DTW_LEADS], present)


def describe_median_beat(signals: Tensor, present: Tensor) -> Tensor:
    """Median beat, RR and its variation (`beats.describe_beats`), on the CPU: (n, 12, 2500) -> (n, 1058)."""
    rows = describe_beats(signals.cpu().numpy(), present.cpu().numpy())
    return torch.from_numpy(rows).to(signals.device)


@torch.no_grad()
def l1_distance(raw: Tensor) -> Tensor:
    """Mean absolute difference over leads and time in mV: what the published code calls Euclidean."""
    leads = raw.reshape(len(raw), LEAD_COUNT, RAW_SAMPLES).transpose(0, 1)  # (lead, batch, time)
    shared = _over_shared_leads(torch.cdist(leads, leads, p=1.0), _has_lead(raw, LEAD_COUNT))
    return _zero_diagonal(shared / (LEAD_COUNT * RAW_SAMPLES))


@torch.no_grad()
def l2_distance(raw: Tensor) -> Tensor:
    """Euclidean distance over leads and time in mV."""
    squared = _squared_l2_by_lead(raw.reshape(len(raw), LEAD_COUNT, RAW_SAMPLES))
    return _zero_diagonal(_over_shared_leads(squared, _has_lead(raw, LEAD_COUNT)).sqrt())


@torch.no_grad()
def median_beat_distance(described: Tensor) -> Tensor:
    """Euclidean distance between median beats, RR and RR variation, weighted as `describe_beats` says."""
    beat, rhythm = described[:, :-2], described[:, -2:]
    squared = _squared_l2_by_lead(beat.reshape(len(beat), LEAD_COUNT, DESCRIBED_SAMPLES))
    squared = _over_shared_leads(squared, _has_lead(beat, LEAD_COUNT))
    squared = squared + (rhythm[:, None] - rhythm[None, :]).square().sum(-1)
    return _zero_diagonal(squared.sqrt())


@torch.no_grad()
def dtw_distance(raw: Tensor) -> Tensor:
    """DTW over time of all leads together; a missing lead is compared as zero."""
    series = raw.reshape(len(raw), -1, RAW_SAMPLES)
    if series.is_cuda:
        distance = pairwise_dtw_torch(series, DTW_BAND_SHARE)
    else:
        distance = torch.from_numpy(pairwise_dtw(series.cpu().numpy(), DTW_BAND_SHARE)).to(raw.device)
    blank = ~(raw != 0).any(1)
    return _zero_diagonal(distance.masked_fill(blank[:, None] | blank[None, :], torch.inf))


def describe_nothing(signals: Tensor, present: Tensor) -> Tensor:  # noqa: ARG001
    """For relations that look at facts, or at the whole ECG: (n, 12, 2500) -> (n, 0)."""
    return signals.new_zeros(len(signals), 0)


def _incomparable(described: Tensor) -> Tensor:
    return described.new_full((len(described), len(described)), torch.inf)


def _squared_l2_by_lead(x: Tensor) -> Tensor:
    """Squared Euclidean distance by matmul: (batch, lead, time) -> (lead, batch, batch)."""
    x = x.transpose(0, 1)  # (lead, batch, time)
    square = x.square().sum(-1)  # (lead, batch)
    return (square[:, :, None] + square[:, None, :] - 2 * x @ x.mT).clamp(min=0)


def _has_lead(flat: Tensor, leads: int) -> Tensor:
    """(batch, lead * time) -> (batch, lead) float32: 1 where a lead has any signal."""
    return (flat.reshape(len(flat), leads, -1) != 0).any(-1).float()


def _over_shared_leads(by_lead: Tensor, has_lead: Tensor) -> Tensor:
    """Sum over shared leads, scaled to 12: (lead, batch, batch), (batch, lead) -> (batch, batch)."""
    shared = has_lead.T[:, :, None] * has_lead.T[:, None, :]  # (lead, batch, batch)
    count = shared.sum(0)
    total = (by_lead * shared).sum(0) * (LEAD_COUNT / count.clamp(min=1))
    return total.masked_fill(count == 0, torch.inf)


def _zero_diagonal(distance: Tensor) -> Tensor:
    """Rounding leaves up to 0.04 between an ECG and itself: the diagonal is 0 by definition."""
    return distance.fill_diagonal_(0.0)


def _of_facts(name: str, distance: Callable[[Tensor], Tensor], facts: tuple[str, ...], source: str) -> Relation:
    return Relation(name, describe_nothing, distance, len(facts), False, source, facts=facts)


RAW_WIDTH = LEAD_COUNT * RAW_SAMPLES
RELATIONS = {
    relation.name: relation
    for relation in (
        Relation("l1", describe_raw, l1_distance, RAW_WIDTH, False, "SSL-DML code, 'euclidean'"),
        Relation("l2", describe_raw, l2_distance, RAW_WIDTH, False, "SSL-DML paper"),
        Relation("dtw", describe_dtw, dtw_distance, 3 * RAW_SAMPLES, False, "SSL-DML paper; Sakoe and Chiba 1978"),
        Relation("dtw_12_lead", describe_raw, dtw_distance, RAW_WIDTH, False, "SSL-DML paper; Sakoe and Chiba 1978"),
        Relation("median_beat", describe_median_beat, median_beat_distance, DESCRIPTOR_WIDTH, True, "HemoFed"),
        Relation("learned", describe_nothing, _incomparable, 0, False, "RelCon's motif distance", learned=True),
        _of_facts("same_record", equal_distance, ("record",), "SimCLR"),
        _of_facts("same_patient", equal_distance, ("patient",), "CLOCS, PCLR"),
        _of_facts("same_demographics", equal_distance, ("age_band", "female"), "Good Views"),
        _of_facts("same_group", equal_distance, ("group",), "Good Views: the rhythm label"),
        _of_facts("same_class", equal_distance, ("positive",), "SSL-DML code: npair, semihard, softhard"),
        _of_facts("label", absolute_difference, ("value",), "SSL-DML code: labelbased; Rank-N-Contrast"),
        Relation(
            "wave_attributes",
            describe_waves,
            wave_distance,
            len(UNITS),
            True,
            "after Good Views, strategy 5: arXiv:2411.17702",
            measured=MEASURED,
        ),
    )
}
