"""The audit: its attacks against plain computations, that it shows its teeth, and that it notices a lie."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from client.private import Mechanism, train_private
from client.training import LocalWork
from shared_model.accounting import Spend, epsilon_of
from shared_model.errors import ExitCode, HemoFedError
from shared_model.privacy import PrivatePhase
from shared_model.study import Phase
from simulation.audit import (
    ALPHA,
    CLIP_NORM,
    DELTA,
    NO_NOISE,
    Arm,
    Asked,
    arms_of,
    demanded_bound,
    private_arm,
    refuse,
    run_audit,
    shadow_masks,
)
from simulation.audit_attacks import (
    LOSS_FLOOR,
    Seen,
    Witness,
    by_inner_product,
    by_likelihood,
    jointly,
    losses,
    told_by_step,
)
from simulation.audit_bound import bound_of, ceiling
from simulation.audit_canaries import COLUMN, Canaries, What, make_canaries, units_of
from simulation.audit_output import CSV_FILE, FIGURE_FILE, JSON_FILE, Audit, auc, roc, tpr_at
from simulation.cli import app

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
COUNT = 24


@pytest.fixture(scope="module", params=["finetune", "pretrain"])
def canaries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    what: What = request.param
    return make_canaries(what, COUNT, tmp_path_factory.mktemp("store"))


def phase_of(steps: int, rate: float = 1.0, sigma: float = NO_NOISE) -> PrivatePhase:
    return PrivatePhase(sampling_rate=rate, noise_multiplier=sigma, clip_norm=CLIP_NORM, steps_per_round=steps, units=1)


def work_of(on_step: Callable[[int, int], None] = lambda done, total: None, rate: float = 2e-3) -> LocalWork:
    return LocalWork(Phase(rounds=1, weight_decay=0.0), np.arange(0), rate, seed=0, on_step=on_step)


def trained(canaries: Canaries, included: np.ndarray, phase: PrivatePhase, looks: int = 20) -> tuple[Mechanism, Seen]:
    """Training as the audit has it, with an attacker who looks on."""
    mechanism = canaries.mechanism(canaries.network())
    witness = Witness(canaries, mechanism, phase, looks)
    patients = [canaries.patients[number] for number in np.flatnonzero(included)]
    train_private(mechanism, patients, canaries.declared_patients, phase, work_of(witness.on_step))
    nobody = np.empty((0, len(canaries)))
    found = Seen(
        losses(canaries, mechanism),
        nobody,
        nobody.astype(bool),
        witness.inner_product,
        witness.evidence,
        witness.information,
    )
    return mechanism, found


# ---- canaries


def test_canaries_of_fine_tuning_have_an_ecg_each_and_a_label_that_it_does_not_tell(tmp_path: Path) -> None:
    canaries = make_canaries("finetune", 200, tmp_path)
    assert [rows.tolist() for rows in canaries.patients] == [[row] for row in range(200)]
    labels = canaries.store.index.labels[COLUMN]
    assert stats.kstest(labels, stats.uniform(5, 40).cdf).pvalue > 1e-3
    voltage = np.ptp(canaries.store.read(np.arange(200)), axis=(1, 2))
    assert abs(stats.spearmanr(voltage, labels).statistic) < 0.25
    assert len({steps.tobytes() for steps in canaries.store.read(np.arange(200))}) == 200


def test_canaries_of_pretraining_are_two_hearts_in_one_patient(tmp_path: Path) -> None:
    canaries = make_canaries("pretrain", COUNT, tmp_path)
    assert [rows.tolist() for rows in canaries.patients] == [[2 * n, 2 * n + 1] for n in range(COUNT)]
    record = canaries.store.index.record
    assert all(record[rows[0]] != record[rows[1]] for rows in canaries.patients)


def test_a_canarys_unit_is_the_one_that_training_draws(canaries: Canaries) -> None:
    """Else the attacker would look for the gradient of another ECG."""
    mechanism = canaries.mechanism(canaries.network())
    known = units_of(canaries, mechanism)
    drawn: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    inner = mechanism.draw_unit

    def draw_unit(rows: np.ndarray, own: torch.Generator) -> tuple[torch.Tensor, ...]:
        unit = inner(rows, own)
        drawn.append((next(n for n, own_rows in enumerate(canaries.patients) if own_rows[0] == rows[0]), unit))
        return unit

    watched = Mechanism(mechanism.network, mechanism.unit_loss, draw_unit, mechanism.prepare)
    train_private(watched, canaries.patients[:5], COUNT // 2, phase_of(2), work_of())
    assert len(drawn) == 10
    for number, unit in drawn:
        assert all(torch.equal(one, other) for one, other in zip(unit, known[number], strict=True))
    views = [unit[0] for unit in known]
    assert not any(torch.equal(views[0], other) for other in views[1:])


# ---- attacks against plain computations


def test_the_sums_that_the_attacker_sees_are_those_of_the_patients_in_training(canaries: Canaries) -> None:
    """Without noise and with everybody drawn, the first sum is that of the clipped gradients of those who are in, taken
    here one by one."""
    included = np.random.default_rng(1).random(COUNT) < 0.5
    network = canaries.network()
    mechanism = canaries.mechanism(network)
    parameters = list(mechanism.network.parameters())
    rows = []
    for unit in mechanism.prepare(units_of(canaries, mechanism)):
        parts = torch.autograd.grad(
            mechanism.unit_loss(mechanism.network, unit), parameters, allow_unused=True, materialize_grads=True
        )
        gradient = torch.cat([part.flatten() for part in parts]).double()
        rows.append(gradient * min(1.0, CLIP_NORM / float(gradient.norm())))
    gradients = torch.stack(rows).numpy()
    product = gradients @ gradients[included].sum(0)
    _, seen = trained(canaries, included, phase_of(1))
    expected = product - np.square(gradients).sum(1) / 2
    np.testing.assert_allclose(by_inner_product(seen), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_without_noise_the_sums_give_everybody_away_and_noise_hides_them(canaries: Canaries, rate: float) -> None:
    included = np.random.default_rng(2).random(COUNT) < 0.5
    _, seen = trained(canaries, included, phase_of(8, rate))
    assert auc(jointly(seen), included) > 0.98
    _, hidden = trained(canaries, included, phase_of(8, rate, sigma=100.0))
    assert bound_of(jointly(hidden), included, DELTA, 0.001).epsilon == 0
    assert np.abs(jointly(hidden)).max() < 0.05


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_the_joint_estimate_is_the_best_linear_one_worked_out_in_full(rate: float) -> None:
    """Covariances over all coordinates of two steps at once, in place of sums over m by m."""
    rng, m, d, sigma = np.random.default_rng(0), 5, 12, 0.7
    phase = phase_of(2, rate, sigma)
    steps = [rng.normal(size=(m, d)) / np.sqrt(d) for _ in range(2)]
    included = rng.random(m) < 0.5
    sums = [
        ((included & (rng.random(m) < rate)).astype(float) @ g) + sigma * CLIP_NORM * rng.normal(size=d) for g in steps
    ]
    information, evidence = np.zeros((m, m)), np.zeros(m)
    for g, s in zip(steps, sums, strict=True):
        more, told = told_by_step(g @ s, g @ g.T, phase)
        information, evidence = information + more, evidence + told
    nothing = np.empty((0, m))
    found = jointly(Seen(np.zeros(m), nothing, nothing.astype(bool), np.zeros(m), evidence, information))

    wide = np.hstack(steps)  # (m, 2 d)
    across = rate / 4 * wide
    drawn = np.zeros((2 * d, 2 * d))
    for number, g in enumerate(steps):
        place = slice(number * d, (number + 1) * d)
        drawn[place, place] = rate * (1 - rate) / 2 * g.T @ g
    spread = rate**2 / 4 * wide.T @ wide + drawn + (sigma * CLIP_NORM) ** 2 * np.eye(2 * d)
    off = np.concatenate(sums) - rate / 2 * wide.sum(0)
    np.testing.assert_allclose(found, across @ np.linalg.solve(spread, off), rtol=1e-4, atol=1e-6)


def test_the_likelihood_ratio_is_that_of_two_normal_distributions() -> None:
    rng, k, m = np.random.default_rng(0), 6, 7
    own, shadow = rng.uniform(0.1, 3, m), rng.uniform(0.1, 3, (k, m))
    included = np.array([mask for half in rng.random((3, m)) < 0.5 for mask in (half, ~half)])
    nothing = np.empty(0)
    found = by_likelihood(Seen(own, shadow, included, nothing, nothing, nothing))
    log = np.log(shadow + LOSS_FLOOR)
    rests: dict[bool, list[float]] = {True: [], False: []}
    means: dict[bool, list[float]] = {True: [], False: []}
    for canary in range(m):
        for was_in in (True, False):
            group = [float(log[model, canary]) for model in range(k) if included[model, canary] == was_in]
            means[was_in].append(sum(group) / len(group))
            rests[was_in] += [(value - means[was_in][-1]) ** 2 for value in group]
    expected = [
        stats.norm.logpdf(np.log(own[n] + LOSS_FLOOR), means[True][n], np.sqrt(np.mean(rests[True])))
        - stats.norm.logpdf(np.log(own[n] + LOSS_FLOOR), means[False][n], np.sqrt(np.mean(rests[False])))
        for n in range(m)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_canary_is_in_half_of_the_shadow_models() -> None:
    masks = np.array(shadow_masks(6, 50))
    assert masks.shape == (6, 50)
    assert (masks.sum(0) == 3).all()
    assert len({mask.tobytes() for mask in masks}) == 6
    assert shadow_masks(0, 50) == []


def test_rates_are_those_of_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    included = rng.random(300) < 0.5
    scores = (included + rng.normal(size=300)).round(1)  # with ties
    assert auc(scores, included) == pytest.approx(roc_auc_score(included, scores))
    for rate in (0.001, 0.01, 0.1):
        calls = [scores >= threshold for threshold in [*np.unique(scores), np.inf]]
        allowed = [call for call in calls if (call & ~included).sum() / (~included).sum() <= rate]
        expected = max((call & included).sum() / included.sum() for call in allowed)
        assert tpr_at(scores, included, rate) == pytest.approx(expected)
    false_rate, true_rate = roc(scores, included)
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)


# ---- arms


def test_each_arm_differs_from_the_one_before_in_one_thing() -> None:
    arms = arms_of(Asked("finetune", Path("unused"), steps=4, plain_steps=9, epsilons=(2.0, 1.0)))
    runs = [arm.run for arm in arms]
    assert [run.steps_per_round for run in runs] == [9, 9, 4, 4, 4]
    assert runs[0].clip_norm > 1e5
    assert {run.clip_norm for run in runs[1:]} == {CLIP_NORM}
    assert max(run.noise_multiplier * run.clip_norm for run in runs[:3]) <= NO_NOISE
    assert [arm.claim is None for arm in arms] == [True, True, True, False, False]
    for arm, asked in zip(arms[3:], (2.0, 1.0), strict=True):
        spend = Spend(
            mechanism="sampled_gaussian",
            count=4,
            noise_multiplier=arm.run.noise_multiplier,
            sampling_rate=arm.run.sampling_rate,
        )
        assert arm.claim == pytest.approx(epsilon_of([spend], DELTA))
        assert 0.98 * asked < arm.claim <= asked


def test_what_is_demanded_follows_what_can_be_shown() -> None:
    assert demanded_bound("finetune", 800) == pytest.approx(3.0)
    assert demanded_bound("finetune", 60) == pytest.approx(3 * ceiling(60, DELTA, ALPHA) / ceiling(800, DELTA, ALPHA))


# ---- teeth, and lies


def test_a_blind_attack_is_toothless(tmp_path: Path) -> None:
    """Scores that know nothing: that they find nothing under privacy must not count as a pass."""
    asked = Asked("finetune", tmp_path, canaries=60)
    blind = {"blind": lambda seen: np.random.default_rng(0).random(len(seen.loss))}
    arms = [Arm("no privacy", phase_of(2)), Arm("epsilon 1", phase_of(2, sigma=10.0), 1.0)]
    found = run_audit(asked, QUIET, arms, blind)
    assert found.verdict == "toothless"
    with pytest.raises(HemoFedError, match="before anything follows") as caught:
        refuse(found)
    assert caught.value.exit_code == ExitCode.AUDIT_TOOTHLESS


@pytest.mark.parametrize("what", ["finetune", pytest.param("pretrain", marks=pytest.mark.long)])
def test_a_lie_about_the_noise_is_noticed(what: What, tmp_path: Path) -> None:
    """Claimed: sigma 2. Run: none. And the same claim with the noise that it is for stands."""
    spend = Spend(mechanism="sampled_gaussian", count=1, noise_multiplier=2.0)
    claim = epsilon_of([spend], DELTA)
    free, lying = Arm("no privacy", phase_of(1)), Arm("lie", phase_of(1), claim)
    honest = Arm("honest", phase_of(1, sigma=2.0), claim)
    asked = Asked(what, tmp_path / "lie", canaries=120)
    (tmp_path / "lie").mkdir()
    found = run_audit(asked, QUIET, arms=[free, lying])
    assert found.verdict == "broken"
    assert found.arms[1].largest_bound > claim
    with pytest.raises(HemoFedError, match="stop private training") as caught:
        refuse(found)
    assert caught.value.exit_code == ExitCode.AUDIT_BROKEN
    (tmp_path / "honest").mkdir()
    found = run_audit(Asked(what, tmp_path / "honest", canaries=120), QUIET, arms=[free, honest])
    assert found.arms[1].largest_bound < claim
    assert found.verdict == "passed"
    refuse(found)


@pytest.mark.long
@pytest.mark.parametrize("what", ["finetune", "pretrain"])
def test_a_small_audit_shows_its_teeth_and_passes(what: What, tmp_path: Path) -> None:
    asked = Asked(what, tmp_path, canaries=60, steps=12, plain_steps=120, epsilons=(8.0, 1.0), shadows=4)
    found = run_audit(asked, QUIET)
    free, clipped, control, eight, one = found.arms
    print(found.model_dump_json(indent=1))  # seen with pytest -s, and where an assertion fails
    by_name = {each.attack: each for each in free.attacks}
    assert by_name["black box: loss"].auc > 0.9
    assert free.largest_bound >= max(1.0, found.demanded_bound)  # 0.53 is demanded of 60 canaries in pretraining
    # Clipping alone hides nobody from who sees the sums; the noise does.
    for arm in (clipped, control):
        assert {each.attack: each for each in arm.attacks}["white box: jointly"].auc > 0.95
    assert control.largest_bound > 1
    assert one.largest_bound < 0.5 < control.largest_bound
    assert eight.largest_bound < 4
    assert found.verdict == "passed"
    refuse(found)


def test_the_files_say_what_was_found(tmp_path: Path) -> None:
    asked = Asked("finetune", tmp_path, canaries=30, steps=2, plain_steps=3, epsilons=(1.0,), shadows=2)
    found = run_audit(asked, QUIET)
    assert Audit.model_validate_json((tmp_path / JSON_FILE).read_text()) == found
    assert (tmp_path / FIGURE_FILE).read_text().lstrip().startswith("<?xml")
    with (tmp_path / CSV_FILE).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 * len(found.arms)
    for number, arm in enumerate(found.arms):
        own = rows[30 * number : 30 * (number + 1)]
        included = np.array([row["included"] == "1" for row in own])
        assert included.sum() == arm.included
        for attack in arm.attacks:  # whoever doubts a bound can work it out from the file
            scores = np.array([float(row[attack.attack]) for row in own])
            assert auc(scores, included) == pytest.approx(attack.auc, abs=1e-3)
            assert bound_of(scores, included, DELTA, ALPHA).epsilon == pytest.approx(
                attack.epsilon_lower_bound, abs=0.3
            )
    assert any(each.attack == "black box: likelihood ratio" for each in found.arms[0].attacks)


def audit_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulation.cli", "audit", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long
def test_the_command_ends_with_34_where_it_cannot_have_teeth(tmp_path: Path) -> None:
    """Twenty canaries and one step, in which half are not drawn, cannot show what is demanded; figures are still
    written and printed."""
    out = tmp_path / "out"
    small = ("--canaries", "20", "--steps", "1", "--plain-steps", "1", "--epsilon", "1", "--quiet")
    done = audit_command("--out", str(out), *small)
    assert done.returncode == ExitCode.AUDIT_TOOTHLESS, done.stderr
    assert done.stderr.count("\n") == 1
    assert "epsilon 1, 1 step, claim" in done.stdout
    assert Audit.model_validate_json((out / JSON_FILE).read_text()).verdict == "toothless"
    again = audit_command("--out", str(out), *small)
    assert again.returncode == ExitCode.USAGE
    assert "holds an audit already" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--what", "everything"),
        ("--epsilon", "8,none"),
        ("--epsilon", "0"),
        ("--epsilon", "inf"),
        ("--epsilon", ""),
        ("--shadows", "3"),
        ("--canaries", "3"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(arguments: tuple[str, str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit", "--out", str(tmp_path / "out"), *arguments])
    if isinstance(result.exception, HemoFedError):
        assert result.exception.exit_code == ExitCode.USAGE
        assert arguments[0] in result.exception.message
    else:  # one of typer's own
        assert result.exit_code == ExitCode.USAGE
        assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


def test_an_epsilon_is_bought_with_the_least_noise() -> None:
    arm = private_arm(2.0, 3)
    less = arm.run.noise_multiplier - 0.002
    spend = Spend(mechanism="sampled_gaussian", count=3, noise_multiplier=less, sampling_rate=arm.run.sampling_rate)
    assert epsilon_of([spend], DELTA) > 2.0
