"""The messages both ends exchange: an instruction goes out, a reply comes back. Knows Flower's records.

A message is one JSON text (checked against the models below; unknown keys are refused) and named arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Entry, Tip
from shared_model.study import Study

SCHEMA_VERSION = 1
MAXIMUM_TEXT = 10_000_000  # a private site's ledger has about 1,000 characters a round

EVALUATIONS = {"validation": 1, "test": 2}

Arrays = Mapping[str, NDArray[np.generic]]
Task = Literal["describe", "distance", "pretrain", "finetune", "evaluate"]
Split = Literal["validation", "test"]


class Body(BaseModel):
    """The JSON half of a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    schema_version: Literal[1] = 1


class Instruction(Body):
    """What the centre asks of a site. The whole study travels, so that a site can judge it by itself."""

    run_id: str = Field(pattern=r"^[0-9a-f]{8,64}$")
    task: Task
    round_number: int = Field(default=0, ge=0)
    study: Study
    learning_rate: float = Field(default=0.0, ge=0)
    split: Split = "validation"
    threshold_edge: int | None = Field(default=None, ge=0)
    ledger_tip: Tip = Tip()
    """The last entry of this site's privacy ledger that the centre saw."""
    ledger_tips: dict[str, Tip] = {}
    """The same by site, at the centre alone: what goes to a site is `for_site`."""

    def for_site(self, site: str) -> "Instruction":
        """The instruction as one site gets it: of all ledgers it sees its own."""
        return self.model_copy(update={"ledger_tip": self.ledger_tips.get(site, Tip()), "ledger_tips": {}})


def ledger_round(instruction: Instruction) -> int:
    """The round's number in a privacy ledger: the release of validation counts is the first evaluation, of test the
    second."""
    return EVALUATIONS[instruction.split] if instruction.task == "evaluate" else instruction.round_number


class SiteDescription(Body):
    """What a site says of itself. Every count is rounded as the site's own site.toml allows; to a private study it is
    what the site declares, or None."""

    release_sha256: str
    simulated: bool
    disclosure: str = Field(max_length=20)
    shares_own_figures: bool
    minimum_cell: int = Field(ge=1)
    records: int | None = Field(default=None, ge=0)
    patients: int | None = Field(default=None, ge=0)
    train_patients: int = Field(ge=0)
    labelled_train_patients: int = Field(ge=0)
    pretrain_patients: int = Field(ge=0)
    """Training patients whom the study's objective can learn from."""
    validation_patients: int | None = Field(default=None, ge=0)
    test_patients: int | None = Field(default=None, ge=0)


class TrainingReport(Body):
    """How a round of local training went: means over the round's steps. Their number is not said: it is a count. A
    private round says no more than the signal to noise of what it sends anyway."""

    loss: float | None = None
    signal_to_noise: float | None = None
    violating_share: float | None = None
    mean_cosine: float | None = None
    hub_share: float | None = None
    warning: str | None = Field(default=None, max_length=300)


class Reply(Body):
    """What a site answers. A failed site says a code and a reference number, never a text of its own."""

    site: str = Field(min_length=1, max_length=80, pattern=r"^[\w .\-]+$")
    status: Literal["done", "failed"] = "done"
    code: int = 0
    reference: str = Field(default="", max_length=16, pattern=r"^[0-9a-f]*$")
    description: SiteDescription | None = None
    training: TrainingReport | None = None
    ledger: tuple[Entry, ...] = Field(default=(), max_length=10_000)
    """Of a private study: the entries of the site's ledger since the one that the centre saw."""


@dataclass(frozen=True)
class SiteReply:
    """A site's good answer, as the centre holds it: one at a time, then let go."""

    site: str
    reply: Reply
    arrays: Arrays


@dataclass(frozen=True)
class SiteFailure:
    """A site that failed, kept silent past the deadline, or answered what cannot be used."""

    site: str
    code: int
    reason: str
    reference: str = ""
    says: str = ""
    """What the site calls itself, where it said so."""


Answer = SiteReply | SiteFailure
BodyType = TypeVar("BodyType", bound=Body)


def pack(body: Body, arrays: Arrays | None = None) -> RecordDict:
    """A message's content. Arrays go as raw numpy, never pickled."""
    return pack_with(body, pack_arrays(arrays or {}))


def pack_arrays(arrays: Arrays) -> ArrayRecord:
    """The second half of a message, which several messages may share."""
    return ArrayRecord({name: Array(np.asarray(value, order="C")) for name, value in arrays.items()})


def pack_with(body: Body, arrays: ArrayRecord) -> RecordDict:
    """A message's content from its halves."""
    return RecordDict({"hemofed": ConfigRecord({"body": body.model_dump_json()}), "arrays": arrays})


def unpack(content: RecordDict, kind: type[BodyType]) -> tuple[BodyType, dict[str, NDArray[np.generic]]]:
    """The two halves of a message.

    Raises:
        HemoFedError: the text is absent, too long, of another schema, or an array cannot be read.
    """
    record = content.get("hemofed")
    text = record.get("body") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str) or len(text) > MAXIMUM_TEXT:
        raise HemoFedError("message: no readable body; both ends must run the same release", ExitCode.SITE_FAILED)
    try:
        body = kind.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise HemoFedError(
            f"message: {kind.__name__}.{key}: {fault['type']}; both ends must run the same release",
            ExitCode.SITE_FAILED,
        ) from None
    arrays = content.get("arrays")
    if not isinstance(arrays, ArrayRecord):
        raise HemoFedError("message: no arrays; both ends must run the same release", ExitCode.SITE_FAILED)
    try:
        read = {name: array.numpy() for name, array in arrays.items()}
    except Exception:  # hostile bytes fail in many ways: a bad header, a pickle, a zip, an absurd shape
        read = None
    # Bytes that begin like a zip file are read as an archive, which is no array.
    if read is None or not all(isinstance(value, np.ndarray) for value in read.values()):
        raise HemoFedError("message: an array cannot be read as plain numpy", ExitCode.SITE_FAILED)
    return body, read
