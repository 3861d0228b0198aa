"""Linear probes and figures of a comparison against scikit-learn and explicit loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, normalized_mutual_info_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from simulation import probe
from simulation.comparison_figures import auprc, auroc, pearson, rmse
from simulation.probe import FOLDS, cluster_information, fit_probe, normalised_mutual_information, recall_at_1

Floats = NDArray[np.float64]


def embeddings(n: int = 120, width: int = 6, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * np.arange(1, width + 1) + 3
    return x, x[:, 0] - 0.4 * x[:, 1] + rng.normal(size=n)


@pytest.mark.parametrize("penalty", probe.PENALTIES)
def test_the_logistic_probe_is_scikit_learns(penalty: float) -> None:
    x, value = embeddings()
    wanted = (value > np.median(value)).astype(float)
    ours = probe._fit(x, wanted, "classification", penalty)
    scaled = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(scaled, wanted)
    np.testing.assert_allclose(ours(x), theirs.predict_proba(scaled)[:, 1], atol=1e-5)


@pytest.mark.parametrize("penalty", probe.PENALTIES)
def test_the_ridge_probe_is_scikit_learns(penalty: float) -> None:
    x, value = embeddings()
    ours = probe._fit(x, value, "regression", penalty)
    scaled = StandardScaler().fit_transform(x)
    np.testing.assert_allclose(ours(x), Ridge(alpha=penalty).fit(scaled, value).predict(scaled), rtol=1e-9)


def test_separable_classes_and_a_constant_feature_do_not_break_the_probe() -> None:
    x, _ = embeddings(40)
    x[:, 2] = 7.0
    wanted = (np.arange(40) >= 20).astype(float)
    x[:, 0] = 100 * wanted
    fitted = fit_probe(x, wanted, np.arange(40), "classification")
    assert np.isfinite(fitted(x)).all()
    assert ((fitted(x) > 0.5) == wanted).all()
    one_class = fit_probe(x, np.ones(40), np.arange(40), "classification")
    assert (one_class(x) > 0.99).all()


def test_a_patients_ecgs_are_in_one_fold_and_every_fold_is_used() -> None:
    patients = np.repeat(np.arange(30), 3)
    folds = probe._folds(patients, seed=1)
    assert all(len(set(folds[patients == patient])) == 1 for patient in range(30))
    assert set(folds) == set(range(FOLDS))


def test_the_penalty_follows_from_the_noise() -> None:
    """Noise alone asks for the strongest penalty, a clear signal for a weaker one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 50))
    noise, signal = rng.normal(size=200), x[:, 0] * 5
    chosen = []
    for value in (noise, signal):
        fitted = fit_probe(x, value, np.arange(200), "regression")
        chosen.append(
            next(
                p for p in probe.PENALTIES if np.allclose(probe._fit(x, value, "regression", p).weights, fitted.weights)
            )
        )
    assert chosen[0] == max(probe.PENALTIES)
    assert chosen[1] == min(probe.PENALTIES)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), n=st.integers(4, 60), levels=st.integers(2, 20))
def test_figures_equal_scikit_learns_at_every_weight(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, levels, n) / levels  # with ties
    outcome = rng.integers(0, 2, n).astype(float)
    weights = np.vstack([np.ones(n), rng.poisson(1.0, (3, n))]).astype(float)
    measured = rng.normal(size=n)
    for row, area, precision in zip(
        weights, auroc(score, outcome, weights), auprc(score, outcome, weights), strict=True
    ):
        there = row > 0
        if len(set(outcome[there])) < 2:
            assert np.isnan(area)
            continue
        assert area == pytest.approx(roc_auc_score(outcome, score, sample_weight=row))
        assert precision == pytest.approx(average_precision_score(outcome, score, sample_weight=row))
    for row, error, r in zip(weights, rmse(score, measured, weights), pearson(score, measured, weights), strict=True):
        if row.sum() == 0:
            assert np.isnan(error)
            continue
        assert error == pytest.approx(np.sqrt(np.average((score - measured) ** 2, weights=row)))
        repeated = np.repeat(np.arange(n), row.astype(int))
        if np.std(score[repeated]) > 1e-6 and np.std(measured[repeated]) > 1e-6:
            assert r == pytest.approx(np.corrcoef(score[repeated], measured[repeated])[0, 1], abs=1e-6)


def test_a_constant_score_has_no_correlation() -> None:
    weights = np.ones((2, 30))
    assert np.isnan(pearson(np.full(30, 15.7), np.random.default_rng(0).normal(size=30), weights)).all()


def test_recall_at_1_equals_a_loop_and_sees_alike_neighbours() -> None:
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(40, 5)), rng.integers(0, 2, 40)
    hits = 0
    for i in range(40):
        cosine = [-np.inf if i == j else x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in range(40)]
        hits += classes[int(np.argmax(cosine))] == classes[i]
    assert recall_at_1(x, classes) == hits / 40
    apart = rng.normal(size=(40, 5)) * 0.01 + np.where(classes, 1.0, -1.0)[:, None]
    assert recall_at_1(apart, classes) == 1.0
    assert np.isnan(recall_at_1(x[:1], classes[:1]))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), n=st.integers(2, 50), k=st.integers(1, 6))
def test_mutual_information_is_scikit_learns(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, k, n), rng.integers(0, 2, n)
    expected = normalized_mutual_info_score(one, other)
    if len(set(one)) == len(set(other)) == 1:
        expected = 0.0  # scikit-learn calls two constants the same; they tell nothing of one another
    assert normalised_mutual_information(one, other) == pytest.approx(expected, abs=1e-9)


def test_clusters_that_are_the_classes_share_their_information() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(200) % 2
    alike = rng.normal(size=(200, 4)) + 100 * classes[:, None]
    unlike = rng.normal(size=(200, 4))
    assert cluster_information(alike, classes) > 0.3  # ten clusters within two classes
    assert cluster_information(unlike, classes) < 0.1
    assert cluster_information(alike, classes) == cluster_information(alike, classes)
