"""Drawn ECGs whose likeness is known."""

import numpy as np
import torch
from torch import Tensor

from simulation.circulation import Population, draw_circulation
from simulation.ecg_generator import Acquisition, draw_anatomy, synthesise


def draw_twins(count: int) -> tuple[Tensor, Tensor]:
    """`count` patients, each ECG drawn twice: same heart, other beats and noise; (count, 12, 2500) mV."""
    rng = np.random.default_rng(0)
    circulation = draw_circulation(rng, Population(ecgs_per_patient=(1.0,)), count)
    anatomy = draw_anatomy(rng, circulation)
    recorder = Acquisition(sampling_rate_hz=250)
    first, second = (synthesise(np.random.default_rng(seed), circulation, anatomy, recorder) for seed in (1, 2))
    return torch.from_numpy(first), torch.from_numpy(second)
