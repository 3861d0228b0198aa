"""From scores inside a hospital to merged counts at the centre; hostile payloads are refused."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from client.evaluation import Scores, count, index_ecgs, pressure_score, release
from shared_model.bootstrap import (
    BootstrapHistograms,
    bootstrap_auroc,
    bootstrap_difference,
    bootstrap_histograms,
    bootstrap_weights,
    mean_site_difference,
    replicate_aurocs,
    sample_histogram,
)
from shared_model.errors import ExitCode, HemoFedError
from shared_model.moments import regression_figures
from shared_model.score_grid import FINE_BINS, bin_of
from shared_model.statistics import auroc, auroc_range
from shared_model.subgroups import attributes_of, group_masks, group_names
from shared_model.tally import SiteTally, from_arrays, merge, to_arrays

SECURE = {"secure_sum_available": True}


def scores_of(seed: int, patients: int, ecgs_each: int = 2) -> Scores:
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), ecgs_each)
    n = len(codes)
    outcomes = (rng.random(patients) < 0.4).astype(float)[codes]
    latent = rng.normal(size=patients)[codes] + 0.3 * rng.normal(size=n)
    sex = rng.choice(["Female", "Male"], patients)[codes]
    return Scores(
        patients=codes,
        patient_keys=[f"site{seed}-{code}" for code in range(patients)],
        recorded_at=rng.permutation(n).astype(float),
        measured_at=np.full(n, n / 2),
        attributes=attributes_of(sex, rng.normal(60, 14, patients)[codes], ["white"] * n),
        outcomes=outcomes,
        probabilities=expit(latent + 1.4 * outcomes - 0.7),
        measured_mmhg=12 + 10 * outcomes,
        predicted_mmhg=14 + 5 * latent,
    )


def pooled_index(parts: list[Scores]) -> tuple[np.ndarray, ...]:
    """Truth and prediction of the index ECGs of all sites."""
    rows = [index_ecgs(p.patients, p.recorded_at, p.measured_at) for p in parts]
    fields = ("outcomes", "probabilities", "measured_mmhg", "predicted_mmhg")
    return tuple(np.concatenate([getattr(p, f)[r] for p, r in zip(parts, rows, strict=True)]) for f in fields)


def test_index_ecgs_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 40, 200)
    recorded = np.where(rng.random(200) < 0.2, np.nan, rng.integers(0, 30, 200).astype(float))
    measured = np.where(rng.random(200) < 0.2, np.nan, rng.integers(0, 30, 200).astype(float))
    chosen = []
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code).tolist()
        before = [r for r in rows if recorded[r] <= measured[r]]
        if before:
            chosen.append(max(before, key=lambda r: (recorded[r], -r)))
        else:
            chosen.append(min(rows, key=lambda r: (np.isnan(recorded[r]), np.nan_to_num(recorded[r]), r)))
    assert index_ecgs(codes, recorded, measured).tolist() == sorted(chosen)


def test_masked_counts_of_all_sites_give_the_pooled_figures() -> None:
    parts = [scores_of(seed, patients) for seed, patients in ((1, 150), (2, 60), (3, 9))]
    names = group_names({"race": ["white"]})
    payloads = [release(count(part), "masked", 11, groups=names, **SECURE) for part in parts]
    assert len({tuple((key, array.shape) for key, array in payload.items()) for payload in payloads}) == 1
    merged = merge(payloads)
    truth, scores, measured, predicted = pooled_index(parts)
    area = auroc(merged.histograms["all"])
    assert merged.sites == 3
    assert abs((area.value or 0) - roc_auc_score(truth, scores)) <= (area.bound or 0)
    assert merged.histograms["all"].size == 219
    figures = regression_figures(merged.moments["all"], 15.7)
    error = (np.rint(predicted * 4096) - np.rint(measured * 4096)) / 4096  # sums are of pressures on this grid
    assert figures.rmse == pytest.approx(np.sqrt((error**2).mean()), abs=1e-6)
    backward = merge(payloads[::-1])
    assert np.array_equal(backward.histograms["all"].table, merged.histograms["all"].table)
    # what a secure sum would hand over: the arrays summed entry by entry
    summed = {key: sum(payload[key] for payload in payloads) for key in payloads[0]}
    again = from_arrays(summed)
    assert np.array_equal(again.histograms["sex=male"].table, merged.histograms["sex=male"].table)
    assert again.bootstrap is not None
    assert merged.bootstrap is not None
    assert np.array_equal(again.bootstrap.positives, merged.bootstrap.positives)


def test_clear_counts_of_all_sites_bound_the_pooled_figures() -> None:
    parts = [scores_of(seed, patients) for seed, patients in ((1, 400), (2, 150), (3, 12))]
    merged = merge([release(count(part), "clear", 11) for part in parts])
    truth, scores, *_ = pooled_index(parts[:2])  # the third site is too small to say anything
    low, high = auroc_range(merged.histograms["all"])
    assert low <= roc_auc_score(truth, scores) <= high
    assert merged.withheld["all"] == 1
    assert merged.bootstrap is None
    assert merged.moments["all"].count == 550


def test_release_obeys_the_tier() -> None:
    counts = count(scores_of(1, 100))
    for tier, minimum, secure in (
        (None, 11, True),
        ("clear", None, True),
        ("masked", 11, False),
        ("noised", 11, True),
    ):
        with pytest.raises(HemoFedError) as caught:
            release(counts, tier, minimum, secure_sum_available=secure)
        assert caught.value.exit_code is ExitCode.DISCLOSURE_REFUSED
    clear = release(counts, "clear", 11)
    assert not any(key.startswith("bootstrap") for key in clear)
    for key, array in clear.items():
        if key.endswith("|cells"):
            assert not ((array[:, :2] > 0) & (array[:, :2] < 11)).any()
    with pytest.raises(HemoFedError, match="'other'"):
        release(counts, "masked", 11, groups=["all"], **SECURE)


def test_regression_alone_is_counted_and_suppressed_by_size() -> None:
    part = replace(scores_of(5, 30), outcomes=None, probabilities=None)
    counts = count(part)
    assert not counts.histograms
    assert counts.bootstrap is None
    kept = merge([release(counts, "clear", 11)])
    assert kept.moments["all"].count == 30
    small = {n for n, m in counts.moments.items() if 0 < m.count < 11}
    assert small
    assert small <= set(kept.withheld)


def test_unlabelled_ecgs_are_left_out_and_a_site_without_labels_counts_nobody() -> None:
    part = scores_of(1, 50)
    some = replace(
        part,
        outcomes=np.where(part.patients < 20, part.outcomes, np.nan),
        measured_mmhg=None,
        predicted_mmhg=None,
    )
    assert count(some).histograms["all"].size == 20
    none = replace(some, outcomes=np.full(100, np.nan))
    counts = count(none)
    assert counts.histograms["all"].size == 0
    assert auroc(merge([release(counts, "clear", 11)]).histograms["all"]).reason == "no patients"
    with pytest.raises(HemoFedError, match="same records"):
        count(replace(part, outcomes=some.outcomes))
    with pytest.raises(HemoFedError, match="differ in length"):
        count(replace(part, recorded_at=part.recorded_at[1:]))
    with pytest.raises(HemoFedError, match="probabilities"):
        count(replace(part, outcomes=None))


def test_pressure_scores_rank_alike_and_cut_at_the_threshold() -> None:
    mmhg = np.array([5.0, 17.9, 18.0, 18.1, 40.0])
    scores = pressure_score(mmhg, 18.0)
    assert (np.diff(scores) > 0).all()
    assert (bin_of(scores) >= 512).tolist() == [False, False, True, True, True]


# Bootstrap: patients, not ECGs (fault item 21).


def test_weights_follow_the_patient_and_are_poisson() -> None:
    keys = [f"p{i}" for i in range(3000)]
    weights = bootstrap_weights(keys, 100, seed=4)
    assert weights.shape == (3000, 100)
    assert np.array_equal(weights[::-1], bootstrap_weights(keys[::-1], 100, seed=4))
    assert np.array_equal(weights[:, :10], bootstrap_weights(keys, 10, seed=4))
    assert not np.array_equal(weights, bootstrap_weights(keys, 100, seed=5))
    assert abs(weights.mean() - 1) < 0.01
    assert abs(weights.var() - 1) < 0.02
    shares = np.bincount(weights.ravel(), minlength=4)[:4] / weights.size
    assert shares == pytest.approx([0.3679, 0.3679, 0.1839, 0.0613], abs=0.003)
    assert abs(np.corrcoef(weights[:-1].ravel(), weights[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(weights[:, :-1].ravel(), weights[:, 1:].ravel())[0, 1]) < 0.01


def test_replicates_equal_weighted_aurocs_of_the_rows() -> None:
    part = scores_of(2, 80, ecgs_each=3)
    weights = bootstrap_weights(part.patient_keys, 20, seed=1)
    areas = replicate_aurocs(bootstrap_histograms(part.probabilities, part.outcomes, part.patients, weights))
    on_grid = bin_of(part.probabilities)
    assert areas[0] == pytest.approx(roc_auc_score(part.outcomes, on_grid))
    for replicate in range(20):
        weight = weights[part.patients, replicate]
        assert areas[replicate + 1] == pytest.approx(roc_auc_score(part.outcomes, on_grid, sample_weight=weight))


def test_resampling_ecgs_instead_of_patients_would_be_too_narrow() -> None:
    part = scores_of(3, 120, ecgs_each=6)
    ours = bootstrap_auroc(count(part, replicates=400).bootstrap)
    keys = [str(row) for row in range(len(part.patients))]
    by_ecg = bootstrap_auroc(
        bootstrap_histograms(
            part.probabilities, part.outcomes, np.arange(len(keys)), bootstrap_weights(keys, 400, seed=0)
        )
    )
    assert ours.value == by_ecg.value
    assert ours.standard_error > 1.7 * by_ecg.standard_error
    # with copies of one ECG the patients' interval is that of one ECG a patient
    single = scores_of(3, 120, ecgs_each=1)
    repeated = {f: np.repeat(getattr(single, f), 6) for f in ("patients", "outcomes", "probabilities")}
    weights = bootstrap_weights(single.patient_keys, 400, seed=0)
    alone = bootstrap_histograms(single.probabilities, single.outcomes, single.patients, weights)
    copies = bootstrap_histograms(repeated["probabilities"], repeated["outcomes"], repeated["patients"], weights)
    assert np.allclose(replicate_aurocs(alone), replicate_aurocs(copies))


def test_bootstrap_error_agrees_with_delong_for_one_ecg_a_patient() -> None:
    counts = count(scores_of(6, 600, ecgs_each=1), replicates=1000)
    assert bootstrap_auroc(counts.bootstrap).standard_error == pytest.approx(
        auroc(counts.histograms["all"]).standard_error, rel=0.12
    )
    assert np.array_equal(sample_histogram(counts.bootstrap).positives_low, counts.histograms["all"].positives_low)


def test_paired_differences_use_the_same_patients() -> None:
    parts = [scores_of(seed, 150) for seed in (1, 2, 3)]
    worse = [
        replace(p, probabilities=expit(0.8 * np.log(p.probabilities / (1 - p.probabilities)) + 0.3)) for p in parts
    ]
    sites = [(count(p).bootstrap, count(w).bootstrap) for p, w in zip(parts, worse, strict=True)]
    same_order = bootstrap_difference(*sites[0])  # a monotone change of scores: no difference but binning
    assert abs(same_order.value) <= same_order.bound
    assert same_order.standard_error < 0.1 * bootstrap_auroc(sites[0][0]).standard_error
    rng = np.random.default_rng(0)
    noisy = [replace(p, probabilities=np.clip(p.probabilities + rng.normal(0, 0.3, 300), 0.01, 0.99)) for p in parts]
    sites = [(count(p).bootstrap, count(w).bootstrap) for p, w in zip(parts, noisy, strict=True)]
    mean = mean_site_difference(sites)
    by_site = [bootstrap_difference(a, b) for a, b in sites]
    assert mean.value == pytest.approx(np.mean([d.value for d in by_site]))
    assert mean.low < mean.value < mean.high
    assert mean.standard_error == pytest.approx(np.sqrt(sum(d.standard_error**2 for d in by_site)) / 3, rel=0.2)
    with pytest.raises(HemoFedError, match="same"):
        mean_site_difference([(sites[0][0], sites[1][1])])
    with pytest.raises(HemoFedError, match="same"):
        bootstrap_difference(sites[0][0], count(parts[0], seed=9).bootstrap)


def test_a_class_that_is_missing_is_said_and_never_nan() -> None:
    part = scores_of(1, 5)
    flat = count(replace(part, outcomes=np.zeros(10), measured_mmhg=None, predicted_mmhg=None)).bootstrap
    assert bootstrap_auroc(flat).reason == "a class is empty"
    assert mean_site_difference([(flat, flat)]).value is None
    rare = count(
        replace(part, outcomes=(part.patients == 0).astype(float), measured_mmhg=None, predicted_mmhg=None)
    ).bootstrap
    estimate = bootstrap_auroc(rare)
    assert estimate.value is not None
    assert (estimate.low, estimate.reason) == (None, "too few replicates contain both classes")


# Hostile payloads.


def honest() -> dict[str, np.ndarray]:
    return release(count(scores_of(1, 200)), "clear", 11)


def test_the_wire_form_is_lossless() -> None:
    counts = count(scores_of(1, 200))
    for fine in (True, False):
        again = from_arrays(to_arrays(counts, fine))
        assert list(again.histograms) == list(counts.histograms)
        for name, histogram in counts.histograms.items():
            assert np.array_equal(again.histograms[name].table, histogram.table)
        assert again.moments == counts.moments
        assert np.array_equal(again.bootstrap.negatives, counts.bootstrap.negatives)


def edited(key: str, change) -> dict[str, np.ndarray]:
    payload = honest()
    payload[key] = change(payload[key].copy())
    return payload


def plus(place, amount):
    def change(array):
        array[place] += amount
        return array

    return change


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {k: v for k, v in honest().items() if k != "sites"},
        honest() | {"sites": np.array([0])},
        honest() | {"sites": np.array([-3])},
        honest() | {"sites": np.array([1, 1])},
        honest() | {"../../etc|cells": np.zeros((1024, 4), np.int64)},
        honest() | {"all|weights": np.zeros(1, np.int64)},
        honest() | {"sex=robot|edges": np.array([0, 1024])},
        honest() | {f"sex=s{i}|withheld": np.array([1]) for i in range(600)},
        honest() | {"all|withheld": np.array([1])},
        honest() | {"all|cells": [[1, 2, 3, 4]]},
        edited("all|cells", lambda a: a.astype(float)),
        edited("all|cells", lambda a: a.astype(object)),
        edited("all|cells", lambda a: a[:-1]),
        edited("all|cells", lambda a: a[:, :3]),
        edited("all|cells", plus((1, 0), -(10**6))),
        edited("all|cells", plus((1, 0), 10**12)),
        edited("all|cells", plus((1, 0), 5)),
        edited("all|cells", plus((1, 2), 2**40)),
        edited("all|cells", plus((1, 3), 2**45)),
        edited("sex=male|cells", plus((1, slice(0, 2)), [40, -0])),
        edited("all|edges", lambda a: a[::-1]),
        edited("all|edges", plus(-1, 1)),
        edited("all|edges", plus(0, 1)),
        edited("all|moments", plus(0, 1)),
        edited("all|moments", plus(3, -(2**60))),
        edited("all|moments", plus(1, 2**45)),
        edited("all|moments", lambda a: a[:7]),
        {k: v for k, v in honest().items() if k != "all|cells"},
        {k: v for k, v in honest().items() if not k.startswith("all|")},
        honest() | {"bootstrap|positives": np.zeros((5, FINE_BINS), np.int32)},
        honest() | dict.fromkeys(("bootstrap|positives", "bootstrap|negatives"), np.zeros((5, 7), np.int32)),
        honest() | dict.fromkeys(("bootstrap|positives", "bootstrap|negatives"), np.zeros((5, FINE_BINS), np.int32)),
        honest()
        | dict.fromkeys(
            ("bootstrap|positives", "bootstrap|negatives"),
            np.arange(5 * FINE_BINS, dtype=np.int32).reshape(5, -1),
        ),
    ],
)
def test_payloads_that_cannot_be_true_are_refused(payload: dict[str, np.ndarray]) -> None:
    with pytest.raises(HemoFedError):
        merge([honest(), payload])


def test_merging_needs_somebody() -> None:
    assert merge([honest(), honest()]).sites == 2  # the control of the test above
    with pytest.raises(HemoFedError, match="no site"):
        merge([])
    with pytest.raises(HemoFedError, match="replicates"):
        count(scores_of(1, 9), replicates=5) + count(scores_of(2, 9), replicates=6)
    with pytest.raises(HemoFedError, match="bootstrap"):
        BootstrapHistograms(np.zeros((0, FINE_BINS), np.int32), np.zeros((0, FINE_BINS), np.int32))
    assert SiteTally().sites == 1


def test_group_masks_of_the_index_ecgs_are_what_is_counted() -> None:
    part = scores_of(1, 90)
    rows = index_ecgs(part.patients, part.recorded_at, part.measured_at)
    masks = group_masks({factor: levels[rows] for factor, levels in part.attributes.items()})
    counts = count(part)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {n: h.size for n, h in counts.histograms.items()}
