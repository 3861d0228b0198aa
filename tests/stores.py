"""A site store in memory, for what reads ECGs and needs no archive."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from client.store import RecordIndex, Store


class MemoryStore:
    """Noise of up to 1 mV in place of ECGs; what `Store` offers to training and prediction."""

    def __init__(self, index: RecordIndex) -> None:
        self.index = index
        self.steps_uv = np.random.default_rng(0).integers(-1000, 1000, (len(index), 12, 2500), dtype=np.int16)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int16]:
        """(len(rows), 12, 2500) microvolt."""
        return self.steps_uv[rows]


def memory_store(patient: Sequence[int], **labels: Sequence[float]) -> Store:
    """One ECG for each entry of `patient`, its code; all of the training split, with these label columns."""
    n = len(patient)
    unknown = np.full(n, np.nan)
    index = RecordIndex(
        row=np.arange(n),
        record=np.arange(n),
        segment=np.zeros(n, np.uint8),
        patient=np.array(patient, np.int64),
        patient_keys=tuple(f"{code:04x}" for code in range(max(patient) + 1)),
        split=np.zeros(n, np.uint8),
        recorded_at=unknown,
        age_years=unknown.astype(np.float32),
        sex=np.full(n, "unknown"),
        race=np.full(n, "unknown"),
        labels={name: np.array(values, np.float32) for name, values in labels.items()},
        measured_at=unknown,
        source_rate_hz=np.full(n, 250, np.float32),
        lead_mask=np.full(n, 0xFFF, np.uint16),
    )
    return cast(Store, MemoryStore(index))
