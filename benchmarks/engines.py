"""A round in this process against a round on Ray, and our running mean against Flower's own aggregation.

`python -m benchmarks.engines`; about two minutes on two cores. The two engines run the same apps on the same
hospitals and must end with the same weights.
"""

import json
import platform
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.timing import compare, seconds
from server.aggregation import RunningMean, fault_of
from server.report.files import load_metrics, load_results
from shared_model.model import build_model, take_arrays, travelling_names
from shared_model.study import Study, study_from_table
from simulation.consortium import Hospital, make_hospital
from simulation.grid import run_in_process, run_on_ray
from simulation.hospitals import HospitalSpec

WORKERS = 2
STUDY = {
    "name": "benchmark",
    "pretrain": {"rounds": 4, "local_epochs": 1},
    "finetune": {"rounds": 5, "local_epochs": 1},
    "evaluation": {"bootstrap_replicates": 0},
}


def make_sites(folder: Path) -> list[Path]:
    """Four simulated hospitals of 150 patients."""
    hospitals = []
    for number in range(4):
        name = f"hospital-{number}"
        hospital = Hospital(HospitalSpec(name=name, patients=150, sampling_rate_hz=250), folder / name)
        make_hospital(hospital, seed=1)
        hospitals.append(hospital.site_dir)
    return hospitals


def round_seconds(out: Path) -> list[float]:
    """Seconds of each round but the first of a phase, in which caches are filled."""
    return [row.seconds for row in load_metrics(out) if row.round > 1 and row.seconds is not None]


def compare_engines(study: Study, sites: list[Path], folder: Path) -> None:
    """Run the study on both engines; print the ratio of their rounds, and of the whole runs."""
    ours, ray = folder / "in-process", folder / "ray"
    whole_ours = seconds(lambda: run_in_process(study, sites, ours, resume=False, workers=WORKERS))
    whole_ray = seconds(lambda: run_on_ray(study, sites, ray, resume=False, workers=WORKERS))
    hashes = {load_results(out).model for out in (ours, ray)}
    if len(hashes) != 1:
        raise SystemExit("the engines ended with different weights: the comparison means nothing")
    pairs = list(zip(round_seconds(ours), round_seconds(ray), strict=True))
    ratios = sorted(rival / own for own, rival in pairs)
    row = {
        "benchmark": f"round of {len(sites)} sites, {WORKERS} at a time, in this process",
        "rival": "Flower's simulation engine on Ray",
        "times_faster": round(statistics.median(ratios), 2),
        "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "ours_s": round(statistics.median(own for own, _ in pairs), 3),
        "rival_s": round(statistics.median(rival for _, rival in pairs), 3),
        "repeats": len(pairs),
        "whole_run_times_faster": round(whole_ray / whole_ours, 2),
        "same_weights": True,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(row), flush=True)


def compare_aggregation(sites: int = 6) -> None:
    """Replies of the paper's encoder become a mean: guarded and one by one, against FedAvg on all at once."""
    study = study_from_table({"name": "benchmark", "encoder": {"preset": "resnet18"}}, "benchmark")
    model = build_model(study)
    sent = take_arrays(model, travelling_names(study, "finetune", model))
    rng = np.random.default_rng(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # a launcher would have set them
    messages = []
    for weight in range(1, sites + 1):
        moved = {name: value + rng.normal(0, 0.01, value.shape).astype(np.float32) for name, value in sent.items()}
        record = ArrayRecord({name: Array(value) for name, value in moved.items()})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": float(weight)})})
        messages.append(Message(content, dst_node_id=1, message_type="train"))

    def ours(guarded: bool) -> None:
        mean = RunningMean()
        for weight, message in enumerate(messages, 1):
            arrays = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
            if not guarded or fault_of(arrays, sent) is None:
                mean.add(arrays, float(weight))
        mean.mean()

    def flowers() -> None:
        FedAvg().aggregate_train(1, messages)

    for guarded, name in ((False, "the sum alone"), (True, "each reply checked for NaN, shape and names")):
        title = f"aggregation, {sites} sites of 8.8 M weights, {name}"
        compare(title, partial(ours, guarded), flowers, "Flower's FedAvg, which checks nothing", repeats=5)


def main() -> None:
    """Print one JSON line a comparison."""
    compare_aggregation()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare_engines(study_from_table(dict(STUDY), "benchmark"), make_sites(folder), folder)


if __name__ == "__main__":
    main()
