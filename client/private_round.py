"""A private round at a hospital: policy and ledger first, then the bank, then the patients.

Nothing is read of a patient before the hospital's policy has let the study in and the round's cost is reserved on disk.
An answer is stored before it is sent, and a round that is asked for again gets the stored one: noise is never drawn
twice for one reservation.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save
from torch import nn

from client.bank import load_bank, neighbours, neighbours_by_label
from client.ledger import Ledger, Reserved, open_ledger
from client.policy import Policy, check_study, load_policy
from client.private import by_patient, finetuning, pretraining, reconstructing, train_private
from client.store import Store
from client.training import LocalWork, Outcome, Progress
from shared_model.accounting import Planned, plan_of
from shared_model.encoder import PRESETS, Encoder, EncoderSettings
from shared_model.errors import ExitCode, HemoFedError
from shared_model.privacy import Trained
from shared_model.reconstruction import Decoder, Reconstructor
from shared_model.wire import Arrays, Instruction, Reply, ledger_round

Work = Callable[[Policy], tuple[Reply, Arrays]]
REPLY = "reply"


def answer_once(instruction: Instruction, arrays: Arrays, site_dir: Path, work: Work) -> tuple[Reply, Arrays]:
    """Reserve what the instruction costs, do the work, store the answer, and add what the ledger gained.

    Guarantee
    ---------
    The work is begun only after the reservation is on disk; an answer that leaves is stored before. The same question
    is answered by the stored answer, another question under the same round is refused, and a ledger that lacks what the
    centre saw of it is refused (`LEDGER_ROLLED_BACK`). It is broken by who can write the site folder.

    Raises:
        HemoFedError: the policy, the budget or the ledger refuses.
    """
    study, policy = instruction.study, load_policy(site_dir)
    check_study(policy, study)
    with open_ledger(site_dir, policy, create=True) as ledger:
        ledger.check_seen(instruction.ledger_tip)
        ledger.admit(study)
        line = planned(instruction)
        reserved = ledger.reserve(
            study, instruction.run_id, line.task, ledger_round(instruction), digest_of(instruction, arrays), line.each
        )
        if isinstance(reserved, Reserved):
            reply, answer = work(policy)
            ledger.commit(reserved, packed(reply, answer))
        else:
            reply, answer = unpacked(reserved.path)
        return with_entries(reply, ledger, instruction), answer


def planned(instruction: Instruction) -> Planned:
    """The line of the study's plan that pays for this instruction."""
    for line in plan_of(instruction.study):
        if line.task == instruction.task:
            return line
    raise HemoFedError(f"[privacy]: the study has no plan for {instruction.task}", ExitCode.BAD_STUDY)


def with_entries(reply: Reply, ledger: Ledger, instruction: Instruction) -> Reply:
    """The reply, and what the ledger has gained since the centre last saw it."""
    entries = tuple(ledger.entries_since(instruction.ledger_tip.sequence))
    return reply.model_copy(update={"ledger": entries})


def digest_of(instruction: Instruction, arrays: Arrays) -> str:
    """SHA-256 of the question: the instruction, but for what the centre saw of the ledger, and the arrays."""
    digest = hashlib.sha256(instruction.model_dump_json(exclude={"ledger_tip"}).encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def packed(reply: Reply, arrays: Arrays) -> bytes:
    """An answer as one file."""
    return save({name: np.ascontiguousarray(value) for name, value in arrays.items()}, {REPLY: reply.model_dump_json()})


def unpacked(path: Path) -> tuple[Reply, Arrays]:
    """An answer from its file, as it was given."""
    with safe_open(path, "numpy") as file:
        reply = Reply.model_validate_json(file.metadata()[REPLY])
    return reply, load(path.read_bytes())


def train_patients(
    instruction: Instruction,
    model: nn.ModuleDict,
    store: Store,
    site_dir: Path,
    policy: Policy,
    work: LocalWork,
    progress: Progress,
) -> Outcome:
    """The private steps of a training round, on the network that the task trains."""
    study = instruction.study
    assert study.privacy is not None
    private = study.privacy.phase(instruction.task)
    assert private is not None
    freeze(model, study.encoder, private.trained)
    if instruction.task == "pretrain" and study.objective.method.private == "alone":
        parts = dict(model["pretext"].named_children())
        network = Reconstructor(cast(Encoder, model["encoder"]), cast(Decoder, parts["decoder"]))
        mechanism = reconstructing(study, network, store)
    elif instruction.task == "pretrain":
        bank = load_bank(site_dir, study.privacy.bank_sha256)
        if study.objective.method.labels:
            near = neighbours_by_label(store, study.objective, bank, study.target.column)
        else:
            near = neighbours(store, study.objective, bank, progress)
        mechanism = pretraining(study, model["encoder"], store, bank, near)
    else:
        mechanism = finetuning(study, nn.Sequential(model["encoder"], model["head"]), store)
    patients = by_patient(store.index.patient, work.rows)
    return train_private(mechanism, patients, policy.declared(instruction.task), private, work)


def freeze(model: nn.ModuleDict, encoder: EncoderSettings, trained: Trained) -> None:
    """Hold still the encoder's weights that the study does not train: a public choice, the same for everybody."""
    per_stage = PRESETS[encoder.preset].blocks_per_stage
    blocks = cast(Encoder, model["encoder"]).blocks
    last = ["embedding.", *(f"blocks.{number}." for number in range(len(blocks) - per_stage, len(blocks)))]
    for name, parameter in model["encoder"].named_parameters():
        chosen = {
            "all": True,
            "last_stage": name.startswith(tuple(last)),
            "norms_and_biases": parameter.ndim == 1,
            "head": False,
        }
        parameter.requires_grad_(chosen[trained])
