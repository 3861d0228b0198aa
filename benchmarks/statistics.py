"""Patient-level bootstrap of the AUROC: histograms of all replicates against a loop over scikit-learn.

Both get the scores, the outcomes and the same Poisson weights, and give the 95 % percentile interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from benchmarks.timing import compare
from shared_model.bootstrap import Weights, bootstrap_auroc, bootstrap_histograms, bootstrap_weights

REPLICATES = 200
ECGS_EACH = 2


@dataclass(frozen=True)
class Sample:
    """ECGs of some patients: patient code, probability and outcome of each, and the patients' weights."""

    patients: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    outcomes: NDArray[np.float64]
    weights: Weights

    def from_histograms(self) -> tuple[float, float]:
        bootstrap = bootstrap_histograms(self.probabilities, self.outcomes, self.patients, self.weights)
        interval = bootstrap_auroc(bootstrap)
        return interval.low or 0.0, interval.high or 0.0

    def from_a_loop(self) -> tuple[float, float]:
        areas = [
            roc_auc_score(self.outcomes, self.probabilities, sample_weight=self.weights[self.patients, replicate])
            for replicate in range(REPLICATES)
        ]
        low, high = np.quantile(areas, [0.025, 0.975])
        return float(low), float(high)


def draw(patients: int) -> Sample:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(patients), ECGS_EACH)
    outcomes = (rng.random(patients) < 0.35).astype(float)[codes]
    probabilities = expit(rng.normal(size=len(codes)) + 1.5 * outcomes - 1)
    weights = bootstrap_weights([str(code) for code in range(patients)], REPLICATES, seed=0)
    return Sample(codes, probabilities, outcomes, weights)


def main() -> None:
    for patients in (300, 2000, 10000):
        sample = draw(patients)
        ours, rival = sample.from_histograms(), sample.from_a_loop()
        if not np.allclose(ours, rival, atol=3e-3):  # ours is wider by the binning bound
            raise SystemExit(f"the intervals differ: {ours} and {rival}")
        compare(
            f"bootstrap of the AUROC, {REPLICATES} replicates, {patients * ECGS_EACH} ECGs",
            sample.from_histograms,
            sample.from_a_loop,
            "loop over sklearn.metrics.roc_auc_score",
            repeats=5,
        )


if __name__ == "__main__":
    main()
