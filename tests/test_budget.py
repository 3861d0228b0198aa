"""`hemofed-client budget`: what it shows of a real ledger and of a plan, in tables and in JSON."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.budget import budget_of, plan_cost, study_of
from client.cli import app
from client.ledger import Reserved, open_ledger
from client.ledger_file import LEDGER_FILE
from shared_model.accounting import epsilon_of, plan_of, spends_of
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study
from tests.private_studies import RUN, policy_of, private_study, site_with

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
name = "a [bold] study"
[pretrain]
rounds = 4
[finetune]
rounds = 2
[evaluation]
every_round = false
partitions = ["sex", "age"]
[privacy]
epsilon = 3.0
bank_sha256 = "abababababababababababababababababababababababababababababababab"
[privacy.pretrain]
sampling_rate = 0.2
noise_multiplier = 6.0
steps_per_round = 20
[privacy.finetune]
sampling_rate = 0.2
noise_multiplier = 6.0
steps_per_round = 20
[[simulation.hospitals]]
name = "north"
patients = 300
"""


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "client.cli", "budget", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """One study admitted: of pretraining two rounds reserved and one answered, one release reserved."""
    folder, study = tmp_path / "site", private_study()
    policy = site_with(folder)
    with open_ledger(folder, policy, create=True) as ledger:
        ledger.admit(study)
        first = ledger.reserve(study, RUN, "pretrain", 1, "cd" * 32, plan_of(study)[0].each)
        assert isinstance(first, Reserved)
        ledger.commit(first, b"weights")
        ledger.reserve(study, RUN, "pretrain", 2, "cd" * 32, plan_of(study)[0].each)
        ledger.release(study, RUN, 1, "cd" * 32, 0.25)
    return folder


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def test_what_is_given_out_reserved_and_left(site: Path) -> None:
    budget = budget_of(site)
    assert (budget.epsilon, budget.epsilon_shared, budget.epsilon_left) == (8.0, 3.0, 5.0)
    assert (budget.delta, budget.delta_shared, budget.delta_left) == (1e-4, 1e-5, 9e-5)
    (share,) = budget.studies
    assert (share.name, share.digest, share.epsilon) == ("a private study", private_study().digest, 3.0)
    rounds = {each.task: (each.planned, each.reserved, each.answered, each.left) for each in share.tasks}
    assert rounds == {"pretrain": (5, 2, 1, 3), "finetune": (3, 0, 0, 3), "evaluate": (2, 1, 0, 1)}


def test_a_lowered_policy_shows_and_leaves_nothing_negative(site: Path) -> None:
    site_with(site, epsilon=2.0)
    assert (budget_of(site).epsilon, budget_of(site).epsilon_left) == (2.0, 0.0)


def test_before_the_first_study_all_is_left_and_looking_makes_no_ledger(tmp_path: Path) -> None:
    site_with(tmp_path / "site")
    budget = budget_of(tmp_path / "site")
    assert (budget.entries, budget.epsilon_left, budget.studies) == (0, 8.0, ())
    assert not (tmp_path / "site" / LEDGER_FILE).exists()


def test_of_a_filter_the_rounds_left_are_those_that_still_fit(tmp_path: Path) -> None:
    policy, study = site_with(tmp_path / "site"), private_study(accounting="filter", order=12.0)
    each = plan_of(study)[0].each
    with open_ledger(tmp_path / "site", policy, create=True) as ledger:
        ledger.admit(study)
        left = budget_of(tmp_path / "site").studies[0].tasks[0].left
        assert left > 1
        for number in range(1, left + 1):
            ledger.reserve(study, RUN, "pretrain", number, "cd" * 32, each)
        assert budget_of(tmp_path / "site").studies[0].tasks[0].left == 0
        with pytest.raises(HemoFedError) as caught:
            ledger.reserve(study, RUN, "pretrain", left + 1, "cd" * 32, each)
        assert caught.value.exit_code == ExitCode.BUDGET_EXCEEDED


def test_what_a_plan_costs_and_how_many_rounds_more_would_fit(site: Path, study_file: Path) -> None:
    study = study_of(study_file)
    cost = plan_cost(site, study)
    assert cost.epsilon == epsilon_of(spends_of(plan_of(study)), 1e-5)
    assert cost.within_share
    assert not cost.admitted
    assert cost.refused == ()
    assert cost.epsilon < sum(phase.epsilon for phase in cost.phases)
    pretrain, finetune, evaluate = cost.phases
    assert (pretrain.rounds, pretrain.noise_multiplier, evaluate.noise_to_signal) == (5, 6.0, {})
    assert pretrain.noise_to_signal == {
        "200": pytest.approx(0.15),
        "1000": pytest.approx(0.03),
        "5000": pytest.approx(0.006),
        "400": pytest.approx(0.075),  # declared
    }
    assert set(finetune.noise_to_signal) == {"200", "1000", "5000"}  # declared_labelled_patients = 200
    longer = study.model_dump()
    longer["pretrain"]["rounds"] += pretrain.more_rounds
    assert plan_cost(site, Study.model_validate(longer)).within_share
    longer["pretrain"]["rounds"] += 1
    above = plan_cost(site, Study.model_validate(longer))
    assert not above.within_share
    assert above.phases[0].more_rounds == -1
    assert "the plan costs epsilon" in above.refused[0]


def test_an_admitted_study_is_known_again_and_the_rest_must_fit(site: Path) -> None:
    known = plan_cost(site, private_study())
    assert known.admitted
    assert known.refused == ()
    site_with(site, tasks=["finetune", "evaluate"])
    greedy = plan_cost(site, private_study(epsilon=5.5))
    assert not greedy.admitted
    assert "the task pretrain" in greedy.refused[0]
    assert "epsilon of all studies would be 8.5" in greedy.refused[1]


def test_a_plan_is_calibrated(site: Path, study_file: Path) -> None:
    cost = plan_cost(site, study_of(study_file), epsilon=1.0)
    assert 0.99 < cost.epsilon <= cost.share_epsilon == 1.0
    assert cost.phases[0].noise_multiplier > 6
    with pytest.raises(HemoFedError) as caught:
        plan_cost(site, private_study(accounting="filter", order=12.0), epsilon=1.0)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_filter_is_accounted_at_its_order(site: Path) -> None:
    cost = plan_cost(site, private_study(accounting="filter", order=12.0))
    exact = plan_cost(site, private_study())
    assert exact.epsilon < cost.epsilon
    assert all(phase.more_rounds >= 0 for phase in cost.phases) == cost.within_share


def test_the_command_shows_and_prints_json(site: Path, study_file: Path) -> None:
    done = command("--site-dir", site, "--plan", study_file)
    assert done.returncode == 0, done.stderr
    for text in ("a [bold] study", "together", "noise to signal", "would be admitted"):
        assert text in done.stdout

    def printed(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["budget", "--site-dir", str(site), *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    shown = printed()
    for text in ("given out", "a private study", "pretrain", "reserved"):
        assert text in shown
    assert json.loads(printed("--json"))["epsilon_left"] == 5.0
    table: dict[str, Any] = json.loads(printed("--plan", study_file, "--epsilon", 2, "--json"))
    assert table["share_epsilon"] == 2.0
    assert table["epsilon"] <= 2.0


def test_a_mistake_is_one_line_and_a_code(site: Path) -> None:
    done = command("--site-dir", site.parent / "nowhere")
    assert done.returncode == ExitCode.POLICY_REFUSED
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--epsilon", "3"], ExitCode.USAGE),
        (["--plan", "study.toml", "--epsilon", "-1"], ExitCode.USAGE),
        (["--plan", "nowhere.toml"], ExitCode.BAD_STUDY),
        (["--plan", "open.toml"], ExitCode.LEDGER_REFUSED),
    ],
)
def test_a_mistake_has_its_own_code(
    site: Path, study_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: ExitCode
) -> None:
    monkeypatch.chdir(study_file.parent)
    Path("open.toml").write_text('name = "without privacy"')
    result = CliRunner().invoke(app, ["budget", "--site-dir", str(site), *arguments])
    assert isinstance(result.exception, HemoFedError)
    assert result.exception.exit_code == code
    assert result.output == ""


def test_a_damaged_ledger_is_said_here_too(site: Path) -> None:
    (site / LEDGER_FILE).unlink()
    assert budget_refused(site) == ExitCode.LEDGER_DAMAGED


def budget_refused(site_dir: Path) -> ExitCode:
    with pytest.raises(HemoFedError) as caught:
        budget_of(site_dir)
    return caught.value.exit_code


def test_a_policy_that_allows_more_than_was_promised_is_said_here_too(site: Path) -> None:
    site_with(site, epsilon=9.0)
    assert budget_refused(site) == ExitCode.POLICY_REFUSED
    assert policy_of().epsilon == 8.0
