"""Simulated ECGs a second on one core against a loop over beats; WFDB records a second against wfdb."""

import argparse
import json
import os
import tempfile
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import wfdb

from benchmarks.timing import compare, seconds
from shared_model.leads import LEADS
from simulation.circulation import Circulation, Population, draw_circulation
from simulation.ecg_generator import (
    ECTOPIC,
    FIBRILLATION,
    Acquisition,
    Anatomy,
    Signal,
    _draw_beats,
    _wave_amplitudes,
    _wave_times,
    derive_leads,
    draw_anatomy,
    synthesise,
)
from simulation.ecg_noise import add_electrode_artefacts, draw_background
from simulation.hospitals import HospitalSpec, write_hospital
from simulation.wfdb_writer import to_adc_units, write_record


def loop_over_beats(rng: np.random.Generator, circulation: Circulation, anatomy: Anatomy) -> Signal:
    """The same ECGs, bit for bit up to rounding, as one would first write them: ECG by ECG, beat by beat."""
    acquisition = Acquisition()
    beat_time, beat_kind, stretch = _draw_beats(rng, circulation, anatomy)
    centre, width = _wave_times(circulation)
    amplitude = _wave_amplitudes(circulation, anatomy)
    background = draw_background(rng, circulation.atrial_fibrillation, 500.0, acquisition.samples, 60.0, 1.0)
    time_s = np.arange(acquisition.samples) / 500.0
    independent = background.muscle * background.muscle_mv[:, :, None]
    independent += np.einsum("nlk,nkt->nlt", background.wave_mv, background.waves)
    for n in range(len(circulation)):
        for beat in range(beat_time.shape[1]):
            waves = {ECTOPIC: range(8, 11), FIBRILLATION: range(2, 8)}.get(int(beat_kind[n, beat]), range(8))
            for wave in waves:
                scale = stretch[n, beat] if wave in (6, 7) else 1.0
                offset = time_s - beat_time[n, beat] - centre[n, wave] * scale
                bell = np.exp(-0.5 * (offset / (width[n, wave] * scale)) ** 2)
                for lead in range(8):
                    independent[n, lead] += (amplitude[n, lead, wave] * bell).astype(np.float32)
    add_electrode_artefacts(rng, independent, 500.0, 1.0)
    signal = np.empty((len(circulation), 12, acquisition.samples), dtype=np.float32)
    derive_leads(independent, signal)
    return signal


def generation(ecgs: int) -> None:
    """ECGs a second, and the ratio to the loop, which must first give the same signal."""
    rng = np.random.default_rng(0)
    circulation = draw_circulation(rng, Population(ecgs_per_patient=(1.0,)), ecgs)
    anatomy = draw_anatomy(rng, circulation)
    few_circulation, few_anatomy = circulation.take(slice(0, 16)), anatomy.take(slice(0, 16))

    def ours() -> Signal:
        return synthesise(np.random.default_rng(1), few_circulation, few_anatomy)

    def rival() -> Signal:
        return loop_over_beats(np.random.default_rng(1), few_circulation, few_anatomy)

    difference = float(np.abs(ours() - rival()).max())
    assert difference < 0.005, f"the two generators differ by {difference} mV"
    compare("generator: 16 ECGs, 12 leads, 500 Hz", ours, rival, "numpy loop over beats", repeats=5)
    spent = min(seconds(lambda: synthesise(np.random.default_rng(1), circulation, anatomy)) for _ in range(3))
    print(json.dumps({"benchmark": "generator", "ecgs_per_s": round(ecgs / spent), "ecgs": ecgs}), flush=True)


def writing(records: int) -> None:
    """The WFDB writer against wfdb.wrsamp, and a whole hospital."""
    rng = np.random.default_rng(0)
    circulation = draw_circulation(rng, Population(ecgs_per_patient=(1.0,)), 1)
    signal_mv = synthesise(rng, circulation, draw_anatomy(rng, circulation))[0].T
    when, names = datetime(2017, 3, 8, 7, 5, 9), list(LEADS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def ours() -> None:
            for n in range(records):
                write_record(folder / f"a{n}", to_adc_units(signal_mv, 1000.0), names, 500.0, 1000.0, when)

        def rival() -> None:
            for n in range(records):
                wfdb.wrsamp(
                    f"b{n}", 500, ["mV"] * 12, names, p_signal=signal_mv.astype(np.float64), fmt=["16"] * 12,
                    adc_gain=[1000.0] * 12, baseline=[0] * 12, base_time=when.time(), base_date=when.date(),
                    write_dir=temporary,
                )  # fmt: skip

        compare(f"writer: {records} records", ours, rival, "wfdb.wrsamp", repeats=5)
        spec = HospitalSpec(name="bench", patients=100)
        count = len(write_hospital(spec, folder / "warm", 0).records)
        spent = seconds(lambda: write_hospital(spec, folder / "timed", 0))
    print(json.dumps({"benchmark": "hospital, written", "records_per_s": round(count / spent)}), flush=True)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ecgs", type=int, default=512, help="ECGs in the throughput figure")
    parser.add_argument("--records", type=int, default=20, help="records a repeat in the writer's figure")
    arguments = parser.parse_args()
    generation(arguments.ecgs)
    writing(arguments.records)


if __name__ == "__main__":
    main()
