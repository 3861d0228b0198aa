"""`hemofed-sim run` as a person runs it: what it writes, prints and ends with."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.ingest import ingest
from server.report.results import Results
from shared_model.errors import ExitCode
from simulation import cli
from tests.federations import copy_site, results_of, rounds_of, same_weights

Sites = Mapping[str, Path]
ROOT = Path(__file__).resolve().parents[1]
STUDY = """
name = "tiny"
seed = 5
[pretrain]
rounds = 1
local_epochs = 0.5
batch_size = 16
[finetune]
rounds = {rounds}
local_epochs = 0.5
batch_size = 16
[evaluation]
bootstrap_replicates = 50
minimum_cell = 5
"""
HOSPITALS = """
[simulation]
seed = 2
oracle_patients = 2000
[[simulation.hospitals]]
name = "alpha"
patients = 140
pressure_shift = 0.3
sampling_rate_hz = 250
[[simulation.hospitals]]
name = "beta"
patients = 140
pressure_shift = 0.3
sampling_rate_hz = 250
[[simulation.hospitals]]
name = "gamma"
patients = 30
labelled_share = 0.0
sampling_rate_hz = 250
"""


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process, with its own exit code and output."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["hemofed-sim", "run", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capfd.readouterr()
        return Ended(int(caught.value.code or 0), printed.out, printed.err)

    return call


def begin(*arguments: object) -> subprocess.Popen[str]:
    """The command line as a process of its own, in a group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulation.cli", "run", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def study_file(folder: Path, text: str = "", rounds: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.toml"
    path.write_text(STUDY.format(rounds=rounds) + text)
    return path


def on(*site_dirs: Path) -> list[str]:
    """Options for site folders of one's own, quick and quiet."""
    sites = [part for site_dir in site_dirs for part in ("--site", str(site_dir))]
    return [*sites, "--no-baselines", "--workers", "1", "--quiet"]


def is_one_line(said: Ended, code: ExitCode, *words: str) -> bool:
    lines = said.err.strip().splitlines()
    whole = len(lines) == 1 and lines[0].startswith("hemofed-sim: ") and "Traceback" not in said.err
    return whole and said.code == code and all(word in lines[0] for word in words)


def test_a_run_on_ones_own_sites_prints_json_and_writes_its_folder(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    study, out = study_file(tmp_path), tmp_path / "out"
    said = run(study, "--out", out, *on(site_dirs["alpha"], site_dirs["beta"]), "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == results_of(out)
    results = Results.model_validate_json((out / "results.json").read_text())
    assert (results.engine, results.seed, results.targets) == ("in-process", 5, ("mpcwp_gt_18",))
    assert results.baselines.pooled["mpcwp_gt_18"].auroc.reason
    assert results.oracle_auroc is None
    assert (out / "report.html").read_text().lower().startswith("<!doctype html>")
    assert {path.name for path in (out / "model").iterdir()} >= {"model.safetensors", "card.md"}

    again = run(study, "--out", out, *on(site_dirs["alpha"], site_dirs["beta"]))
    assert is_one_line(again, ExitCode.USAGE, str(out), "--resume")
    before = (out / "model" / "model.safetensors").read_bytes()
    resumed = run(study, "--out", out, *on(site_dirs["alpha"], site_dirs["beta"]), "--resume")
    assert resumed.code == 0
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert "mpcwp_gt_18" in resumed.out


def test_a_mistake_is_one_line_with_an_exit_code_of_its_own(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    good, out = study_file(tmp_path), tmp_path / "out"
    alpha = on(site_dirs["alpha"])
    twin = copy_site(site_dirs["beta"], tmp_path / "twin", name="alpha")
    absent, none = tmp_path / "absent.toml", study_file(tmp_path / "none", "[simulation]\nhospitals = []")
    unknown = study_file(tmp_path / "unknown", "colour = 1")
    spec = study_file(tmp_path / "spec", '[[simulation.hospitals]]\nname = "A B"\npatients = 3')
    for said in (
        is_one_line(run(good, "--out", out, *alpha, "--engine", "magic"), ExitCode.USAGE, "magic", "in-process"),
        is_one_line(run(absent, "--out", out, *alpha), ExitCode.BAD_STUDY, str(absent)),
        is_one_line(run(unknown, "--out", out, *alpha), ExitCode.BAD_STUDY, str(unknown), "colour"),
        is_one_line(run(none, "--out", out), ExitCode.BAD_STUDY, str(none), "hospitals"),
        is_one_line(run(spec, "--out", out), ExitCode.BAD_STUDY, str(spec), "name"),
        is_one_line(run(good, "--out", out), ExitCode.BAD_STUDY, "--site", "[simulation]"),
        is_one_line(run(good, "--out", out, *on(tmp_path)), ExitCode.BAD_SITE, "site.toml"),
        is_one_line(run(good, "--out", out, *on(site_dirs["alpha"], twin)), ExitCode.BAD_SITE, "'alpha'"),
        is_one_line(run(good, "--out", out, *on(site_dirs["alpha"], site_dirs["alpha"])), ExitCode.BAD_SITE),
        is_one_line(run(good), ExitCode.USAGE, "--out"),
        is_one_line(run(good, "--out", out, *alpha, "--workers", "0"), ExitCode.USAGE, "workers"),
    ):
        assert said
    assert not (out / "results.json").exists()


def test_a_study_without_labels_ends_with_its_own_code(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    said = run(study_file(tmp_path), "--out", tmp_path / "out", *on(site_dirs["gamma"]))
    assert is_one_line(said, ExitCode.NO_USABLE_PATIENTS, "mpcwp_mmhg")


def test_a_checkpoint_of_another_study_or_a_damaged_one(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    out, alpha = tmp_path / "out", on(site_dirs["alpha"])
    assert run(study_file(tmp_path), "--out", out, *alpha).code == 0
    (out / "results.json").unlink()
    said = run(study_file(tmp_path), "--out", out, *alpha)
    assert is_one_line(said, ExitCode.BAD_CHECKPOINT, str(out), "--resume")
    other = run(study_file(tmp_path / "other", rounds=3), "--out", out, *alpha, "--resume")
    assert is_one_line(other, ExitCode.BAD_CHECKPOINT, "another study")
    (out / "checkpoint" / "position.json").write_text("{")
    damaged = run(study_file(tmp_path), "--out", out, *alpha, "--resume")
    assert is_one_line(damaged, ExitCode.BAD_CHECKPOINT, "damaged")


def test_a_finished_study_is_not_taken_for_another(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    out, alpha = tmp_path / "out", on(site_dirs["alpha"])
    assert run(study_file(tmp_path), "--out", out, *alpha).code == 0
    other = run(study_file(tmp_path / "other", rounds=3), "--out", out, *alpha, "--resume")
    assert is_one_line(other, ExitCode.BAD_CHECKPOINT, "another study")


def test_a_regression_says_how_far_off_it_is(larger_site: Path, tmp_path: Path, run: Any) -> None:
    study = study_file(tmp_path, '[target]\nkind = "regression"\n')
    said = run(study, "--out", tmp_path / "out", *on(larger_site))
    assert said.code == 0, said.err
    assert "RMSE" in said.out
    assert "always saying the mean" in " ".join(said.out.split())
    (own,) = results_of(tmp_path / "out")["test"].values()
    assert own["kind"] == "regression"
    figures = own["regression"]
    assert 2 < figures["rmse"] < 40
    assert 2 < figures["mean_predictor_rmse"] < 20
    assert figures["mae"] <= figures["rmse"]
    assert own["brier"] is None
    assert own["auroc"]["value"] is not None
    assert "always saying the mean" in (tmp_path / "out" / "report.html").read_text()


def test_a_column_of_zeros_and_ones_is_a_target(site_dirs: Sites, tmp_path: Path, run: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(site_dirs["alpha"].parent / "source", source)
    with (source / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["congested"] = "" if not row["mpcwp_mmhg"] else str(int(float(row["mpcwp_mmhg"]) > 15))
    with (source / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    ingest(source, tmp_path / "site", name="alpha", disclosure="masked", patient_key=bytes(32))
    copy_site(tmp_path / "site", tmp_path / "mine", minimum_cell=2)
    study = study_file(tmp_path, '[target]\ncolumn = "congested"\nthreshold = 0.5\n')
    said = run(study, "--out", tmp_path / "out", *on(tmp_path / "mine"), "--json")
    assert said.code == 0, said.err
    results = json.loads(said.out)
    assert results["targets"] == ["congested"]
    assert not results["simulated"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The whole of it in a process of its own: hospitals made, federation, baselines, oracle, report."""
    folder = tmp_path_factory.mktemp("demo")
    study = study_file(folder, HOSPITALS)
    return folder / "out", ended(begin(study, "--out", folder / "out", "--workers", "2", "--quiet"))


@pytest.mark.long
def test_a_simulated_study_ends_well(demo: tuple[Path, Ended]) -> None:
    out, said = demo
    assert said.code == 0, said.err
    assert "Traceback" not in said.err
    for word in ("local-only", "federated", "pooled", "oracle", "federated minus local-only"):
        assert word in said.out
    for name in ("results.json", "metrics.jsonl", "report.html", "model/model.safetensors", "model/card.md"):
        assert (out / name).stat().st_size > 0
    assert [row["phase"] for row in rounds_of(out)] == ["pretrain", "finetune", "finetune"]


@pytest.mark.long
def test_its_results_have_what_the_schema_promises(demo: tuple[Path, Ended]) -> None:
    results = results_of(demo[0])
    Results.model_validate(results)
    target = "mpcwp_gt_18"
    assert (results["engine"], results["seed"], results["simulated"]) == ("in-process", 5, True)
    assert [site["name"] for site in results["sites"]] == ["alpha", "beta", "gamma"]
    assert all(site["patients"] % 5 == 0 and site["patients"] > 0 for site in results["sites"])
    assert 0.7 < results["oracle_auroc"] < 0.95
    for figure in ("auroc", "auprc"):
        given = results["test"][target][figure]
        assert set(given) >= {"value", "low", "high", "bound"}
        assert given["value"] is not None or given["reason"]
    assert results["targets"][0] == target
    assert {group["partition"] for group in results["subgroups"]} >= {"sex", "age", "race"}
    local = results["baselines"]["local_only"][target]
    assert set(local["auroc"]["sites"]) == {"alpha", "beta", "gamma"}
    assert local["auroc"]["sites"]["gamma"] is None
    assert "gamma" in local["reason"]
    assert "mean" in local["auroc"]
    assert results["baselines"]["pooled"][target]["auroc"]["value"] is not None
    assert results["baselines"]["comparisons"]["federated_minus_local_only"]
    assert results["test"][target]["patients"] % 5 == 0


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the file is there; fails where the process ended before."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_a_checkpoint_and_resume_gives_the_same_weights(
    site_dirs: Sites, tmp_path: Path, workers: int
) -> None:
    study = study_file(tmp_path, rounds=8)
    options = [*on(site_dirs["alpha"], site_dirs["beta"]), "--workers", workers]
    assert ended(begin(study, "--out", tmp_path / "whole", *options)).code == 0
    out = tmp_path / "out"
    process = begin(study, "--out", out, *options)
    wait_for(out / "checkpoint" / "position.json", process)
    os.killpg(process.pid, signal.SIGINT)
    said = ended(process)
    assert said.code == 130
    assert not (out / "results.json").exists()
    assert "Traceback" not in said.err
    assert said.err.strip().splitlines()[-1].startswith("hemofed-sim: interrupted")
    assert ended(begin(study, "--out", out, *options, "--resume")).code == 0
    assert same_weights(out, tmp_path / "whole")
    assert rounds_of(out) == rounds_of(tmp_path / "whole")


@pytest.mark.long
def test_ctrl_c_while_hospitals_and_baselines_are_made(demo: tuple[Path, Ended], tmp_path: Path) -> None:
    study, out = study_file(tmp_path, HOSPITALS), tmp_path / "out"
    options = ("--out", out, "--workers", "2", "--quiet", "--resume")
    for sign in (out / "hospitals" / "gamma" / "source", out / "baselines" / "pooled" / "checkpoint"):
        process = begin(study, *options)
        wait_for(sign, process)
        os.killpg(process.pid, signal.SIGINT)
        said = ended(process)
        assert said.code == 130
        assert "Traceback" not in said.err
    assert ended(begin(study, *options)).code == 0
    assert same_weights(out, demo[0])
    assert results_of(out)["baselines"] == results_of(demo[0])["baselines"]
    assert results_of(out)["test"] == results_of(demo[0])["test"]


@pytest.mark.long
def test_a_killed_run_goes_on_from_every_round(site_dirs: Sites, tmp_path: Path) -> None:
    study, out = study_file(tmp_path, rounds=3), tmp_path / "out"
    options = on(site_dirs["alpha"], site_dirs["beta"])
    assert ended(begin(study, "--out", tmp_path / "whole", *options)).code == 0
    for stem in ("pretrain-00001", "finetune-00001", "finetune-00002"):
        process = begin(study, "--out", out, *options, "--resume")
        wait_for(out / "checkpoint" / f"{stem}.safetensors", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert ended(begin(study, "--out", out, *options, "--resume")).code == 0
    assert same_weights(out, tmp_path / "whole")
    assert rounds_of(out) == rounds_of(tmp_path / "whole")
