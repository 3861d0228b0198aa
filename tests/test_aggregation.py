"""The mean and the update rules against Flower's own strategies; what must never touch a mean."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg
from numpy.typing import NDArray

from server.aggregation import UPDATE_RULES, RunningMean, Weights, adam_step, fault_of, take_mean
from shared_model.study import Federation
from tests.federations import identify_process

Values = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _identity() -> None:
    identify_process()


def draw(seed: int) -> Weights:
    """Weights of three shapes, some of them tiny, some large."""
    rng = np.random.default_rng(seed)
    return {
        "stem.weight": rng.normal(0, 0.1, (4, 12, 15)).astype(np.float32),
        "bias": rng.normal(0, 1e-6, 7).astype(np.float32),
        "scale": rng.normal(0, 100, 1).astype(np.float32),
    }


SITES = [(draw(1), 1700.0), (draw(2), 35.0), (draw(3), 5.0)]


def flower_reply(arrays: Weights, weight: float) -> Message:
    """A reply as Flower's strategies expect it."""
    record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": weight})})
    return Message(content, dst_node_id=1, message_type="train")


def flower_mean(strategy: FedAvg, number: int, sites: Sequence[tuple[Weights, float]]) -> Mapping[str, Values]:
    arrays, _ = strategy.aggregate_train(number, [flower_reply(*site) for site in sites])
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def our_mean(sites: Sequence[tuple[Weights, float]]) -> Weights:
    mean = RunningMean()
    for arrays, weight in sites:
        mean.add(arrays, weight)
    return mean.mean()


def close(ours: Mapping[str, Values], others: Mapping[str, Values]) -> bool:
    return ours.keys() == others.keys() and all(
        ours[name].shape == others[name].shape
        and bool(np.allclose(ours[name], others[name], rtol=2e-6, atol=1e-7 * np.abs(others[name]).max()))
        for name in ours
    )


def test_the_mean_is_flowers_fedavg() -> None:
    flower = flower_mean(FedAvg(weighted_by_key="num-examples"), 1, SITES)
    assert close(our_mean(SITES), flower)
    assert not close(our_mean([(arrays, 1.0) for arrays, _ in SITES]), flower)  # weights matter


def test_the_mean_of_one_site_is_its_weights_and_the_site_keeps_them() -> None:
    before = {name: value.copy() for name, value in SITES[0][0].items()}
    mean = our_mean([(SITES[0][0], 1.0)])
    assert all(mean[name].tobytes() == before[name].tobytes() for name in before)
    our_mean(SITES)
    assert all(SITES[0][0][name].tobytes() == before[name].tobytes() for name in before)


def three_rounds(step: Callable[[Weights, Weights, int], Weights]) -> list[Weights]:
    """The centre's weights after each of three rounds, in which sites move towards different points."""
    weights, seen = draw(10), []
    for number in (1, 2, 3):
        sites = [
            ({name: (value + 0.1 * draw(20 * number + at)[name]) for name, value in weights.items()}, weight)
            for at, (_, weight) in enumerate(SITES)
        ]
        weights = step(weights, our_mean(sites), number)
        seen.append(weights)
    return seen


RULE = Federation(rule="fedadam", server_learning_rate=0.03, server_beta_1=0.8, server_beta_2=0.95, server_tau=1e-2)


def ours(rule: Federation) -> Callable[[Weights, Weights, int], Weights]:
    moments: Weights = {}

    def step(old: Weights, mean: Weights, number: int) -> Weights:
        nonlocal moments
        new, moments = adam_step(old, mean, moments, number, rule)
        return new

    return step


def flowers() -> Callable[[Weights, Weights, int], Weights]:
    strategy = FedAdam(eta=0.03, beta_1=0.8, beta_2=0.95, tau=1e-2)

    def step(old: Weights, mean: Weights, number: int) -> Weights:
        strategy.current_arrays = {name: value.copy() for name, value in old.items()}
        new = flower_mean(strategy, number, [(mean, 1.0)])
        return {name: value.astype(np.float32) for name, value in new.items()}

    return step


def test_fedadam_is_flowers_over_three_rounds() -> None:
    expected = three_rounds(flowers())
    got = three_rounds(ours(RULE))
    assert all(close(*pair) for pair in zip(got, expected, strict=True))
    other = three_rounds(ours(RULE.model_copy(update={"server_beta_2": 0.99})))
    assert not close(other[2], expected[2])


def forgets(old: Weights, mean: Weights, number: int) -> Weights:
    return adam_step(old, mean, {}, number, RULE)[0]


def test_fedadam_remembers_its_moments() -> None:
    expected = three_rounds(flowers())
    assert close(three_rounds(forgets)[0], expected[0])
    assert not close(three_rounds(forgets)[2], expected[2])


def test_every_rule_of_a_study_has_an_update() -> None:
    assert set(UPDATE_RULES) == {"fedavg", "fedprox", "fedadam", "fedbn"}
    old, mean = draw(1), draw(2)
    for rule in ("fedavg", "fedprox", "fedbn"):
        new, moments = UPDATE_RULES[rule](old, mean, {}, 1, Federation())
        assert UPDATE_RULES[rule] is take_mean
        assert new is mean
        assert moments == {}


def poisoned(value: float) -> Weights:
    arrays = draw(1)
    arrays["bias"][3] = value
    return arrays


BAD: dict[str, tuple[Callable[[], Mapping[str, NDArray[np.generic]]], str]] = {
    "NaN": (lambda: poisoned(np.nan), "bias holds NaN or infinity"),
    "infinity": (lambda: poisoned(np.inf), "bias holds NaN or infinity"),
    "minus infinity": (lambda: poisoned(-np.inf), "bias holds NaN or infinity"),
    "shape": (lambda: {**draw(1), "bias": np.zeros(8, np.float32)}, "bias has another shape"),
    "broadcastable shape": (lambda: {**draw(1), "bias": np.zeros((1, 7), np.float32)}, "bias has another shape"),
    "float64": (lambda: {**draw(1), "bias": np.zeros(7)}, "bias is float64, not float32"),
    "integers": (lambda: {**draw(1), "bias": np.zeros(7, np.int64)}, "bias is int64, not float32"),
    "text": (lambda: {**draw(1), "bias": np.full(7, "x")}, "not float32"),
    "missing": (lambda: {k: v for k, v in draw(1).items() if k != "bias"}, "other names"),
    "extra": (lambda: {**draw(1), "more": np.zeros(7, np.float32)}, "other names"),
    "nothing": (dict, "other names"),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_update_that_is_no_update_is_refused(fault: str) -> None:
    make, said = BAD[fault]
    assert said in str(fault_of(make(), draw(2)))


def test_an_honest_update_passes_the_guard() -> None:
    assert fault_of(draw(1), draw(2)) is None


def test_the_sum_is_one_set_of_arrays_however_many_sites() -> None:
    mean = RunningMean()
    sizes = []
    for site in range(20):
        mean.add(draw(site), 1.0)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in mean.total.values()))
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(value.nbytes for value in draw(0).values())
    assert all(isinstance(tensor, torch.Tensor) for tensor in mean.total.values())


def test_an_update_of_nobody_is_no_mean() -> None:
    assert RunningMean().mean() == {}
