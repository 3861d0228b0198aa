"""InfoNCE against an explicit loop, pytorch-metric-learning and CLIP's cross entropy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor

from shared_model.objectives.contrastive import info_nce
from shared_model.objectives.losses import collapse_warning, summarise

SUMS = ("each", "sum_inside_log")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def itself(rows: int) -> Tensor:
    return torch.eye(rows, dtype=torch.bool)


def same(codes: Tensor) -> Tensor:
    """0 of equal codes, 1 of different ones."""
    return (codes[:, None] != codes[None, :]).float()


def slow_info_nce(
    embeddings: Tensor,
    distance: Tensor,
    excluded: Tensor,
    temperature: float,
    radius: float,
    candidates: Tensor,
    positives: str,
) -> float:
    e, losses = embeddings.double().numpy(), []
    for i in range(len(e)):
        compared = [k for k in range(len(e)) if candidates[i, k] and not excluded[i, k] and distance[i, k] < math.inf]
        near = [k for k in compared if distance[i, k] <= radius]
        if not near or len(near) == len(compared):
            continue
        s = {k: math.exp(e[i] @ e[k] / np.linalg.norm(e[i]) / np.linalg.norm(e[k]) / temperature) for k in compared}
        everything = sum(s.values())
        if positives == "each":
            losses.append(sum(-math.log(s[k] / everything) for k in near) / len(near))
        else:
            losses.append(-math.log(sum(s[k] for k in near) / everything))
    return sum(losses) / len(losses) if losses else 0.0


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 14),
    groups=st.integers(1, 14),
    radius=st.sampled_from((0.0, 0.4)),
    left_out=st.sampled_from((0.0, 0.3, 0.8)),
    temperature=st.sampled_from((0.07, 0.1, 1.0)),
    positives=st.sampled_from(SUMS),
    seed=st.integers(0, 2**31),
)
def test_equals_a_loop(
    rows: int, groups: int, radius: float, left_out: float, temperature: float, positives: str, seed: int
) -> None:
    """Categories where `radius` is 0, else distances in space."""
    embeddings = torch.randn(rows, 5, generator=seeded(seed), dtype=torch.float64).requires_grad_(True)
    places = torch.rand(rows, 2, generator=seeded(seed))
    distance = torch.cdist(places, places) if radius else same(torch.randint(groups, (rows,), generator=seeded(seed)))
    distance[torch.rand(rows, rows, generator=seeded(seed + 1)) < left_out] = math.inf
    excluded = itself(rows) | (torch.rand(rows, rows, generator=seeded(seed + 2)) < left_out)
    candidates = torch.rand(rows, rows, generator=seeded(seed + 3)) >= left_out
    loss, _ = info_nce(embeddings, distance, excluded, temperature, radius, candidates, positives)
    expected = slow_info_nce(embeddings.detach(), distance, excluded, temperature, radius, candidates, positives)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


# ---- other libraries


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("positives", SUMS)
def test_two_views_equal_the_nt_xent_of_pytorch_metric_learning(positives: str, temperature: float) -> None:
    """With one positive a row both sums are SimCLR's."""
    embeddings, ecg = torch.randn(20, 8, generator=seeded(0)), torch.arange(10).repeat(2)
    expected = NTXentLoss(temperature)(embeddings, ecg)
    ours, seen = info_nce(embeddings, same(ecg), itself(20), temperature, positives=positives)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert float(seen.usable_share) == 1


def test_several_positives_equal_the_sup_con_of_pytorch_metric_learning() -> None:
    """Of uneven classes, one of them of a single ECG, which has no positive and is left out."""
    embeddings = torch.randn(12, 8, generator=seeded(1))
    label = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    expected = SupConLoss(0.1)(embeddings, label)
    ours, seen = info_nce(embeddings, same(label), itself(12), 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert float(seen.usable_share) == pytest.approx(11 / 12)


def test_across_sides_equals_clips_symmetric_cross_entropy_and_its_gradient() -> None:
    """EBCL: before and after an event; the last batch of an epoch may be shorter, and is compared like any other."""
    for pairs in (6, 5):
        embeddings = torch.randn(2 * pairs, 8, generator=seeded(2))
        before, after = torch.nn.functional.normalize(embeddings, dim=1).split(pairs)
        scale = torch.tensor(2.0, requires_grad=True)
        logits = scale.exp() * after @ before.T
        target = torch.arange(pairs)
        cross_entropy = torch.nn.functional.cross_entropy
        expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        side = torch.arange(2 * pairs) >= pairs
        ours_scale = torch.tensor(2.0, requires_grad=True)
        ours, _ = info_nce(
            embeddings,
            same(target.repeat(2)),
            itself(2 * pairs),
            1 / ours_scale.exp(),
            candidates=side[:, None] != side[None, :],
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        expected.backward()
        ours.backward()
        assert ours_scale.grad is not None
        torch.testing.assert_close(ours_scale.grad, scale.grad, rtol=1e-4, atol=1e-5)


def test_the_two_sums_differ_where_there_are_several_positives() -> None:
    """Inside the log one near positive is enough (Good Views); each for itself pulls all of them (SupCon)."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    group = torch.tensor([0, 0, 0, 1])
    losses = [float(info_nce(embeddings, same(group), itself(4), 0.1, positives=each)[0]) for each in SUMS]
    assert losses[1] < losses[0]


# ---- gradients


@pytest.mark.parametrize("positives", SUMS)
def test_gradient_is_that_of_finite_differences(positives: str) -> None:
    embeddings = torch.randn(7, 3, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    distance = same(torch.tensor([0, 0, 0, 1, 1, 2, 3]))
    distance[6] = math.inf
    assert torch.autograd.gradcheck(
        lambda e, t: info_nce(e, distance, itself(7), t, positives=positives)[0], (embeddings, temperature)
    )


@pytest.mark.parametrize("positives", SUMS)
@pytest.mark.parametrize("kind", ["equal", "zero", "two", "opposite"])
def test_gradients_are_finite_at_duplicates_and_zeros(kind: str, positives: str) -> None:
    """At temperature 0.005 a similarity is up to 200: its exponential is beyond single precision."""
    embeddings = {
        "equal": torch.ones(6, 4),
        "zero": torch.zeros(6, 4),
        "two": torch.eye(2, 4).repeat(3, 1),
        "opposite": torch.cat([torch.ones(3, 4), -torch.ones(3, 4)]),
    }[kind].requires_grad_(True)
    loss, _ = info_nce(embeddings, same(torch.tensor([0, 1, 2]).repeat(2)), itself(6), 0.005, positives=positives)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("positives", SUMS)
@pytest.mark.parametrize(
    ("patients", "teaches"),
    [([0], False), ([0, 0], False), ([0, 1], False), ([0, 0, 0, 0], False), ([0, 1, 2, 3], False), ([0, 0, 1], True)],
    ids=["one ECG", "one pair", "two patients", "one patient", "no pair", "a pair and another"],
)
def test_a_batch_without_a_pair_or_without_another_patient_teaches_nothing(
    patients: list[int], teaches: bool, positives: str
) -> None:
    rows = len(patients)
    embeddings = torch.randn(rows, 4, generator=seeded(0), requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss, seen = info_nce(embeddings, same(torch.tensor(patients)), itself(rows), temperature, positives=positives)
    loss.backward()
    assert embeddings.grad is not None
    assert temperature.grad is not None
    assert embeddings.grad.isfinite().all()
    assert bool(loss > 0) == bool(embeddings.grad.any()) == bool(temperature.grad != 0) == teaches
    assert bool(seen.usable_share > 0) == teaches
    assert summarise([seen])["skipped_batches"] == (not teaches)


def test_rows_that_cannot_be_compared_are_as_if_they_were_not_there() -> None:
    embeddings, patient = torch.randn(8, 4, generator=seeded(4)), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    distance = same(patient)
    distance[6:] = distance[:, 6:] = math.inf
    with_them = info_nce(embeddings, distance, itself(8), 0.1)[0]
    torch.testing.assert_close(with_them, info_nce(embeddings[:6], same(patient[:6]), itself(6), 0.1)[0])


def test_under_autocast_it_is_that_of_full_precision() -> None:
    embeddings, losses = torch.randn(16, 32, generator=seeded(1)), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(info_nce(embeddings, same(torch.arange(8).repeat(2)), itself(16), 0.1)[0])
    assert losses[0] == losses[1]


def test_numbers_without_a_meaning_here_are_nan_and_stay_harmless() -> None:
    _, seen = info_nce(torch.eye(4), same(torch.arange(2).repeat(2)), itself(4), 0.1)
    summary = summarise([seen, seen])
    assert all(math.isnan(summary[name]) for name in ("violating_share", "hub_share", "max_in_degree"))
    assert (summary["mean_cosine"], summary["usable_share"]) == (0.0, 1.0)
    assert collapse_warning(summary) is None
