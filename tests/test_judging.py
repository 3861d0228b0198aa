"""One site's odd counts leave that site out, and nobody else."""

import numpy as np
import pytest

from server.judging import fitting
from shared_model.bootstrap import bootstrap_histograms, bootstrap_weights
from shared_model.errors import HemoFedError
from shared_model.histograms import histogram_of
from shared_model.study import Study
from shared_model.tally import SiteTally

SCORES, OUTCOMES = np.linspace(0.1, 0.9, 40), np.arange(40) % 2
STUDY = Study(name="x")


def tally(group: str = "all", replicates: int | None = None) -> SiteTally:
    """Counts of 40 patients, with bootstrap replicates if a number is given."""
    histogram = histogram_of(SCORES, OUTCOMES)
    bootstrap = None
    if replicates is not None:
        weights = bootstrap_weights([str(i) for i in range(40)], replicates, 0)
        bootstrap = bootstrap_histograms(SCORES, OUTCOMES, np.arange(40), weights)
    return SiteTally({group: histogram}, {}, bootstrap)


def test_what_was_asked_for_fits() -> None:
    for good in (tally(), tally("sex=female"), tally(replicates=STUDY.evaluation.bootstrap_replicates)):
        assert fitting(STUDY, good, "test") is good


@pytest.mark.parametrize(
    ("odd", "said"), [(tally("ward=3"), "ward=3"), (tally(replicates=7), "7 bootstrap replicates where 200")]
)
def test_what_cannot_be_added_is_refused(odd: SiteTally, said: str) -> None:
    with pytest.raises(HemoFedError, match=said):
        fitting(STUDY, odd, "test")
    if odd.bootstrap is not None:  # negative control: without the guard the sum itself would fail for everybody
        with pytest.raises(HemoFedError):
            odd + tally(replicates=200)


def test_validation_asks_for_no_replicates() -> None:
    with pytest.raises(HemoFedError, match="where 0"):
        fitting(STUDY, tally(replicates=200), "validation")
