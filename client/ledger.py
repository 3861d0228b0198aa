"""The privacy ledger of one cohort: reserve, then work, then commit; never refunded, and it outlives crashes.

It is read and written before any private record is: it knows no store.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client import ledger_account as account
from client import ledger_file as files
from client.lock import hold_ledger_lock
from client.policy import Policy, check_study
from shared_model.accounting import Spend
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import Answered, Entry, LedgerTask, Tip, tip_of
from shared_model.study import Study


@dataclass(frozen=True)
class Reserved:
    """A round that is paid for and may be worked on: the entry that says so."""

    entry: Entry


@dataclass(frozen=True)
class StoredAnswer:
    """A round that was answered before: the file with the answer's bytes, to be sent again for free."""

    path: Path


@dataclass
class Ledger:
    """An open, verified ledger whose lock is held. Made by `open_ledger`."""

    site_dir: Path
    policy: Policy
    connection: sqlite3.Connection
    entries: tuple[Entry, ...]

    def tip(self) -> Tip:
        """The last entry: what the centre is told, to know it again."""
        return tip_of(self.entries[-1])

    def contains(self, tip: Tip) -> bool:
        """Whether the ledger has the entry that somebody saw before. A ledger not yet seen is contained in any."""
        if tip.sequence == 0:
            return tip == Tip()
        return tip.sequence <= len(self.entries) and tip_of(self.entries[tip.sequence - 1]) == tip

    def check_seen(self, tip: Tip) -> None:
        """Refuse to go on where the centre saw an entry that is not here.

        Raises:
            HemoFedError: an older or another ledger was put in place (LEDGER_ROLLED_BACK).
        """
        if not self.contains(tip):
            raise HemoFedError(
                f"{self.path}: lacks entry {tip.sequence} that the centre saw: an older or another ledger was put in "
                f"its place; {files.RESTORE}",
                ExitCode.LEDGER_ROLLED_BACK,
            )

    def entries_since(self, sequence: int) -> list[Entry]:
        """The entries after that one, for `ledger_chain.verify_chain`; after 0 all."""
        return list(self.entries[sequence:])

    @property
    def path(self) -> Path:
        """The database."""
        return self.site_dir / files.LEDGER_FILE

    def admit(self, study: Study) -> None:
        """Set a study's share aside, with the plan that it is for; on the disk before this returns. A study that was
        admitted before is left as it is.

        Guarantee
        ---------
        Unit: a patient of this cohort; neighbours: one more or less. Shares of admitted studies add up to no more than
        the header's epsilon and delta, nor than the policy's, and no study costs more than its share (`check_round`):
        so all of them together cost at most that (basic composition). It is broken by a patient who is in two cohorts,
        and by a ledger that is begun anew.

        Raises:
            HemoFedError: POLICY_REFUSED, BUDGET_EXCEEDED, CLOCK_SET_BACK or LEDGER_NOT_WRITTEN.
        """
        check_study(self.policy, study)
        if study.digest in account.admissions(self.entries):
            return
        admission = account.admission_of(study)
        account.check_shares(self.entries, self.policy, admission.epsilon, admission.delta)
        account.check_plan(admission)
        self._append(study.model_dump_json(), kind="admit", study=study.digest, admission=admission)

    def reserve(
        self, study: Study, run_id: str, task: LedgerTask, round_number: int, request_sha256: str, spend: Spend
    ) -> Reserved | StoredAnswer:
        """Pay for a round before it is worked on; on the disk before this returns.

        A round that was answered before gives its stored answer, for nothing. One that was reserved and not answered
        (a crash) is paid for again.

        Raises:
            HemoFedError: POLICY_REFUSED; LEDGER_REFUSED: not admitted, not as planned, or another question for a round
                that was asked before; BUDGET_EXCEEDED; LEDGER_DAMAGED: the stored answer is gone or changed;
                CLOCK_SET_BACK; LEDGER_NOT_WRITTEN.
        """
        check_study(self.policy, study)
        admission = account.admissions(self.entries).get(study.digest)
        if admission is None:
            line = f"study {study.name!r} was not admitted to the ledger; admit it before its first round"
            raise HemoFedError(line, ExitCode.LEDGER_REFUSED)
        asked: dict[str, Any] = {
            "study": study.digest,
            "run_id": run_id,
            "task": task,
            "round_number": round_number,
            "request_sha256": request_sha256,
        }
        if stored := self._stored_answer(asked):
            return stored
        account.check_shares(self.entries, self.policy)  # the policy may have been lowered since
        account.check_round(admission, account.reservations(self.entries, study.digest), task, spend)
        return Reserved(self._append(kind="reserve", spend=spend, **asked))

    def commit(self, reserved: Reserved, answer: bytes) -> None:
        """Keep the answer to a reserved round, and note that it was given; both on the disk before this returns.

        After LEDGER_NOT_WRITTEN it may be called again with the same answer.

        Raises:
            HemoFedError: LEDGER_NOT_WRITTEN; LEDGER_REFUSED: the round is not reserved here, or answered already.
        """
        entry = reserved.entry
        if entry not in self.entries or entry.sequence in account.commitments(self.entries):
            line = f"ledger entry {entry.sequence}: no reservation that waits for an answer; reserve the round first"
            raise HemoFedError(line, ExitCode.LEDGER_REFUSED)
        files.write_durably(files.answer_path(self.site_dir, entry.sequence), answer)
        answered = Answered(reservation=entry.sequence, answer_sha256=hashlib.sha256(answer).hexdigest())
        same = {key: getattr(entry, key) for key in ("study", "run_id", "task", "round_number", "request_sha256")}
        self._append(kind="commit", answered=answered, **same)

    def release(
        self, study: Study, run_id: str, round_number: int, request_sha256: str, epsilon: float
    ) -> Reserved | StoredAnswer:
        """Pay for a release of counts: `reserve` for the task evaluate, by discrete Laplace noise."""
        spend = Spend(mechanism="discrete_laplace", count=1, epsilon=epsilon)
        return self.reserve(study, run_id, "evaluate", round_number, request_sha256, spend)

    def _stored_answer(self, asked: dict[str, Any]) -> StoredAnswer | None:
        """The answer to the same question of the same round, or None where it was never answered."""
        key = (asked["run_id"], asked["task"], asked["round_number"])
        answered = account.commitments(self.entries)
        for entry in self.entries:
            if entry.kind != "reserve" or (entry.run_id, entry.task, entry.round_number) != key:
                continue
            if (entry.study, entry.request_sha256) != (asked["study"], asked["request_sha256"]):
                raise HemoFedError(
                    f"ledger: round {key[2]} of {key[1]} was asked another question before; a different question needs "
                    "a round of its own",
                    ExitCode.LEDGER_REFUSED,
                )
            if entry.sequence in answered:
                return self._checked(answered[entry.sequence])
        return None

    def _checked(self, commit: Entry) -> StoredAnswer:
        assert commit.answered is not None
        path = files.answer_path(self.site_dir, commit.answered.reservation)
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            digest = ""
        if digest != commit.answered.answer_sha256:
            raise HemoFedError(
                f"{path}: the stored answer is gone or changed, so this round cannot be answered again; restore the "
                "file, or let the centre go on without it",
                ExitCode.LEDGER_DAMAGED,
            )
        return StoredAnswer(path)

    def _append(self, admitted: str = "", **content: Any) -> Entry:
        """Write the next entry. The clock never refuses a commit, whose work is done; it refuses what comes after."""
        last, now = self.entries[-1], files.utc_now()
        if now < last.written_at and content["kind"] != "commit":
            raise HemoFedError(
                f"{self.path}: the clock says {now}, and the last entry is of {last.written_at}; set the clock right, "
                "and find out whether a backup of this machine was restored",
                ExitCode.CLOCK_SET_BACK,
            )
        tip = self.tip()
        written_at = max(now, last.written_at)
        entry = Entry(sequence=tip.sequence + 1, previous=tip.head, written_at=written_at, **content)
        files.append(self.connection, self.path, entry, admitted)
        self.entries = (*self.entries, entry)
        return entry


@contextmanager
def open_ledger(site_dir: Path, policy: Policy, create: bool = False) -> Iterator[Ledger]:
    """Open and verify the ledger of a site folder, and hold its lock until the end of the block.

    With `create`, one is made where there never was one, with the policy's epsilon and delta for good.

    Raises:
        HemoFedError: LEDGER_BUSY: another client holds it; LEDGER_DAMAGED: torn, edited, gone, or another cohort's;
            LEDGER_ROLLED_BACK: older than the answers beside it; POLICY_REFUSED: the policy allows more than the
            ledger promised; LEDGER_REFUSED: there is none yet; LEDGER_NOT_WRITTEN.
    """
    path = site_dir / files.LEDGER_FILE
    with hold_ledger_lock(site_dir):
        blank = files.is_blank(path)
        if blank:
            refuse_blank(site_dir, create)
        with closing(_opened(path, policy, blank)) as connection:
            entries = files.read_chain(connection, path)
            _check(site_dir, policy, entries)
            if files.read_marker(site_dir) is None:  # new, or its making was cut short here
                files.write_durably(site_dir / files.MARKER_FILE, account.header_of(entries).cohort.encode())
            yield Ledger(site_dir, policy, connection, entries)


@dataclass(frozen=True)
class LedgerContent:
    """What a verified ledger holds: its entries, none where there never was a ledger, and study names by digest."""

    entries: tuple[Entry, ...] = ()
    study_names: Mapping[str, str] = field(default_factory=dict)


def read_ledger(site_dir: Path, policy: Policy) -> LedgerContent:
    """The verified ledger, without the lock and without writing: for a look while a round is at work.

    Raises:
        HemoFedError: as `open_ledger`, but for the lock.
    """
    path = site_dir / files.LEDGER_FILE
    if files.is_blank(path):
        refuse_blank(site_dir, create=True)
        return LedgerContent()
    with closing(files.connect(path, read_only=True)) as connection:
        entries = files.read_chain(connection, path)
        names = files.read_study_names(connection, path)
    _check(site_dir, policy, entries)
    return LedgerContent(entries, names)


def _opened(path: Path, policy: Policy, blank: bool) -> sqlite3.Connection:
    connection = None
    try:
        connection = files.connect(path)
        if blank:
            files.make(connection, policy)
            files.sync_folder(path.parent)
    except (sqlite3.Error, OSError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise files.fault_of(path, error) from None
        raise files.not_written(path, error.strerror or "unknown") from None
    return connection


def refuse_blank(site_dir: Path, create: bool) -> None:
    """Raises HemoFedError where there was a ledger and it is gone, or where none may be made."""
    path = site_dir / files.LEDGER_FILE
    if files.read_marker(site_dir) is not None or files.answer_numbers(site_dir):
        raise files.damaged(path, f"is gone or empty, and {files.MARKER_FILE} or stored answers say that there was one")
    if not create:
        line = f"{path}: there is no privacy ledger here yet; the first private study that is admitted makes it"
        raise HemoFedError(line, ExitCode.LEDGER_REFUSED)


def _check(site_dir: Path, policy: Policy, entries: Sequence[Entry]) -> None:
    files.check_place(site_dir, entries)
    account.check_caps(entries, policy)
