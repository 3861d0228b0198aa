"""The privacy ledger as both ends see it: entries that are chained by SHA-256, and the check that they are.

An entry says nothing of a patient and holds no count of patients: it may leave the hospital.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared_model.accounting import Planned, Spend
from shared_model.errors import ExitCode, HemoFedError

NO_HEAD = "0" * 64
HASH = r"^[0-9a-f]{64}$"
Kind = Literal["header", "admit", "reserve", "commit"]
LedgerTask = Literal["pretrain", "finetune", "evaluate"]


class Chained(BaseModel):
    """A frozen table; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Tip(Chained):
    """The last entry of a ledger: how many there are, and its hash. Sequence 0 is a ledger not yet seen."""

    sequence: int = Field(default=0, ge=0)
    head: str = Field(default=NO_HEAD, pattern=HASH)


class Header(Chained):
    """What a ledger promises, for good.

    Attributes:
        cohort: a random id of the patients that it speaks of.
        epsilon, delta: the most that all studies together may cost one of them.
    """

    cohort: str = Field(pattern=r"^[0-9a-f]{32}$")
    unit: Literal["patient"]
    adjacency: Literal["add or remove one"]
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class Admission(Chained):
    """A study's share of epsilon and delta, and the plan it is for. `order` is the filter's Renyi order."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    accounting: Literal["plan", "filter"]
    order: float = Field(gt=1)
    plan: tuple[Planned, ...] = Field(min_length=1, max_length=8)


class Answered(Chained):
    """That an answer is on the hospital's disk: of which reservation, and the SHA-256 of its bytes."""

    reservation: int = Field(ge=1)
    answer_sha256: str = Field(pattern=HASH)


class Entry(Chained):
    """One line of a ledger; entries count from 1, and the first is the header.

    Attributes:
        previous: hash of the entry before.
        written_at: ISO 8601, UTC, whole seconds.
        study: digest of the study.
        request_sha256: hash of what the centre asked.
    """

    sequence: int = Field(ge=1)
    previous: str = Field(pattern=HASH)
    kind: Kind
    written_at: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    study: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    run_id: str = Field(default="", pattern=r"^([0-9a-f]{8,64})?$")
    task: LedgerTask | None = None
    round_number: int = Field(default=0, ge=0)
    request_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    header: Header | None = None
    admission: Admission | None = None
    spend: Spend | None = None
    answered: Answered | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Entry":
        """Each kind carries its own part and no other."""
        parts = {"header": self.header, "admit": self.admission, "reserve": self.spend, "commit": self.answered}
        if [kind for kind, part in parts.items() if part is not None] != [self.kind]:
            raise ValueError(f"an entry of kind {self.kind} carries that part alone")
        if len({self.kind == "header", self.sequence == 1, self.previous == NO_HEAD}) != 1:
            raise ValueError("the header is the first entry, and the first entry is the header")
        if (self.kind == "header") == bool(self.study):
            raise ValueError("an entry other than the header names its study")
        of_a_round = self.run_id and self.task and self.request_sha256
        if self.kind in ("reserve", "commit") and not of_a_round:
            raise ValueError("an entry of a round names run, task and request")
        return self


def canonical(entry: Entry) -> str:
    """The one way to write an entry: JSON, keys sorted, no blanks, what is at its default left out."""
    content = entry.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def head_of(entry: Entry) -> str:
    """SHA-256, hexadecimal, of the previous hash and the entry."""
    return hashlib.sha256(f"{entry.previous}\n{canonical(entry)}".encode()).hexdigest()


def tip_of(entry: Entry) -> Tip:
    """The tip of a ledger that ends with this entry."""
    return Tip(sequence=entry.sequence, head=head_of(entry))


def verify_chain(known: Tip, entries: Sequence[Entry]) -> Tip:
    """The tip that `entries`, all since `known`, lead to.

    Guarantee
    ---------
    Who holds `known` knows that the ledger still has every entry up to it, unaltered: another entry would have
    another hash. It is broken by a ledger that `known` never saw, and says nothing of what a hospital does beside its
    ledger. No entries prove nothing: an answer to a round is believed with the entry of its reservation, or not at all.

    Raises:
        HemoFedError: they do not follow on `known`, or on each other (exit code LEDGER_ROLLED_BACK).
    """
    tip = known
    for entry in entries:
        if entry.sequence != tip.sequence + 1 or entry.previous != tip.head:
            raise HemoFedError(
                f"ledger entry {entry.sequence}: does not follow on entry {tip.sequence} that was seen before; the "
                "hospital's ledger was set back, exchanged or edited: it must restore the newest one",
                ExitCode.LEDGER_ROLLED_BACK,
            )
        tip = tip_of(entry)
    return tip
