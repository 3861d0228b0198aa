"""kill -9 at random moments, and at every single line, of private rounds: spent never under-counts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.ledger import StoredAnswer, open_ledger, read_ledger
from client.ledger_account import commitments, reservations
from client.ledger_file import ANSWERS_DIR
from shared_model.accounting import plan_of
from shared_model.ledger_chain import Tip, tip_of, verify_chain
from shared_model.study import Study
from tests.private_studies import policy_of, private_study, site_with

ROUNDS = 100_000
LOOP = """
import os, sys
from pathlib import Path
from client.ledger import Reserved, open_ledger
from client.policy import load_policy
from shared_model.accounting import plan_of
from shared_model.study import Study
site_dir, study, begun = Path(sys.argv[1]), Study.model_validate_json(Path(sys.argv[2]).read_text()), sys.argv[3]
spend = plan_of(study)[0].each
run_id = os.urandom(8).hex()
with open_ledger(site_dir, load_policy(site_dir)) as ledger, open(begun, "ab", buffering=0) as file:
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        reserved = ledger.reserve(study, run_id, "pretrain", number, "cd" * 32, spend)
        assert isinstance(reserved, Reserved)
        file.write(b".")  # the work begins
        ledger.commit(reserved, os.urandom(5000))
"""


def endless_study() -> Study:
    """More rounds than any test asks for; the noise is such that they still cost little."""
    study = private_study(epsilon=8.0)
    table = study.model_dump(mode="json")
    table["pretrain"]["rounds"] = ROUNDS
    quiet = {"sampling_rate": 0.001, "noise_multiplier": 20.0, "steps_per_round": 1}
    table["privacy"]["pretrain"] = quiet
    return Study.model_validate(table)


def kill_in_the_loop(folder: Path, kills: int, seed: int) -> int:
    """Kill the loop `kills` times, and verify after each; the number of rounds begun."""
    site_dir, begun, chance = folder / "site", folder / "begun", random.Random(seed)
    study, policy = endless_study(), site_with(site_dir, epsilon=8.0)
    (folder / "study.json").write_text(study.model_dump_json())
    with open_ledger(site_dir, policy, create=True) as ledger:
        ledger.admit(study)
        seen = ledger.tip()
    for _ in range(kills):
        words = [sys.executable, "-c", LOOP, str(site_dir), str(folder / "study.json"), str(begun)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.02 + chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        rounds = begun.stat().st_size if begun.exists() else 0
        looked = read_ledger(site_dir, policy).entries  # a look needs no mending first
        with open_ledger(site_dir, policy) as ledger:
            assert tuple(looked) == ledger.entries
            assert ledger.contains(seen)
            seen = verify_chain(seen, ledger.entries_since(seen.sequence))
            assert seen == ledger.tip()
            spent = len(reservations(ledger.entries, study.digest))
            assert spent >= rounds
            assert len(commitments(ledger.entries)) <= spent
            assert len(list((site_dir / ANSWERS_DIR).glob("*.answer"))) >= len(commitments(ledger.entries))
    return rounds


def test_killed_three_times(tmp_path: Path) -> None:
    assert kill_in_the_loop(tmp_path, kills=3, seed=1) > 3


@pytest.mark.long
def test_killed_forty_times(tmp_path: Path) -> None:
    assert kill_in_the_loop(tmp_path, kills=40, seed=2) > 40


# One process that imports once and forks a child for every line of a first private round, from the making of the ledger
# on; each child kills itself at its line.
EVERY_LINE = """
import json, os, signal, sys
from pathlib import Path
from client.ledger import open_ledger
from client.policy import Policy
from shared_model.accounting import plan_of
from shared_model.study import Study
folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
policy, study = Policy.model_validate(given["policy"]), Study.model_validate(given["study"])
spend = plan_of(study)[0].each
OURS = ("ledger.py", "ledger_file.py", "lock.py")

def private_round(site_dir):
    with open_ledger(site_dir, policy, create=True) as ledger:
        ledger.admit(study)
        reserved = ledger.reserve(study, "abcdef12", "pretrain", 1, "cd" * 32, spend)
        (site_dir / "begun").write_text(".")
        ledger.commit(reserved, b"answer")

def killed_at(line, site_dir):
    left = line
    def trace(frame, event, _):
        nonlocal left
        if os.path.basename(frame.f_code.co_filename) not in OURS:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    private_round(site_dir)
    os._exit(0)

line, status = 0, None
while status != 0:
    line += int(sys.argv[3])
    site_dir = folder / str(line)
    site_dir.mkdir()
    child = os.fork()
    if child == 0:
        killed_at(line, site_dir)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    print(line, flush=True)
"""


def kill_at_lines(folder: Path, step: int) -> list[Path]:
    policy = policy_of()
    given = json.dumps({"policy": policy.model_dump(), "study": private_study().model_dump(exclude_unset=True)})
    words = [sys.executable, "-c", EVERY_LINE, str(folder), given, str(step)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return [folder / line for line in done.stdout.split()]


def check_after_a_kill(site_dir: Path) -> tuple[int, int]:
    """Open the ledger again and ask for the same round; how often it was paid for, and begun before the kill."""
    begun = int((site_dir / "begun").exists())
    study = private_study()
    with open_ledger(site_dir, policy_of(), create=True) as ledger:
        assert verify_chain(Tip(), ledger.entries) == ledger.tip() == tip_of(ledger.entries[-1])
        spent = len(reservations(ledger.entries, study.digest))
        assert spent >= begun
        if spent:
            again = ledger.reserve(study, "abcdef12", "pretrain", 1, "cd" * 32, plan_of(study)[0].each)
            assert isinstance(again, StoredAnswer) == bool(commitments(ledger.entries))
    return spent, begun


def kinds_after(folder: Path, step: int) -> set[tuple[int, int]]:
    sites = kill_at_lines(folder, step)
    assert len(sites) > 200 // step
    return {check_after_a_kill(site_dir) for site_dir in sites}


def test_killed_at_lines_of_a_private_round(tmp_path: Path) -> None:
    """Before the reservation, after it and before the work, and after the work began."""
    assert kinds_after(tmp_path, step=20) >= {(0, 0), (1, 1)}


@pytest.mark.long
def test_killed_at_every_line_of_a_private_round(tmp_path: Path) -> None:
    assert kinds_after(tmp_path, step=1) == {(0, 0), (1, 0), (1, 1)}
