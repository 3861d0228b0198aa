"""ECG files as hospital systems export them, written by hand at test time: MUSE XML, DICOM, HL7 aECG, SCG-RHC."""

import base64
import json
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from client.records import READERS, choose_format
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Reason, Remark, TurnedAway
from shared_model.leads import LEADS
from tests.pressure_fixtures import pressure_mmhg
from tests.wfdb_fixtures import ecg_steps, write_record

MUSE_LEADS = ("I", "II", *LEADS[6:])
MUSE_DOCTYPE = '<!DOCTYPE RestingECG SYSTEM "restecg.dtd">'
# PR, QRS and QT agree with the onsets, which are samples of the median beat at 500 Hz.
MUSE_MEASURED = {
    **{"VentricularRate": "75", "AtrialRate": "75", "PRInterval": "162", "QRSDuration": "96", "QTInterval": "400"},
    **{"QTCorrected": "447", "PAxis": "41", "RAxis": "-17", "TAxis": "30", "QRSCount": "12", "QOnset": "201"},
    **{"QOffset": "249", "POnset": "120", "POffset": "176", "TOffset": "401", "ECGSampleBase": "500"},
    **{"ECGSampleExponent": "0", "QTcFrederica": "431"},
}
AECG_MEASURED = (
    *(("HEART_RATE", "75", "bpm"), ("TIME_PD_RR", "0.8", "s"), ("TIME_PD_P", "112", "ms"), ("TIME_PD_PR", "162", "ms")),
    *(("TIME_PD_QRS", "96", "ms"), ("TIME_PD_QT_GL", "400", "ms"), ("TIME_PD_QTcF", "431", "ms")),
    *(("TIME_PD_QTc", "447", "ms"), ("ANGLE_P_FRONT", "41", "deg"), ("ANGLE_QRS_FRONT", "-17", "deg")),
    ("ANGLE_T_FRONT", "30", "deg"),
)
DICOM_MEASURED = {
    **{"heart_rate_bpm": "2:16016", "rr_ms": "2:16168", "p_duration_ms": "2:16184", "pr_ms": "2:15872"},
    **{"qrs_ms": "2:16156", "qt_ms": "2:16160", "qtc_ms": "2:15876", "p_axis_deg": "2:16128"},
    **{"qrs_axis_deg": "2:16132", "t_axis_deg": "2:16136"},
}
SCG_PRESSURE = ("1000(0)/mV", "100(0)/mmHg")
LEAD_NUMBERS = dict(zip(LEADS, ("1", "2", "61", "62", "63", "64", "3", "4", "5", "6", "7", "8"), strict=True))


def records_of(source: Path) -> tuple[list[EcgRecord], list[TurnedAway], list[Remark]]:
    archive = READERS[choose_format(source)].open_archive(source, ReaderOptions())
    items = list(archive.items)
    assert archive.count == sum(not isinstance(item, Remark) for item in items)
    return (
        [item for item in items if isinstance(item, EcgRecord)],
        [item for item in items if isinstance(item, TurnedAway)],
        [item for item in items if isinstance(item, Remark)],
    )


def only_record(source: Path) -> EcgRecord:
    (record,), away, _ = records_of(source)
    assert not away
    return record


def only_reason(source: Path) -> Reason:
    records, (away,), _ = records_of(source)
    assert not records
    assert len(away.detail.splitlines()) == 1
    assert ";" in away.detail
    return away.reason


def steps_for(lead_names: Sequence[str], rate_hz: int = 500, seconds: float = 10) -> np.ndarray:
    """(lead, time) int16, small enough for 4.88 uV a step."""
    return ecg_steps(seconds, rate_hz, len(lead_names)) // 4


def muse_lead(name: str, steps: np.ndarray, units: str, units_per_bit: str, extra: str = "") -> str:
    data = steps.astype("<i2").tobytes()
    wrapped = "\n".join(textwrap.wrap(base64.b64encode(data).decode(), 68))
    return (
        f"<LeadData><LeadByteCountTotal>{len(data)}</LeadByteCountTotal><LeadTimeOffset>0</LeadTimeOffset>"
        f"<LeadSampleCountTotal>{len(steps)}</LeadSampleCountTotal>"
        f"<LeadAmplitudeUnitsPerBit>{units_per_bit}</LeadAmplitudeUnitsPerBit>"
        f"<LeadAmplitudeUnits>{units}</LeadAmplitudeUnits><LeadID>{name}</LeadID>"
        f"<FirstSampleBaseline>0</FirstSampleBaseline><LeadSampleSize>2</LeadSampleSize>"
        f"<LeadOff>FALSE</LeadOff>{extra}<LeadDataCRC32>{zlib.crc32(data)}</LeadDataCRC32>"
        f"<WaveFormData>\n{wrapped}\n</WaveFormData></LeadData>\n"
    )


def muse_waveform(
    kind: str, steps: np.ndarray, lead_names: Sequence[str], rate_hz: int, units: str, units_per_bit: str
) -> str:
    leads = "".join(muse_lead(name, row, units, units_per_bit) for name, row in zip(lead_names, steps, strict=True))
    return (
        f"<Waveform><WaveformType>{kind}</WaveformType><NumberofLeads>{len(lead_names)}</NumberofLeads>"
        f"<SampleType>CONTINUOUS_SAMPLES</SampleType><SampleBase>{rate_hz}</SampleBase>"
        f"<SampleExponent>0</SampleExponent><HighPassFilter>16</HighPassFilter>{leads}</Waveform>\n"
    )


def write_muse(
    path: Path,
    steps: np.ndarray | None = None,
    *,
    lead_names: Sequence[str] = MUSE_LEADS,
    rate_hz: int = 500,
    units: str = "MICROVOLTS",
    units_per_bit: str = "4.88",
    encoding: str = "ISO-8859-1",
    doctype: str = MUSE_DOCTYPE,
    patient: Mapping[str, str] | None = None,
    test: Mapping[str, str] | None = None,
    measured: Mapping[str, str] | None = None,
) -> Path:
    """One MUSE file with a median and a rhythm waveform, in the order of a 9.0.9 file."""
    steps = steps_for(lead_names, rate_hz) if steps is None else steps
    shown = {"PatientID": "0017", "PatientAge": "67", "AgeUnits": "YEARS", "DateofBirth": "XX-XX-XXXX"}
    shown |= {"Gender": "FEMALE", "Race": "CAUCASIAN", "PatientLastName": "M\u00fcller"} | dict(patient or {})
    taken = {"DataType": "RESTING", "AcquisitionDevice": "MAC55"}
    taken |= {"AcquisitionTime": "09:30:05", "AcquisitionDate": "05-31-2024"} | dict(test or {})
    median = muse_waveform("Median", steps[:, :600], lead_names, rate_hz, units, units_per_bit)
    rhythm = muse_waveform("Rhythm", steps, lead_names, rate_hz, units, units_per_bit)
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?>\n{doctype}\n<RestingECG>\n'
        f"<MuseInfo><MuseVersion>9.0.9.18167</MuseVersion></MuseInfo>\n"
        f"<PatientDemographics>{_children(shown)}</PatientDemographics>\n"
        f"<TestDemographics>{_children(taken)}</TestDemographics>\n"
        f"<RestingECGMeasurements>{_children(MUSE_MEASURED | dict(measured or {}))}</RestingECGMeasurements>\n"
        f"<QRSTimesTypes><QRS><Number>1</Number><Type>0</Type><Time>398</Time></QRS><GlobalRR>800</GlobalRR>"
        f"</QRSTimesTypes>{median}{rhythm}</RestingECG>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def _children(values: Mapping[str, str]) -> str:
    return "".join(f"<{name}>{value}</{name}>" for name, value in values.items())


def write_aecg(
    path: Path,
    steps: np.ndarray | None = None,
    *,
    lead_codes: Sequence[str] = tuple(f"MDC_ECG_LEAD_{lead.upper()}" for lead in LEADS),
    increment: tuple[str, str] = ("0.002", "s"),
    origin: tuple[str, str] = ("0", "uV"),
    scale: tuple[str, str] = ("5", "uV"),
    absolute: bool = True,
    subject: str = "",
    measured: Sequence[tuple[str, str, str]] = AECG_MEASURED,
) -> Path:
    """One aECG with a rhythm series and, as devices write it, a derived representative beat."""
    steps = steps_for(lead_codes) if steps is None else steps
    person = subject or (
        '<id root="2.16.840.1" extension="S-17"/><subjectDemographicPerson><name/>'
        '<administrativeGenderCode code="M"/><birthTime value="19540601"/><raceCode code="2106-3"/>'
        "</subjectDemographicPerson>"
    )
    kind, head, increment_type = (
        ("TIME_ABSOLUTE", '<head value="20240531093005.000"/>', "GLIST_TS")
        if absolute
        else ("TIME_RELATIVE", '<head value="0" unit="s"/>', "GLIST_PQ")
    )
    time = (
        f'<component><sequence><code code="{kind}"/><value xsi:type="{increment_type}">{head}'
        f'<increment value="{increment[0]}" unit="{increment[1]}"/></value></sequence></component>'
    )
    leads = "".join(
        f'<component><sequence><code code="{code}" codeSystem="2.16.840.1.113883.6.24"/>'
        f'<value xsi:type="SLIST_PQ"><origin value="{origin[0]}" unit="{origin[1]}"/>'
        f'<scale value="{scale[0]}" unit="{scale[1]}"/><digits>{" ".join(map(str, row))}</digits>'
        f"</value></sequence></component>\n"
        for code, row in zip(lead_codes, steps, strict=True)
    )
    beat = (
        '<derivation><derivedSeries><code code="REPRESENTATIVE_BEAT"/><component><sequenceSet>'
        f"{time}</sequenceSet></component></derivedSeries></derivation>"
    )
    annotations = "".join(
        f'<component><annotation><code code="MDC_ECG_{code}" codeSystem="2.16.840.1.113883.6.24"/>'
        f'<value xsi:type="PQ" value="{value}" unit="{unit}"/></annotation></component>'
        for code, value, unit in measured
    )
    annotations = f"<subjectOf><annotationSet>{annotations}</annotationSet></subjectOf>"
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<AnnotatedECG xmlns="urn:hl7-org:v3" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><id root="1.2.3"/>'
        '<code code="93000" codeSystem="2.16.840.1.113883.6.12"/>'
        '<effectiveTime><low value="20240531093005"/><high value="20240531093015"/></effectiveTime>'
        "<componentOf><timepointEvent><componentOf><subjectAssignment><subject><trialSubject>"
        f"{person}</trialSubject></subject></subjectAssignment></componentOf></timepointEvent></componentOf>"
        f'<component><series><code code="RHYTHM" codeSystem="2.16.840.1.113883.5.4"/>'
        "<author><seriesAuthor><manufacturedSeriesDevice><manufacturerModelName>ELI250</manufacturerModelName>"
        "</manufacturedSeriesDevice></seriesAuthor></author>"
        f"<component><sequenceSet>{time}{leads}</sequenceSet></component>{beat}"
        f"{annotations}</series></component></AnnotatedECG>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def dicom_group(
    steps: np.ndarray,
    lead_names: Sequence[str] = LEADS,
    *,
    rate_hz: float = 500,
    unit: str = "uV",
    sensitivity: str = "1.25",
    correction: str = "1",
    baseline: str = "0",
    scheme: str = "MDC",
    label: str = "RHYTHM",
    originality: str = "ORIGINAL",
    padding: int | None = None,
) -> Any:
    """One multiplex group; a scheme that is not known leaves only the code's meaning to go by."""
    from pydicom import Dataset

    group = Dataset()
    group.WaveformOriginality, group.MultiplexGroupLabel = originality, label
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = steps.shape
    group.SamplingFrequency = f"{rate_hz:g}"
    prefix = {"MDC": "2:", "SCPECG": "5.6.3-9-"}.get(scheme, "local-")
    group.ChannelDefinitionSequence = []
    for name in lead_names:
        source, units, channel = Dataset(), Dataset(), Dataset()
        source.CodeValue, source.CodingSchemeDesignator = f"{prefix}{LEAD_NUMBERS.get(name, '999')}", scheme
        source.CodeMeaning = f"Lead {name} (Einthoven)" if scheme not in ("MDC", "SCPECG") else "a lead"
        units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
        channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [source], [units]
        channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = sensitivity, correction
        channel.ChannelBaseline, channel.ChannelSampleSkew, channel.WaveformBitsStored = baseline, "0", 16
        group.ChannelDefinitionSequence.append(channel)
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    if padding is not None:
        group.add_new("WaveformPaddingValue", "OW", int(padding).to_bytes(2, "little", signed=True))
    group.add_new("WaveformData", "OW", steps.T.astype("<i2").tobytes())
    return group


def _annotation(name: str, value: float) -> Any:
    """A measurement of a whole multiplex group (channel 0), as PS3.16 TID 3713 codes it."""
    from pydicom import Dataset

    annotation, concept, units = Dataset(), Dataset(), Dataset()
    concept.CodeValue, concept.CodingSchemeDesignator, concept.CodeMeaning = DICOM_MEASURED[name], "MDC", name
    units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = name.rpartition("_")[2], "UCUM", "unit"
    units.CodeValue = {"bpm": "/min"}.get(units.CodeValue, units.CodeValue)
    annotation.ConceptNameCodeSequence, annotation.MeasurementUnitsCodeSequence = [concept], [units]
    annotation.ReferencedWaveformChannels, annotation.NumericValue = [1, 0], f"{value:g}"
    return annotation


def write_dicom(
    path: Path,
    groups: Sequence[Any],
    sop_class: str = "1.1",
    annotations: Mapping[str, float] | None = None,
    **values: str,
) -> Path:
    """One DICOM file of the ECG class 1.2.840.10008.5.1.4.1.1.9.<sop_class>."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = UID(f"1.2.840.10008.5.1.4.1.1.9.{sop_class}")
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    dataset.Modality, dataset.PatientID, dataset.PatientSex, dataset.PatientAge = "ECG", "D-17", "F", "067Y"
    dataset.AcquisitionDateTime = "20240531093005"
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.WaveformSequence = list(groups)
    dataset.WaveformAnnotationSequence = [_annotation(*pair) for pair in (annotations or {}).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def scg_pressure_mmhg(seconds: float, wedge_s: float = 90) -> np.ndarray:
    """At 500 Hz: an artery with a mean of 34 mmHg up to the wedge, then a wedge tracing of 22 mmHg."""
    artery, wedge = (
        pressure_mmhg(mean, seconds=seconds, rate_hz=500, wedge=wedged, pulse_mmhg=pulse)
        for mean, wedged, pulse in ((34, False, 24), (22, True, 7))
    )
    return np.where(np.arange(len(artery)) < wedge_s * 500, artery, wedge)


def write_scg_rhc(
    folder: Path,
    name: str = "TRM107-RHC1",
    seconds: float = 200,
    events: object = None,
    pressure: np.ndarray | None = None,
    **changed: object,
) -> Path:
    """A procedure at 500 Hz with a pressure channel between the leads, and its JSON. No `events`: wedge at 90 s."""
    names = ("patch_ECG", "ECG_lead_I", "RHC_pressure", "ECG_lead_II", "aVR", "ECG_lead_V1", "PLETH")
    steps = ecg_steps(seconds, 500, len(names))
    steps[2] = np.rint(100 * (scg_pressure_mmhg(seconds) if pressure is None else pressure))
    header = write_record(folder / "processed_data", name, steps, lead_names=names)
    lines = header.read_text().split("\n")
    header.write_text("\n".join(line.replace(*SCG_PRESSURE) if "_pressure" in line else line for line in lines))
    content = {
        "age": 61,
        "gender": "Male",
        "ChamEvents": {"RA": "12-Mar-2018 10:13:00 AM", "PCW": "12-Mar-2018 10:15:00 AM"},
        "ChamEvents_in_s": {"RA": 10, "PA": 50, "PCW": 90} if events is None else events,
        "maclabMeas": {
            key.ljust(13): value
            for key, value in {"PCWM": "21", "PAM": 34.0, "RAM": "nd", "PAS": "52", "TDCOL/min": "999"}.items()
        },
    }
    header.with_suffix(".json").write_text(json.dumps(content | changed))
    return header
