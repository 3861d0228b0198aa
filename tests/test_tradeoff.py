"""The trade-off: every cell with its own noise and ledger, killed and resumed, and what it refuses."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.policy import load_policy
from shared_model.accounting import epsilon_of, plan_of, spends_of
from shared_model.errors import ExitCode, HemoFedError
from simulation.cli import app
from simulation.plan import load_tradeoff
from simulation.tradeoff_job import Ground, cell_study
from simulation.tradeoff_plan import Cell, Sweep, Tradeoff, cells_of

PHASE = "sampling_rate = 0.5\nnoise_multiplier = 1.0\nsteps_per_round = 2\nunits = 1\n"
STUDY = f"""name = "tiny trade-off"
[objective]
name = "ssl_dml_l2"
[encoder]
embedding_dim = 16
[pretrain]
rounds = 1
local_epochs = 0.3
batch_size = 16
[finetune]
rounds = 1
local_epochs = 0.3
batch_size = 16
[evaluation]
every_round = false
partitions = ["sex"]
[privacy]
epsilon = 8.0
delta = 1e-3
[privacy.pretrain]
{PHASE}
[privacy.finetune]
{PHASE}
[tradeoff]
epsilons = [0.0, 8.0]
starts = ["public_and_private"]
seeds = 1
public_patients = 50
bank_ecgs = 16
[[simulation.hospitals]]
name = "north"
patients = 60
"""


def written(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["tradeoff", *words, "--quiet", "--workers", "1"])


def ground_of(tmp_path: Path) -> Ground:
    study, _, _ = load_tradeoff(written(tmp_path))
    bank = tmp_path / "bank"
    bank.write_bytes(b"a bank")
    return Ground(study, {}, {}, tmp_path, {"shifted": bank, "same": bank}, {}, tmp_path)


@pytest.mark.parametrize("start", ["scratch", "public", "public_and_private"])
@pytest.mark.parametrize("epsilon", [8.0, 1.0])
def test_a_cells_noise_is_the_least_that_its_epsilon_allows(start: Any, epsilon: float, tmp_path: Path) -> None:
    study = cell_study(ground_of(tmp_path), Cell(start, epsilon, "norms_and_biases", "shifted", 0, 3))
    assert study.privacy is not None
    assert (study.seed, study.privacy.epsilon) == (3, epsilon)
    assert ("pretrain" in study.phases) == (start != "public")
    spends = spends_of(plan_of(study))
    cost = epsilon_of(spends, study.privacy.delta)
    assert 0.98 * epsilon < cost <= epsilon
    less = [each.model_copy(update={"noise_multiplier": 0.97 * each.noise_multiplier}) for each in spends]
    assert epsilon_of(less, study.privacy.delta) > cost


def test_without_privacy_a_cell_is_an_ordinary_study(tmp_path: Path) -> None:
    study = cell_study(ground_of(tmp_path), Cell("scratch", 0.0, "all", "shifted", 0, 1))
    assert study.privacy is None
    assert "pretrain" in study.phases


def test_cells_are_listed_once_and_by_seed() -> None:
    plan = Tradeoff(seeds=2, epsilons=(0.0, 8.0), starts=("public",), further=(Sweep(seeds=3, starts=("public",)),))
    cells = cells_of(plan)
    assert len(cells) == len(set(cells)) == 2 * 2 + (4 * 3 - 2 * 2)
    assert [cell.seed for cell in cells[:4]] == [1, 1, 2, 2]
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_trade_off_runs_goes_on_and_leaves_the_hospitals_own_ledgers_alone(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    result = run(str(path), "--out", str(out))
    assert result.exit_code == 0, result.output
    table = json.loads((out / "tradeoff.json").read_text())
    assert table["cells"] == table["cells_finished"] == 2
    free, private = sorted(table["points"], key=lambda point: point["epsilon"] or 0)
    assert free["epsilon"] is None
    assert not free["noise_multiplier"]
    assert private["spent_epsilon"] <= 8.0
    assert set(private["noise_multiplier"]) == {"pretrain", "finetune"}
    assert set(private["signal_to_noise"]) == {"pretrain", "finetune"}
    assert (out / "tradeoff.svg").stat().st_size > 1000
    hospital = out / "hospitals" / "north" / "site"
    assert not (hospital / "ledger.sqlite").exists()
    with pytest.raises(HemoFedError):
        load_policy(hospital)
    # A cell that is there is not trained again; one that was lost is.
    facts = sorted(out.glob("cells/*/*/*/facts.json"))
    kept, lost = facts[0].stat().st_mtime_ns, facts[1]
    lost.unlink()
    assert run(str(path), "--out", str(out)).exception.exit_code == ExitCode.USAGE
    assert run(str(path), "--out", str(out), "--resume").exit_code == 0
    assert facts[0].stat().st_mtime_ns == kept
    assert lost.exists()
    changed = written(tmp_path, STUDY.replace("delta = 1e-3", "delta = 1e-4"))
    assert run(str(changed), "--out", str(out), "--resume").exception.exit_code == ExitCode.BAD_CHECKPOINT


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[tradeoff]", "[comparison]", "needs [tradeoff]"),
        ("epsilons = [0.0, 8.0]", "epsilons = [-1.0]", "above 0"),
        ('starts = ["public_and_private"]', 'starts = ["nowhere"]', "starts"),
        ("bank_ecgs = 16", "banks_ecgs = 16", "banks_ecgs"),
        ('name = "ssl_dml_l2"', 'name = "simclr"', "compares the patients"),
    ],
)
def test_bad_files_are_refused_in_one_line(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in STUDY
    text = STUDY.replace(old, new)
    result = run(str(written(tmp_path, text)), "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, HemoFedError)
    assert result.exception.exit_code == ExitCode.BAD_STUDY
    assert words in result.exception.message
    assert "\n" not in result.exception.message


def test_a_study_without_privacy_has_no_trade_off(tmp_path: Path) -> None:
    table = tomllib.loads(STUDY)
    assert "privacy" in table
    text = STUDY[: STUDY.index("[privacy]")] + STUDY[STUDY.index("[tradeoff]") :]
    result = run(str(written(tmp_path, text)), "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, HemoFedError)
    assert "[privacy]" in result.exception.message
