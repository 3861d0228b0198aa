"""The local training loop against explicit formulas."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client import training
from client.store import open_store
from client.training import LocalWork, Outcome, predict, train
from shared_model.errors import ExitCode, HemoFedError
from shared_model.model import build_model
from shared_model.objectives.draws import batches
from shared_model.study import Phase, derive_seed
from tests.federations import tiny_study

ROWS = np.arange(100, 150)
PHASE = Phase(rounds=1, local_epochs=1, batch_size=8, weight_decay=0.0, gradient_clip_norm=1e9)
Batches = Callable[[NDArray[np.int64], int, int, int], list[NDArray[np.int64]]]


def epochs(draw: Batches, seed: int = 1) -> list[list[frozenset[int]]]:
    """Three epochs of six batches of eight."""
    drawn = [frozenset(batch.tolist()) for batch in draw(ROWS, 8, 18, seed)]
    return [drawn[0:6], drawn[6:12], drawn[12:18]]


def ours(rows: NDArray[np.int64], size: int, steps: int, seed: int) -> list[NDArray[np.int64]]:
    return list(batches(rows, size, steps, seed))


def published(rows: NDArray[np.int64], size: int, steps: int, seed: int) -> list[NDArray[np.int64]]:
    """Fault 27: batches made once, before the first epoch, so that the same ECGs always meet."""
    once = ours(rows, size, len(rows) // size, seed)
    return [once[step % len(once)] for step in range(steps)]


def is_reshuffled(draw: Batches) -> bool:
    first, second, third = epochs(draw)
    return not (set(first) & set(second) or set(second) & set(third))


def test_27_batches_are_drawn_anew_every_epoch() -> None:
    assert is_reshuffled(ours)
    assert not is_reshuffled(published)


def test_an_epoch_visits_no_ecg_twice_and_nearly_all_once() -> None:
    for epoch in epochs(ours):
        assert sum(len(batch) for batch in epoch) == len(frozenset[int]().union(*epoch)) == 48


def test_a_site_smaller_than_a_batch_gives_all_it_has() -> None:
    assert [sorted(batch.tolist()) for batch in batches(ROWS[:3], 8, 2, 1)] == [[100, 101, 102]] * 2


def test_no_site_round_or_phase_has_anothers_batches() -> None:
    seeds = [
        derive_seed(1, task, number, site)
        for task in ("pretrain", "finetune")
        for number in (1, 2)
        for site in ("alpha", "beta")
    ]
    drawn = [tuple(tuple(batch.tolist()) for batch in batches(ROWS, 8, 6, seed)) for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    assert drawn[0] == tuple(tuple(batch.tolist()) for batch in batches(ROWS, 8, 6, seeds[0]))


@pytest.mark.parametrize(
    ("rows", "epochs", "minimum", "steps"),
    [(64, 2.0, 0, 16), (64, 0.5, 0, 4), (5, 1.0, 0, 1), (5, 1.0, 20, 20), (70, 1.0, 0, 8), (64, 0.01, 0, 1)],
)
def test_the_number_of_steps(rows: int, epochs: float, minimum: int, steps: int) -> None:
    phase = PHASE.model_copy(update={"local_epochs": epochs, "minimum_steps": minimum})
    assert LocalWork(phase, np.arange(rows), 0.1, seed=1).steps == steps


class Line(nn.Module):
    """y = w . x, whose weights a test can follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).squeeze(-1)


X = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))


def squared(model: Line) -> training.StepLoss:
    def step_loss(rows: NDArray[np.int64]) -> tuple[Tensor, None]:
        return ((model(X[rows]) - 3.0) ** 2).mean(), None

    return step_loss


def fit(model: nn.Module, work: LocalWork, step_loss: training.StepLoss) -> Outcome:
    return train(model, model, work, batches(work.rows, work.phase.batch_size, work.steps, work.seed), step_loss)


def test_17_the_rate_of_the_round_reaches_the_optimiser() -> None:
    """Adam's first step is the rate times the sign of the gradient, whatever the gradient's size."""
    moved = []
    for rate in (1e-3, 2e-3):
        model = Line()
        before = model.weight.detach().clone()
        fit(model, LocalWork(PHASE, np.arange(8), rate, seed=1), squared(model))
        moved.append((model.weight.detach() - before).abs())
    torch.testing.assert_close(moved[0], torch.full((1, 3), 1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[1], torch.full((1, 3), 2e-3), rtol=1e-3, atol=0)


def gradients(monkeypatch: pytest.MonkeyPatch, mu: float) -> tuple[Line, list[tuple[Tensor, Tensor]]]:
    """Train a few steps; (weights, gradient) at each step, as the optimiser gets them."""
    model, seen = Line(), []

    def look(parameters: list[nn.Parameter], _norm: float) -> None:
        (weight,) = parameters
        assert weight.grad is not None
        seen.append((weight.detach().clone(), weight.grad.detach().clone()))

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", look)
        work = LocalWork(PHASE, np.arange(40), 0.05, seed=3, proximal_mu=mu)
        fit(model, work, squared(model))
    return model, seen


def explicit(weight: Tensor, rows: NDArray[np.int64], mu: float) -> Tensor:
    """Gradient of the mean squared error + mu / 2 |w - w_start|^2, written out."""
    error = X[rows] @ weight[0] - 3.0
    return (2 * error[:, None] * X[rows]).mean(0, keepdim=True) + mu * (weight - Line().weight.detach())


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedprox_adds_the_pull_to_the_start_of_the_round(monkeypatch: pytest.MonkeyPatch, mu: float) -> None:
    _, seen = gradients(monkeypatch, mu)
    order = list(batches(np.arange(40), 8, 5, 3))
    assert len(seen) == 5
    for (weight, gradient), rows in zip(seen, order, strict=True):
        torch.testing.assert_close(gradient, explicit(weight, rows, mu), rtol=1e-4, atol=1e-5)
    away = seen[-1][0] - seen[0][0]
    assert away.abs().max() > 0.05
    assert not torch.allclose(seen[-1][1], explicit(seen[-1][0], order[-1], mu + 0.7), rtol=1e-4)


def test_fedprox_keeps_weights_nearer_to_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Line().weight.detach()
    far, near = (gradients(monkeypatch, mu)[0].weight.detach() for mu in (0.0, 50.0))
    assert (near - start).norm() < (far - start).norm()


def test_the_gradient_is_clipped() -> None:
    """One huge gradient: Adam hides the size of a single step, so the moments are looked at."""
    phase = PHASE.model_copy(update={"gradient_clip_norm": 1.0})
    model = Line()
    outcome = fit(model, LocalWork(phase, np.arange(8), 1e-3, seed=1), squared(model))
    clipped = outcome.optimizer_state["0.exp_avg"] / 0.1
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), rtol=1e-4, atol=0)
    model = Line()
    outcome = fit(model, LocalWork(PHASE, np.arange(8), 1e-3, seed=1), squared(model))
    assert (outcome.optimizer_state["0.exp_avg"] / 0.1).norm() > 2


def two_rounds(keep: bool) -> Tensor:
    model = Line()
    kept: Mapping[str, Tensor] = {}
    for seed in (1, 2):
        work = LocalWork(PHASE, np.arange(16), 0.01, seed=seed, optimizer_state=kept)
        outcome = fit(model, work, squared(model))
        kept = outcome.optimizer_state if keep else {}
    return model.weight.detach()


def test_kept_moments_go_on_where_they_were() -> None:
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for seed in (1, 2):
        for rows in batches(np.arange(16), 8, 2, seed):
            optimizer.zero_grad()
            squared(model)(rows)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(two_rounds(keep=True), model.weight.detach())
    assert not torch.equal(two_rounds(keep=False), model.weight.detach())


def test_a_loss_that_is_not_finite_ends_the_round() -> None:
    model = Line()

    def broken(rows: NDArray[np.int64]) -> tuple[Tensor, None]:
        return model(X[rows]).sum() * torch.tensor(float("nan")), None

    with pytest.raises(HemoFedError, match="not finite") as caught:
        fit(model, LocalWork(PHASE, np.arange(8), 0.1, seed=1), broken)
    assert caught.value.exit_code == ExitCode.SITE_FAILED


def test_every_step_is_shown() -> None:
    model, seen = Line(), []
    work = LocalWork(PHASE, np.arange(24), 0.1, seed=1, on_step=lambda done, total: seen.append((done, total)))
    fit(model, work, squared(model))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_dropout_is_off_when_scores_are_given_and_batches_do_not_matter(site_dirs: Mapping[str, Path]) -> None:
    study, store = tiny_study(), open_store(site_dirs["alpha"])
    model, cpu = build_model(study), torch.device("cpu")
    model.train()
    rows = store.index.row[:12]
    torch.manual_seed(1)
    first = predict(study, model, store, rows, cpu)
    torch.manual_seed(2)
    again = predict(study, model, store, rows, cpu)
    np.testing.assert_array_equal(first, again)
    one_by_one = np.concatenate([predict(study, model, store, rows[[at]], cpu) for at in range(12)])
    np.testing.assert_allclose(first, one_by_one, atol=1e-6)
    assert ((first > 0) & (first < 1)).all()
    assert len(predict(study, model, store, rows[:0], cpu)) == 0
    model.train()  # the control: with dropout on, two passes differ
    signals, _ = training.read_signals(store, rows, cpu)
    assert not torch.equal(model["head"](model["encoder"](signals)), model["head"](model["encoder"](signals)))


def test_a_regression_says_mmhg(site_dirs: Mapping[str, Path]) -> None:
    store = open_store(site_dirs["alpha"])
    rows, cpu = store.index.row[:4], torch.device("cpu")
    plain = tiny_study(target={"kind": "regression", "centre": 0.0, "scale": 1.0})
    scaled = tiny_study(target={"kind": "regression", "centre": 16.0, "scale": 8.0})
    model = build_model(plain)
    expected = predict(plain, model, store, rows, cpu) * 8.0 + 16.0
    np.testing.assert_allclose(predict(scaled, model, store, rows, cpu), expected, rtol=1e-6)
