"""The one local training loop, and what it is run with: a method's loss, the target's own, a distance's."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from client.facts import cohort_of
from client.store import Store
from shared_model.encoder import decay_groups
from shared_model.errors import ExitCode, HemoFedError
from shared_model.heads import in_target_units, standardised
from shared_model.leads import MISSING
from shared_model.model import trained_parts
from shared_model.motif_distance import MotifDistance, motif_loss
from shared_model.objectives.augmentations import augment, disturb
from shared_model.objectives.draws import DRAWS, Rows, batches
from shared_model.objectives.losses import Diagnostics, summarise
from shared_model.objectives.step import Batch, Parts, pretraining_step
from shared_model.study import Phase, Study, Target

StepLoss = Callable[[Rows], tuple[Tensor, Diagnostics | None]]
Progress = Callable[[int, int], None]
Describe = Callable[[Rows, Tensor, Tensor], Tensor]

PREDICT_BATCH = 256


@dataclass(frozen=True)
class LocalWork:
    """One round of local training at one site."""

    phase: Phase
    rows: Rows
    learning_rate: float
    seed: int
    precision: str = "float32"
    proximal_mu: float = 0.0
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)
    physical_batch: int | None = None
    on_step: Progress = lambda done, total: None

    @property
    def steps(self) -> int:
        """Local steps of this round: the epochs asked for, at least the minimum asked for."""
        per_epoch = max(1, len(self.rows) // self.phase.batch_size)
        return max(self.phase.minimum_steps, math.ceil(self.phase.local_epochs * per_epoch))


@dataclass(frozen=True)
class Outcome:
    """What a round left behind besides the changed weights. `diagnostics` are means over the steps; a private round has
    no loss, since its own would tell of the patients."""

    steps: int
    loss: float | None
    diagnostics: Mapping[str, float]
    optimizer_state: Mapping[str, Tensor]


def read_signals(store: Store, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """ECGs of the rows: signal (batch, 12, 2500) float32 mV with 0 where missing, and present (bool)."""
    steps_uv = torch.from_numpy(store.read(rows)).to(device)
    present = steps_uv != int(MISSING)
    return torch.where(present, steps_uv.float() * 1e-3, 0.0), present


def encode(encoder: nn.Module, signals: Tensor, physical_batch: int | None) -> Tensor:
    """(batch, 12, time) -> (batch, embedding), at most `physical_batch` ECGs in memory at a time.

    Each chunk is embedded, forgotten, and embedded again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174): the loss still sees the whole batch, as a loss over pairs must, for a third more work.
    """
    if physical_batch is None or len(signals) <= physical_batch:
        return encoder(signals)  # type: ignore[no-any-return]
    chunks = torch.split(signals, physical_batch)
    return torch.cat([checkpoint(encoder, chunk, use_reentrant=False) for chunk in chunks])


def train(model: nn.Module, trained: nn.Module, work: LocalWork, drawn: Iterator[Rows], loss_of: StepLoss) -> Outcome:
    """Take up to `work.steps` AdamW steps on the parameters of `trained`, a part of `model`, one for each batch drawn.

    The proximal term of FedProx (Li et al., MLSys 2020, eq. 2) pulls towards the weights at the round's
    start; its gradient mu * (w - w_start) is added after the backward pass.

    Raises:
        HemoFedError: the loss is not finite; the round's weights are not to be used.
    """
    optimizer = torch.optim.AdamW(decay_groups(trained, work.phase.weight_decay), lr=work.learning_rate)
    restore_optimizer(optimizer, work.optimizer_state)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters] if work.proximal_mu else []
    losses: list[Tensor] = []
    seen: list[Diagnostics] = []
    torch.manual_seed(work.seed)  # dropout draws from torch's global stream: give each site and round its own
    model.eval()
    trained.train()
    for number, rows in enumerate(islice(drawn, work.steps), 1):
        loss, diagnostics = loss_of(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, origin in zip(parameters, start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=work.proximal_mu)
        nn.utils.clip_grad_norm_(parameters, work.phase.gradient_clip_norm)
        optimizer.step()
        losses.append(loss.detach())
        if diagnostics is not None:
            seen.append(diagnostics)
        work.on_step(number, work.steps)
    mean_loss = float(torch.stack(losses).mean()) if losses else 0.0
    if not math.isfinite(mean_loss):
        raise HemoFedError("training: the loss is not finite; lower the study's learning rate", ExitCode.SITE_FAILED)
    return Outcome(len(losses), mean_loss, summarise(seen) if seen else {}, flatten_optimizer(optimizer))


def only(model: nn.ModuleDict, parts: Sequence[str]) -> nn.ModuleDict:
    """The named parts of the model, as far as it has them."""
    return nn.ModuleDict({part: model[part] for part in parts if part in model})


def pretrain(
    study: Study,
    model: nn.ModuleDict,
    store: Store,
    work: LocalWork,
    device: torch.device,
    describe: Describe,
) -> Outcome:
    """Local training of the encoder with the study's objective.

    Args:
        describe: (rows, signals, present) of a batch -> (batch, width) what the relation compares.

    Raises:
        HemoFedError: no batch can be drawn here, such as pairs of one patient where no patient has two ECGs.
    """
    objective, generator = study.objective, torch.Generator(device=device).manual_seed(work.seed)
    parts, record = parts_of(study, model, work), store.index.record

    def loss_of(rows: Rows) -> tuple[Tensor, Diagnostics]:
        signals, present = read_signals(store, rows, device)
        batch = Batch(
            signals,
            describe(rows, signals, present),
            torch.from_numpy(record[rows]).to(device),
            loss_on(study, store, rows, device) if objective.task_weight else None,
        )
        with autocast(device, work.precision):
            return pretraining_step(objective, parts, batch, generator)

    cohort = cohort_of(study, store.index, work.rows)
    drawn = DRAWS[objective.method.draw](cohort, work.phase.batch_size, work.steps, work.seed, objective.draw_settings)
    return train(model, only(model, trained_parts(study, "pretrain")), work, drawn, loss_of)


def parts_of(study: Study, model: nn.ModuleDict, work: LocalWork) -> Parts:
    """The networks of a step of pretraining.

    Raises:
        HemoFedError: memory is short, and the objective cannot work in pieces.
    """
    if work.physical_batch is not None and study.objective.method.encoder != "residual":
        raise HemoFedError(
            f"site.toml: physical_batch cannot be kept by {study.objective.name}; remove it, or lower the study's "
            "pretrain.batch_size",
            ExitCode.BAD_SITE,
        )
    distance = dict(model.named_children()).get("distance")
    assert distance is None or isinstance(distance, MotifDistance)
    return Parts(
        encoder=model["encoder"],
        embed=partial(encode, model["encoder"], physical_batch=work.physical_batch),
        pretext=dict(model["pretext"].named_children()) if "pretext" in model else {},
        head=model["head"],
        learned_distance=distance.distance_matrix if distance is not None else None,
    )


def train_distance(study: Study, model: nn.ModuleDict, store: Store, work: LocalWork, device: torch.device) -> Outcome:
    """Local training of RelCon's distance: an ECG is rebuilt from itself disturbed."""
    generator, motif = torch.Generator(device=device).manual_seed(work.seed), model["distance"]
    assert isinstance(motif, MotifDistance)

    def loss_of(rows: Rows) -> tuple[Tensor, None]:
        signals, _ = read_signals(store, rows, device)
        return motif_loss(motif, signals, disturb(signals, generator)), None

    drawn = batches(work.rows, work.phase.batch_size, work.steps, work.seed)
    return train(model, only(model, trained_parts(study, "distance")), work, drawn, loss_of)


def finetune(study: Study, model: nn.ModuleDict, store: Store, work: LocalWork, device: torch.device) -> Outcome:
    """Supervised local training of encoder and head on the study's target."""
    generator = torch.Generator(device=device).manual_seed(work.seed)

    def loss_of(rows: Rows) -> tuple[Tensor, None]:
        signals, _ = read_signals(store, rows, device)
        if study.finetune.augment:
            signals = augment(signals, generator)
        with autocast(device, work.precision):
            output = model["head"](encode(model["encoder"], signals, work.physical_batch)).float()
        return loss_on(study, store, rows, device)(output), None

    drawn = batches(work.rows, work.phase.batch_size, work.steps, work.seed)
    return train(model, only(model, trained_parts(study, "finetune")), work, drawn, loss_of)


def loss_on(study: Study, store: Store, rows: Rows, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The loss of the head's output (n,) on the target of these rows."""
    wanted = torch.from_numpy(store.index.labels[study.target.column][rows]).to(device)
    return lambda output: target_loss(study.target, output, wanted)


def target_loss(target: Target, output: Tensor, wanted: Tensor) -> Tensor:
    """The mean loss of the head's output (n,) on the label's values (n,).

    Classification: binary cross-entropy on value > threshold. Regression: squared error of the value in
    units of the study's fixed centre and scale.
    """
    if target.kind == "regression":
        return nn.functional.mse_loss(output.float(), standardised(wanted, target.centre, target.scale))
    above = (wanted > target.threshold).float()
    return nn.functional.binary_cross_entropy_with_logits(output.float(), above)


def predict(
    study: Study, model: nn.ModuleDict, store: Store, rows: Rows, device: torch.device, batch: int = PREDICT_BATCH
) -> NDArray[np.float64]:
    """Scores of the rows, dropout off: P(value > threshold), or mmHg where the target is regression."""
    model.eval()
    scores = np.empty(len(rows), dtype=np.float64)
    regression = study.target.kind == "regression"
    with torch.inference_mode(), autocast(device, study.federation.precision):
        for start in range(0, len(rows), batch):
            signals, _ = read_signals(store, rows[start : start + batch], device)
            output = model["head"](model["encoder"](signals)).double()
            if regression:
                output = in_target_units(output, study.target.centre, study.target.scale)
            scores[start : start + batch] = output.cpu().numpy()
    return scores if regression else np.asarray(expit(scores))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 where the study says so, else a no-op."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments as named tensors, so that they can be kept as safetensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, moments in state.items()
        for key, value in moments.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Put back moments from `flatten_optimizer`; an empty mapping leaves a fresh optimiser."""
    if not kept:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in kept.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
