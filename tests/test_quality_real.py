"""Quality of real ECGs: the labels of the 2011 challenge, the early release of 2020, and swaps of real records."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import wfdb
from sklearn.metrics import roc_auc_score

from client.quality_policy import Finding, Quality, QualityPolicy, apply_policy
from client.records import READERS
from client.records.options import ReaderOptions
from client.records.record import EcgRecord, Reason, Unusable
from client.signal_measures import measure
from client.signal_quality import LARGEST_QRS_SUM_MV, assess
from shared_model.leads import LEADS
from tests.quality_fixtures import ALL, first_segment, table_column, with_electrodes
from tests.realdata import REAL_DATA, needs_real_data

pytestmark = needs_real_data
SETS = {
    "ptbxl-dev": ("ptbxl", ReaderOptions()),
    "cinc2021-dev": ("cinc", ReaderOptions()),
    "cinc2020-dev": ("cinc", ReaderOptions()),
    "cinc2011-dev": ("wfdb", ReaderOptions()),
    "ludb-dev": ("wfdb", ReaderOptions()),
    "code15-dev": ("matlab", ReaderOptions((), 400, "mV", "feats", "lead-time")),
    "cpsc2018-mat-dev": ("matlab", ReaderOptions((), 500, "mV", "ECG.data", "lead-time")),
    "chapman-denoised-dev": ("matlab", ReaderOptions((), 500, "uV", "val", "time-lead")),
}
ORDINARY = tuple(name for name in SETS if name not in ("cinc2020-dev", "cinc2011-dev"))


@cache
def segments(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first 10 s of each record of a set, with nothing masked or turned away."""
    format_name, options = SETS[name]
    items = READERS[format_name].open_archive(REAL_DATA / name, options).items
    return {item.record_id: first_segment(item) for item in items if isinstance(item, EcgRecord)}


def ordinary() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name in ORDINARY:
        for record_id, (steps, recorded) in segments(name).items():
            yield f"{name}/{record_id}", steps, recorded


def judged(name: str) -> dict[str, Quality]:
    return {record_id: assess(*segment) for record_id, segment in segments(name).items()}


def qrs_sum_mv(steps: np.ndarray, recorded: np.ndarray) -> float:
    return float(measure(steps, recorded).column("span_mv").sum())


def test_the_early_release_is_turned_away_for_its_gain() -> None:
    assert {record.split("/")[-1] for record in segments("cinc2020-dev")} == {"HR00599", "HR20715"}
    for steps, recorded in segments("cinc2020-dev").values():
        with pytest.raises(Unusable, match="gain and unit in the header") as caught:
            apply_policy(QualityPolicy(), assess(steps, recorded))
        assert caught.value.reason == Reason.WRONG_GAIN
        mended = np.rint(steps / 5).astype(np.int16)
        assert Finding.WRONG_GAIN not in assess(mended, recorded).findings


def test_no_other_record_has_a_wrong_gain_and_the_margin_is_wide() -> None:
    sums = [qrs_sum_mv(steps, recorded) for _, steps, recorded in ordinary()]
    assert len(sums) == 312
    assert max(sums) < 0.75 * LARGEST_QRS_SUM_MV
    assert min(qrs_sum_mv(*segment) for segment in segments("cinc2020-dev").values()) > 1.1 * LARGEST_QRS_SUM_MV


def test_by_default_ordinary_records_are_all_stored() -> None:
    for name, steps, recorded in ordinary():
        quality = assess(steps, recorded)
        masked = apply_policy(QualityPolicy(), quality)
        assert masked == (("V2", "V4", "V6") if name.endswith(("JS20004", "JS20008")) else ()), name


def test_the_score_agrees_with_the_labels_of_2011() -> None:
    label = table_column(REAL_DATA / "cinc2011-dev" / "labels.csv", "record", "quality")
    scores = {record: quality.score for record, quality in judged("cinc2011-dev").items()}
    assert len(scores) == 36
    area = roc_auc_score([label[record] == "acceptable" for record in scores], list(scores.values()))
    assert area >= 0.95


def test_in_cinc2011_avl_and_avf_have_each_other_s_name() -> None:
    """Found by the residuals: exchanged, they fit. Records without limb leads to compare say nothing."""
    compared = 0
    for record, quality in judged("cinc2011-dev").items():
        wrong = quality.findings.get(Finding.INCONSISTENT_LIMB_LEADS)
        compared += wrong is not None
        assert wrong in (None, ("aVL", "aVF")), record
        steps = segments("cinc2011-dev")[record][0][[0, 1, 2, 3, 5, 4, *range(6, 12)]]
        assert Finding.INCONSISTENT_LIMB_LEADS not in assess(steps, ALL).findings
    assert compared == 26


def test_the_notes_of_ptb_xl_on_drift() -> None:
    """An outside check of the score: records with a note on baseline drift score lower."""
    note = table_column(REAL_DATA / "ptbxl-dev" / "ptbxl_database.csv", "ecg_id", "baseline_drift")
    scores = {record: quality.score for record, quality in judged("ptbxl-dev").items()}
    assert roc_auc_score([note[record] != "" for record in scores], [-score for score in scores.values()]) > 0.8


SWAPS = {
    "right and left arm": (("LA", "RA", "LL"), 0.85),
    "right arm and left leg": (("LL", "LA", "RA"), 0.75),
    "all three, to the left": (("LA", "LL", "RA"), 0.65),
    "all three, to the right": (("LL", "RA", "LA"), 0.85),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_electrodes_of_real_records(swap: str) -> None:
    electrodes, at_least = SWAPS[swap]
    found = [
        Finding.LIMB_LEAD_REVERSAL in assess(with_electrodes(steps, *electrodes), ALL).findings
        for steps, _ in segments("ptbxl-dev").values()
    ]
    assert np.mean(found) >= at_least


def test_no_record_as_it_was_recorded_is_called_swapped() -> None:
    for name, steps, recorded in ordinary():
        assert Finding.LIMB_LEAD_REVERSAL not in assess(steps, recorded).findings, name


def test_leads_named_wrongly_in_real_records() -> None:
    """aVL and aVF exchanged, as where MIMIC-IV-ECG's order is taken for the usual one; and no false alarm."""
    exchanged, right = [], []
    for _, steps, recorded in ordinary():
        order = [0, 1, 2, 3, 5, 4, *range(6, 12)]
        exchanged.append(Finding.INCONSISTENT_LIMB_LEADS in assess(steps[order], recorded).findings)
        right.append(Finding.INCONSISTENT_LIMB_LEADS in assess(steps, recorded).findings)
    assert np.mean(exchanged) > 0.95
    assert not any(right)


def test_100_and_500_hz_of_one_record_score_alike() -> None:
    for header in sorted((REAL_DATA / "ptbxl-dev" / "records500").rglob("*.hea"))[:20]:
        read = wfdb.rdrecord(str(header.with_suffix("")))
        names = tuple(next(lead for lead in LEADS if lead.upper() == name.upper()) for name in read.sig_name)
        record = EcgRecord("r", "r", read.p_signal.T.astype(np.float32), names, read.fs, "p")
        fast = assess(*first_segment(record))
        slow = assess(*segments("ptbxl-dev")[str(int(header.stem.split("_")[0]))])
        assert fast.score == pytest.approx(slow.score, abs=0.1)
        assert set(fast.findings) == set(slow.findings)
