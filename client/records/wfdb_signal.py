"""The samples of a WFDB record in millivolt: by wfdb, or for plain format 16 by an equal raw read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from client.records.record import Reason, Unusable
from client.records.wfdb_header import Header, check_files
from client.records.wfdb_segments import check_segments
from shared_model.kernels import scaled
from shared_model.leads import LEADS, canonical_lead, millivolt_per_unit

LONGEST_READ_S = 60
INVALID_16 = -32768  # format 16's missing sample (signal-5.htm)
Channels = dict[str, tuple[int, float]]
"""Canonical lead -> its channel, and how many mV its unit is."""


@dataclass(frozen=True)
class LeadSignal:
    """The ECG leads of a record: (lead, time) float32 mV, NaN missing, at most the first 60 s."""

    signal_mv: NDArray[np.float32]
    lead_names: tuple[str, ...]


def read_leads(header: Header) -> LeadSignal:
    """Read the known ECG leads of a record; other channels (pressure, PLETH ...) are left out.

    Raises:
        Unusable: a file is missing, cut short or damaged; segments disagree; no lead is known, or a lead's unit.
    """
    length = min(header.length, round(LONGEST_READ_S * header.sampling_rate_hz))
    if not header.segments:
        check_files(header)
    else:
        check_segments(header, length)
    if length == 0:
        raise Unusable(Reason.TOO_SHORT, "the header states 0 samples; copy the record again")
    if is_plain(header):
        channels = known_channels([s.name for s in header.signals], [s.unit for s in header.signals])
        return LeadSignal(read_plain(header, length, channels), tuple(channels))
    names, units, physical = _read_by_wfdb(header, length)
    return _scaled(physical, known_channels(names, units))


def _read_by_wfdb(header: Header, length: int) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Names, units and (signal, time) of any record that wfdb reads."""
    import wfdb  # 130 MB with what it brings, for the formats that need it

    try:
        record = wfdb.rdrecord(str(header.path.with_suffix("")), sampto=length)
        physical: NDArray[np.float64] = record.p_signal.T
        units = [signal.unit for signal in header.signals] or [unit or "" for unit in record.units]
        names = [name or "" for name in record.sig_name]
    except FileNotFoundError as error:
        name = str(error.filename or error).rsplit("/", 1)[-1].strip("'\"")
        raise Unusable(Reason.MISSING_FILE, f"its file {name} is not there; copy it beside the header") from None
    except (Exception, MemoryError) as error:  # damage makes wfdb raise whatever its libraries raise
        detail = f"wfdb cannot read it ({_one_line(error)}); copy the record again"
        raise Unusable(Reason.UNREADABLE, detail) from None
    if not len(names) == len(units) == len(physical):
        raise Unusable(Reason.UNREADABLE, "its signals and their names differ in number; copy the header again")
    return names, units, physical


def is_plain(header: Header) -> bool:
    """Whether all signals lie interleaved in one format-16 file (`.dat`, `.mat` 16+24) with gains."""
    first = header.signals[0] if header.signals else None
    return first is not None and all(
        signal.storage_format == "16"
        and signal.samples_per_frame == 1
        and signal.skew == 0
        and signal.gain != 0
        and (signal.file_name, signal.byte_offset) == (first.file_name, first.byte_offset)
        for signal in header.signals
    )


def read_plain(header: Header, length: int, channels: Channels) -> NDArray[np.float32]:
    """The first `length` samples of a plain record's leads, to the last bit as by way of wfdb: (lead, time) mV."""
    steps = read_steps(header, length)
    baselines_and_gains = tuple((signal.baseline, signal.gain) for signal in header.signals)
    scales = _scales(baselines_and_gains, tuple(channels.values()))
    signal_mv: NDArray[np.float32] = scaled(steps, *scales, np.int16(INVALID_16))
    return signal_mv


@lru_cache(maxsize=64)  # the records of an archive are alike
def _scales(
    baselines_and_gains: tuple[tuple[int, float], ...], places_and_factors: tuple[tuple[int, float], ...]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """`places`, `baseline`, `gain` and `factor` as `scaled` takes them."""
    baselines, gains = zip(*baselines_and_gains, strict=True)
    places, factors = zip(*places_and_factors, strict=True)
    return np.array(places), np.array(baselines, np.float64), np.array(gains), np.array(factors, np.float64)


def read_steps(header: Header, length: int) -> NDArray[np.int16]:
    """The first `length` samples of a plain record as they lie in the file: (time, channel)."""
    first = header.signals[0]
    with open(header.beside(first.file_name), "rb", buffering=0) as file:  # one read, straight from the file
        file.seek(first.byte_offset)
        content = file.read(2 * length * len(header.signals))
    if len(content) < 2 * length * len(header.signals):  # since its size was looked at
        raise Unusable(Reason.TRUNCATED, f"its signal file {first.file_name} was cut short meanwhile; copy it again")
    return np.frombuffer(content, "<i2").reshape(length, len(header.signals))


def known_channels(names: Sequence[str], units: Sequence[str]) -> Channels:
    """For each canonical lead: its channel (the first of that name) and how many mV its unit is.

    Raises:
        Unusable: no channel is one of the twelve leads, or a lead's unit is not a voltage.
    """
    return dict(_known_channels(tuple(names), tuple(units)))


@lru_cache(maxsize=64)  # the records of an archive are alike
def _known_channels(names: tuple[str, ...], units: tuple[str, ...]) -> Channels:
    channels: Channels = {}
    for channel, (name, unit) in enumerate(zip(names, units, strict=True)):
        lead = canonical_lead(name)
        if lead is None or lead in channels:
            continue
        factor = millivolt_per_unit(unit)
        if factor is None:
            raise Unusable(
                Reason.UNKNOWN_UNIT,
                f"lead {name} has the unit {unit!r}; state mV, uV or V in its header line",
            )
        channels[lead] = (channel, factor)
    if not channels:
        listed = ", ".join(names)[:80]
        raise Unusable(
            Reason.NO_KNOWN_LEAD,
            f"none of its channels ({listed}) is a known lead; name them {', '.join(LEADS)}",
        )
    return channels


def _scaled(physical: NDArray[np.floating], channels: Channels) -> LeadSignal:
    places = [channel for channel, _ in channels.values()]
    factors = np.array([factor for _, factor in channels.values()])
    signal_mv = (physical[places] * factors[:, None]).astype(np.float32)
    signal_mv[~np.isfinite(signal_mv)] = np.nan
    return LeadSignal(signal_mv, tuple(channels))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
