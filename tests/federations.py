"""Tiny studies, a federation of made-up sites that needs no ECG, and how runs are compared."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from safetensors.numpy import load_file

from client.site import SiteSettings, load_site, write_site
from server.report.files import load_metrics
from shared_model.histograms import histogram_of
from shared_model.ledger_chain import Entry, Tip, tip_of
from shared_model.release import release_sha256
from shared_model.study import Study, study_from_table
from shared_model.subgroups import ALL
from shared_model.tally import SiteTally, to_arrays
from shared_model.wire import (
    Answer,
    Arrays,
    Instruction,
    Reply,
    SiteDescription,
    SiteFailure,
    SiteReply,
    TrainingReport,
    ledger_round,
)

TINY: dict[str, Any] = {
    "name": "tiny",
    "pretrain": {"rounds": 1, "local_epochs": 0.4, "batch_size": 16},
    "finetune": {"rounds": 2, "local_epochs": 0.5, "batch_size": 16},
    "evaluation": {"bootstrap_replicates": 20, "minimum_cell": 5},
}


def tiny_study(**tables: Any) -> Study:
    """A study of one pretraining and two fine-tuning rounds; tables given are merged into its own."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in tables.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return study_from_table(table, "test")


def private_study(**tables: Any) -> Study:
    """A tiny study of fine-tuning alone, under `[privacy]`."""
    finetune = {"sampling_rate": 0.5, "noise_multiplier": 1.0, "steps_per_round": 2}
    private: dict[str, Any] = {
        "pretrain": {"rounds": 0},
        "evaluation": {"every_round": False},
        "privacy": {"epsilon": 50.0, "release_epsilon": 1.0, "finetune": finetune},
    }
    for key, value in tables.items():
        private[key] = {**private.get(key, {}), **value} if isinstance(value, dict) else value
    return tiny_study(**private)


def identify_process() -> None:
    """Flower stamps each message with its process's identity, which a launcher would have set."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def copy_site(site_dir: Path, target: Path, **settings: Any) -> Path:
    """A site folder of one's own to change, with other settings in its site.toml."""
    shutil.copytree(site_dir, target, ignore=shutil.ignore_patterns("state"))
    write_site(target, SiteSettings(**{**load_site(target).model_dump(), **settings}))
    return target


def weights_of(out: Path) -> dict[str, NDArray[np.generic]]:
    """The final weights of a finished run."""
    return load_file(out / "model" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def rounds_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    return [row.model_dump(exclude={"seconds"}) for row in load_metrics(out)]


def results_of(out: Path) -> dict[str, Any]:
    """results.json as plain values."""
    table: dict[str, Any] = json.loads((out / "results.json").read_text())
    return table


Trained = Callable[[str, Instruction, Arrays], Answer]


def description(**changes: Any) -> SiteDescription:
    """What an ordinary made-up site says of itself."""
    usual: dict[str, Any] = {
        "release_sha256": release_sha256(),
        "simulated": True,
        "disclosure": "masked",
        "shares_own_figures": True,
        "minimum_cell": 5,
        "records": 200,
        "patients": 100,
        "train_patients": 60,
        "labelled_train_patients": 50,
        "pretrain_patients": 60,
        "validation_patients": 20,
        "test_patients": 20,
    }
    return SiteDescription(**{**usual, **changes})


def shifted(site: str, instruction: Instruction, arrays: Arrays) -> Answer:
    """Local training that moves every weight by an amount that depends on site and round."""
    amount = np.float32((len(site) + 0.1 * ord(site[0])) * 0.001 * instruction.round_number)
    moved = {name: np.asarray(value, np.float32) + amount for name, value in arrays.items()}
    return SiteReply(site, Reply(site=site, training=TrainingReport(loss=0.5)), moved)


def counted(site: str, patients: int = 40) -> Answer:
    """Counts of a model that is right most of the time."""
    rng = np.random.default_rng(len(site) + ord(site[0]))
    outcomes = np.arange(patients) % 2
    scores = np.clip(0.3 + 0.3 * outcomes + rng.normal(0, 0.15, patients), 0.01, 0.99)
    tally = SiteTally({ALL: histogram_of(scores, outcomes)}, {}, None)
    return SiteReply(site, Reply(site=site), to_arrays(tally, fine=True))


def paid_entries(instruction: Instruction, before: Sequence[Entry]) -> list[Entry]:
    """What a ledger that ends with `before` gains by a round: a header where it is new, reservation, answer."""
    new: list[Entry] = []

    def add(kind: Any, **content: Any) -> None:
        tip = tip_of([*before, *new][-1]) if before or new else Tip()
        usual = {"sequence": tip.sequence + 1, "previous": tip.head, "written_at": "2026-01-02T03:04:05+00:00"}
        new.append(Entry(kind=kind, **usual, **content))

    if not before:
        header = {"cohort": "0" * 32, "unit": "patient", "adjacency": "add or remove one", "epsilon": 50, "delta": 1e-3}
        add("header", header=header)
    asked = {
        "study": instruction.study.digest,
        "run_id": instruction.run_id,
        "task": instruction.task,
        "round_number": ledger_round(instruction),
        "request_sha256": "1" * 64,
    }
    add("reserve", spend={"mechanism": "sampled_gaussian", "count": 1, "noise_multiplier": 1.0}, **asked)
    add("commit", answered={"reservation": len(before) + len(new), "answer_sha256": "2" * 64}, **asked)
    return new


@dataclass
class MadeUpSites:
    """`ask` over sites that have no ECGs; it remembers every instruction, and who was asked."""

    train: Trained = shifted
    evaluate: Callable[[str, Instruction], Answer] = lambda site, instruction: counted(site)
    seen: list[tuple[Instruction, tuple[str, ...]]] = field(default_factory=list)
    sent: list[set[str]] = field(default_factory=list)
    ledgers: dict[str, list[Entry]] = field(default_factory=dict)

    def ask(self, instruction: Instruction, arrays: Arrays, sites: Sequence[str]) -> Iterator[Answer]:
        """As `server.app.asker` gives it: one answer a site, in site-name order."""
        self.seen.append((instruction, tuple(sites)))
        self.sent.append(set(arrays))
        for site in sorted(sites):
            if instruction.task == "evaluate":
                answer = self.evaluate(site, instruction)
            else:
                answer = self.train(site, instruction, arrays)
            yield self.paid(answer, instruction) if instruction.study.privacy else answer

    def paid(self, answer: Answer, instruction: Instruction) -> Answer:
        """The answer with what an honest site's ledger gained by it."""
        if not isinstance(answer, SiteReply):
            return answer
        entries = self.ledgers.setdefault(answer.site, [])
        seen = instruction.ledger_tips.get(answer.site, Tip()).sequence
        entries += paid_entries(instruction, entries)
        reply = answer.reply.model_copy(update={"ledger": tuple(entries[seen:])})
        return SiteReply(answer.site, reply, answer.arrays)

    def of(self, task: str) -> list[Instruction]:
        """The instructions of one task, in the order given."""
        return [instruction for instruction, _ in self.seen if instruction.task == task]


Described = Mapping[str, SiteDescription | SiteFailure]


def three_sites(**changes: SiteDescription | SiteFailure) -> Described:
    """Three made-up sites of different size; a keyword replaces or adds one."""
    usual: dict[str, SiteDescription | SiteFailure] = {
        "alpha": description(train_patients=60, pretrain_patients=60, labelled_train_patients=50),
        "beta": description(train_patients=30, pretrain_patients=30, labelled_train_patients=25),
        "gamma": description(train_patients=10, pretrain_patients=10, labelled_train_patients=5),
    }
    return {**usual, **changes}
