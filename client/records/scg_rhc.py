"""PhysioNet SCG-RHC 1.0.0: ECG during right heart catheterisation, processed_data/TRM107-RHC1.{hea,dat,json}.

A record lasts a whole procedure. What is labelled is the ECG around the moment at which the catheter reached the
wedge position, because that is when the mean wedge pressure of the Mac-Lab report was taken. Beside the report's
pressures stand those of the waveform itself, measured while the catheter lay there.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.records.files import may_be_opened
from client.records.labels_csv import EMPTY
from client.records.options import ReaderOptions
from client.records.plausible import plausible_range
from client.records.record import (
    Archive,
    EcgRecord,
    Item,
    Noticed,
    Reason,
    Remark,
    TurnedAway,
    Unusable,
    known_age,
    known_sex,
)
from client.records.wfdb_folder import readable
from client.records.wfdb_header import Header, check_files, read_header
from client.records.wfdb_signal import LONGEST_READ_S, LeadSignal, known_channels

DATA_FOLDER = "processed_data"
LARGEST_JSON_BYTES = 2**20
# Half before and half after the wedge position is reached.
AROUND_S = LONGEST_READ_S / 2
# Mac-Lab's name -> label.
LABELS = {
    "PCWM": "mpcwp_mmhg",
    "PAM": "mpap_mmhg",
    "RAM": "mrap_mmhg",
    "PAS": "pasp_mmhg",
    "PAD": "padp_mmhg",
    "Fick COL/min": "co_fick_l_min",
    "TDCOL/min": "co_thermodilution_l_min",
}
PRESSURE_CHANNEL, PRESSURE_UNIT = "RHC_pressure", "mmhg"
# Where the catheter lies -> label measured there, and the report's own name for it.
MEASURED = {"PCW": ("mpcwp_waveform_mmhg", "mpcwp_mmhg"), "PA": ("mpap_waveform_mmhg", "mpap_mmhg")}
# The events are entered by hand when the tracing has changed: the first seconds may hold the way there.
SETTLING_S, LONGEST_INTERVAL_S = 2.0, 15.0
MOST_DIFFERENT_MMHG = 5.0


@dataclass(frozen=True)
class Procedure:
    """What a record's JSON says."""

    age_years: float = math.nan
    sex: str = ""
    reached_s: dict[str, float] = field(default_factory=dict)
    """Event of `ChamEvents_in_s` -> seconds from the beginning of the record."""
    wedge_at: float = math.nan
    """Unix seconds of the wedge event."""
    labels: dict[str, float] = field(default_factory=dict)
    absurd: tuple[str, ...] = ()

    @property
    def wedge_s(self) -> float:
        """Seconds from the beginning of the record at which the wedge position was reached; NaN: not annotated."""
        return self.reached_s.get(_event("PCW", self.reached_s) or "", math.nan)

    def interval_s(self, chamber: str, duration_s: float) -> tuple[float, float] | None:
        """From when to when the catheter lay in a chamber: settled, up to the next event, at most 15 s."""
        event = _event(chamber, self.reached_s)
        if event is None or not 0 <= self.reached_s[event] < duration_s:
            return None
        reached = self.reached_s[event]
        left = min((moment for moment in self.reached_s.values() if moment > reached), default=duration_s)
        first = reached + SETTLING_S
        return first, max(first, min(left, duration_s, first + LONGEST_INTERVAL_S))


def recognises(source: Path) -> bool:
    """Whether a header has a JSON of catheter events beside it, here or in processed_data/."""
    notes = [*source.glob("*.json"), *(source / DATA_FOLDER).glob("*.json")]
    return any(path.with_suffix(".hea").is_file() and _has_events(path) for path in notes)


def _headers(source: Path) -> list[Path]:
    headers = sorted([*source.glob("*.hea"), *(source / DATA_FOLDER).glob("*.hea")])
    return [path for path in headers if may_be_opened(path)]


def _has_events(path: Path) -> bool:
    try:
        return bool({"ChamEvents_in_s", "maclabMeas"} & _read_json(path).keys())
    except Unusable:
        return False


def open_archive(source: Path, _options: ReaderOptions) -> Archive:
    """List the records."""
    headers = _headers(source)
    return Archive(len(headers), (partial(_read, path, readable(path.relative_to(source))) for path in headers))


def _read(path: Path, name: str) -> Iterator[Item]:
    try:
        yield from _read_record(path, name)
    except Unusable as unusable:
        yield TurnedAway(name, unusable.reason, unusable.detail)


def _read_record(path: Path, name: str) -> Iterator[EcgRecord | Remark]:
    header = read_header(path)
    json_path = path.with_suffix(".json")
    procedure = _procedure(_read_json(json_path)) if json_path.exists() else Procedure()
    duration_s = header.length / header.sampling_rate_hz
    labelled = 0 <= procedure.wedge_s < duration_s
    start_s = max(0.0, min(procedure.wedge_s, duration_s - AROUND_S) - AROUND_S) if labelled else 0.0
    leads = _read_window(header, start_s)
    if not labelled:
        detail = "no wedge position within the record in ChamEvents_in_s, so its first minute is taken without labels"
        yield Remark(name, Noticed.NO_WEDGE_INTERVAL, detail)
    if procedure.absurd and labelled:
        detail = f"{', '.join(procedure.absurd)}; dropped, check the source"
        yield Remark(name, Noticed.ABSURD_LABEL, detail)
    measured, differing, refused = _measured_pressures(header, procedure) if labelled else ({}, [], [])
    if differing:
        detail = f"{', '.join(differing)}; both are kept, look at the tracing"
        yield Remark(name, Noticed.PRESSURE_DIFFERS, detail)
    if refused:
        detail = f"{', '.join(refused)}; not measured there, look at the tracing"
        yield Remark(name, Noticed.PRESSURE_REFUSED, detail)
    began_at = procedure.wedge_at - procedure.wedge_s if labelled else math.nan
    began_at = header.recorded_at if math.isnan(began_at) else began_at
    yield EcgRecord(
        record_id=path.stem,
        source=name,
        signal_mv=leads.signal_mv,
        lead_names=leads.lead_names,
        sampling_rate_hz=header.sampling_rate_hz,
        patient_id=path.stem.partition("-")[0] or f"record:{path.stem}",
        recorded_at=began_at + start_s,
        age_years=procedure.age_years,
        sex=known_sex(procedure.sex),
        labels={**procedure.labels, **measured} if labelled else {},
        measured_at=began_at + procedure.wedge_s if labelled else math.nan,
    )


def _read_window(header: Header, start_s: float) -> LeadSignal:
    """The known ECG leads of a minute from `start_s`; the record's other channels are not read."""
    check_files(header)
    channels = known_channels([signal.name for signal in header.signals], [signal.unit for signal in header.signals])
    places, factors = zip(*channels.values(), strict=True)
    physical = _samples(header, list(places), start_s, start_s + LONGEST_READ_S)
    signal_mv = (physical * [[factor] for factor in factors]).astype("float32")
    return LeadSignal(signal_mv, tuple(channels))


def _samples(header: Header, places: list[int], first_s: float, last_s: float) -> NDArray[np.float64]:
    """Some channels of some seconds in their own units: (channel, time)."""
    import wfdb  # loaded where it is needed, as in wfdb_signal.py

    first, last = (min(header.length, round(seconds * header.sampling_rate_hz)) for seconds in (first_s, last_s))
    try:
        stem = str(header.path.with_suffix(""))
        physical: NDArray[np.float64] = wfdb.rdrecord(stem, sampfrom=first, sampto=last, channels=places).p_signal.T
    except (Exception, MemoryError) as error:  # damage makes wfdb raise whatever its libraries raise
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise Unusable(Reason.UNREADABLE, f"wfdb cannot read it ({detail}); copy the record again") from None
    return physical


def _measured_pressures(header: Header, procedure: Procedure) -> tuple[dict[str, float], list[str], list[str]]:
    """Labels measured from the waveform, where they differ from the report, and which intervals are artefact."""
    from client.records.pressure_wave import Refused, measure_pressures  # brings scipy.signal

    units = {signal.name: (place, signal.unit.lower()) for place, signal in enumerate(header.signals)}
    place, unit = units.get(PRESSURE_CHANNEL, (-1, ""))
    labels: dict[str, float] = {}
    differing, refused = [], []
    for chamber, (label, reported) in MEASURED.items() if unit == PRESSURE_UNIT else ():
        interval = procedure.interval_s(chamber, header.length / header.sampling_rate_hz)
        if interval is None:
            continue
        try:
            (pressure,) = _samples(header, [place], *interval) if interval[0] < interval[1] else ([],)
            mean = round(measure_pressures(np.asarray(pressure), header.sampling_rate_hz).mean_mmhg, 2)
        except Refused as artefact:
            refused.append(f"{chamber}: {artefact}")
            continue
        low, high = plausible_range(reported)
        if not low <= mean <= high:
            refused.append(f"{chamber}: a mean of {mean:.1f} mmHg")
            continue
        labels[label] = mean
        if abs(mean - procedure.labels.get(reported, mean)) > MOST_DIFFERENT_MMHG:
            differing.append(f"{label} = {mean:.1f} but {reported} = {procedure.labels[reported]:g}")
    return labels, differing, refused


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise Unusable(Reason.UNREADABLE, f"{path.name} is no regular file; copy it again")
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise Unusable(Reason.UNREADABLE, f"{path.name} is larger than 1 MB; copy it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, f"{path.name} cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, RecursionError):
        raise Unusable(Reason.UNREADABLE, f"{path.name} is not JSON; copy it again") from None
    if not isinstance(content, dict):
        raise Unusable(Reason.UNREADABLE, f"{path.name} is not a JSON object; copy it again")
    return content


def _procedure(content: dict[str, Any]) -> Procedure:
    events, moments = content.get("ChamEvents_in_s"), content.get("ChamEvents")
    reached = {name: _number(value) for name, value in events.items()} if isinstance(events, dict) else {}
    reached = {name: seconds for name, seconds in reached.items() if not math.isnan(seconds)}
    wedge = _event("PCW", reached)
    labels, absurd = _labels(content.get("maclabMeas"))
    return Procedure(
        age_years=known_age(str(content.get("age", ""))),
        sex=str(content.get("gender", "")),
        reached_s=reached,
        wedge_at=_event_time(moments.get(wedge)) if isinstance(moments, dict) else math.nan,
        labels=labels,
        absurd=absurd,
    )


def _event(chamber: str, reached_s: Mapping[str, float]) -> str | None:
    """`PCW`, or the earliest of `PCW_1`, `PCW_2` ..., whichever has a time."""
    names = [name for name in reached_s if name.startswith(f"{chamber}_")]
    return chamber if chamber in reached_s else min(names, key=lambda name: reached_s[name], default=None)


def _event_time(text: object) -> float:
    """'12-Mar-2018 10:15:00 AM': the hour counts to 24, so the last word adds nothing."""
    words = str(text).split()
    try:
        return datetime.strptime(" ".join(words[:2]), "%d-%b-%Y %H:%M:%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return math.nan


def _labels(measured: object) -> tuple[dict[str, float], tuple[str, ...]]:
    """Labels by name, and the values that cannot be. Mac-Lab pads its names with blanks and writes "nd"."""
    labels, absurd = {}, []
    for key, value in measured.items() if isinstance(measured, dict) else ():
        label = LABELS.get(str(key).strip(), "")
        if not label or str(value).strip().lower() in EMPTY:
            continue
        number, (low, high) = _number(value), plausible_range(label)
        if low <= number <= high:
            labels[label] = number
        else:
            absurd.append(f"{label} = {str(value)[:40]!r} is not within {low:g} to {high:g}")
    return labels, tuple(absurd)


def _number(value: object) -> float:
    """A finite number from JSON's numbers and strings, else NaN."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
