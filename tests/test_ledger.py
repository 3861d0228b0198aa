"""The privacy ledger on real files: what it grants, what it refuses, and how it notices that it was tampered with."""

import hashlib
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Ledger, Reserved, StoredAnswer, open_ledger, read_ledger
from client.ledger_file import ANSWERS_DIR, LEDGER_FILE, MARKER_FILE, connect
from client.policy import Policy
from shared_model.accounting import Spend, filter_limit, plan_of, renyi_at
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import NO_HEAD, Entry, LedgerTask, Tip, canonical, head_of, tip_of, verify_chain
from shared_model.study import Study
from tests.private_studies import RUN, policy_of, private_study, site_with

ASKED = "cd" * 32


def spend_of(study: Study, task: str) -> Spend:
    return next(line.each for line in plan_of(study) if line.task == task)


def reserve(
    ledger: Ledger,
    study: Study,
    round_number: int = 1,
    task: LedgerTask = "pretrain",
    run_id: str = RUN,
    request: str = ASKED,
    **changes: Any,
) -> Reserved | StoredAnswer:
    spend = spend_of(study, task).model_copy(update=changes)
    return ledger.reserve(study, run_id, task, round_number, request, spend)


def reserved(*given: Any, **named: Any) -> Reserved:
    answer = reserve(*given, **named)
    assert isinstance(answer, Reserved)
    return answer


def refusal(work: Callable[[], object]) -> tuple[ExitCode, str]:
    with pytest.raises(HemoFedError) as caught:
        work()
    assert "\n" not in caught.value.message
    return caught.value.exit_code, caught.value.message


def opening(site_dir: Path, policy: Policy, create: bool = False) -> Callable[[], object]:
    def work() -> None:
        with open_ledger(site_dir, policy, create):
            pass

    return work


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site folder whose ledger has admitted `private_study()`, and holds one answered and one unanswered round."""
    policy = site_with(tmp_path / "site")
    with open_ledger(tmp_path / "site", policy, create=True) as ledger:
        ledger.admit(private_study())
        ledger.commit(reserved(ledger, private_study(), 1), b"noised weights")
        reserve(ledger, private_study(), 2)
    return tmp_path / "site"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for tests that copy it."""
    folder = tmp_path_factory.mktemp("sample") / "site"
    policy = site_with(folder)
    with open_ledger(folder, policy, create=True) as ledger:
        ledger.admit(private_study())
        ledger.commit(reserved(ledger, private_study(), 1), b"noised weights")
        reserve(ledger, private_study(), 2)
    return folder


# --- what is on the disk


def test_it_is_written_for_good_and_for_its_owner_only(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        assert ledger.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger.connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        ledger.admit(private_study())
        ledger.commit(reserved(ledger, private_study()), b"answer")
        header = ledger.entries[0].header
        assert header is not None
        assert (header.unit, header.adjacency, header.epsilon, header.delta) == (
            "patient",
            "add or remove one",
            8.0,
            1e-4,
        )
    (answer,) = (tmp_path / ANSWERS_DIR).iterdir()
    for path in (tmp_path / LEDGER_FILE, tmp_path / MARKER_FILE, answer):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / MARKER_FILE).read_text() == header.cohort
    assert answer.read_bytes() == b"answer"


def test_two_cohorts_have_two_ids(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        opening(tmp_path / name, policy_of(), create=True)()
    assert (tmp_path / "a" / MARKER_FILE).read_text() != (tmp_path / "b" / MARKER_FILE).read_text()


def test_none_is_made_unless_asked_for(tmp_path: Path) -> None:
    code, message = refusal(opening(tmp_path, policy_of()))
    assert code == ExitCode.LEDGER_REFUSED
    assert "no privacy ledger here yet" in message
    assert not (tmp_path / LEDGER_FILE).exists()


def test_it_knows_what_was_seen_before(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        tip, all_entries = ledger.tip(), ledger.entries_since(0)
        assert [entry.kind for entry in all_entries] == ["header", "admit", "reserve", "commit", "reserve"]
        assert tip == tip_of(all_entries[-1])
        for seen in (Tip(), *(tip_of(entry) for entry in all_entries)):
            assert ledger.contains(seen)
            ledger.check_seen(seen)
            assert verify_chain(seen, ledger.entries_since(seen.sequence)) == tip
        for unseen in (
            Tip(sequence=6, head=tip.head),
            Tip(sequence=4, head=tip.head),
            Tip(sequence=0, head=tip.head),
            Tip(sequence=5, head=NO_HEAD),
        ):
            assert not ledger.contains(unseen)
            code, message = refusal(lambda unseen=unseen: ledger.check_seen(unseen))
            assert code == ExitCode.LEDGER_ROLLED_BACK
            assert "that the centre saw" in message


# --- admission


def test_a_study_is_admitted_once(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        ledger.admit(private_study())
        tip = ledger.tip()
        ledger.admit(private_study())
        assert ledger.tip() == tip
        admission = ledger.entries[1].admission
        assert admission is not None
        assert (admission.epsilon, admission.delta) == (3.0, 1e-5)
        assert admission.plan == plan_of(private_study())
    with open_ledger(tmp_path, policy_of()) as ledger:  # and after a restart
        ledger.admit(private_study())
        assert ledger.tip() == tip


def test_shares_add_up_to_the_caps_and_not_beyond(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(epsilon=8.0), create=True) as ledger:
        ledger.admit(private_study(1))
        ledger.admit(private_study(2))
        tip = ledger.tip()
        code, message = refusal(lambda: ledger.admit(private_study(3)))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "epsilon of all studies would be 9" in message
        assert ledger.tip() == tip
        ledger.admit(private_study(3, epsilon=2.0, pretrain=quiet(), finetune=quiet()))


def quiet() -> dict[str, Any]:
    """A phase that costs very little."""
    return {"sampling_rate": 0.05, "noise_multiplier": 30.0, "steps_per_round": 10}


def test_shares_are_added_as_they_are_written(tmp_path: Path) -> None:
    """0.1 + 0.2 in binary is more than 0.3; 1e-5 three times is more than 3e-5."""
    tables = {"pretrain": quiet(), "finetune": quiet(), "release_epsilon": 0.01}
    with open_ledger(tmp_path, policy_of(epsilon=0.3, delta=3e-5), create=True) as ledger:
        ledger.admit(private_study(1, epsilon=0.1, **tables))
        ledger.admit(private_study(2, epsilon=0.1, **tables))
        ledger.admit(private_study(3, epsilon=0.1, **tables))
        code, _ = refusal(lambda: ledger.admit(private_study(4, epsilon=0.1, **tables)))
        assert code == ExitCode.BUDGET_EXCEEDED


def test_delta_has_a_cap_of_its_own(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(delta=1.5e-5), create=True) as ledger:
        ledger.admit(private_study(1))
        code, message = refusal(lambda: ledger.admit(private_study(2)))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "delta of all studies would be 2e-05" in message


def test_a_plan_that_costs_more_than_its_share_is_not_admitted(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        code, message = refusal(lambda: ledger.admit(private_study(epsilon=1.5)))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "the plan costs epsilon" in message
        assert len(ledger.entries) == 1


def test_what_the_policy_refuses_is_not_admitted(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(tasks=["finetune", "evaluate"]), create=True) as ledger:
        assert refusal(lambda: ledger.admit(private_study()))[0] == ExitCode.POLICY_REFUSED
        assert len(ledger.entries) == 1
    open_study = private_study().model_copy(update={"privacy": None})
    with open_ledger(tmp_path, policy_of(require_privacy=False)) as ledger:
        assert refusal(lambda: ledger.admit(open_study))[0] == ExitCode.LEDGER_REFUSED


def test_the_policy_may_become_stricter_and_never_looser(site: Path) -> None:
    code, message = refusal(opening(site, policy_of(epsilon=8.1)))
    assert code == ExitCode.POLICY_REFUSED
    assert "above the 8 that this cohort's ledger was made with" in message
    assert refusal(opening(site, policy_of(delta=1.1e-4)))[0] == ExitCode.POLICY_REFUSED
    with open_ledger(site, policy_of(epsilon=5.0)) as ledger:
        assert refusal(lambda: ledger.admit(private_study(2)))[0] == ExitCode.BUDGET_EXCEEDED
        reserve(ledger, private_study(), 3)  # the share that was given out still fits
    with open_ledger(site, policy_of(epsilon=2.5)) as ledger:
        assert refusal(lambda: reserve(ledger, private_study(), 4))[0] == ExitCode.POLICY_REFUSED
    with open_ledger(site, policy_of()) as ledger:  # back to what was promised
        ledger.admit(private_study(2))
    with open_ledger(site, policy_of(epsilon=5.0)) as ledger:  # both shares no longer fit
        assert refusal(lambda: reserve(ledger, private_study(), 4))[0] == ExitCode.BUDGET_EXCEEDED


# --- rounds of a plan


def test_rounds_end_with_the_plan_over_runs_and_restarts_and_crashes(tmp_path: Path) -> None:
    study, policy = private_study(), policy_of()
    planned = {line.task: line.rounds for line in plan_of(study)}
    assert planned == {"pretrain": 5, "finetune": 3, "evaluate": 2}
    with open_ledger(tmp_path, policy, create=True) as ledger:
        ledger.admit(study)
    for number in range(1, 6):  # none is ever answered: crashes are spent all the same
        with open_ledger(tmp_path, policy) as ledger:
            reserve(ledger, study, number, run_id=f"{number:08x}")
    with open_ledger(tmp_path, policy) as ledger:
        code, message = refusal(lambda: reserve(ledger, study, 6))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "all 5 rounds of pretrain" in message
        code, _ = refusal(lambda: reserve(ledger, study, 5, run_id="00000005"))  # nor once more for a crashed one
        assert code == ExitCode.BUDGET_EXCEEDED
        for number in (1, 2):
            answer = ledger.release(study, RUN, number, ASKED, epsilon=0.25)
            assert isinstance(answer, Reserved)
        assert refusal(lambda: ledger.release(study, RUN, 3, ASKED, epsilon=0.25))[0] == ExitCode.BUDGET_EXCEEDED
        reserve(ledger, study, 1, "finetune")


@pytest.mark.parametrize(
    "changes",
    [{"noise_multiplier": 5.9}, {"sampling_rate": 0.21}, {"count": 21}, {"count": 1}, {"noise_multiplier": 30.0}],
)
def test_a_round_is_as_planned_or_not_at_all(site: Path, changes: dict[str, Any]) -> None:
    with open_ledger(site, policy_of()) as ledger:
        tip = ledger.tip()
        code, message = refusal(lambda: reserve(ledger, private_study(), 3, **changes))
        assert code == ExitCode.LEDGER_REFUSED
        assert "other noise, sampling or steps" in message
        assert ledger.tip() == tip


def test_only_admitted_studies_and_planned_tasks_are_worked_on(site: Path) -> None:
    other = private_study(2)
    with open_ledger(site, policy_of()) as ledger:
        code, message = refusal(lambda: reserve(ledger, other, 1, run_id="abcdef12"))
        assert code == ExitCode.LEDGER_REFUSED
        assert "was not admitted" in message
    with open_ledger(site, policy_of(tasks=["finetune", "evaluate"])) as ledger:  # the policy changed since
        assert refusal(lambda: reserve(ledger, private_study(), 3))[0] == ExitCode.POLICY_REFUSED


def test_a_study_without_a_phase_cannot_have_rounds_of_it(tmp_path: Path) -> None:
    study = private_study()
    table = study.model_dump()
    table["pretrain"]["rounds"] = 0
    table["privacy"]["pretrain"] = None
    alone = Study.model_validate(table)
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        ledger.admit(alone)
        spend = spend_of(study, "pretrain")
        code, message = refusal(lambda: ledger.reserve(alone, RUN, "pretrain", 1, ASKED, spend))
        assert code == ExitCode.LEDGER_REFUSED
        assert "no pretrain" in message


def test_a_retried_round_gets_its_stored_answer_for_nothing(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        tip = ledger.tip()
        answer = reserve(ledger, private_study(), 1)
        assert isinstance(answer, StoredAnswer)
        assert answer.path.read_bytes() == b"noised weights"
        assert ledger.tip() == tip


def test_a_round_that_was_never_answered_is_paid_for_again(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        again = reserved(ledger, private_study(), 2)
        assert again.entry.sequence == 6
        ledger.commit(again, b"other weights")
        stored = reserve(ledger, private_study(), 2)
        assert isinstance(stored, StoredAnswer)
        assert stored.path.read_bytes() == b"other weights"


@pytest.mark.parametrize("number", [1, 2])
def test_another_question_needs_a_round_of_its_own(site: Path, number: int) -> None:
    with open_ledger(site, policy_of()) as ledger:
        tip = ledger.tip()
        code, message = refusal(lambda: reserve(ledger, private_study(), number, request="ef" * 32))
        assert code == ExitCode.LEDGER_REFUSED
        assert "another question" in message
        ledger.admit(private_study(2))
        code, _ = refusal(lambda: reserve(ledger, private_study(2), number))  # the same run, of another study
        assert code == ExitCode.LEDGER_REFUSED
        assert len(ledger.entries) == tip.sequence + 1
        reserve(ledger, private_study(), 3, request="ef" * 32)


def test_a_reservation_is_answered_once(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        mine = reserved(ledger, private_study(), 3)
        ledger.commit(mine, b"once")
        code, _ = refusal(lambda: ledger.commit(mine, b"twice"))
        assert code == ExitCode.LEDGER_REFUSED
        foreign = Reserved(mine.entry.model_copy(update={"sequence": 99}))
        assert refusal(lambda: ledger.commit(foreign, b"never"))[0] == ExitCode.LEDGER_REFUSED
        stored = reserve(ledger, private_study(), 3)
        assert isinstance(stored, StoredAnswer)
        assert stored.path.read_bytes() == b"once"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"weights without noise")])
def test_an_answer_that_is_gone_or_changed_is_not_sent(site: Path, spoil: Callable[[Path], object]) -> None:
    (path,) = (site / ANSWERS_DIR).iterdir()
    spoil(path)
    with open_ledger(site, policy_of()) as ledger:
        code, message = refusal(lambda: reserve(ledger, private_study(), 1))
        assert code == ExitCode.LEDGER_DAMAGED
        assert "stored answer is gone or changed" in message


# --- a filter


def test_a_filter_lets_parameters_change_within_its_limit(tmp_path: Path) -> None:
    study = private_study(accounting="filter", order=12.0)
    limit, spent = filter_limit(3.0, 1e-5, 12.0), list[Spend]()
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        ledger.admit(study)
        base = spend_of(study, "pretrain")
        for number in range(1, 1000):
            spend = base.model_copy(update={"noise_multiplier": 6.0 + number % 3, "count": 15 + number % 7})
            if renyi_at([*spent, spend], 12.0) > limit:
                break
            assert isinstance(ledger.reserve(study, RUN, "pretrain", number, ASKED, spend), Reserved)
            spent.append(spend)
        assert len(spent) > 10
        code, message = refusal(lambda: ledger.reserve(study, RUN, "pretrain", number, ASKED, spend))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "the filter at order 12" in message
        smaller = base.model_copy(update={"noise_multiplier": 100.0, "count": 1})
        assert isinstance(ledger.reserve(study, RUN, "pretrain", number, ASKED, smaller), Reserved)
        for silent in (
            smaller.model_copy(update={"noise_multiplier": 0.0}),
            Spend(mechanism="discrete_laplace", count=1),
        ):
            code, _ = refusal(lambda silent=silent: ledger.reserve(study, RUN, "pretrain", 1001, ASKED, silent))
            assert code == ExitCode.LEDGER_REFUSED


def test_a_filter_without_room_is_not_admitted(tmp_path: Path) -> None:
    with open_ledger(tmp_path, policy_of(), create=True) as ledger:
        code, message = refusal(lambda: ledger.admit(private_study(accounting="filter", order=3.0)))
        assert code == ExitCode.BUDGET_EXCEEDED
        assert "at order 3 the share leaves no room" in message


# --- two clients

HOLD = """
import sys
from pathlib import Path
from client.ledger import open_ledger
from client.policy import load_policy
site_dir = Path(sys.argv[1])
with open_ledger(site_dir, load_policy(site_dir)):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_client_is_refused_while_the_first_is_at_work(site: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(site)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code, message = refusal(opening(site, policy_of()))
    assert code == ExitCode.LEDGER_BUSY
    assert "another client works with this privacy ledger" in message
    assert len(read_ledger(site, policy_of()).entries) == 5  # a look is free
    holder.kill()
    holder.communicate()
    opening(site, policy_of())()


def test_a_writer_that_passes_the_lock_by_is_noticed(site: Path) -> None:
    """As over a network file system without locks."""
    with open_ledger(site, policy_of()) as first:
        second = Ledger(site, policy_of(), connect(site / LEDGER_FILE), first.entries)
        reserve(second, private_study(), 3)
        code, message = refusal(lambda: reserve(first, private_study(), 4))
        assert code == ExitCode.LEDGER_BUSY
        assert "changed by another program" in message
        second.connection.execute("BEGIN IMMEDIATE")
        first.connection.execute("PRAGMA busy_timeout = 10")
        assert refusal(lambda: reserve(first, private_study(), 4))[0] == ExitCode.LEDGER_BUSY
        second.connection.execute("ROLLBACK")
        second.connection.close()
    with open_ledger(site, policy_of()) as ledger:
        assert len(ledger.entries) == 6


# --- faults


def edit(site_dir: Path, *statements: str) -> None:
    with closing(sqlite3.connect(site_dir / LEDGER_FILE, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


EDITS = {
    "a row in the middle is gone": "DELETE FROM entries WHERE sequence = 3",
    "the header is gone": "DELETE FROM entries WHERE sequence = 1",
    "all rows are gone": "DELETE FROM entries",
    "rows change places": "UPDATE entries SET sequence = CASE sequence WHEN 3 THEN 30 ELSE sequence END",
    "a head is another": "UPDATE entries SET head = replace(head, substr(head, 1, 1), '0') || '' WHERE sequence = 5 "
    "AND substr(head, 1, 1) != '0' OR sequence = 4",
    "less noise was spent": "UPDATE entries SET entry = replace(entry, '\"count\":20', '\"count\":2')",
    "the cap is higher": "UPDATE entries SET entry = replace(entry, '\"epsilon\":8.0', '\"epsilon\":80.0')",
    "a blank": "UPDATE entries SET entry = entry || ' ' WHERE sequence = 3",
    "bytes in place of text": "UPDATE entries SET entry = CAST(entry AS BLOB) WHERE sequence = 2",
    "not UTF-8": "UPDATE entries SET head = CAST(x'ff' AS TEXT) WHERE sequence = 2",
    "not JSON": "UPDATE entries SET entry = '{' WHERE sequence = 2",
    "another study": "UPDATE studies SET study = replace(study, '\"seed\":1', '\"seed\":2')",
    "a study is gone": "DELETE FROM studies",
    "a study too many": "INSERT INTO studies SELECT 'x', study FROM studies",
    "a trigger": "CREATE TRIGGER forget AFTER INSERT ON entries BEGIN DELETE FROM entries WHERE sequence > 2; END",
    "no table": "DROP TABLE entries",
    "other tables": "ALTER TABLE entries ADD COLUMN note TEXT",
}


@pytest.mark.parametrize("statement", EDITS.values(), ids=EDITS)
def test_an_edited_ledger_is_refused(site: Path, statement: str) -> None:
    edit(site, "SELECT 1")
    opening(site, policy_of())()  # the negative control
    edit(site, statement)
    code, message = refusal(opening(site, policy_of()))
    assert code == ExitCode.LEDGER_DAMAGED
    assert LEDGER_FILE in message
    assert refusal(lambda: read_ledger(site, policy_of()))[0] == ExitCode.LEDGER_DAMAGED


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_character_in_any_row_is_noticed(sample: Path, data: st.DataObject) -> None:
    table, key, columns = data.draw(
        st.sampled_from(
            [("entries", "sequence", ("sequence", "entry", "head")), ("studies", "digest", ("digest", "study"))]
        )
    )
    column = data.draw(st.sampled_from(columns))
    site_dir = sample.parent / "edited"
    shutil.rmtree(site_dir, ignore_errors=True)
    shutil.copytree(sample, site_dir)
    with closing(sqlite3.connect(site_dir / LEDGER_FILE, isolation_level=None)) as connection:
        rows = connection.execute(f"SELECT {key}, {column} FROM {table}").fetchall()
        which, value = data.draw(st.sampled_from(rows))
        if isinstance(value, int):
            changed: object = data.draw(st.integers(-5, 100).filter(lambda number: number not in dict(rows)))
        else:
            place = data.draw(st.integers(0, len(value) - 1))
            byte = ord(value[place]) ^ (1 << data.draw(st.integers(0, 6)))
            changed = value[:place] + chr(byte) + value[place + 1 :]
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (changed, which))
    assert refusal(opening(site_dir, policy_of()))[0] == ExitCode.LEDGER_DAMAGED


def test_a_torn_file_is_refused(site: Path) -> None:
    whole = (site / LEDGER_FILE).read_bytes()
    assert not (site / f"{LEDGER_FILE}-wal").exists()
    full = len(whole.rstrip(b"\0"))  # SQLite makes up for unwritten zeros at the end
    for length in [*range(0, full, 1000), 1, full - 1]:
        (site / LEDGER_FILE).write_bytes(whole[:length])
        code, message = refusal(opening(site, policy_of(), create=True))
        assert code == ExitCode.LEDGER_DAMAGED, length
        assert str(site / LEDGER_FILE) in message
        assert (site / LEDGER_FILE).read_bytes() == whole[:length]  # and nothing was made in its place
    (site / LEDGER_FILE).write_bytes(whole)
    opening(site, policy_of())()


def test_a_deleted_ledger_is_not_made_anew(site: Path) -> None:
    (site / LEDGER_FILE).unlink()
    for _ in range(2):
        code, message = refusal(opening(site, policy_of(), create=True))
        assert code == ExitCode.LEDGER_DAMAGED
        assert "is gone or empty" in message
        (site / MARKER_FILE).unlink(missing_ok=True)  # the answers still say that there was one
    assert refusal(lambda: read_ledger(site, policy_of()))[0] == ExitCode.LEDGER_DAMAGED
    shutil.rmtree(site / ANSWERS_DIR)
    opening(site, policy_of(), create=True)()  # nothing here knows of it any more: the centre does


def test_a_ledger_of_another_cohort_is_refused(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    site_with(other)
    opening(other, policy_of(), create=True)()
    mine = (other / LEDGER_FILE).read_bytes()
    shutil.copy(site / LEDGER_FILE, other / LEDGER_FILE)
    code, message = refusal(opening(other, policy_of()))
    assert code == ExitCode.LEDGER_DAMAGED
    assert "another cohort's" in message
    (other / MARKER_FILE).unlink()
    code, message = refusal(opening(other, policy_of()))
    assert code == ExitCode.LEDGER_DAMAGED
    assert "copied from elsewhere" in message
    (other / LEDGER_FILE).write_bytes(mine)
    opening(other, policy_of())()  # with no entry but its header nothing was spent: the marker is made again
    assert (other / MARKER_FILE).exists()


def test_an_older_ledger_is_noticed_here_by_its_answers_and_elsewhere_by_its_tip(site: Path) -> None:
    backup = (site / LEDGER_FILE).read_bytes()
    with open_ledger(site, policy_of()) as ledger:
        ledger.commit(reserved(ledger, private_study(), 3), b"weights")
        seen = ledger.tip()
    (site / LEDGER_FILE).write_bytes(backup)
    code, message = refusal(opening(site, policy_of()))
    assert code == ExitCode.LEDGER_ROLLED_BACK
    assert "lacks entry 6" in message
    max((site / ANSWERS_DIR).iterdir()).unlink()
    with open_ledger(site, policy_of()) as ledger:  # the whole folder is old: only the centre can know
        assert refusal(lambda: ledger.check_seen(seen))[0] == ExitCode.LEDGER_ROLLED_BACK
        reserve(ledger, private_study(), 3, request="ef" * 32)
        reserve(ledger, private_study(), 4)
        reserve(ledger, private_study(), 5)
        assert not ledger.contains(seen)  # nor by going on from there
        code, _ = refusal(lambda: verify_chain(seen, ledger.entries_since(seen.sequence)))
        assert code == ExitCode.LEDGER_ROLLED_BACK


def chained(site_dir: Path, written_at: str) -> None:
    """Add a true entry of another time."""
    last = read_ledger(site_dir, policy_of()).entries[-1]
    changes = {"sequence": last.sequence + 1, "previous": head_of(last), "written_at": written_at}
    entry = Entry.model_validate({**last.model_dump(), **changes})
    with closing(sqlite3.connect(site_dir / LEDGER_FILE, isolation_level=None)) as connection:
        row = (entry.sequence, canonical(entry), head_of(entry))
        connection.execute("INSERT INTO entries VALUES (?, ?, ?)", row)


def test_a_clock_set_back_is_noticed(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        waiting = ledger.entries[-1]
    chained(site, "2999-01-01T00:00:00+00:00")
    with open_ledger(site, policy_of()) as ledger:
        tip = ledger.tip()
        for work in (lambda: reserve(ledger, private_study(), 3), lambda: ledger.admit(private_study(2))):
            code, message = refusal(work)
            assert code == ExitCode.CLOCK_SET_BACK
            assert "2999-01-01" in message
        assert ledger.tip() == tip
        ledger.commit(Reserved(waiting), b"work that is done is kept")
        assert ledger.entries[-1].written_at == "2999-01-01T00:00:00+00:00"


def test_a_full_disk_at_reserve_reserves_nothing(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        pages = ledger.connection.execute("PRAGMA page_count").fetchone()[0]
        ledger.connection.execute(f"PRAGMA max_page_count = {pages}")
        before = ledger.entries
        for number in range(3, 6):  # until the last page is full
            try:
                reserve(ledger, private_study(), number, run_id="ab" * 32)
            except HemoFedError as error:
                full = error
                break
            before = ledger.entries
        assert full.exit_code == ExitCode.LEDGER_NOT_WRITTEN
        assert "database or disk is full" in full.message
        assert ledger.entries == before
        ledger.connection.execute("PRAGMA max_page_count = 100000")
        reserve(ledger, private_study(), number, run_id="ab" * 32)  # space was freed
    with open_ledger(site, policy_of()) as ledger:
        assert len(ledger.entries) == len(before) + 1


STARVED = """
import resource, signal, sys
from pathlib import Path
from client.ledger import Reserved, open_ledger
from client.policy import load_policy
from shared_model.errors import HemoFedError
site_dir = Path(sys.argv[1])
with open_ledger(site_dir, load_policy(site_dir)) as ledger:
    waiting = Reserved(ledger.entries[-1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        ledger.commit(waiting, bytes(200_000))
    except HemoFedError as error:
        print(int(error.exit_code), error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(path.name for path in (site_dir / "answers").iterdir())
    ledger.commit(waiting, bytes(200_000))  # the same answer, once there is room
    print(left)
"""


def test_a_disk_that_takes_no_answer_loses_nothing(site: Path) -> None:
    words = [sys.executable, "-c", STARVED, str(site)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, left = done.stdout.splitlines()
    assert first.startswith(f"{int(ExitCode.LEDGER_NOT_WRITTEN)} ")
    assert "cannot be written (File too large)" in first
    assert left == "['00000003.answer']"
    with open_ledger(site, policy_of()) as ledger:
        stored = reserve(ledger, private_study(), 2)
        assert isinstance(stored, StoredAnswer)
        assert stored.path.read_bytes() == bytes(200_000)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, message = refusal(opening(tmp_path / "nowhere", policy_of(), create=True))
    assert code == ExitCode.LEDGER_NOT_WRITTEN
    assert "cannot be written" in message


# --- the chain by itself


def test_an_entry_survives_the_wire_and_says_nothing_private(site: Path) -> None:
    with open_ledger(site, policy_of()) as ledger:
        sent = [entry.model_dump_json() for entry in ledger.entries_since(0)]
        tip = ledger.tip()
    received = [Entry.model_validate_json(text) for text in sent]
    assert verify_chain(Tip(), received) == tip
    assert "a private study" not in "".join(sent)  # names of studies are the hospital's own
    assert str(site) not in "".join(sent)


def test_the_hash_is_of_the_previous_hash_and_the_canonical_json(site: Path) -> None:
    for entry in read_ledger(site, policy_of()).entries:
        text = canonical(entry)
        assert hashlib.sha256(f"{entry.previous}\n{text}".encode()).hexdigest() == head_of(entry)
        assert Entry.model_validate_json(text) == entry
    assert canonical(entry).startswith('{"kind":"reserve","previous":"')


def test_a_chain_that_lacks_doubles_or_swaps_an_entry_is_refused(site: Path) -> None:
    whole = list(read_ledger(site, policy_of()).entries)
    edited = whole[2].model_copy(update={"round_number": 9})
    for broken in (
        whole[1:],
        whole[:2] + whole[3:],
        [*whole, whole[-1]],
        [whole[0], whole[2], whole[1]],
        [*whole[:2], edited, *whole[3:]],
    ):
        assert refusal(lambda broken=broken: verify_chain(Tip(), broken))[0] == ExitCode.LEDGER_ROLLED_BACK


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "commit"},
        {"kind": "header"},
        {"sequence": 1},
        {"previous": NO_HEAD},
        {"study": ""},
        {"run_id": ""},
        {"request_sha256": ""},
        {"task": None},
        {"spend": None},
        {"patients": 412},
        {"written_at": "yesterday"},
    ],
)
def test_an_entry_that_is_not_whole_is_none(site: Path, changes: dict[str, Any]) -> None:
    last = read_ledger(site, policy_of()).entries[-1].model_dump()
    Entry.model_validate(last)
    with pytest.raises(ValueError):
        Entry.model_validate({**last, **changes})
