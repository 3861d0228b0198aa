"""`hemofed-sim audit`: attacks on our own training, in staging, with canaries whose presence is known.

Everything is trained by `client.private.train_private`, as at a hospital. What an attack finds is put as a lower bound
on epsilon beside what the accountant claims.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from client.private import Mechanism, train_private
from client.training import LocalWork, Progress
from shared_model.accounting import Planned, Spend, calibrate, epsilon_of, spends_of
from shared_model.errors import ExitCode, HemoFedError
from shared_model.privacy import PrivatePhase
from shared_model.release import VERSION, release_sha256
from shared_model.study import Phase
from simulation.audit_attacks import ATTACKS, WITH_SHADOWS, Attack, Floats, Mask, Seen, Witness, losses
from simulation.audit_bound import bound_of, ceiling
from simulation.audit_canaries import Canaries, What, make_canaries
from simulation.audit_output import ArmResult, AttackResult, Audit, Tried, Verdict, auc, tpr_at, write_outputs
from simulation.watch import bars

DELTA, ALPHA = 1e-5, 0.05
SAMPLING_RATE = 0.5
CLIP_NORM = 1.0
# [privacy] refuses noise and clip norms that are none; these are none to the last digit of float32.
NO_NOISE = 1e-9
NO_CLIP = 1e6
LEARNING_RATES: Mapping[What, float] = {"finetune": 2e-3, "pretrain": 1e-3}
# What the attacks must reach without privacy, at 800 canaries; at other numbers in proportion to what can be reached.
DEMANDED: Mapping[What, float] = {"finetune": 3.0, "pretrain": 1.0}
DEMANDED_AT = 800
LOOKS = 20


@dataclass(frozen=True)
class Arm:
    """One way of training that is attacked: what is run, and the epsilon claimed for it (None: nothing is claimed)."""

    name: str
    run: PrivatePhase
    claim: float | None = None


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line.

    Attributes:
        steps: of the arms with noise and of their control, each looked at by the white-box attacks.
        plain_steps: of training without noise, long enough to learn canaries by heart.
        shadows: models that the attacker trains for each arm; even, 0 leaves that attack out.
    """

    what: What
    out: Path
    canaries: int = DEMANDED_AT
    steps: int = LOOKS
    plain_steps: int = 240
    epsilons: tuple[float, ...] = (8.0, 1.0)
    shadows: int = 0


def run_audit(
    asked: Asked,
    console: Console,
    arms: Sequence[Arm] | None = None,
    attacks: Mapping[str, Attack] | None = None,
) -> Audit:
    """Train and attack every arm, and write what was found into `asked.out`.

    Args:
        arms: what is trained; `arms_of` where None.
        attacks: by name; all where None.
    """
    torch.set_num_threads(1)
    arms = arms_of(asked) if arms is None else arms
    attacks = {**ATTACKS, **(WITH_SHADOWS if asked.shadows else {})} if attacks is None else attacks
    demanded = demanded_bound(asked.what, asked.canaries)
    with tempfile.TemporaryDirectory() as folder:
        canaries = make_canaries(asked.what, asked.canaries, Path(folder))
        tried = [try_arm(canaries, arm, attacks, asked, console) for arm in arms]
    results = tuple(each.result for each in tried)
    audit = Audit(
        hemofed_version=VERSION,
        release_sha256=release_sha256(),
        what=asked.what,
        canaries=asked.canaries,
        shadows=asked.shadows,
        delta=DELTA,
        confidence=1 - ALPHA,
        demanded_bound=demanded,
        ceiling=ceiling(asked.canaries, DELTA, ALPHA),
        verdict=verdict_of(results, demanded),
        arms=results,
    )
    write_outputs(audit, tried, asked.out)
    return audit


def arms_of(asked: Asked) -> list[Arm]:
    """Training as it is without privacy; with the clip alone, as long; with the clip alone, as short as with noise; and
    with the noise of each epsilon. Each differs from the one before it in one thing."""
    free, clipped = (
        phase_of(asked.plain_steps, clip_norm=NO_CLIP, sigma=NO_NOISE / NO_CLIP),
        phase_of(asked.plain_steps, CLIP_NORM, NO_NOISE),
    )
    control = phase_of(asked.steps, CLIP_NORM, NO_NOISE)
    noised = [private_arm(epsilon, asked.steps) for epsilon in asked.epsilons]
    return [
        Arm("no privacy", free),
        Arm("clip only", clipped),
        Arm("clip only", control),
        *noised,
    ]


def phase_of(steps: int, clip_norm: float, sigma: float) -> PrivatePhase:
    """An arm's training."""
    return PrivatePhase(
        sampling_rate=SAMPLING_RATE, noise_multiplier=sigma, clip_norm=clip_norm, steps_per_round=steps, units=1
    )


def private_arm(epsilon: float, steps: int) -> Arm:
    """The least noise that the accountant allows for this epsilon, and what it claims for it."""
    each = Spend(mechanism="sampled_gaussian", count=steps, noise_multiplier=1.0, sampling_rate=SAMPLING_RATE)
    plan = calibrate([Planned(task="finetune", rounds=1, each=each)], epsilon, DELTA)
    sigma = plan[0].each.noise_multiplier
    return Arm(f"epsilon {epsilon:g}", phase_of(steps, CLIP_NORM, sigma), epsilon_of(spends_of(plan), DELTA))


def demanded_bound(what: What, canaries: int) -> float:
    """What the attacks must show without privacy before their silence means anything."""
    return DEMANDED[what] * ceiling(canaries, DELTA, ALPHA) / ceiling(DEMANDED_AT, DELTA, ALPHA)


def try_arm(canaries: Canaries, arm: Arm, attacks: Mapping[str, Attack], asked: Asked, console: Console) -> Tried:
    """Toss a coin for each canary, train with those that are in, and let every attack guess."""
    coins = np.random.default_rng()  # from the system's entropy, as the audit's chance of error needs
    included = coins.random(len(canaries)) < 0.5
    with bars(console) as progress:
        task = progress.add_task(arm.name, total=arm.run.steps_per_round * (1 + asked.shadows))
        seen = attack_training(canaries, arm, included, asked, lambda done, total: progress.advance(task))
    scores = {name: attack(seen) for name, attack in attacks.items()}
    return Tried(
        arm.name, arm.run, arm.claim, included, scores, tuple(judge(n, s, included) for n, s in scores.items())
    )


def attack_training(canaries: Canaries, arm: Arm, included: Mask, asked: Asked, on_step: Progress) -> Seen:
    """Train once with `included` while the attacker looks on, and the attacker's own models."""
    witness: list[Witness] = []

    def watch(mechanism: Mechanism) -> Progress:
        witness.append(Witness(canaries, mechanism, arm.run, LOOKS))
        return witness[0].on_step

    loss = trained_losses(canaries, arm, included, asked.what, on_step, watch)
    masks = shadow_masks(asked.shadows, len(canaries))
    shadow = [trained_losses(canaries, arm, mask, asked.what, on_step) for mask in masks]
    shape = (asked.shadows, len(canaries))
    return Seen(
        loss=loss,
        shadow_loss=np.reshape(shadow, shape),
        shadow_included=np.reshape(masks, shape).astype(bool),
        inner_product=witness[0].inner_product,
        evidence=witness[0].evidence,
        information=witness[0].information,
    )


def shadow_masks(shadows: int, canaries: int) -> list[Mask]:
    """Who is in each of the attacker's models: in pairs of a draw and its complement, so that every canary is in half
    of them."""
    rng = np.random.default_rng()
    drawn = [rng.random(canaries) < 0.5 for _ in range(shadows // 2)]
    return [mask for half in drawn for mask in (half, ~half)]


def trained_losses(
    canaries: Canaries,
    arm: Arm,
    included: Mask,
    what: What,
    on_step: Progress,
    watch: Callable[[Mechanism], Progress] | None = None,
) -> Floats:
    """Train a network on the canaries that are in, and take every canary's loss in it."""
    mechanism = canaries.mechanism(canaries.network())
    look = watch(mechanism) if watch else None

    def after_step(done: int, total: int) -> None:
        if look:
            look(done, total)
        on_step(done, total)

    work = LocalWork(
        phase=Phase(rounds=1, weight_decay=0.0),
        rows=np.arange(0),
        learning_rate=LEARNING_RATES[what],
        seed=0,
        on_step=after_step,
    )
    patients = [canaries.patients[number] for number in np.flatnonzero(included)]
    train_private(mechanism, patients, canaries.declared_patients, arm.run, work)
    return losses(canaries, mechanism)


def judge(name: str, scores: Floats, included: Mask) -> AttackResult:
    """What an attack's scores are worth."""
    bound = bound_of(scores, included, DELTA, ALPHA)
    return AttackResult(
        attack=name,
        auc=auc(scores, included),
        tpr_at_1_percent=tpr_at(scores, included, 0.01),
        tpr_at_0_1_percent=tpr_at(scores, included, 0.001),
        epsilon_lower_bound=bound.epsilon,
        guesses=bound.guesses,
        correct=bound.correct,
    )


def verdict_of(arms: Sequence[ArmResult], demanded: float) -> Verdict:
    """Broken where a claim is refuted; toothless where the first arm, that without privacy, hides its canaries."""
    if any(arm.broken for arm in arms):
        return "broken"
    return "toothless" if arms[0].largest_bound < demanded else "passed"


def refuse(audit: Audit) -> None:
    """Do nothing where the audit passed.

    Raises:
        HemoFedError: AUDIT_BROKEN where a bound exceeds a claim; AUDIT_TOOTHLESS where no attack reaches what it must
            without privacy, so that nothing follows from the rest.
    """
    if audit.verdict == "toothless":
        raise HemoFedError(
            f"audit: without privacy the attacks show epsilon {audit.arms[0].largest_bound:.2f}, and must show "
            f"{audit.demanded_bound:.2f} before anything follows from the rest; use more --canaries or --plain-steps",
            ExitCode.AUDIT_TOOTHLESS,
        )
    for arm in audit.arms:
        if arm.broken:
            raise HemoFedError(
                f"audit: {arm.name}: epsilon is claimed to be {arm.claimed_epsilon:.2f}, and attacks show "
                f"{arm.largest_bound:.2f}; stop private training with this release and report it",
                ExitCode.AUDIT_BROKEN,
            )
