"""Ages and times as hospital systems write them."""

import math
import re
from datetime import UTC, datetime, timedelta, timezone

from client.records.record import known_age

DAYS_A_YEAR = 365.25
UNITS_A_YEAR = {"y": 1.0, "m": 12.0, "w": DAYS_A_YEAR / 7, "d": DAYS_A_YEAR, "h": DAYS_A_YEAR * 24}
_COMPACT = re.compile(r"(\d{8})(?:(\d{2})(\d{2})(?:(\d{2})(\.\d{1,9})?)?)?([+-]\d{4})?", re.ASCII)


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
    """Unix seconds of YYYYMMDD[HHMM[SS[.fff]]][+-ZZZZ] (HL7 TS, DICOM DT); no zone: UTC; NaN for anything else."""
    match = _COMPACT.fullmatch(text.strip())
    if match is None:
        return math.nan
    date, hour, minute, second, fraction, zone = match.groups()
    try:
        moment = datetime.strptime(f"{date}{hour or '00'}{minute or '00'}{second or '00'}", "%Y%m%d%H%M%S")
        sign = -1 if zone and zone[0] == "-" else 1
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[3:])) if zone else timedelta()
        return moment.replace(tzinfo=timezone(sign * offset)).timestamp() + float(fraction or 0)
    except (ValueError, OverflowError):
        return math.nan


def birth_time(text: str) -> float:
    """Unix seconds of a date of birth; of a year alone its middle, of a month alone its middle."""
    return compact_time(text.strip() + {4: "0701", 6: "15"}.get(len(text.strip()), ""))


def american_time(date: str, clock: str) -> float:
    """Unix seconds of MM-DD-YYYY and HH:MM[:SS]; NaN for a masked or absent date; no clock: midnight."""
    for form in ("%m-%d-%Y %H:%M:%S", "%m-%d-%Y %H:%M"):
        try:
            return datetime.strptime(f"{date.strip()} {clock.strip() or '00:00'}", form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
    return math.nan
