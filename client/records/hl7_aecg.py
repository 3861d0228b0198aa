"""HL7 annotated ECG: a folder of *.xml with the root AnnotatedECG (ANSI/HL7 V3 ECG R1-2004, PORT_MT020001).

The first RHYTHM series is taken; representative beats are not. A value is origin + scale x digit, each in the unit
that stands with it; the sampling rate is one over the increment of the time sequence.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from client.records.cart_measurements import as_number, first_known, in_unit
from client.records.demographics import age_between, birth_time, compact_time
from client.records.file_folder import add_lead, checked_rate, open_folder, stacked
from client.records.guarded_xml import attribute_of, holds_root, read_xml, text_of, xml_files
from client.records.options import ReaderOptions
from client.records.record import UNKNOWN, Archive, EcgRecord, Noticed, Reason, Remark, Unusable, known_sex
from shared_model.leads import canonical_lead, millivolt_per_unit

ROOT = "AnnotatedECG"
SECONDS_BY_UNIT = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
DEVICE_PLACE = "author/seriesAuthor/manufacturedSeriesDevice/manufacturerModelName"
# QTc and QTcB are Bazett's; Fridericia's QTcF is left out.
MEASUREMENT_CODES = {
    "MDC_ECG_HEART_RATE": "heart_rate_bpm",
    "MDC_ECG_TIME_PD_RR": "rr_ms",
    "MDC_ECG_TIME_PD_P": "p_duration_ms",
    "MDC_ECG_TIME_PD_PR": "pr_ms",
    "MDC_ECG_TIME_PD_QRS": "qrs_ms",
    "MDC_ECG_TIME_PD_QT": "qt_ms",
    "MDC_ECG_TIME_PD_QTc": "qtc_ms",
    "MDC_ECG_TIME_PD_QTcB": "qtc_ms",
    "MDC_ECG_ANGLE_P_FRONT": "p_axis_deg",
    "MDC_ECG_ANGLE_QRS_FRONT": "qrs_axis_deg",
    "MDC_ECG_ANGLE_T_FRONT": "t_axis_deg",
}
NEGATED_AVR = "MDC_ECG_LEAD_AVRNEG"
# CDC Race and Ethnicity, 2.16.840.1.113883.6.238: the five races of the US census, by code.
RACE_BY_CODE = {
    "1002-5": "american indian or alaska native",
    "2028-9": "asian",
    "2054-5": "black or african american",
    "2076-8": "native hawaiian or other pacific islander",
    "2106-3": "white",
}


def recognises(source: Path) -> bool:
    """Whether there are aECG files below."""
    return holds_root(source, ROOT)


def open_archive(source: Path, _options: ReaderOptions) -> Archive:
    """List the XML files. Raises HemoFedError for a broken labels.csv."""
    return open_folder(source, xml_files, _read_file)


def _read_file(path: Path, name: str) -> Iterator[EcgRecord | Remark]:
    root = read_xml(path, ROOT)
    series = [one for one in root.findall("component/series") if attribute_of(one, "code", "code") == "RHYTHM"]
    sets = [one for each in series for one in each.findall("component/sequenceSet")]
    if not sets:
        raise Unusable(Reason.NO_KNOWN_LEAD, "there is no RHYTHM series with a sequence set; export it with waveforms")
    if len(sets) > 1:
        yield Remark(name, Noticed.SEGMENTS_LEFT_OUT, f"{len(sets)} rhythm sequence sets; the first is used")
    rate_hz, recorded_at = _time_axis(sets[0])
    leads = _leads(sets[0])
    if math.isnan(recorded_at):
        recorded_at = _effective_time(series[0], root)
    subject = root.find(".//trialSubject")
    subject = Element("trialSubject") if subject is None else subject
    person = "subjectDemographicPerson"
    race = attribute_of(subject, f"{person}/raceCode", "code")
    yield EcgRecord(
        record_id=name,
        source=name,
        signal_mv=stacked(leads, rate_hz),
        lead_names=tuple(leads),
        sampling_rate_hz=rate_hz,
        patient_id=attribute_of(subject, "id", "extension"),
        recorded_at=recorded_at,
        age_years=age_between(birth_time(attribute_of(subject, f"{person}/birthTime", "value")), recorded_at),
        sex=known_sex(attribute_of(subject, f"{person}/administrativeGenderCode", "code")),
        race=(RACE_BY_CODE.get(race) or attribute_of(subject, f"{person}/raceCode", "displayName") or race).lower()
        or UNKNOWN,
        device=text_of(series[0], DEVICE_PLACE) or UNKNOWN,
        measurements=first_known(_measurements(series[0])),
    )


def _measurements(series: Element) -> Iterator[tuple[str, float]]:
    """The annotations of the series and its derived beats. One with a `support` is of a single beat, wave or lead."""
    for annotation in series.iter("annotation"):
        code = attribute_of(annotation, "code", "code").removesuffix("_GL")
        name = MEASUREMENT_CODES.get(code)
        if name and annotation.find("support") is None:
            value, unit = (attribute_of(annotation, "value", part) for part in ("value", "unit"))
            yield name, in_unit(name, value, unit)


def _time_axis(sequences: Element) -> tuple[float, float]:
    """Sampling rate in Hz, and unix seconds of the first sample (NaN for TIME_RELATIVE)."""
    for sequence in sequences.findall("component/sequence"):
        if not attribute_of(sequence, "code", "code").startswith("TIME_"):
            continue
        unit = SECONDS_BY_UNIT.get(attribute_of(sequence, "value/increment", "unit"))
        increment = as_number(attribute_of(sequence, "value/increment", "value"))
        if unit is None or not increment * unit > 0:
            break
        # Increments are written rounded: 1/0.00390625 is 256 Hz, not 256.0000001.
        return checked_rate(round(1 / (increment * unit), 6)), compact_time(
            attribute_of(sequence, "value/head", "value")
        )
    raise Unusable(Reason.NO_SAMPLING_RATE, "no time sequence with an increment in s, ms or us; export it again")


def _effective_time(series: Element, root: Element) -> float:
    for element in (series, root):
        for place in ("effectiveTime/low", "effectiveTime/center", "effectiveTime"):
            moment = compact_time(attribute_of(element, place, "value"))
            if not math.isnan(moment):
                return moment
    return math.nan


def _leads(sequences: Element) -> dict[str, NDArray[np.float64]]:
    """The known leads in mV; -aVR is turned round where aVR itself is not there."""
    leads: dict[str, NDArray[np.float64]] = {}
    negated: NDArray[np.float64] | None = None
    for sequence in sequences.findall("component/sequence"):
        code = attribute_of(sequence, "code", "code")
        lead = canonical_lead(code)
        if lead is not None:
            add_lead(leads, lead, _millivolt(sequence, lead))
        elif code == NEGATED_AVR:
            negated = -_millivolt(sequence, "-aVR")
    if negated is not None:
        leads.setdefault("aVR", negated)
    return leads


def _millivolt(sequence: Element, lead: str) -> NDArray[np.float64]:
    """origin + scale x digit of one SLIST_PQ."""
    value = sequence.find("value")
    if value is None or value.get("type", "SLIST_PQ").rpartition(":")[2] != "SLIST_PQ":
        raise Unusable(Reason.UNREADABLE, f"lead {lead}: its value is no SLIST_PQ; export it again")
    try:
        digits = np.array([int(digit) for digit in text_of(value, "digits").split()], np.float64)
    except (ValueError, OverflowError):
        raise Unusable(Reason.UNREADABLE, f"lead {lead}: a digit is no whole number; export it again") from None
    scale = _quantity_mv(value, "scale", lead)
    if scale == 0:
        raise Unusable(Reason.UNKNOWN_UNIT, f"lead {lead}: a scale of 0; export it again")
    signal_mv: NDArray[np.float64] = _quantity_mv(value, "origin", lead) + scale * digits
    return signal_mv


def _quantity_mv(value: Element, name: str, lead: str) -> float:
    """A physical quantity in mV; an absent origin, or one of 0 without a unit, is 0."""
    number, unit = attribute_of(value, name, "value"), attribute_of(value, name, "unit")
    quantity, millivolt = as_number(number), millivolt_per_unit(unit)
    if name == "origin" and (not number or (quantity == 0 and not unit)):
        return 0.0
    if millivolt is None or not math.isfinite(quantity):
        detail = f"lead {lead}: {name} {number[:20]!r} {unit[:20]!r}; it needs a number in uV, mV or V"
        raise Unusable(Reason.UNKNOWN_UNIT, detail)
    return quantity * millivolt
