"""Private steps: one patient moves the sum by no more than C, the noise is what it should be, and guards that bite."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from scipy import stats
from torch import Tensor, nn

from client import private
from client.bank import Bank, Neighbours
from client.private import (
    Gradients,
    Mechanism,
    Network,
    Unit,
    cheapest,
    clipped_sum,
    coins,
    gradients_by_loop,
    gradients_by_vmap,
    sample_patients,
    train_private,
)
from client.store import Store
from client.training import LocalWork
from shared_model.encoder import Encoder, EncoderSettings, build_encoder, weights_from
from shared_model.errors import ExitCode, HemoFedError
from shared_model.heads import build_head
from shared_model.objectives.draws import Rows
from shared_model.objectives.losses import triplet_loss
from shared_model.objectives.mining import Triplets
from shared_model.privacy import PrivatePhase
from shared_model.reconstruction import Decoder, Reconstructor
from shared_model.study import Phase, Study
from tests.stores import memory_store
from tests.twins import draw_twins

CLIP = 0.05  # far below the norms that these networks give, so that every patient is clipped
SLACK = 1 + 1e-5
KINDS = ("pretrain", "finetune", "reconstruct")
SECRET = b"the coins of one step, fixed so that two sums can be compared"
SMALL = EncoderSettings(embedding_dim=16)
PAPER = EncoderSettings(preset="resnet18")

Sum = Callable[[list[int]], list[Tensor]]


def study_of(objective: str = "ssl_dml_l2", norm: str = "group", units: int = 1, **phase: object) -> Study:
    table = {"sampling_rate": 1.0, "noise_multiplier": 1.0, "steps_per_round": 1, "clip_norm": CLIP, "units": units}
    return Study.model_validate(
        {
            "name": "private",
            "objective": {"name": objective},
            "evaluation": {"every_round": False},
            "privacy": {"epsilon": 8, "bank_sha256": "0" * 64, "pretrain": table | phase, "finetune": table | phase},
        }
    )


def patients_of_all_kinds() -> tuple[Store, list[Rows]]:
    """Twelve patients: two of random noise, flat, loud (20 times), duplicates of another, a hub (the mean of all), ECGs
    as drawn; some with several ECGs."""
    drawn = (draw_twins(8)[0] * 1000).round().numpy()
    patient = [0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11]
    store = memory_store(patient, mpcwp_mmhg=np.linspace(5, 40, len(patient)).tolist())
    steps = store.read(np.arange(len(patient))).copy()
    steps[3] = 0
    steps[4] = np.clip(20 * drawn[0], -30000, 30000)
    steps[5:8] = drawn[1:4]
    steps[8] = steps[9] = drawn[4]
    steps[10] = drawn.mean(0)
    steps[11:15] = drawn[4:8]
    cast("object", store).steps_uv = steps.astype(np.int16)  # type: ignore[attr-defined]
    return store, private.by_patient(store.index.patient, store.index.row)


def bank_of(count: int = 16) -> tuple[Bank, Neighbours]:
    drawn = (draw_twins(count)[1] * 1000).round().numpy().astype(np.int16)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(count) for _ in range(15)])
    return Bank(drawn, "0" * 64), Neighbours(order[:, :2], order[:, -2:])


def hooked_by_opacus(network: nn.Module, **settings: str) -> GradSampleModule:
    """Opacus looks at networks that train; dropout stays off."""
    hooked = GradSampleModule(network.train(), **settings)
    for layer in hooked.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    return hooked


def network_of(encoder: EncoderSettings, with_head: bool, seed: int = 1) -> nn.Module:
    network: nn.Module = build_encoder(encoder, seed)
    if with_head:
        network = nn.Sequential(network, build_head(encoder, seed))
    return network.eval()


def mechanism_of(kind: str, encoder: EncoderSettings = SMALL, units: int = 1) -> tuple[Mechanism, list[Rows]]:
    store, patients = patients_of_all_kinds()
    if kind == "finetune":
        network = cast(nn.Sequential, network_of(encoder, True))
        return private.finetuning(study_of(units=units), network, store), patients
    if kind == "reconstruct":
        with weights_from(1):
            decoder = Decoder(encoder)
        network = Reconstructor(cast(Encoder, network_of(encoder, False)), decoder)
        return private.reconstructing(study_of("masked_reconstruction", units=units), network, store), patients
    return private.pretraining(study_of(units=units), network_of(encoder, False), store, *bank_of()), patients


def sum_of(mechanism: Mechanism, patients: Sequence[Rows], gradients: Gradients = gradients_by_loop) -> Sum:
    """f(S): the clipped sum over patients S, whose coins are the same whoever else is there."""
    parameters = list(mechanism.network.parameters())

    def f(chosen: list[int]) -> list[Tensor]:
        units = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in chosen]
        found = gradients(mechanism.network, parameters, mechanism.unit_loss, mechanism.prepare(units))
        return clipped_sum(parameters, found, CLIP)

    return f


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(one, other, strict=True)))


def largest_change(f: Sum, patients: int, pairs: int, shake: Callable[[], None] | None = None) -> float:
    """The largest ||f(S + x) - f(S)|| in units of C, over neighbours drawn by adding patients one by one."""
    rng, worst, done = np.random.default_rng(0), 0.0, 0
    while done < pairs:
        if shake:
            shake()
        order = rng.permutation(patients)[: rng.integers(2, 7)].tolist()
        before = f([])
        for size in range(1, len(order) + 1):
            after = f(order[:size])
            worst, before, done = max(worst, distance(after, before) / CLIP), after, done + 1
    return worst


def shaker(network: nn.Module) -> Callable[[], None]:
    """Other weights every time: the bound holds for all of them."""
    generator = torch.Generator().manual_seed(0)

    def shake() -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))

    return shake


@pytest.mark.parametrize("kind", KINDS)
def test_one_patient_moves_the_sum_by_at_most_c(kind: str) -> None:
    """Random, flat, loud, duplicate and hub patients, 200 pairs for each of the three losses."""
    mechanism, patients = mechanism_of(kind)
    way = cheapest(list(mechanism.network.parameters()), torch.device("cpu"))
    worst = largest_change(sum_of(mechanism, patients, way), len(patients), 200, shaker(mechanism.network))
    assert 0.99 < worst <= SLACK  # and the bound is met, so that the clip is not idle


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_patient_moves_the_sum_by_at_most_c_in_the_papers_encoder(kind: str) -> None:
    mechanism, patients = mechanism_of(kind, PAPER, units=2)
    assert cheapest(list(mechanism.network.parameters()), torch.device("cpu")) is gradients_by_loop
    assert 0.99 < largest_change(sum_of(mechanism, patients), len(patients), 24) <= SLACK


# ---- negative controls: what must break the bound, or the test above proves nothing


def test_control_triplets_mined_in_the_batch_break_the_bound() -> None:
    """Clipping each row of opacus' per-example gradients of a coupled loss, as published code does."""
    store, patients = patients_of_all_kinds()
    network = hooked_by_opacus(network_of(SMALL, False))
    parameters = list(network.parameters())

    def f(chosen: list[int]) -> list[Tensor]:
        if len(chosen) < 3:
            return [torch.zeros_like(parameter) for parameter in parameters]
        network.zero_grad()
        signals = torch.from_numpy(store.read(np.array([patients[p][0] for p in chosen]))).float() * 1e-3
        apart = torch.cdist(signals.flatten(1), signals.flatten(1)).fill_diagonal_(torch.inf)
        positive = apart.argmin(1)
        farthest = apart.masked_fill(apart.isinf(), -1).argmax(1)
        negatives = nn.functional.one_hot(farthest, len(chosen)).bool()
        loss, _ = triplet_loss(network(signals), Triplets(positive, negatives, negatives.any(1)), 0.3, "cosine", "all")
        (loss * len(chosen)).backward()
        rows = [[parameter.grad_sample[k] for parameter in parameters] for k in range(len(chosen))]
        return clipped_sum(parameters, rows, CLIP)

    assert largest_change(f, len(patients), 60) > 1.5


def test_control_batch_norm_breaks_the_bound() -> None:
    store, patients = patients_of_all_kinds()
    network = network_of(EncoderSettings(embedding_dim=16, norm="batch"), True).train()
    parameters = list(network.parameters())

    def f(chosen: list[int]) -> list[Tensor]:
        if len(chosen) < 2:
            return [torch.zeros_like(parameter) for parameter in parameters]
        signals = torch.from_numpy(store.read(np.array([patients[p][0] for p in chosen]))).float() * 1e-3
        losses = network(signals).square()
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return clipped_sum(parameters, rows, CLIP)

    assert largest_change(f, len(patients), 40) > 1.5


def test_control_a_z_score_over_the_cohort_breaks_the_bound() -> None:
    mechanism, patients = mechanism_of("finetune")
    parameters = list(mechanism.network.parameters())

    def f(chosen: list[int]) -> list[Tensor]:
        units = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in chosen]
        if not units:
            return clipped_sum(parameters, [], CLIP)
        together = torch.cat([signals for signals, _ in units])
        scaled = [((signals - together.mean()) / together.std(), wanted) for signals, wanted in units]
        return clipped_sum(
            parameters, gradients_by_loop(mechanism.network, parameters, mechanism.unit_loss, scaled), CLIP
        )

    assert largest_change(f, len(patients), 60) > 1.2


# ---- the sum


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_same_in_any_order_and_by_any_way_of_taking_gradients(kind: str) -> None:
    mechanism, patients = mechanism_of(kind, units=2)
    loop, vmap = (sum_of(mechanism, patients, way) for way in (gradients_by_loop, gradients_by_vmap))
    everyone = list(range(len(patients)))
    expected = loop(everyone)
    norm = distance(expected, [torch.zeros_like(part) for part in expected])
    assert distance(loop(everyone[::-1]), expected) < 1e-5 * norm
    assert distance(vmap(everyone), expected) < 1e-3 * norm
    alone = [loop([p]) for p in everyone]
    assert distance([sum(parts) for parts in zip(*alone, strict=True)], expected) < 1e-5 * norm  # type: ignore[misc]


def test_a_patients_gradient_is_the_same_to_the_last_bit_in_any_company() -> None:
    """Kernels round differently for another number of ECGs, and an edge of a ReLU can make 1e-4 of C of it."""
    mechanism, patients = mechanism_of("pretrain", units=2)
    parameters = list(mechanism.network.parameters())

    def gradients(chosen: list[int]) -> list[Sequence[Tensor]]:
        units = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in chosen]
        return list(gradients_by_vmap(mechanism.network, parameters, mechanism.unit_loss, mechanism.prepare(units)))

    together = gradients(list(range(12)))
    for patient in (0, 5, 11):
        (alone,) = gradients([patient])
        assert all(torch.equal(one, other) for one, other in zip(alone, together[patient], strict=True))


def test_per_patient_gradients_are_opacus_ones() -> None:
    """One ECG a patient and a loss without pairs: what opacus' hooks give for an example."""
    mechanism, patients = mechanism_of("finetune")
    units = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in range(6)]
    parameters = list(mechanism.network.parameters())
    ours = list(gradients_by_loop(mechanism.network, parameters, mechanism.unit_loss, units))
    hooked = hooked_by_opacus(network_of(SMALL, True), loss_reduction="sum")
    scores = hooked(torch.cat([signals for signals, _ in units]))
    above = torch.cat([(wanted > 18).float() for _, wanted in units])
    nn.functional.binary_cross_entropy_with_logits(scores, above, reduction="sum").backward()
    for number, gradient in enumerate(ours):
        theirs = [parameter.grad_sample[number] for parameter in hooked.parameters()]
        norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
        assert distance(gradient, theirs) < 1e-3 * norm


def constant(value: float) -> Callable[[Network, Unit], Tensor]:
    return lambda network, unit: value * network(unit[0]).sum()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_ecg_adds_nothing_and_spoils_nothing(value: float) -> None:
    mechanism, patients = mechanism_of("finetune")
    parameters = list(mechanism.network.parameters())
    good = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in (5, 6)]
    signals, wanted = good[0]
    bad = (signals * value, wanted)
    found = [
        clipped_sum(parameters, gradients_by_loop(mechanism.network, parameters, mechanism.unit_loss, units), CLIP)
        for units in (good, [good[0], bad, good[1]])
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(part.isfinite().all() for part in found[1])


def test_a_gradient_below_c_is_left_as_it_is_and_one_above_is_shortened_over_all_parameters() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    small, large = [torch.tensor([0.3, 0.0]), torch.tensor([0.4])], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    total = clipped_sum(parameters, [small, large], 1.0)
    torch.testing.assert_close(total[0], torch.tensor([0.9, 0.0]))
    torch.testing.assert_close(total[1], torch.tensor([1.2]))


# ---- sampling and noise


def test_each_patient_is_drawn_alone_with_the_probability_asked_for() -> None:
    draws = np.zeros((4000, 5))
    for step in range(len(draws)):
        draws[step, sample_patients(5, 0.3)] = 1
    for column in draws.T:
        assert stats.binomtest(int(column.sum()), len(draws), 0.3).pvalue > 1e-6
    together = np.corrcoef(draws.T)[np.triu_indices(5, 1)]
    assert np.abs(together).max() < 6 / math.sqrt(len(draws))
    assert len(sample_patients(5, 1.0)) == 5
    assert len(sample_patients(0, 0.5)) == 0
    limit = 2**64 // 4
    words = np.array([limit - 1, limit, 0, 2**64 - 1], np.uint64).tobytes()
    assert sample_patients(4, 0.25, lambda size: words[:size]).tolist() == [0, 2]


def test_coins_are_a_patients_own() -> None:
    draw = lambda secret, patient: torch.rand(4, generator=coins(secret, patient, torch.device("cpu")))  # noqa: E731
    assert torch.equal(draw(b"a", 1), draw(b"a", 1))
    assert not torch.equal(draw(b"a", 1), draw(b"a", 2))
    assert not torch.equal(draw(b"a", 1), draw(b"b", 1))


def work_of(learning_rate: float = 1e-3, **changes: object) -> LocalWork:
    phase = Phase(rounds=1, weight_decay=0.0)
    return LocalWork(phase, np.arange(1), learning_rate, seed=0, **changes)  # type: ignore[arg-type]


def test_small_networks_and_gpus_take_many_patients_at_once() -> None:
    small, large = [nn.Parameter(torch.zeros(10))], [nn.Parameter(torch.zeros(2_000_000))]
    assert cheapest(small, torch.device("cpu")) is gradients_by_vmap
    assert cheapest(large, torch.device("cpu")) is gradients_by_loop
    assert cheapest(large, torch.device("cuda")) is gradients_by_vmap


class Recorder(nn.Module):
    """A network of one matrix, whose gradients can be looked at."""

    def __init__(self, size: int = 20_000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1] @ self.weight.T


def one_step(patients: int, declared: int, **changes: object) -> Tensor:
    """What one step gives AdamW, of patients whose gradients are all (1, 1, ...)."""
    table = {"sampling_rate": 1.0, "noise_multiplier": 1.0, "steps_per_round": 1, **changes}
    phase = PrivatePhase.model_validate(table)
    network = Recorder()
    mechanism = Mechanism(network, constant(1.0), lambda rows, own: (torch.ones(1, 1),))
    train_private(mechanism, [np.array([p]) for p in range(patients)], declared, phase, work_of())
    assert network.weight.grad is not None
    return network.weight.grad.flatten()


@pytest.mark.parametrize(("sigma", "clip", "rate", "declared"), [(1.0, 1.0, 1.0, 10), (2.5, 0.3, 0.25, 400)])
def test_the_noise_has_the_sd_that_is_paid_for(sigma: float, clip: float, rate: float, declared: int) -> None:
    """Of nobody's gradient, so of noise alone: an empty step is noised like any other."""
    noise = one_step(0, declared, noise_multiplier=sigma, clip_norm=clip, sampling_rate=rate).double().numpy()
    sd = sigma * clip / (rate * declared)
    assert stats.kstest(noise / sd, "norm").pvalue > 1e-6
    statistic = float((noise / sd) @ (noise / sd))
    assert 1e-6 < stats.chi2.cdf(statistic, len(noise)) < 1 - 1e-6


def test_two_steps_never_share_their_noise() -> None:
    assert not torch.equal(one_step(0, 1), one_step(0, 1))


def test_the_denominator_is_the_declared_number_whoever_is_there() -> None:
    for patients, declared in ((3, 100), (3, 200), (6, 100)):
        mean = one_step(patients, declared, noise_multiplier=1e-9)
        expected = patients / math.sqrt(len(mean)) / declared  # each gradient, of length 1, has equal coordinates
        torch.testing.assert_close(mean, torch.full_like(mean, expected), rtol=1e-4, atol=1e-9)


def test_signal_to_noise_is_told_from_the_noised_sums() -> None:
    """Ten patients with the same direction of length 1 against noise of SD sigma in 20,000 coordinates."""
    phase = PrivatePhase(sampling_rate=1.0, noise_multiplier=0.05, steps_per_round=20)
    mechanism = Mechanism(Recorder(), constant(1.0), lambda rows, own: (torch.ones(1, 1),))
    outcome = train_private(mechanism, [np.array([p]) for p in range(10)], 10, phase, work_of(0.0))
    assert outcome.loss is None
    expected = 10 / (0.05 * math.sqrt(20_000))
    assert outcome.diagnostics["signal_to_noise"] == pytest.approx(expected, rel=0.05)


def test_batch_norm_is_refused_before_a_step() -> None:
    network = network_of(EncoderSettings(norm="batch", embedding_dim=16), False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawn: list[Rows] = []

    def draw_unit(rows: Rows, own: torch.Generator) -> Unit:
        drawn.append(rows)
        return (torch.ones(1, 12, 100),)

    mechanism = Mechanism(network, constant(1.0), draw_unit)
    phase = PrivatePhase(sampling_rate=1.0, noise_multiplier=1.0, steps_per_round=1)
    with pytest.raises(HemoFedError, match=r'encoder.norm = "group"') as caught:
        train_private(mechanism, [np.array([0])], 1, phase, work_of())
    assert caught.value.exit_code == ExitCode.BAD_STUDY
    assert not drawn
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_proximal_term_pulls_to_the_rounds_start_and_reads_no_patient() -> None:
    phase = PrivatePhase(sampling_rate=1.0, noise_multiplier=0.01, steps_per_round=30)
    ends = []
    for mu in (0.0, 100.0):
        network = Recorder(100)
        mechanism = Mechanism(network, constant(1.0), lambda rows, own: (torch.ones(1, 1),))
        train_private(mechanism, [np.array([0])], 1, phase, work_of(0.01, proximal_mu=mu))
        ends.append(float(network.weight.detach().abs().mean()))
    assert ends[1] < 0.5 * ends[0]


# ---- units


def test_a_partner_is_another_record_of_the_patient_or_the_ecg_itself() -> None:
    rows, record, own = (
        np.array([3, 5, 8]),
        np.array([0, 0, 0, 7, 0, 7, 0, 0, 9]),
        coins(SECRET, 0, torch.device("cpu")),
    )
    assert {private.partner_of(3, rows, record, own) for _ in range(20)} == {8}
    assert {private.partner_of(8, rows, record, own) for _ in range(60)} == {3, 5}
    assert private.partner_of(3, np.array([3, 5]), record, own) == 3


@pytest.mark.parametrize("negatives", ["beyond_nearest", "farthest", "random"])
def test_negatives_are_those_that_the_objective_names(negatives: str) -> None:
    study = study_of()
    objective = study.objective.model_copy(update={"negatives": negatives})
    near = Neighbours(np.array([[0, 1, 2]]), np.array([[6, 7]]))
    own = coins(SECRET, 1, torch.device("cpu"))
    drawn = {int(private.far_of(objective, near, np.zeros(1, np.int64), 8, own)[0]) for _ in range(300)}
    allowed = {"beyond_nearest": {3, 4, 5, 6, 7}, "farthest": {6, 7}, "random": {1, 2, 3, 4, 5, 6, 7}}
    assert drawn == allowed[negatives]


def test_the_pretraining_loss_is_the_formula() -> None:
    mechanism, patients = mechanism_of("pretrain", units=3)
    unit = mechanism.prepare([mechanism.draw_unit(patients[4], coins(SECRET, 4, torch.device("cpu")))])[0]
    views, near, far = unit
    with torch.no_grad():
        embedded = [embedding.double() for embedding in mechanism.network(views)]
        terms = []
        for k in range(3):
            anchor, partner = embedded[k], embedded[3 + k]
            apart = [
                1 - float(torch.cosine_similarity(anchor, other.double(), dim=0))
                for other in (partner, near[k], far[k])
            ]
            terms.append(max(0.0, apart[0] - apart[2] + 0.3) + max(0.0, apart[1] - apart[2] + 0.3))
        assert float(mechanism.unit_loss(mechanism.network, unit)) == pytest.approx(np.mean(terms), rel=1e-4)


def test_a_frozen_encoder_is_gone_through_once_and_gives_the_same_gradients_of_the_head() -> None:
    store, patients = patients_of_all_kinds()
    network = cast(nn.Sequential, network_of(SMALL, True))
    whole = private.finetuning(study_of(units=2), network, store)
    network[0].requires_grad_(False)
    short = private.finetuning(study_of(units=2), network, store)
    assert short.network is network[1]
    parameters = list(network[1].parameters())
    sums = []
    for mechanism in (whole, short):
        units = [mechanism.draw_unit(patients[p], coins(SECRET, p, torch.device("cpu"))) for p in range(8)]
        found = gradients_by_loop(mechanism.network, parameters, mechanism.unit_loss, mechanism.prepare(units))
        sums.append(clipped_sum(parameters, found, CLIP))
    assert distance(*sums) < 1e-4 * CLIP
    assert short.prepare([]) == []


def test_a_units_ecgs_are_the_patients_own() -> None:
    store, patients = patients_of_all_kinds()
    study = study_of(units=40).model_copy(
        update={"finetune": study_of().finetune.model_copy(update={"augment": False})}
    )
    mechanism = private.finetuning(study, cast(nn.Sequential, network_of(SMALL, True)), store)
    signals, values = mechanism.draw_unit(patients[4], coins(SECRET, 4, torch.device("cpu")))
    wanted = {round(float(store.index.labels["mpcwp_mmhg"][row]), 4) for row in patients[4]}
    assert {round(float(value), 4) for value in values} == wanted
    assert signals.shape == (40, 12, 2500)
