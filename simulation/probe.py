"""What a frozen embedding is worth: linear probes on it, whether neighbours are alike, whether clusters are the
classes.

A logistic probe is fitted by sums over patients, which add over hospitals, so that a federation could fit it without
moving an embedding: on one encoder the federated and the pooled probe are the same. A local-only probe sees its own
hospital."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.special import expit

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5
MOST_NEWTON_STEPS = 50
CLUSTERS = 10


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear score of an embedding, standardised by the training embeddings: `x @ weights + bias`."""

    mean: Floats
    scale: Floats
    weights: Floats
    bias: float
    kind: str

    def __call__(self, embeddings: Floats) -> Floats:
        """(n, width) -> (n,): a probability, or a value in the target's units."""
        score: Floats = (embeddings - self.mean) / self.scale @ self.weights + self.bias
        return np.asarray(expit(score)) if self.kind == "classification" else score


def fit_probe(embeddings: Floats, wanted: Floats, patients: Codes, kind: str, seed: int = 0) -> Probe:
    """Logistic (classification, `wanted` 0 or 1) or ridge regression with an L2 penalty on the weights.

    The penalty is that of PENALTIES with the least loss in five-fold cross-validation over training patients: neither
    validation nor test patients are looked at.

    Args:
        embeddings: (n, width).
        wanted: (n,).
        patients: (n,) codes; all ECGs of a patient are in one fold.
    """
    folds = _folds(patients, seed)
    losses = [_validation_loss(embeddings, wanted, folds, kind, penalty) for penalty in PENALTIES]
    return _fit(embeddings, wanted, kind, PENALTIES[int(np.argmin(losses))])


def _folds(patients: Codes, seed: int) -> Codes:
    codes, place = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(codes))
    return np.asarray(order[place] % FOLDS, np.int64)


def _validation_loss(embeddings: Floats, wanted: Floats, folds: Codes, kind: str, penalty: float) -> float:
    total = 0.0
    for fold in range(FOLDS):
        out = folds == fold
        if not out.any() or out.all():
            continue
        score = _fit(embeddings[~out], wanted[~out], kind, penalty)(embeddings[out])
        if kind == "classification":
            score = np.clip(score, 1e-6, 1 - 1e-6)
            total -= float(np.sum(wanted[out] * np.log(score) + (1 - wanted[out]) * np.log1p(-score)))
        else:
            total += float(np.sum((wanted[out] - score) ** 2))
    return total


def _fit(embeddings: Floats, wanted: Floats, kind: str, penalty: float) -> Probe:
    mean, spread = embeddings.mean(0), embeddings.std(0)
    scale = np.where(spread > 1e-8, spread, 1.0)
    x = (embeddings - mean) / scale
    if kind == "regression":
        centre = float(wanted.mean())
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (wanted - centre))
        return Probe(mean, scale, weights, centre, kind)

    solution = _newton(np.hstack([x, np.ones((len(x), 1))]), wanted, penalty)
    return Probe(mean, scale, solution[:-1], float(solution[-1]), kind)


def _newton(x: Floats, wanted: Floats, penalty: float) -> Floats:
    """Logistic regression by Newton steps, halved while they do not help; the last column, the bias, is not
    penalised."""
    ridge = np.full(x.shape[1], penalty)
    ridge[-1] = 1e-6  # keeps the bias finite where all training patients are of one class

    def loss(solution: Floats) -> float:
        logit = x @ solution
        return float(np.sum(np.logaddexp(0, logit) - wanted * logit) + ridge @ solution**2 / 2)

    solution = np.zeros(x.shape[1])
    best = loss(solution)
    for _ in range(MOST_NEWTON_STEPS):
        probability = expit(x @ solution)
        gradient = x.T @ (probability - wanted) + ridge * solution
        curvature = (x * (probability * (1 - probability))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        while (value := loss(solution - step)) > best and np.abs(step).max() > 1e-10:
            step /= 2
        solution = solution - step
        if best - value < 1e-9 * max(best, 1.0):
            break
        best = value
    return solution


def recall_at_1(embeddings: Floats, classes: Codes) -> float:
    """Share of ECGs whose nearest other ECG by cosine is of their own class; NaN of fewer than two."""
    if len(embeddings) < 2:
        return float("nan")
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return float(np.mean(classes[cosine.argmax(1)] == classes))


def cluster_information(embeddings: Floats, classes: Codes, seed: int = 0) -> float:
    """Normalised mutual information of k-means clusters (k = 10, or fewer ECGs) with the classes."""
    if len(embeddings) < 2:
        return float("nan")
    clusters = min(CLUSTERS, len(embeddings))
    _, found = kmeans2(embeddings, clusters, minit="++", rng=np.random.default_rng(seed), missing="warn")
    return normalised_mutual_information(np.asarray(found, np.int64), classes)


def normalised_mutual_information(one: Codes, other: Codes) -> float:
    """Mutual information over the arithmetic mean of the entropies; 0 where both are constant."""
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1 / len(one))
    rows, columns = joint.sum(1), joint.sum(0)
    independent = np.outer(rows, columns)
    there = joint > 0
    information = float(np.sum(joint[there] * np.log(joint[there] / independent[there])))
    entropy = sum(-float(np.sum(p[p > 0] * np.log(p[p > 0]))) for p in (rows, columns)) / 2
    return max(information, 0.0) / entropy if entropy > 1e-12 else 0.0
