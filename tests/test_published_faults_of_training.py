"""Faults of the published SSL-DML code in training, choosing and scoring, beside ours; see test_published_faults."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import ttest_ind
from torch import Tensor, nn

from client.store import Store
from client.training import LocalWork, finetune, predict, pretrain, train
from server.aggregation import UPDATE_RULES, RunningMean
from server.checkpoint import Checkpoint, Position
from server.rounds import remember_best
from shared_model.gaps import partition_gaps
from shared_model.histograms import histogram_of
from shared_model.model import build_model
from shared_model.objectives.losses import Diagnostics
from shared_model.statistics import auroc
from shared_model.study import Phase, Study
from tests.federations import tiny_study
from tests.stores import memory_store

CPU = torch.device("cpu")
PRESSURE = [11.5, 14.0, 19.25, 22.0, 12.75, 30.0, 25.0, 9.0]  # mmHg
OUTPUT = [4.0, 5.0, 6.0, 7.0, 8.0, 3.0, 2.0, 5.5]  # l/min


def one_step(rows: int) -> LocalWork:
    phase = Phase(rounds=1, local_epochs=1e-6, minimum_steps=1, batch_size=rows, weight_decay=0.0)
    return LocalWork(phase, np.arange(rows), learning_rate=1e-3, seed=1)


def a_store() -> Store:
    return memory_store(list(range(8)), mpcwp_mmhg=PRESSURE, cardiac_output_l_min=OUTPUT)


# ---- 16


def our_step(model: nn.ModuleDict) -> None:
    finetune(tiny_study(), model, a_store(), one_step(8), CPU)


def published_step(model: nn.ModuleDict) -> None:
    """Fault 16: the loss goes through a head that the optimiser was never given."""
    optimizer = torch.optim.Adam(model["encoder"].parameters(), lr=1e-3)
    model["head"](model["encoder"](torch.randn(8, 12, 2500))).square().mean().backward()
    optimizer.step()


def every_part_is_trained(step: Callable[[nn.ModuleDict], None]) -> bool:
    model = build_model(tiny_study())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    return all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_16_the_head_is_trained_with_the_encoder() -> None:
    assert every_part_is_trained(our_step)
    assert not every_part_is_trained(published_step)


# ---- 18


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.full((2, 2), 4e-3))

    def forward(self) -> Tensor:
        return self.small.sum()


def our_decay(module: Weights, steps: int, rate: float) -> None:
    def nothing_to_learn(rows: NDArray[np.int64]) -> tuple[Tensor, Diagnostics | None]:
        return 0 * module(), None

    def batches() -> Iterator[NDArray[np.int64]]:
        yield from (np.arange(8) for _ in range(steps))

    phase = Phase(rounds=1, minimum_steps=steps, weight_decay=0.1)
    train(module, module, LocalWork(phase, np.arange(8), rate, seed=1), batches(), nothing_to_learn)


def published_decay(module: Weights, steps: int, rate: float) -> None:
    """Fault 18: decay 0.1 added to the gradient, which Adam then makes as large as any other."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (0 * module()).backward()
        optimizer.step()


def weights_survive(decay: Callable[[Weights, int, float], None]) -> bool:
    """Decoupled decay takes rate * 0.1 of a weight a step: after 50 of them 99.95% is left."""
    module = Weights()
    decay(module, 50, 1e-4)
    return bool((module.small > 0.99 * 4e-3).all())


def test_18_decay_does_not_take_small_weights_away() -> None:
    assert weights_survive(our_decay)
    assert not weights_survive(published_decay)


# ---- 19, 20

Keep = Callable[[list[float | None], str], tuple[int, float]]


def ours(scores: list[float | None], rule: str) -> tuple[int, float]:
    """Rounds as the centre takes them: the round that is kept, and the weight that is kept for it."""
    study = tiny_study(federation={"rule": rule}, evaluation={"model": "best_on_validation"})
    position = Position(run_id="r", study_sha256="s", release_sha256="c")
    state = Checkpoint(position, {"w": np.zeros(3, np.float32)}, {}, {})
    for number, score in enumerate(scores, 1):
        mean = RunningMean()
        mean.add({"w": np.full(3, number, np.float32)}, 2.0)
        new, moments = UPDATE_RULES[rule](state.weights, mean.mean(), state.moments, number, study.federation)
        state = Checkpoint(state.position, {**state.weights, **new}, moments, state.best_weights)
        state = remember_best(study, state, number, score)
    return state.position.best_round, float(state.best_weights["w"][0])


def published_reference(scores: list[float | None], rule: str) -> tuple[int, float]:
    """Fault 19: what is kept is the live model, which goes on being trained."""
    model, best, best_round = torch.zeros(3), torch.zeros(3), 0
    for number, score in enumerate(scores, 1):
        model.fill_(float(number))
        if score == max(each for each in scores if each is not None):
            best, best_round = model, number
    return best_round, float(best[0])


def published_worst(scores: list[float | None], rule: str) -> tuple[int, float]:
    """Fault 20: the smallest AUROC was taken."""
    number = int(np.argmin([math.inf if score is None else score for score in scores])) + 1
    return number, float(number)


def keeps_the_best_round(keep: Keep, rule: str = "fedavg") -> bool:
    """Of three histories: the round of the best score, with the weights it had then."""
    histories: list[tuple[list[float | None], int]] = [([0.6, 0.8, 0.7], 2), ([0.9, 0.5], 1), ([None, 0.6, 0.65], 3)]
    for scores, best in histories:
        then = ours([*scores[: best - 1], 1.0], rule)[1]
        if keep(scores, rule) != (best, then):
            return False
    return True


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
def test_19_20_the_best_round_on_validation_is_kept_as_it_was(rule: str) -> None:
    assert keeps_the_best_round(ours, rule)
    assert not keeps_the_best_round(published_reference)
    assert not keeps_the_best_round(published_worst)


# ---- 22

Groups = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def two_groups(seed: int, gap: float) -> Groups:
    """Scores of 60 with and 60 without high pressure in each of two groups, which differ by `gap`."""
    rng = np.random.default_rng(seed)
    shifts = {"female": 1.0, "male": 1.0 + gap}
    return {name: (expit(rng.normal(by, 1, 60)), expit(rng.normal(0, 1, 60))) for name, by in shifts.items()}


def our_p(groups: Groups) -> float:
    outcomes = np.repeat([1, 0], 60)
    figures = {name: auroc(histogram_of(np.concatenate(scores), outcomes)) for name, scores in groups.items()}
    largest = partition_gaps(figures).largest
    assert largest is not None
    return largest.p_value


def published_p(groups: Groups) -> float:
    """Fault 22: a t-test between bootstrap replicates, whose number can be raised at will."""
    rng = np.random.default_rng(0)
    replicates = []
    for high, low in groups.values():
        in_order = (high[:, None] > low[None, :]).astype(float)
        one, other = (rng.multinomial(60, np.full(60, 1 / 60), size=200) for _ in range(2))
        replicates.append(np.einsum("rp,pn,rn->r", one, in_order, other, optimize=True) / 3600)
    return float(ttest_ind(*replicates).pvalue)


def rarely_sees_what_is_not_there(p_value: Callable[[Groups], float]) -> bool:
    """At most 15 of 100 at a level of 5%: more come by chance less than once in 10,000 times."""
    return sum(p_value(two_groups(seed, 0.0)) < 0.05 for seed in range(100)) <= 15


def test_22_p_values_come_from_patients_and_not_from_replicates() -> None:
    assert rarely_sees_what_is_not_there(our_p)
    assert not rarely_sees_what_is_not_there(published_p)
    assert all(our_p(two_groups(seed, 3.0)) < 0.05 for seed in range(5))  # what is there is seen


# ---- 23, 24


def constant_head(study: Study, output: float) -> nn.ModuleDict:
    """A model whose head says `output` of every ECG."""
    model = build_model(study)
    with torch.no_grad():
        model["head"].output.weight.zero_()
        model["head"].output.bias.fill_(output)
    return model


def our_probability(logit: float) -> float:
    return float(predict(tiny_study(), constant_head(tiny_study(), logit), a_store(), np.arange(1), CPU)[0])


def published_probability(logit: float) -> float:
    """Fault 23: the sign of the exponent."""
    return 1 / (1 + math.exp(logit))


def a_higher_logit_is_a_higher_probability(to_probability: Callable[[float], float]) -> bool:
    return to_probability(-3.0) < 0.05 and to_probability(0.0) == 0.5 and to_probability(3.0) > 0.95


def test_23_probability_rises_with_the_logit() -> None:
    assert a_higher_logit_is_a_higher_probability(our_probability)
    assert not a_higher_logit_is_a_higher_probability(published_probability)


Score = Callable[[nn.ModuleDict, Store, NDArray[np.int64]], NDArray[np.float64]]


def our_scores(model: nn.ModuleDict, store: Store, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return predict(tiny_study(), model, store, rows, CPU, batch=5)


def published_scores(model: nn.ModuleDict, store: Store, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Fault 24: the validation loader shuffles and drops the last incomplete batch."""
    shuffled = np.random.default_rng(0).permutation(rows)
    return our_scores(model, store, shuffled[: len(rows) // 5 * 5])


def every_ecg_is_scored_in_its_place(score: Score) -> bool:
    model, store, rows = build_model(tiny_study()), a_store(), np.array([6, 1, 3, 0, 2, 7, 5])
    scores = score(model, store, rows)
    alone = [our_scores(model, store, rows[at : at + 1])[0] for at in range(len(rows))]
    return len(scores) == len(rows) and bool(np.allclose(scores, alone, atol=1e-6))


def test_24_evaluation_leaves_no_ecg_out() -> None:
    assert every_ecg_is_scored_in_its_place(our_scores)
    assert not every_ecg_is_scored_in_its_place(published_scores)


def our_loss(column: str) -> float:
    """Of a head that says 0, so that the loss is the mean square of what it should have said."""
    study = tiny_study(target={"kind": "regression", "column": column, "centre": 0.0, "scale": 1.0})
    return finetune(study, constant_head(study, 0.0), a_store(), one_step(8), CPU).loss


def published_loss(column: str) -> float:
    """Fault 24: whatever label is asked for, the pressure is learned."""
    return float(np.mean(np.square(PRESSURE)))


def learns_the_label_asked_for(loss_on: Callable[[str], float]) -> bool:
    wanted = {"mpcwp_mmhg": PRESSURE, "cardiac_output_l_min": OUTPUT}
    return all(math.isclose(loss_on(name), np.mean(np.square(values)), rel_tol=1e-5) for name, values in wanted.items())


def test_24_the_label_asked_for_is_the_one_that_is_learned() -> None:
    assert learns_the_label_asked_for(our_loss)
    assert not learns_the_label_asked_for(published_loss)


# ---- 25


def our_inputs() -> list[Tensor]:
    """What the encoder is shown of the same eight ECGs in pretraining, in fine-tuning and when it scores them."""
    study, store, shown = tiny_study(objective={"name": "ssl_dml_l2"}, finetune={"augment": False}), a_store(), []
    model = build_model(study)
    model["encoder"].register_forward_pre_hook(lambda module, given: shown.append(given[0].detach().clone()))
    relation = study.objective.relation
    pretrain(study, model, store, one_step(8), CPU, lambda rows, signals, present: relation.describe(signals, present))
    finetune(study, model, store, one_step(8), CPU)
    predict(study, model, store, np.arange(8), CPU)
    return shown


def published_inputs() -> list[Tensor]:
    """Fault 25: 2500 samples, each ECG stretched to 0..1 over all leads together; then 2496 samples in mV."""
    signals = torch.from_numpy(a_store().read(np.arange(8))).float() * 1e-3
    low, high = signals.amin((1, 2), keepdim=True), signals.amax((1, 2), keepdim=True)
    return [(signals - low) / (high - low), signals[..., :2496], signals[..., :2496]]


def the_encoder_sees_one_signal(shown: list[Tensor]) -> bool:
    """Whether all phases show the same ECGs, in whatever order."""
    if len({tuple(batch.shape) for batch in shown}) > 1:
        return False
    as_sets = [{ecg.numpy().tobytes() for ecg in batch} for batch in shown]
    return len(as_sets) == 3 and all(each == as_sets[0] for each in as_sets)


def test_25_pretraining_fine_tuning_and_scoring_see_one_signal() -> None:
    assert the_encoder_sees_one_signal(our_inputs())
    assert not the_encoder_sees_one_signal(published_inputs())
    assert not the_encoder_sees_one_signal([batch[..., :2496] for batch in published_inputs()])  # the scale alone
