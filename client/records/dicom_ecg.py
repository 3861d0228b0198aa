"""DICOM ECG waveforms: 12-lead, general, general 32-bit and ambulatory (PS3.3 A.34), read through pydicom.

Real files break the limits of their own class (a 12-lead object with 24 channels), so the class is not held
against a file. The writers also differ in where the size of a step stands: sensitivity and correction factor are
always multiplied (PS3.3 C.10.9.1.4.2).
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.records.cart_measurements import first_known, in_unit
from client.records.demographics import age_between, age_in_years, birth_time, compact_time
from client.records.file_folder import add_lead, checked_rate, open_folder, stacked
from client.records.files import files_below
from client.records.options import ReaderOptions
from client.records.record import UNKNOWN, Archive, EcgRecord, Noticed, Reason, Remark, Unusable, known_sex
from client.records.wfdb_signal import LONGEST_READ_S
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import canonical_lead, millivolt_per_unit

if TYPE_CHECKING:
    from pydicom import Dataset

PREAMBLE, MAGIC = 128, b"DICM"
LARGEST_BYTES = 256 * 2**20
ECG_CLASSES = frozenset(f"1.2.840.10008.5.1.4.1.1.9.{tail}" for tail in ("1.1", "1.2", "1.3", "1.4"))
# Waveforms are not compressed. Deflated files could unpack to any size, and big-endian ones are retired.
TRANSFER_SYNTAXES = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"})
TAGS = (
    *("PatientID", "PatientAge", "PatientBirthDate", "PatientSex", "EthnicGroup", "SpecificCharacterSet"),
    *("AcquisitionDateTime", "ContentDate", "ContentTime", "StudyDate", "StudyTime", "WaveformSequence"),
    *("ManufacturerModelName", "WaveformAnnotationSequence"),
)
# (bits, interpretation); the companded ones (MB, AB) are sound, not ECG.
SAMPLE_TYPES = {
    (8, "SB"): "<i1",
    (8, "UB"): "<u1",
    (16, "SS"): "<i2",
    (16, "US"): "<u2",
    (32, "SL"): "<i4",
    (32, "UL"): "<u4",
}
# The last number of a code, in MDC ("2:61") as in the older SCPECG ("5.6.3-9-61"): PS3.16 CID 3001.
LEAD_BY_NUMBER = {"1": "I", "2": "II", "61": "III", "62": "aVR", "63": "aVL", "64": "aVF"} | {
    str(number): f"V{number - 2}" for number in range(3, 9)
}
# PS3.16 TID 3713 with CID 3227 to 3229 and 3689, and the same in the older SCPECG scheme.
MEASUREMENT_CODES = {
    (scheme, code): name
    for name, mdc_codes, scpecg_code in (
        ("heart_rate_bpm", ("2:16016",), "5.10.2.5-1"),
        ("rr_ms", ("2:16168", "2:16000"), "5.10.2.1-3"),
        ("p_duration_ms", ("2:16184",), ""),
        ("pr_ms", ("2:15872",), "5.13.5-7"),
        ("qrs_ms", ("2:16156",), "5.13.5-9"),
        ("qt_ms", ("2:16160",), "5.13.5-11"),
        ("qtc_ms", ("2:15876",), "5.10.2.5-5"),
        ("p_axis_deg", ("2:16128",), "5.10.3-11"),
        ("qrs_axis_deg", ("2:16132",), "5.10.3-13"),
        ("t_axis_deg", ("2:16136",), "5.10.3-15"),
    )
    for scheme, code in (*(("MDC", code) for code in mdc_codes), ("SCPECG", scpecg_code))
}
CODE_PREFIXES = {"MDC": "2:", "SCPECG": "5.6.3-9-"}
OTHER_SUFFIXES = {".dcm", ".hea", ".dat", ".mat", ".xml", ".json", ".csv", ".hdf5", ".txt", ".md", ".pdf"}


def recognises(source: Path) -> bool:
    """Whether one of the files below is DICOM."""
    return next(_dicom_files(source), None) is not None


def open_archive(source: Path, _options: ReaderOptions) -> Archive:
    """List the DICOM files, whatever their names.

    Raises:
        HemoFedError: pydicom is not installed, or labels.csv is broken.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise HemoFedError("DICOM needs pydicom, which is not there: pip install 'hemofed[records]'", ExitCode.USAGE)
    return open_folder(source, _dicom_files, _read_file)


def _dicom_files(source: Path) -> Iterator[str]:
    # Only regular files and broken links come from there, so opening one does not wait.
    return (path for path in files_below(source) if os.path.basename(path) != "DICOMDIR" and _is_dicom(path))


def _is_dicom(path: str) -> bool:
    """By its suffix, or by the preamble: many are named by their UID. Files of other formats are not opened."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in OTHER_SUFFIXES:
        return suffix == ".dcm"
    try:
        with open(path, "rb") as file:
            return file.read(PREAMBLE + len(MAGIC))[PREAMBLE:] == MAGIC
    except OSError:
        return False


def _read_file(path: Path, name: str) -> Iterator[EcgRecord | Remark]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom remarks on each value against the standard
            items = list(_items(_read_dataset(path), name))
    except Unusable:
        raise
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, f"cannot be read ({error.strerror}); check the file's permissions") from None
    except (Exception, MemoryError) as error:  # damage makes pydicom raise whatever its parts raise
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise Unusable(Reason.UNREADABLE, f"pydicom cannot read it ({detail}); export it again") from None
    yield from items


def _read_dataset(path: Path) -> "Dataset":
    """What an ECG needs of a file. Class, transfer syntax and size are settled before anything is unpacked."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(path)
    if str(meta.MediaStorageSOPClassUID) not in ECG_CLASSES:
        detail = f"a DICOM file of the class {meta.MediaStorageSOPClassUID.name[:60]}; leave it out"
        raise Unusable(Reason.NOT_AN_ECG, detail)
    if str(meta.TransferSyntaxUID) not in TRANSFER_SYNTAXES:
        detail = f"transfer syntax {meta.TransferSyntaxUID.name[:60]}; export it as Explicit VR Little Endian"
        raise Unusable(Reason.UNREADABLE, detail)
    if path.stat().st_size > LARGEST_BYTES:
        raise Unusable(Reason.UNREADABLE, f"larger than {LARGEST_BYTES >> 20} MB; export it in shorter pieces")
    return dcmread(path, specific_tags=list(TAGS))


def _items(dataset: "Dataset", name: str) -> Iterator[EcgRecord | Remark]:
    groups = sorted(dataset.get("WaveformSequence") or (), key=_preference, reverse=True)
    if not groups:
        raise Unusable(Reason.NO_KNOWN_LEAD, "there is no waveform in it; export it with waveforms")
    together = [group for group in groups if _simultaneous(group, groups[0])]
    further = sum(_preference(group)[0] for group in groups) - len(together)
    if further > 0:
        detail = f"{further} further rhythm groups of another time, rate or length; the one with most leads is used"
        yield Remark(name, Noticed.SEGMENTS_LEFT_OUT, detail)
    rate_hz = checked_rate(float(groups[0].get("SamplingFrequency") or 0))
    leads: dict[str, NDArray[np.float64]] = {}
    for group in together:
        leads = _leads(group, rate_hz) | leads
    recorded_at = _recorded_at(dataset)
    age_text = _text(dataset, "PatientAge")
    age = age_in_years(age_text[:-1], age_text[-1:])
    if math.isnan(age):
        age = age_between(birth_time(_text(dataset, "PatientBirthDate")), recorded_at)
    yield EcgRecord(
        record_id=name,
        source=name,
        signal_mv=stacked(leads, rate_hz),
        lead_names=tuple(leads),
        sampling_rate_hz=rate_hz,
        patient_id=_text(dataset, "PatientID"),
        recorded_at=recorded_at,
        age_years=age,
        sex=known_sex(_text(dataset, "PatientSex")),
        race=_text(dataset, "EthnicGroup").lower() or UNKNOWN,
        device=_text(dataset, "ManufacturerModelName") or UNKNOWN,
        measurements=first_known(_measurements(dataset)),
    )


def _measurements(dataset: "Dataset") -> Iterator[tuple[str, float]]:
    """The annotations with a number that are of all channels of their group (channel 0, PS3.3 C.10.10.1.1)."""
    for annotation in dataset.get("WaveformAnnotationSequence") or ():
        concepts, units = annotation.get("ConceptNameCodeSequence"), annotation.get("MeasurementUnitsCodeSequence")
        channels = list(annotation.get("ReferencedWaveformChannels") or (0, 0))[1::2]
        if not concepts or not units or any(channels):
            continue
        code = _text(concepts[0], "CodingSchemeDesignator").upper(), _text(concepts[0], "CodeValue")
        if name := MEASUREMENT_CODES.get(code):
            yield name, in_unit(name, _text(annotation, "NumericValue"), _text(units[0], "CodeValue"))


def _text(dataset: "Dataset", tag: str) -> str:
    return str(dataset.get(tag) or "").strip()


def _recorded_at(dataset: "Dataset") -> float:
    for text in (
        _text(dataset, "AcquisitionDateTime"),
        _text(dataset, "ContentDate") + _text(dataset, "ContentTime"),
        _text(dataset, "StudyDate") + _text(dataset, "StudyTime"),
    ):
        moment = compact_time(text)
        if not math.isnan(moment):
            return moment
    return math.nan


def _preference(group: "Dataset") -> tuple[bool, int, int]:
    """The rhythm before median beats and other derived groups; then the most leads; then the longest."""
    median = "MEDIAN" in _text(group, "MultiplexGroupLabel").upper()
    rhythm = not median and _text(group, "WaveformOriginality").upper() != "DERIVED"
    leads = sum(_lead(channel) is not None for channel in group.get("ChannelDefinitionSequence") or ())
    return rhythm, leads, int(group.get("NumberOfWaveformSamples") or 0)


def _simultaneous(group: "Dataset", other: "Dataset") -> bool:
    """Whether two groups hold the same seconds: some devices write twelve leads as four groups of three."""
    same = ("SamplingFrequency", "NumberOfWaveformSamples", "MultiplexGroupTimeOffset")
    return _preference(group)[0] == _preference(other)[0] and all(group.get(tag) == other.get(tag) for tag in same)


def _lead(channel: "Dataset") -> str | None:
    """By scheme and code; by the meaning ("Lead I (Einthoven)") where the code is none that is known."""
    source = channel.ChannelSourceSequence[0]
    prefix = CODE_PREFIXES.get(_text(source, "CodingSchemeDesignator").upper())
    code = _text(source, "CodeValue")
    if prefix and code.startswith(prefix) and (lead := LEAD_BY_NUMBER.get(code.removeprefix(prefix))):
        return lead
    return canonical_lead(_text(source, "CodeMeaning").partition("(")[0].partition(",")[0])


def _leads(group: "Dataset", rate_hz: float) -> dict[str, NDArray[np.float64]]:
    """The known leads in mV, at most the first 60 s, NaN where a sample has the padding value."""
    steps = _steps(group)[: round(LONGEST_READ_S * rate_hz)]  # no more is stored, and float64 is four times as large
    padding = _padding_value(group, steps.dtype)
    leads: dict[str, NDArray[np.float64]] = {}
    for channel, values in zip(group.ChannelDefinitionSequence, steps.T, strict=True):
        lead = _lead(channel)
        if lead is None:
            continue
        skew = float(channel.get("ChannelSampleSkew") or 0) + rate_hz * float(channel.get("ChannelTimeSkew") or 0)
        if abs(skew) > 1:
            detail = f"lead {lead} is skewed by {skew:g} samples against the others; export it again"
            raise Unusable(Reason.UNREADABLE, detail)
        signal_mv = _millivolt(channel, lead, values)
        if padding is not None:
            signal_mv[values == padding] = np.nan
        add_lead(leads, lead, signal_mv)
    return leads


def _steps(group: "Dataset") -> NDArray[np.integer]:
    """The samples as stored, (time, channel)."""
    kind = (int(group.WaveformBitsAllocated), _text(group, "WaveformSampleInterpretation"))
    if kind not in SAMPLE_TYPES:
        raise Unusable(Reason.UNREADABLE, f"samples of the type {kind}; export them as 16-bit SS")
    samples, channels = int(group.NumberOfWaveformSamples), int(group.NumberOfWaveformChannels)
    claimed = getattr(group.get_item("WaveformData"), "length", None)  # gone once pydicom has decoded the element
    data, needed = group.WaveformData or b"", samples * channels * kind[0] // 8
    if not isinstance(data, bytes):
        raise Unusable(Reason.UNREADABLE, "its WaveformData are no bytes; export it again")
    if (
        claimed not in (None, len(data)) or not needed <= len(data) <= needed + needed % 2
    ):  # an odd length is padded by one byte
        detail = f"{len(data)} bytes for {samples} samples of {channels} channels; export it again"
        raise Unusable(Reason.TRUNCATED, detail)
    return np.frombuffer(data[:needed], SAMPLE_TYPES[kind]).reshape(samples, channels)


def _padding_value(group: "Dataset", sample_type: np.dtype[np.integer]) -> int | None:
    value = group.get("WaveformPaddingValue")
    if value is None or isinstance(value, int):
        return value
    if not isinstance(value, bytes) or len(value) < sample_type.itemsize:
        raise Unusable(Reason.UNREADABLE, "its WaveformPaddingValue is no sample; export it again")
    return int(np.frombuffer(value[: sample_type.itemsize], sample_type)[0])


def _millivolt(channel: "Dataset", lead: str, values: NDArray[np.integer]) -> NDArray[np.float64]:
    """sample x sensitivity x correction + baseline, in the channel's unit (PS3.3 C.10.9.1.4)."""
    units = channel.get("ChannelSensitivityUnitsSequence")
    unit = _text(units[0], "CodeValue") if units else ""
    millivolt, sensitivity = millivolt_per_unit(unit), channel.get("ChannelSensitivity")
    if millivolt is None or sensitivity is None:
        detail = f"lead {lead}: ChannelSensitivity {sensitivity} in {unit[:20]!r}; it needs a value in uV or mV"
        raise Unusable(Reason.UNKNOWN_UNIT, detail)
    correction, baseline = channel.get("ChannelSensitivityCorrectionFactor"), channel.get("ChannelBaseline")
    factor = float(sensitivity) * (1.0 if correction is None else float(correction))
    if not (math.isfinite(factor) and factor != 0):
        raise Unusable(Reason.UNKNOWN_UNIT, f"lead {lead}: a step of {factor:g} {unit}; export it again")
    physical: NDArray[np.float64] = (values.astype(np.float64) * factor + float(baseline or 0)) * millivolt
    return physical
