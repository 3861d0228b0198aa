"""Write WFDB records in format 16, the plain case: one signal file, one gain, baseline 0.

The header follows the WFDB header specification (header(5), PhysioNet). wfdb.wrsamp writes the same signal
more slowly, because it handles every format; tests hold this writer to wfdb.rdrecord.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_model.errors import ExitCode, HemoFedError

_RECORD_NAME = re.compile(r"[-\w]+")


def to_adc_units(signal_mv: NDArray[np.float32], gain_adc_per_mv: float) -> NDArray[np.int16]:
    """Whole ADC units, little-endian int16; saturates at +-32767 (-32768 means a missing sample)."""
    scaled = signal_mv * np.float32(gain_adc_per_mv)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32767, 32767, out=scaled)
    return scaled.astype("<i2")


def write_record(
    path: Path,
    samples: NDArray[np.int16],
    lead_names: Sequence[str],
    sampling_rate_hz: float,
    gain_adc_per_mv: float,
    recorded_at: datetime,
    comments: Sequence[str] = (),
) -> None:
    """Write `path`.hea and `path`.dat.

    `samples` is (time, lead) int16 in ADC units; physical mV = samples / gain. `recorded_at` is local time,
    to the second. Raises HemoFedError for a name, lead or comment that the header could not carry, and
    OSError where the disk fails.
    """
    name = path.name
    if not _RECORD_NAME.fullmatch(name):
        raise HemoFedError(
            f"record name {name!r}: WFDB allows letters, digits, '-' and '_' only; rename the record",
            ExitCode.USAGE,
        )
    if samples.ndim != 2 or samples.shape[1] != len(lead_names) or len(samples) == 0:
        raise HemoFedError(
            f"record {name}: {samples.shape} samples for {len(lead_names)} leads; give (time, lead)",
            ExitCode.USAGE,
        )
    if any("\n" in text or "\r" in text for text in (*lead_names, *comments)):
        raise HemoFedError(f"record {name}: a lead name or comment holds a line break; remove it", ExitCode.USAGE)

    stored = np.ascontiguousarray(samples, dtype="<i2")
    total = stored.sum(axis=0, dtype=np.int64)
    checksum = ((total + 0x8000) & 0xFFFF) - 0x8000  # signed 16 bit, as the specification has it
    initial = stored[0].tolist()
    lines = [f"{name} {len(lead_names)} {sampling_rate_hz:.12g} {len(stored)} {recorded_at:%H:%M:%S %d/%m/%Y}"]
    lines += [
        f"{name}.dat 16 {gain_adc_per_mv:.12g}(0)/mV 16 0 {first} {total} 0 {lead}"
        for lead, first, total in zip(lead_names, initial, checksum.tolist(), strict=True)
    ]
    lines += [f"#{comment}" for comment in comments]
    path.with_name(f"{name}.dat").write_bytes(stored.tobytes())
    path.with_name(f"{name}.hea").write_bytes(("\n".join(lines) + "\n").encode())
