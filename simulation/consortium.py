"""Makes the hospitals of a plan: written as WFDB records, ingested by the command that a hospital would use."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.ingest import ingest
from shared_model.errors import ExitCode, HemoFedError
from shared_model.release import release_sha256
from shared_model.workers import worker_pool
from simulation.hospitals import HospitalSpec, write_hospital
from simulation.plan import Simulation

MADE_FILE = "made.json"
TRUTH_FILE = "truth.npz"


@dataclass(frozen=True)
class Hospital:
    """Where a simulated hospital lies: `source` as exported, `site` as ingested, `truth.npz` apart from both."""

    spec: HospitalSpec
    folder: Path

    @property
    def source(self) -> Path:
        """WFDB records and labels.csv."""
        return self.folder / "source"

    @property
    def site_dir(self) -> Path:
        """The site store."""
        return self.folder / "site"


def hospitals_of(plan: Simulation, folder: Path) -> list[Hospital]:
    """The hospitals of a plan and where they lie or will lie under `folder`."""
    return [Hospital(spec, folder / spec.name) for spec in plan.hospitals]


def make_hospitals(plan: Simulation, folder: Path, workers: int, threshold_mmhg: float = 18.0) -> Iterator[Hospital]:
    """Write and ingest every hospital that is not there yet, `workers` at a time; yields each when it is done.

    One made by the same specification, seed and release is kept as it is.
    """
    wanted = hospitals_of(plan, folder)
    # The largest first, so that the last worker does not begin the longest piece when the others are done.
    order = sorted(wanted, key=lambda hospital: -hospital.spec.patients)
    with worker_pool(workers) as pool:
        running = {
            pool.submit(make_hospital, hospital, plan.seed, plan.split, threshold_mmhg): hospital for hospital in order
        }
        for done in as_completed(running):
            done.result()
            yield running[done]


def make_hospital(hospital: Hospital, seed: int, split: str = "60/20/20", threshold_mmhg: float = 18.0) -> None:
    """Write one hospital and ingest it, unless the very same is there already.

    Args:
        threshold_mmhg: the oracle's probability, kept apart, is that of a recorded pressure above it.

    Raises:
        HemoFedError: another one is there: a study that was begun on it must not go on with new data.
    """
    identity = {"spec": hospital.spec.model_dump(mode="json"), "seed": seed, "release": release_sha256()}
    identity |= {"threshold_mmhg": threshold_mmhg, "split": split}
    made = hospital.folder / MADE_FILE
    if made.exists():
        if json.loads(made.read_text()) == json.loads(json.dumps(identity)):
            return
        raise HemoFedError(
            f"{hospital.folder}: holds a hospital of another plan or release; remove it, or give another --out",
            ExitCode.BAD_CHECKPOINT,
        )
    shutil.rmtree(hospital.folder, ignore_errors=True)
    hospital.folder.mkdir(parents=True)
    truth = write_hospital(hospital.spec, hospital.source, seed)
    # A hospital that does not exist has no secret: its patient key follows from the seed, so that runs repeat.
    key = hashlib.sha256(f"{seed}/{hospital.spec.name}/patient-key".encode()).digest()
    ingest(
        hospital.source,
        hospital.site_dir,
        name=hospital.spec.name,
        disclosure="masked",
        patient_key=key,
        split=split,
        simulated=True,
    )
    np.savez(
        hospital.folder / TRUTH_FILE,
        record=np.array(truth.records),
        oracle_probability=truth.oracle_probability(threshold_mmhg),
        recorded_mpcwp_mmhg=truth.recorded_mpcwp_mmhg,
    )
    made.write_text(json.dumps(identity, indent=1))
