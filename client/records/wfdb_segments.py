"""The segments of a multi-segment WFDB record held against its master header, before wfdb joins them.

wfdb takes rate and lengths from the master, and in a fixed layout names and units from the first segment: a segment
that says otherwise would come out at another speed, or as another lead. Format:
https://physionet.org/physiotools/wag/header-5.htm, "Multi-segment records".
"""

from pathlib import Path

from client.records.record import Reason, Unusable
from client.records.wfdb_header import LAYOUT_FILE, Header, check_files, read_header, split_header


def check_segments(master: Header, length: int) -> None:
    """Look at the segments that the first `length` samples lie in.

    Raises:
        Unusable: a segment is missing, damaged or cut short; its sampling rate or length is not the master's; or, in
            a fixed layout (the first segment has samples), its signals are not those of the first segment.
    """
    entries = _entries(master)
    is_fixed = entries[0][1] > 0
    first: Header | None = None
    start = 0
    for name, samples in entries:
        if start >= length:
            break
        start += samples
        if name == LAYOUT_FILE:
            continue
        segment = _read_segment(master, name)
        first = first or segment
        if segment.sampling_rate_hz != master.sampling_rate_hz:
            detail = f"{segment.sampling_rate_hz:g} Hz, the record {master.sampling_rate_hz:g} Hz"
            raise _differs(name, detail)
        if segment.length != samples:
            raise _differs(name, f"{segment.length} samples, the record's header {samples}")
        if is_fixed and _channels(segment) != _channels(first):
            raise _differs(name, "other signals or units, or another order, than the first segment")


def _entries(master: Header) -> list[tuple[str, int]]:
    """Name and samples of each segment as the master header lists them, gaps included."""
    entries = [line.split() for line in split_header(master.path)[0][1:]]
    try:
        return [(words[0], int(words[1])) for words in entries]
    except (ValueError, IndexError):
        detail = "a segment's line is not a name and a number of samples; copy the header again"
        raise Unusable(Reason.UNREADABLE, detail) from None


def _read_segment(master: Header, name: str) -> Header:
    path = Path(master.beside(f"{name}.hea"))
    if not path.exists():
        raise Unusable(Reason.MISSING_FILE, f"its file {path.name} is not there; copy it beside the header")
    try:
        segment = read_header(path)
        if segment.segments:
            raise Unusable(Reason.UNREADABLE, "it has segments itself; export the record again")
        if segment.length:  # a layout has no signal file
            check_files(segment)
    except Unusable as unusable:
        raise Unusable(unusable.reason, f"segment {name}: {unusable.detail}") from None
    return segment


def _channels(header: Header) -> list[tuple[str, str]]:
    return [(signal.name, signal.unit) for signal in header.signals]


def _differs(name: str, detail: str) -> Unusable:
    return Unusable(Reason.UNREADABLE, f"segment {name} has {detail}; copy or export the whole record again")
