"""All networks of a study as one module, and which of its arrays travel in which phase."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared_model.encoder import EncoderSettings, build_encoder, norm_parameter_names, weights_from
from shared_model.errors import ExitCode, HemoFedError
from shared_model.heads import build_head
from shared_model.objectives.pretext import build_distance, build_pretext
from shared_model.recurrent import RecurrentEncoder
from shared_model.study import Study, derive_seed
from shared_model.time_frequency import TimeFrequencyEncoder

TRAINING_TASKS = ("distance", "pretrain", "finetune")
JUDGED = ("encoder", "head")


def build_model(study: Study) -> nn.ModuleDict:
    """`encoder` and `head`, and what pretraining needs beside them (`pretext`, `distance`); initialised from the
    study's seed alone, the same at every party."""
    parts: dict[str, nn.Module] = {
        "encoder": encoder_of(study),
        "head": build_head(study.encoder, derive_seed(study.seed, "head")),
    }
    pretext = build_pretext(study.objective, study.encoder, derive_seed(study.seed, "pretext"))
    if len(pretext):
        parts["pretext"] = pretext
    if study.objective.relation.learned:
        parts["distance"] = build_distance(study.encoder, derive_seed(study.seed, "distance"))
    return nn.ModuleDict(parts)


OWN_ENCODERS: Mapping[str, Callable[[EncoderSettings], nn.Module]] = {
    "time_frequency": TimeFrequencyEncoder,
    "recurrent": RecurrentEncoder,
}


def encoder_of(study: Study) -> nn.Module:
    """The encoder that the study's objective trains: the ResNet, or the row's own."""
    seed, kind = derive_seed(study.seed, "encoder"), study.objective.method.encoder
    if kind == "residual":
        return build_encoder(study.encoder, seed)
    with weights_from(seed):
        return OWN_ENCODERS[kind](study.encoder)


def trained_parts(study: Study, task: str) -> tuple[str, ...]:
    """Which networks a task changes."""
    if task == "distance":
        return ("distance",)
    if task == "pretrain":
        return ("encoder", "pretext", "head") if study.objective.task_weight else ("encoder", "pretext")
    return JUDGED


def travelling_names(study: Study, task: str, model: nn.ModuleDict) -> tuple[str, ...]:
    """Names of the arrays that come back from a site in a task; all others stay there.

    Pretraining sends the encoder and what is trained beside it. Fine-tuning sends encoder and head, or the encoder
    only where the study keeps heads local. FedBN (Li et al., ICLR 2021) keeps normalisation layers at the site, but not
    those of a learned distance: near and far must mean the same everywhere. Integer buffers (batch norm's step
    counter) never travel: a mean would turn them into fractions.
    """
    local: frozenset[str] = frozenset()
    if study.federation.rule == "fedbn":
        local = frozenset(name for name in norm_parameter_names(model) if part_of(name) != "distance")
    parts = set(trained_parts(study, task)) - (set() if study.finetune.share_head else {"head"})
    return tuple(
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and name not in local and part_of(name) in parts
    )


def sent_names(study: Study, task: str, model: nn.ModuleDict) -> tuple[str, ...]:
    """Names of the arrays that a site is sent in a task: what it trains, and a distance that is trained already."""
    frozen = tuple(name for name in model.state_dict() if task == "pretrain" and part_of(name) == "distance")
    return travelling_names(study, task, model) + frozen


def all_names(study: Study, model: nn.ModuleDict) -> tuple[str, ...]:
    """Names of all arrays that travel in any phase: what the centre keeps."""
    travelling = {name for task in TRAINING_TASKS for name in travelling_names(study, task, model)}
    return tuple(name for name in model.state_dict() if name in travelling)


def part_of(name: str) -> str:
    """Which network an array belongs to."""
    return name.split(".", 1)[0]


def take_arrays(model: nn.ModuleDict, names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    """A copy of the named arrays, as float32 numpy, in the order given."""
    state = model.state_dict()
    return {name: state[name].detach().to("cpu", torch.float32, copy=True).numpy() for name in names}


def put_arrays(model: nn.ModuleDict, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write named arrays into the model.

    Raises:
        HemoFedError: a name is unknown or a shape differs (another encoder, or another release).
    """
    state = model.state_dict()
    for name, value in arrays.items():
        if name not in state or tuple(value.shape) != tuple(state[name].shape):
            raise HemoFedError(
                f"weights: {name} {tuple(value.shape)} does not fit this study's model; "
                "use weights of the same encoder settings and release",
                ExitCode.RELEASE_DIFFERS,
            )
        state[name].copy_(torch.from_numpy(np.asarray(value, order="C")))
