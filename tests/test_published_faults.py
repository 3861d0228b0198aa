"""Faults of the published SSL-DML code: each test holds on ours and not on the fault, rewritten beside it.

The numbers are those of the project's list of faults; 17 (scheduler) and 21 (metrics) are tested elsewhere.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_model.dtw import pairwise_dtw
from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.heads import build_head
from shared_model.objectives.mining import mine
from shared_model.objectives.relations import RELATIONS

TIME_S = np.arange(625) / 62.5
ECGS = torch.randn(6, 12, 2500, generator=torch.Generator().manual_seed(0))


def mined_positive(distance: Tensor) -> list[int]:
    nobody = torch.zeros(distance.shape, dtype=torch.bool)
    return mine(distance, nobody, "farthest", torch.Generator().manual_seed(0)).positive.tolist()


def published_positive(distance: Tensor) -> list[int]:
    """Fault 11: argpartition(-2)[-2:] holds the two LARGEST distances; one of them became the positive."""
    return [int(np.argpartition(row, -2)[-2:][0]) for row in distance.numpy()]


def is_nearest_other(positive: list[int], distance: Tensor) -> bool:
    others = distance.clone().fill_diagonal_(torch.inf)
    return positive == others.argmin(1).tolist()


def test_11_the_positive_is_the_nearest_and_not_the_second_farthest() -> None:
    places = torch.rand(20, 2, generator=torch.Generator().manual_seed(1))
    distance = torch.cdist(places, places)
    assert is_nearest_other(mined_positive(distance), distance)
    assert not is_nearest_other(published_positive(distance), distance)


def two_ecgs_apart_by(shift_s: float) -> NDArray[np.float32]:
    """(2, 12, 625) mV at 62.5 Hz: the same 12 leads of narrow QRS and wide T, the second later."""
    beats = np.arange(0.7, 9.0, 0.9)[:, None, None]
    gain = np.linspace(-0.8, 1.4, 12)[:, None]
    series = []
    for late in (0.0, shift_s):
        since = TIME_S - beats - late
        series.append(gain * (np.exp(-((since / 0.03) ** 2)) + 0.3 * np.exp(-(((since - 0.3) / 0.06) ** 2))).sum(0))
    return np.stack(series).astype(np.float32)


def shift_is_forgiven(distance: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> bool:
    pair = two_ecgs_apart_by(0.2)
    return bool(distance(pair)[0, 1] < 0.25 * np.linalg.norm(pair[0] - pair[1]))


def warp_over_leads(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fault 12: arrays (12, 2500) given to a library that takes the first axis as time."""
    return pairwise_dtw(np.ascontiguousarray(x.transpose(0, 2, 1)))


def test_12_dtw_warps_over_time_and_not_over_leads() -> None:
    assert shift_is_forgiven(pairwise_dtw)
    assert not shift_is_forgiven(warp_over_leads)


def published_euclidean(x: Tensor) -> Tensor:
    """Fault 13: the mean absolute difference, under the name Euclidean."""
    return (x[:, None] - x[None, :]).abs().mean(-1)


def is_euclidean(distance: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    return torch.allclose(distance(x), torch.linalg.vector_norm(x[:, None] - x[None, :], dim=-1), rtol=1e-4, atol=1e-3)


def test_13_l2_is_euclidean_and_l1_goes_by_its_own_name() -> None:
    x = RELATIONS["l2"].describe(ECGS, torch.ones(ECGS.shape, dtype=torch.bool))
    assert is_euclidean(RELATIONS["l2"].distance, x)
    assert not is_euclidean(published_euclidean, x)
    torch.testing.assert_close(RELATIONS["l1"].distance(x), published_euclidean(x), rtol=1e-4, atol=1e-6)


class PublishedProjection(nn.Module):
    """Fault 14: the projection is made inside `forward`: new random weights at each call, never trained."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(x.shape[1], 128)(x)  # type: ignore[no-any-return]


def has_fixed_trained_projection(module: nn.Module, x: Tensor) -> bool:
    module.eval()
    output = module(x)
    same = torch.equal(output, module(x))
    trained = [parameter for parameter in module.parameters() if parameter.shape[0] == 128 and parameter.ndim == 2]
    if not trained:
        return False
    output.sum().backward()
    return same and all(parameter.grad is not None for parameter in trained)


def test_14_the_projection_is_one_trained_layer() -> None:
    assert has_fixed_trained_projection(build_encoder(EncoderSettings(), seed=1), ECGS)
    assert not has_fixed_trained_projection(PublishedProjection(), ECGS[:, 0])


class PublishedHead(nn.Module):
    """Fault 15: dropout is made inside `forward`, where it is always in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(128, 128), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(nn.Dropout(0.3)(torch.relu(self.hidden(x)))).squeeze(-1)  # type: ignore[no-any-return]


def scores_are_repeatable(head: nn.Module) -> bool:
    embedding = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    head.eval()
    with torch.inference_mode():
        return torch.equal(head(embedding), head(embedding))


def test_15_dropout_is_off_at_evaluation() -> None:
    head = build_head(EncoderSettings(), seed=1)
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in head.modules())
    assert scores_are_repeatable(head)
    assert not scores_are_repeatable(PublishedHead())
