"""A bank of public ECGs for private pretraining, from simulated patients who are not those of any hospital, or from a
site folder of public ECGs.

The simulated public is shifted on purpose: other people, recorders, noise and wave shapes; signs of pressure half as
strong and some of them absent. A bank from the hospitals' own generator would make privacy look cheaper than it is.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from client.bank import FEWEST_ECGS, LABEL, SIGNALS
from client.store import RecordIndex, open_store
from shared_model.errors import ExitCode, HemoFedError
from simulation.circulation import EFFECT_SCALE
from simulation.consortium import Hospital, make_hospital
from simulation.hospitals import DeviceFilter, HospitalSpec


def public_hospital(patients: int, name: str = "public", labelled_share: float = 0.0) -> HospitalSpec:
    """Patients of a public archive: shifted against every hospital's defaults; without labels unless asked for."""
    return HospitalSpec(
        name=name,
        patients=patients,
        labelled_share=labelled_share,
        age_mean_years=52,
        age_sd_years=18,
        female_share=0.52,
        race_mix={"white": 0.85, "asian": 0.10, "other": 0.05},
        effect_scale=EFFECT_SCALE / 2,
        absent_effects=("p_terminal_v1", "qtc", "atrial_fibrillation"),
        wave_width=1.15,
        amplitude_gain=1.1,
        noise_scale=0.7,
        mains_hz=50,
        filter=DeviceFilter(high_pass_hz=0.5, low_pass_hz=100),
    )


def make_bank(ecgs: int, seed: int, spec: HospitalSpec | None = None, labels: bool = False) -> bytes:
    """The file of a bank of `ecgs` simulated ECGs, one a patient; the bytes follow from the arguments alone.

    Args:
        spec: whom they are of; `public_hospital` where None.
        labels: put their labels in, for supervised metric learning.
    """
    spec = spec or public_hospital(ecgs, labelled_share=float(labels))
    with tempfile.TemporaryDirectory() as folder:
        hospital = Hospital(spec.model_copy(update={"patients": ecgs}), Path(folder) / "public")
        make_hospital(hospital, seed)
        return bank_of(hospital.site_dir, ecgs, seed, labels)


def bank_of(site_dir: Path, ecgs: int, seed: int, labels: bool = False) -> bytes:
    """The file of a bank of ECGs from a site folder: the first of each of up to `ecgs` random patients.

    Raises:
        HemoFedError: there are too few patients.
    """
    store = open_store(site_dir)
    rows = first_ecgs(store.index)
    if len(rows) < FEWEST_ECGS:
        raise HemoFedError(
            f"{site_dir}: {len(rows)} patients make no bank; {FEWEST_ECGS} or more are needed",
            ExitCode.NO_USABLE_PATIENTS,
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:ecgs])
    arrays: dict[str, NDArray[np.generic]] = {SIGNALS: np.ascontiguousarray(store.read(chosen))}
    if labels:
        arrays |= {f"{LABEL}{name}": values[chosen].astype(np.float32) for name, values in store.index.labels.items()}
    return save(arrays)


def first_ecgs(index: RecordIndex) -> NDArray[np.int64]:
    """The row of each patient's first stored ECG."""
    _, places = np.unique(index.patient, return_index=True)
    rows: NDArray[np.int64] = index.row[places]
    return rows


def write_bank(data: bytes, path: Path) -> str:
    """Write a bank, whole or not at all; its SHA-256 is returned."""
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        raise HemoFedError(f"--out {path}: {error.strerror}; give a file that can be written", ExitCode.USAGE) from None
    return hashlib.sha256(data).hexdigest()
