"""Encoder and head as one module, and which of its arrays travel in which phase."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared_model.encoder import build_encoder, norm_parameter_names
from shared_model.errors import ExitCode, HemoFedError
from shared_model.heads import build_head
from shared_model.study import Study, derive_seed


def build_model(study: Study) -> nn.ModuleDict:
    """`encoder` and `head`, initialised from the study's seed alone, the same at every party."""
    return nn.ModuleDict(
        {
            "encoder": build_encoder(study.encoder, derive_seed(study.seed, "encoder")),
            "head": build_head(study.encoder, derive_seed(study.seed, "head")),
        }
    )


def travelling_names(study: Study, task: str, model: nn.ModuleDict) -> tuple[str, ...]:
    """Names of the arrays that go to and fro in a task; all others stay at the site.

    Pretraining sends the encoder only. Fine-tuning sends encoder and head, or the encoder only where the
    study keeps heads local. FedBN (Li et al., ICLR 2021) keeps normalisation layers at the site. Integer
    buffers (batch norm's step counter) never travel: a mean would turn them into fractions.
    """
    local: frozenset[str] = frozenset()
    if study.federation.rule == "fedbn":
        local = norm_parameter_names(model)
    with_head = task != "pretrain" and study.finetune.share_head
    return tuple(
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point()
        and name not in local
        and (name.startswith("encoder.") or (with_head and name.startswith("head.")))
    )


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
