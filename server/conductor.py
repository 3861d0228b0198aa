"""A study under way: whom it asks, who watches, and the few things that every step of it does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.aggregation import Weights
from server.report.results import RoundMetrics
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Entry, Tip, verify_chain
from shared_model.model import build_model, sent_names
from shared_model.study import Study
from shared_model.wire import (
    Answer,
    Arrays,
    Instruction,
    SiteDescription,
    SiteFailure,
    SiteReply,
    Split,
    Task,
    ledger_round,
)

# Sends one instruction to each named site and yields the answers one by one, in site-name order.
Ask = Callable[[Instruction, Arrays, Sequence[str]], Iterator[Answer]]


@dataclass(frozen=True)
class Watcher:
    """Who is told how the study goes; each is called in the study's own thread."""

    on_sites: Callable[[Mapping[str, SiteDescription]], None] = lambda sites: None
    on_round_start: Callable[[str, int, int], None] = lambda phase, number, rounds: None
    on_round: Callable[[RoundMetrics], None] = lambda metrics: None
    on_notice: Callable[[str], None] = lambda text: None


@dataclass
class Conductor:
    """One study under way: what every round needs."""

    study: Study
    ask: Ask
    out: Path
    watcher: Watcher
    run_id: str
    sites: dict[str, SiteDescription] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    ledger_tips: dict[str, Tip] = field(default_factory=dict)


def require_sites(conductor: Conductor, answered: int, what: str, needed: int | None = None) -> None:
    """Stop where fewer sites answered than are needed (the study's minimum): a mean of nobody is no result."""
    needed = max(1, conductor.study.federation.minimum_sites if needed is None else needed)
    if answered < needed:
        raise HemoFedError(
            f"{answered} of the {needed} sites the study needs {what}; mend the sites named above, then "
            "run again with --resume",
            ExitCode.TOO_FEW_SITES,
        )


def instruct(
    conductor: Conductor,
    task: Task,
    number: int = 0,
    learning_rate: float = 0.0,
    split: Split = "validation",
    threshold_edge: int | None = None,
) -> Instruction:
    """An instruction of this run."""
    return Instruction(
        run_id=conductor.run_id,
        task=task,
        round_number=number,
        study=conductor.study,
        learning_rate=learning_rate,
        split=split,
        threshold_edge=threshold_edge,
        ledger_tips=dict(conductor.ledger_tips),
    )


def ask_sites(conductor: Conductor, instruction: Instruction, arrays: Arrays, sites: Sequence[str]) -> Iterator[Answer]:
    """The sites' answers. Of a private study each must carry on the ledger that was seen of the site before, or it is a
    failure: budget that was spent could have been forgotten."""
    for answer in conductor.ask(instruction, arrays, sites):
        if isinstance(answer, SiteReply) and conductor.study.privacy is not None:
            try:
                seen = conductor.ledger_tips.get(answer.site, Tip())
                tip = verify_chain(seen, answer.reply.ledger)
                require_paid(instruction, answer.reply.ledger)
                conductor.ledger_tips[answer.site] = tip
            except HemoFedError as error:
                yield SiteFailure(answer.site, int(error.exit_code), error.message)
                continue
        yield answer


def require_paid(instruction: Instruction, entries: Sequence[Entry]) -> None:
    """Refuse an answer whose cost stands in no new entry: the centre has not seen this round's before.

    Raises:
        HemoFedError: none of the entries says that this round of this run was answered.
    """
    for entry in entries:
        same = (entry.run_id, entry.task, entry.study) == (
            instruction.run_id,
            instruction.task,
            instruction.study.digest,
        )
        if entry.kind == "commit" and same and entry.round_number == ledger_round(instruction):
            return
    raise HemoFedError("its ledger has no entry for what it sent", ExitCode.LEDGER_REFUSED)


def travelling(study: Study, task: str, weights: Weights) -> Weights:
    """The part of the weights that goes to the sites in this task."""
    model = build_model(study)
    return {name: weights[name] for name in sent_names(study, task, model)}
