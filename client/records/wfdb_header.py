"""WFDB headers, as far as ingest must know them before it trusts a file to wfdb.

Format: https://physionet.org/physiotools/wag/header-5.htm. wfdb itself is not loaded for it: it brings pandas and
scipy.signal, 130 MB a process, and most archives hold plain records that are read without. What is read here is
held to wfdb's own reading by tests/test_mutations_wfdb.py.
"""

import math
import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from client.records.record import Reason, Unusable

# Bytes a sample of the formats whose file size follows from the length (signal-5.htm).
BYTES_PER_SAMPLE = {
    "8": 1,
    "80": 1,
    "16": 2,
    "61": 2,
    "160": 2,
    "212": 1.5,
    "310": 4 / 3,
    "311": 4 / 3,
    "24": 3,
    "32": 4,
}
LAYOUT_FILE = "~"
LARGEST_HEADER_BYTES = 2**20
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 50, 20_000

# Name, segments, signals, rate (with counter frequency and base), length; then time and date, in any order.
_RECORD_LINE = re.compile(
    r"[-\w]+(?:/\d+)?[ \t]+(?P<n_sig>\d+)"
    r"(?:[ \t]+(?P<rate>\d+\.?\d*)(?:[/(]\S*)?(?:[ \t]+(?P<length>\d+))?)?(?:[ \t].*)?"
)
# File, format x frame : skew + offset, gain (baseline) / unit, resolution, zero, first value, checksum, block, name.
_SIGNAL_LINE = re.compile(
    r"(?P<file>~|[-\w]+\.?\w*)[ \t]+(?P<format>\d+)(?:x(?P<frame>\d+))?(?::(?P<skew>\d+))?(?:\+(?P<offset>\d+))?"
    r"(?:[ \t]+(?P<gain>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?"
    r"(?:[ \t]+\d+(?:[ \t]+(?P<zero>-?\d+)(?:[ \t]+-?\d+(?:[ \t]+-?\d+(?:[ \t]+\d+(?:[ \t]+(?P<name>.+))?)?)?)?)?)?)?"
)
_FILE_NAME = re.compile(r"[-\w]+\.?\w*")
_SINGLE_SEGMENT = re.compile(rb"[-\w]+\s")  # how nearly all headers start: with a name, and no "/2" after it
_CLOCK = re.compile(r"\b\d{1,2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?\b")
_DATE = re.compile(r"\b\d{1,2}/\d{1,2}/\d{4}\b|\b\d{1,2}-[A-Za-z]{3}-\d{4}\b")
_FIELD = re.compile(r"(?:^|<)\s*(patient_id|subject_id|subject|age|sex|gender|race|dx)\s*>?\s*:\s*([^<]*)", re.I)


class SignalLine(NamedTuple):
    """One signal of a header. A tuple: a header has twelve, and an archive a million headers."""

    file_name: str
    storage_format: str
    samples_per_frame: int
    skew: int
    byte_offset: int
    gain: float
    """Steps a unit; 0 where the header leaves it out."""
    baseline: int
    unit: str
    name: str


@dataclass(frozen=True)
class Header:
    """What a .hea file says."""

    path: Path
    segments: tuple[str, ...]
    """Names of the segment records; empty for a single-segment record."""
    sampling_rate_hz: float
    length: int
    """Samples a signal."""
    recorded_at: float
    signals: tuple[SignalLine, ...]
    comments: dict[str, str]
    """patient_id, age, sex, race, dx as written in the comments, where they are."""

    def beside(self, name: str) -> str:
        """The path of a file in the header's folder."""
        return os.path.join(os.path.dirname(self.path), name)


def split_header(path: Path | str) -> tuple[list[str], list[str]]:
    """The lines and the comments of a header. Raises Unusable if it cannot be read, is too large or is empty."""
    return _split(_content(path))


def _content(path: Path | str) -> bytes:
    try:
        found = os.stat(path)  # before it is opened: a pipe would wait for ever
        if not stat.S_ISREG(found.st_mode):
            raise Unusable(Reason.UNREADABLE, "the header is no regular file; copy the record again")
        if found.st_size > LARGEST_HEADER_BYTES:
            raise Unusable(Reason.UNREADABLE, "the header is larger than 1 MB; copy the record again")
        with open(path, "rb", buffering=0) as file:  # unbuffered: a header is read in one piece
            return file.read()
    except OSError as error:
        raise Unusable(Reason.UNREADABLE, f"cannot be read ({error.strerror}); check the file's permissions") from None


def _split(content: bytes) -> tuple[list[str], list[str]]:
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError:
        decoded = content.decode("latin-1")  # old carts write the micro sign so
    stripped = [line.strip() for line in decoded.splitlines()]
    lines = [line for line in stripped if line and not line.startswith("#")]
    if not lines:
        raise Unusable(Reason.UNREADABLE, "the header is empty; copy the record again")
    return lines, [line.lstrip("#").strip() for line in stripped if line.startswith("#")]


def segment_names(path: Path | str) -> tuple[str, ...]:
    """The segment records that a multi-segment header joins; empty for any other file."""
    try:
        content = _content(path)
        return () if _SINGLE_SEGMENT.match(content) else _segments(_split(content)[0])
    except Unusable:
        return ()


def _segments(lines: list[str]) -> tuple[str, ...]:
    if "/" not in lines[0].split(maxsplit=1)[0]:
        return ()
    return tuple(name for line in lines[1:] if (name := line.split(maxsplit=1)[0]) != LAYOUT_FILE)


def read_header(path: Path) -> Header:
    """Parse and check a header.

    Raises:
        Unusable: it does not parse, states no rate or length, or names files outside its own folder.
    """
    lines, comments = split_header(path)
    match = _RECORD_LINE.fullmatch(lines[0])
    if match is None:
        raise Unusable(Reason.UNREADABLE, f"the first line is not a WFDB record line: {lines[0][:60]!r}; copy it again")
    rate_hz = float(match["rate"] or 0)
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise Unusable(
            Reason.NO_SAMPLING_RATE,
            f"the first line states {match['rate'] or 'no'} Hz; an ECG has {LOWEST_RATE_HZ} to "
            f"{HIGHEST_RATE_HZ} Hz: mend the third field",
        )
    if not match["length"]:
        raise Unusable(
            Reason.NO_LENGTH,
            "the first line states no length, so a cut-off file would go unnoticed; add the number of "
            "samples as the fourth field",
        )
    segments = _segments(lines)
    if segments:
        _refuse_foreign_paths(lines)
    signals = () if segments else _signal_lines(lines, int(match["n_sig"]))
    if not segments and (len(lines) - 1 != int(match["n_sig"]) or not signals):
        detail = f"{len(lines) - 1} signal lines, where the first line says {match['n_sig']}; copy it again"
        raise Unusable(Reason.UNREADABLE, detail)
    return Header(
        path=path,
        segments=segments,
        sampling_rate_hz=rate_hz,
        length=int(match["length"]),
        recorded_at=_base_time(lines[0]),
        signals=signals,
        comments=_comment_fields(comments),
    )


def _refuse_foreign_paths(lines: list[str]) -> None:
    """A header names files beside itself only: a path could make ingest read any file of the machine."""
    for name in (line.split()[0] for line in lines[1:]):
        if "/" in name or "\\" in name or name.startswith(".."):
            raise Unusable(
                Reason.PATH_OUTSIDE_FOLDER,
                f"the header points to {name[:80]!r}; put the file beside the header, named without a folder",
            )


def _signal_lines(lines: list[str], count: int) -> tuple[SignalLine, ...]:
    """The signal lines; where one does not parse, its path may be why."""
    try:
        return tuple(_signal_line(line) for line in lines[1 : 1 + count])
    except Unusable:
        _refuse_foreign_paths(lines)
        raise


def _signal_line(line: str) -> SignalLine:
    """Parse one signal line. The lines of an archive are alike but for file, first value and checksum."""
    words = line.split()
    if len(words) > 7 and _is_file_name(words[0]) and _is_whole(words[5]) and _is_whole(words[6]):
        file_name, words[0], words[5], words[6] = words[0], "x", "0", "0"
        return SignalLine(file_name, *_parsed_line(" ".join(words))[1:])
    return _parsed_line(line)


@lru_cache(maxsize=64)  # the signals of a record are mostly in one file
def _is_file_name(word: str) -> bool:
    return _FILE_NAME.fullmatch(word) is not None


def _is_whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


@lru_cache(maxsize=1024)
def _parsed_line(line: str) -> SignalLine:
    match = _SIGNAL_LINE.fullmatch(line)
    if match is None:
        raise Unusable(Reason.UNREADABLE, f"not a WFDB signal line: {line[:60]!r}; copy the header again")
    try:
        return SignalLine(
            file_name=match["file"],
            storage_format=match["format"],
            samples_per_frame=int(match["frame"] or 1),
            skew=int(match["skew"] or 0),
            byte_offset=int(match["offset"] or 0),
            gain=float(match["gain"] or 0),
            baseline=int(match["baseline"] or match["zero"] or 0),
            unit=match["unit"] or "mV",
            name=(match["name"] or "").strip(),
        )
    except ValueError:
        raise Unusable(
            Reason.UNREADABLE, f"a number is broken in the signal line {line[:60]!r}; copy it again"
        ) from None


def _base_time(record_line: str) -> float:
    """Unix seconds of base date and time; NaN without both. Both "22/09/2182" and "05-Feb-2020" occur."""
    date, clock = _DATE.search(record_line), _CLOCK.search(record_line)
    if date is None or clock is None:  # midnight would lie before every event of that day
        return math.nan
    date_form = "%d-%b-%Y" if "-" in date[0] else "%d/%m/%Y"
    parts = clock[0].split(":")
    try:
        day = datetime.strptime(date[0], date_form).replace(tzinfo=UTC)
    except ValueError:
        return math.nan
    seconds = float(parts[2]) if len(parts) > 2 else 0.0
    return day.timestamp() + 3600 * int(parts[0]) + 60 * int(parts[1]) + seconds


def _comment_fields(comments: list[str]) -> dict[str, str]:
    """`patient_id: x`, `#Age: 67`, `<age>: 28  <sex>: M`, `<subject_id>: 1`; the first of a name counts."""
    fields: dict[str, str] = {}
    for comment in comments:
        for name, value in _FIELD.findall(comment):
            key = {"subject_id": "patient_id", "subject": "patient_id", "gender": "sex"}.get(name.lower(), name.lower())
            fields.setdefault(key, value.strip())
    return fields


def check_files(header: Header) -> None:
    """Raises Unusable if a signal file of a single-segment record is absent or shorter than stated."""
    files: dict[str, list[SignalLine]] = {}
    for signal in header.signals:
        files.setdefault(signal.file_name, []).append(signal)
    for name, signals in files.items():
        try:
            found = os.stat(header.beside(name))
            is_file, size = stat.S_ISREG(found.st_mode), found.st_size
        except OSError:
            is_file, size = False, 0
        if name == LAYOUT_FILE or not is_file:
            raise Unusable(Reason.MISSING_FILE, f"its signal file {name} is not there; copy it beside the header")
        frame = sum(BYTES_PER_SAMPLE.get(s.storage_format, math.nan) * s.samples_per_frame for s in signals)
        if math.isnan(frame):
            continue  # compressed: wfdb finds out
        needed = signals[0].byte_offset + int(frame * header.length)
        if size < needed:
            raise Unusable(Reason.TRUNCATED, f"its signal file {name} holds {size} of {needed} bytes; copy it again")
