"""RelCon and Rank-N-Contrast against their definitions, term by term, with ties and pairs that cannot be compared."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from shared_model.objectives.losses import collapse_warning, summarise
from shared_model.objectives.ranking import relative_contrastive

RELCON = {"ties": "strict", "similarity": "cosine", "reduction": "sum"}
RANK_N_CONTRAST = {"ties": "inclusive", "similarity": "negative_l2", "reduction": "mean"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances(rows: int, kind: str, seed: int) -> Tensor:
    """Not symmetric, as RelCon's learned distance is not; `labels` and `classes` tie."""
    if kind == "learned":
        return torch.rand(rows, rows, generator=seeded(seed), dtype=torch.float64)
    label = torch.randint(5 if kind == "labels" else 2, (rows,), generator=seeded(seed)).double()
    return (label[:, None] - label[None, :]).abs()


def alike(a: NDArray[np.float64], b: NDArray[np.float64], kind: str) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) if kind == "cosine" else -float(np.linalg.norm(a - b))


def brute_force(
    embeddings: Tensor,
    distance: Tensor,
    excluded: Tensor,
    temperature: float,
    ties: str,
    similar: str,
    reduction: str,
) -> float:
    """Every sum over S written out, with the maximum taken out as one does by hand."""
    rows, sums, pairs = len(embeddings), [], 0
    e, d = embeddings.numpy(), distance.numpy()
    for a in range(rows):
        candidates = [i for i in range(rows) if not excluded[a, i] and math.isfinite(d[a, i])]
        if len(candidates) < 2 or (ties == "strict" and len({d[a, i] for i in candidates}) == 1):
            continue
        s = {i: alike(e[a], e[i], similar) / temperature for i in candidates}
        total = 0.0
        for i in candidates:
            rivals = [
                k for k in candidates if (d[a, k] > d[a, i] or k == i if ties == "strict" else d[a, k] >= d[a, i])
            ]
            top = max(s[k] for k in rivals)
            total += top + math.log(sum(math.exp(s[k] - top) for k in rivals)) - s[i]
        sums.append(total)
        pairs += len(candidates)
    if not sums:
        return 0.0
    return sum(sums) / (len(sums) if reduction == "sum" else pairs)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 12),
    kind=st.sampled_from(("learned", "labels", "classes")),
    left_out=st.sampled_from((0.0, 0.2, 0.7)),
    temperature=st.sampled_from((0.01, 0.1, 2.0)),
    ties=st.sampled_from(("strict", "inclusive")),
    similar=st.sampled_from(("cosine", "negative_l2")),
    reduction=st.sampled_from(("sum", "mean")),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(
    rows: int, kind: str, left_out: float, temperature: float, ties: str, similar: str, reduction: str, seed: int
) -> None:
    embeddings = torch.randn(rows, 4, generator=seeded(seed), dtype=torch.float64)
    distance = distances(rows, kind, seed)
    distance[torch.rand(rows, rows, generator=seeded(seed + 1)) < left_out] = math.inf
    excluded = torch.eye(rows, dtype=torch.bool) | (torch.rand(rows, rows, generator=seeded(seed + 2)) < left_out)
    embeddings.requires_grad_(True)
    loss, _ = relative_contrastive(embeddings, distance, excluded, temperature, ties, similar, reduction)
    expected = brute_force(embeddings.detach(), distance, excluded, temperature, ties, similar, reduction)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_relcon_is_the_plackett_luce_likelihood_of_the_order() -> None:
    """Another form of it: candidates are taken away from near to far, each by a softmax over those that are left."""
    embeddings = torch.randn(9, 4, generator=seeded(0), dtype=torch.float64)
    distance, itself = distances(9, "learned", 1), torch.eye(9, dtype=torch.bool)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    logits = unit @ unit.T / 0.1
    likelihood = 0.0
    for a in range(9):
        left = sorted((i for i in range(9) if i != a), key=lambda i: float(distance[a, i]))
        while left:
            likelihood += float(torch.log_softmax(logits[a, left], 0)[0])
            left.pop(0)
    loss, _ = relative_contrastive(embeddings, distance, itself, 0.1, **RELCON)
    assert float(loss) == pytest.approx(-likelihood / 9, rel=1e-12)


@pytest.mark.parametrize("options", [RELCON, RANK_N_CONTRAST], ids=["relcon", "rank_n_contrast"])
@pytest.mark.parametrize("kind", ["learned", "labels"])
def test_gradient_is_that_of_finite_differences(kind: str, options: dict[str, str]) -> None:
    embeddings = torch.randn(7, 3, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    distance, itself = distances(7, kind, 3), torch.eye(7, dtype=torch.bool)
    distance[0, 4] = math.inf
    assert torch.autograd.gradcheck(
        lambda e: relative_contrastive(e, distance, itself, 0.5, **options)[0], (embeddings,)
    )


@pytest.mark.parametrize("options", [RELCON, RANK_N_CONTRAST], ids=["relcon", "rank_n_contrast"])
@pytest.mark.parametrize("kind", ["equal", "zero", "huge", "two"])
def test_gradients_are_finite_at_duplicates_and_extremes(kind: str, options: dict[str, str]) -> None:
    embeddings = {
        "equal": 30 * torch.ones(6, 40) / 7,
        "zero": torch.zeros(6, 40),
        "huge": 1e4 * torch.randn(6, 40, generator=seeded(0)),
        "two": 3.7 * torch.eye(2, 40).repeat(3, 1),
    }[kind].requires_grad_(True)
    distance, itself = distances(6, "learned", 0).float(), torch.eye(6, dtype=torch.bool)
    loss, _ = relative_contrastive(embeddings, distance, itself, 0.05, **options)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    if kind in ("equal", "zero") and options is RANK_N_CONTRAST:
        assert (embeddings.grad == 0).all()  # no direction is better than another


@pytest.mark.parametrize("options", [RELCON, RANK_N_CONTRAST], ids=["relcon", "rank_n_contrast"])
@pytest.mark.parametrize(("rows", "teaches"), [(1, False), (2, False), (3, True)])
def test_a_batch_too_small_to_rank_teaches_nothing(rows: int, teaches: bool, options: dict[str, str]) -> None:
    embeddings = torch.randn(rows, 4, generator=seeded(1), requires_grad=True)
    distance, itself = distances(rows, "learned", 1).float(), torch.eye(rows, dtype=torch.bool)
    loss, seen = relative_contrastive(embeddings, distance, itself, 0.1, **options)
    loss.backward()
    assert embeddings.grad is not None
    assert bool(loss > 0) == bool(embeddings.grad.any()) == bool(seen.usable_share > 0) == teaches
    assert summarise([seen])["skipped_batches"] == (not teaches)


def test_a_batch_in_which_all_are_equally_far_has_no_order_to_teach() -> None:
    """Fault 28 of the published code took one of the equally far for farther."""
    embeddings = torch.randn(6, 4, generator=seeded(1), requires_grad=True)
    tied, itself = torch.ones(6, 6), torch.eye(6, dtype=torch.bool)
    loss, seen = relative_contrastive(embeddings, tied, itself, 0.1, **RELCON)
    loss.backward()
    assert (float(loss.detach()), float(seen.usable_share)) == (0.0, 0.0)
    assert embeddings.grad is not None
    assert not embeddings.grad.any()
    tied[:, 0] = 2.0
    assert relative_contrastive(embeddings, tied, itself, 0.1, **RELCON)[0] > 0


def test_the_order_of_the_batch_and_of_the_distances_scale_do_not_matter() -> None:
    embeddings = torch.randn(8, 4, generator=seeded(4), dtype=torch.float64)
    distance, itself = distances(8, "labels", 5), torch.eye(8, dtype=torch.bool)
    order = torch.randperm(8, generator=seeded(6))
    for options in (RELCON, RANK_N_CONTRAST):
        loss = relative_contrastive(embeddings, distance, itself, 0.1, **options)[0]
        shuffled = relative_contrastive(embeddings[order], distance[order][:, order], itself, 0.1, **options)[0]
        stretched = relative_contrastive(embeddings, distance**3 * 7, itself, 0.1, **options)[0]
        assert float(shuffled) == pytest.approx(float(loss), rel=1e-12)
        assert float(stretched) == pytest.approx(float(loss), rel=1e-12)


def test_an_embedding_in_label_order_loses_less_than_one_that_is_not() -> None:
    label = torch.arange(10.0)
    distance, itself = (label[:, None] - label[None, :]).abs(), torch.eye(10, dtype=torch.bool)
    ordered, mixed = label[:, None] * torch.ones(1, 2), label[torch.randperm(10, generator=seeded(0))][:, None]
    losses = [float(relative_contrastive(e, distance, itself, 2.0, **RANK_N_CONTRAST)[0]) for e in (ordered, mixed)]
    assert losses[0] < losses[1]


def test_numbers_without_a_meaning_here_are_nan_and_stay_harmless() -> None:
    embeddings = torch.ones(4, 3)
    _, seen = relative_contrastive(embeddings, distances(4, "learned", 0), torch.eye(4, dtype=torch.bool), 0.1)
    summary = summarise([seen, seen])
    assert math.isnan(summary["violating_share"])
    assert math.isnan(summary["hub_share"])
    assert (summary["mean_cosine"], summary["usable_share"]) == (pytest.approx(1.0), 1.0)
    assert collapse_warning(summary) is not None  # these four embeddings are one


def test_under_autocast_it_is_that_of_full_precision() -> None:
    embeddings = torch.randn(12, 16, generator=seeded(0))
    distance, itself = distances(12, "learned", 0), torch.eye(12, dtype=torch.bool)
    for options in (RELCON, RANK_N_CONTRAST):
        losses = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(relative_contrastive(embeddings, distance, itself, 0.1, **options)[0])
        assert losses[0] == losses[1]
