"""GE MUSE XML: a folder of *.xml with the root RestingECG (GE "MUSE NX XML Developer Guide" 2102027-228).

The rhythm waveform is taken, not the median beat. MUSE stores I, II, V1-V6, or all twelve if so configured: the
stored leads are kept, and ingest derives the limb leads that are not there. FirstSampleBaseline is not added:
readers of the format disagree on it, and a constant is no part of an ECG.
"""

import base64
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from client.records.cart_measurements import as_number
from client.records.demographics import age_between, age_in_years, american_birth_time, american_time
from client.records.file_folder import add_lead, checked_rate, open_folder, stacked
from client.records.guarded_xml import holds_root, read_xml, text_of, xml_files
from client.records.options import ReaderOptions
from client.records.record import (
    UNKNOWN,
    Archive,
    EcgRecord,
    Noticed,
    Reason,
    Remark,
    Unusable,
    known_measurements,
    known_sex,
)
from shared_model.leads import canonical_lead, millivolt_per_unit

ROOT = "RestingECG"
BYTES_A_SAMPLE = 2
MEASUREMENT_PLACES = {
    "rr_ms": "QRSTimesTypes/GlobalRR",
    **{
        name: f"RestingECGMeasurements/{element}"
        for name, element in (
            *(("heart_rate_bpm", "VentricularRate"), ("pr_ms", "PRInterval"), ("qrs_ms", "QRSDuration")),
            *(("qt_ms", "QTInterval"), ("qtc_ms", "QTCorrected")),
            *(("p_axis_deg", "PAxis"), ("qrs_axis_deg", "RAxis"), ("t_axis_deg", "TAxis")),
        )
    },
}


def recognises(source: Path) -> bool:
    """Whether there are MUSE XML files below."""
    return holds_root(source, ROOT)


def open_archive(source: Path, _options: ReaderOptions) -> Archive:
    """List the XML files. Raises HemoFedError for a broken labels.csv."""
    return open_folder(source, xml_files, _read_file)


def _read_file(path: Path, name: str) -> Iterator[EcgRecord | Remark]:
    root = read_xml(path, ROOT)
    rhythms = [one for one in root.iter("Waveform") if text_of(one, "WaveformType").lower() == "rhythm"]
    if not rhythms:
        raise Unusable(Reason.NO_KNOWN_LEAD, "there is no waveform of the type Rhythm; export it with waveforms")
    if len(rhythms) > 1:
        detail = f"{len(rhythms)} rhythm waveforms; the first is used"
        yield Remark(name, Noticed.SEGMENTS_LEFT_OUT, detail)
    rate_hz = _rate_hz(rhythms[0])
    leads = _leads(rhythms[0])
    recorded_at = american_time(
        text_of(root, "TestDemographics/AcquisitionDate"), text_of(root, "TestDemographics/AcquisitionTime")
    )
    age = age_in_years(text_of(root, "PatientDemographics/PatientAge"), text_of(root, "PatientDemographics/AgeUnits"))
    if math.isnan(age):
        age = age_between(american_birth_time(text_of(root, "PatientDemographics/DateofBirth")), recorded_at)
    yield EcgRecord(
        record_id=name,
        source=name,
        signal_mv=stacked(leads, rate_hz),
        lead_names=tuple(leads),
        sampling_rate_hz=rate_hz,
        patient_id=text_of(root, "PatientDemographics/PatientID"),
        recorded_at=recorded_at,
        age_years=age,
        sex=known_sex(text_of(root, "PatientDemographics/Gender")),
        race=text_of(root, "PatientDemographics/Race").lower() or UNKNOWN,
        device=text_of(root, "TestDemographics/AcquisitionDevice") or UNKNOWN,
        measurements=_measurements(root),
    )


def _measurements(root: Element) -> dict[str, float]:
    """What stands in ms, bpm and degrees. POnset and POffset are samples of the median beat; -1: no P wave."""
    values = {name: as_number(text_of(root, place)) for name, place in MEASUREMENT_PLACES.items()}
    onset, offset, base, exponent = (
        as_number(text_of(root, f"RestingECGMeasurements/{name}"))
        for name in ("POnset", "POffset", "ECGSampleBase", "ECGSampleExponent")
    )
    if onset >= 0 and base > 0 and exponent == 0:
        values["p_duration_ms"] = (offset - onset) * 1000 / base
    return known_measurements(values)


def _rate_hz(waveform: Element) -> float:
    """SampleBase x 10^SampleExponent."""
    try:
        base, exponent = int(text_of(waveform, "SampleBase")), int(text_of(waveform, "SampleExponent") or "0")
    except ValueError:
        raise Unusable(Reason.NO_SAMPLING_RATE, "SampleBase or SampleExponent is no number; export it again") from None
    return checked_rate(float(f"{base}e{exponent}"))


def _leads(waveform: Element) -> dict[str, NDArray[np.float64]]:
    """The known leads in mV. A lead whose electrode was off is left out."""
    elements = waveform.findall("LeadData")
    stated = text_of(waveform, "NumberofLeads")
    if stated and stated != str(len(elements)):
        raise Unusable(Reason.TRUNCATED, f"{len(elements)} of {stated[:20]} leads are there; export it again")
    if len({text_of(element, "LeadTimeOffset") or "0" for element in elements}) > 1:
        raise Unusable(Reason.UNREADABLE, "its leads begin at different times (LeadTimeOffset); export it again")
    leads: dict[str, NDArray[np.float64]] = {}
    for element in elements:
        lead = canonical_lead(text_of(element, "LeadID"))
        steps = _steps(element)
        if lead is not None and text_of(element, "LeadOff").upper() != "TRUE":
            add_lead(leads, lead, steps.astype(np.float64) * _millivolt_per_bit(element, lead))
    return leads


def _steps(element: Element) -> NDArray[np.int16]:
    """The samples, checked against LeadSampleCountTotal, LeadByteCountTotal and LeadDataCRC32 (zlib's CRC-32)."""
    lead = text_of(element, "LeadID")[:20]
    if text_of(element, "LeadSampleSize") not in ("", str(BYTES_A_SAMPLE)):
        raise Unusable(Reason.UNREADABLE, f"lead {lead}: samples not of 2 bytes (LeadSampleSize); export it again")
    try:
        data = base64.b64decode("".join(text_of(element, "WaveFormData").split()), validate=True)
        count = int(text_of(element, "LeadSampleCountTotal"))
        byte_count = int(text_of(element, "LeadByteCountTotal") or BYTES_A_SAMPLE * count)
        checksum = int(text_of(element, "LeadDataCRC32") or zlib.crc32(data)) & 0xFFFFFFFF
    except ValueError:
        detail = f"lead {lead}: WaveFormData, a count or LeadDataCRC32 is damaged; export it again"
        raise Unusable(Reason.UNREADABLE, detail) from None
    if not len(data) == byte_count == BYTES_A_SAMPLE * count:
        detail = f"lead {lead}: {len(data)} bytes for {count} samples stated; export it again"
        raise Unusable(Reason.TRUNCATED, detail)
    if checksum != zlib.crc32(data):
        raise Unusable(Reason.WRONG_CHECKSUM, f"lead {lead}: its LeadDataCRC32 does not match; export it again")
    return np.frombuffer(data, "<i2")


def _millivolt_per_bit(element: Element, lead: str) -> float:
    unit = text_of(element, "LeadAmplitudeUnits")
    millivolt = millivolt_per_unit(unit.lower().removesuffix("s"))
    try:
        units_per_bit = float(text_of(element, "LeadAmplitudeUnitsPerBit"))
    except ValueError:
        units_per_bit = math.nan
    if millivolt is None or not 0 < units_per_bit < math.inf:
        raise Unusable(
            Reason.UNKNOWN_UNIT,
            f"lead {lead}: LeadAmplitudeUnits {unit[:20]!r}, LeadAmplitudeUnitsPerBit "
            f"{text_of(element, 'LeadAmplitudeUnitsPerBit')[:20]!r}; export it in MICROVOLTS",
        )
    return units_per_bit * millivolt
