"""The one grid on which every site counts its scores: bins of equal width in logit, fine ones nested in
coarse ones.

`FINE_BINS` bins cover the probabilities 0 to 1. Edge e (1 to FINE_BINS - 1) parts the bins below e from the
bins at or above e; it lies at logit -8 + 16 e / FINE_BINS. The first and the last bin are open towards 0 and
1. Every (FINE_BINS / COARSE_BINS)-th edge is an edge of the coarse grid. Bins of equal width in logit keep
their resolution when a model is over-confident, where bins of equal width in probability pile up.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from shared_model.errors import HemoFedError

FINE_BINS = 1024
COARSE_BINS = 32
LOGIT_LIMIT = 8.0

EDGE_LOGITS = -LOGIT_LIMIT + np.arange(1, FINE_BINS) * (2 * LOGIT_LIMIT / FINE_BINS)
EDGE_PROBABILITIES: NDArray[np.float64] = expit(EDGE_LOGITS)
COARSE_EDGES: NDArray[np.int64] = np.arange(0, FINE_BINS + 1, FINE_BINS // COARSE_BINS)


def bin_of(probabilities: ArrayLike) -> NDArray[np.int64]:
    """Fine bin, 0 to FINE_BINS - 1, of each probability; `p >= edge_probability(e)` exactly when the bin is
    >= e.

    Raises HemoFedError for a score that is NaN or outside 0 to 1 (a logit passed by mistake, for example).
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if values.size and not (values.min() >= 0.0 and values.max() <= 1.0):  # NaN fails both
        raise HemoFedError(
            "a score is NaN or outside 0 to 1: scores must be probabilities; apply the sigmoid to logits"
        )
    return np.searchsorted(EDGE_PROBABILITIES, values, side="right").astype(np.int64)


def snap_threshold(probability: float) -> int:
    """The fine edge whose logit is nearest to the threshold's; use `edge_probability` of it from then on."""
    if not 0.0 < probability < 1.0:
        raise HemoFedError(f"threshold {probability} is not strictly between 0 and 1")
    logit = np.log(probability) - np.log1p(-probability)
    return int(np.abs(EDGE_LOGITS - logit).argmin()) + 1


def edge_probability(edge: int) -> float:
    """Probability at an edge: 0 at edge 0, 1 at edge FINE_BINS."""
    if not 0 <= edge <= FINE_BINS:
        raise HemoFedError(f"edge {edge} is not on the score grid (0 to {FINE_BINS})")
    if edge in (0, FINE_BINS):
        return float(edge == FINE_BINS)
    return float(EDGE_PROBABILITIES[edge - 1])
