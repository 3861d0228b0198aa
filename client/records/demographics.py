"""Ages and times as hospital systems write them."""

import math
import re
from datetime import UTC, datetime

from client.records.record import known_age

DAYS_A_YEAR = 365.25
UNITS_A_YEAR = {"y": 1.0, "m": 12.0, "w": DAYS_A_YEAR / 7, "d": DAYS_A_YEAR, "h": DAYS_A_YEAR * 24}
_COMPACT = re.compile(r"(\d{8})(\d{2})(\d{2})(?:(\d{2})(\.\d{1,9})?)?(?:[+-]\d{4})?", re.ASCII)


def age_in_years(value: str, unit: str) -> float:
    """Years from a number and its unit ("YEARS", "MONTHS", "D" ...); NaN where either is not known."""
    units_a_year = UNITS_A_YEAR.get(unit.strip().lower()[:1])
    if units_a_year is None:
        return math.nan
    try:
        return known_age(str(float(value) / units_a_year))
    except ValueError:
        return math.nan


def age_between(born_at: float, recorded_at: float) -> float:
    """Years from birth to recording, both unix seconds; NaN where one is unknown or the order is wrong."""
    return known_age(str((recorded_at - born_at) / (DAYS_A_YEAR * 86_400)))


def compact_time(text: str) -> float:
    """Unix seconds of YYYYMMDDHHMM[SS[.fff]][+-ZZZZ] (HL7 TS, DICOM DT); NaN for anything else.

    The clock counts as it reads, a zone is dropped: a hospital's other times have none. A date without a clock is
    no time: midnight would lie before every event of that day.
    """
    match = _COMPACT.fullmatch(text.strip())
    if match is None:
        return math.nan
    date, hour, minute, second, fraction = match.groups()
    return _unix_seconds(f"{date}{hour}{minute}{second or '00'}", "%Y%m%d%H%M%S") + float(fraction or 0)


def birth_time(text: str) -> float:
    """Unix seconds of a date of birth; of a year alone its middle, of a month alone its middle."""
    text = text.strip()
    return _unix_seconds((text + {4: "0701", 6: "15"}.get(len(text), ""))[:8], "%Y%m%d")


def american_birth_time(date: str) -> float:
    """Unix seconds of a date of birth as MM-DD-YYYY; NaN for a masked or absent one."""
    return _unix_seconds(date.strip(), "%m-%d-%Y")


def american_time(date: str, clock: str) -> float:
    """Unix seconds of MM-DD-YYYY and HH:MM[:SS]; NaN where the date is masked or one of the two is absent."""
    text, form = f"{date.strip()} {clock.strip()}", "%m-%d-%Y %H:%M"
    moment = _unix_seconds(text, f"{form}:%S")
    return _unix_seconds(text, form) if math.isnan(moment) else moment


def _unix_seconds(text: str, form: str) -> float:
    """Unix seconds of a clock reading, taken as UTC; NaN where it is none."""
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return math.nan
