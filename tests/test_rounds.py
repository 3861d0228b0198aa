"""A study's rounds over made-up sites: who is asked what, what is refused, and when the study stops."""

import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.aggregation import Weights
from server.conductor import Watcher
from server.judging import StudyOutcome
from server.logbook import file_watcher
from server.report.files import append_metrics, load_metrics
from server.report.results import RoundMetrics
from server.rounds import run_study
from shared_model.errors import ExitCode, HemoFedError
from shared_model.histograms import histogram_of
from shared_model.model import build_model, take_arrays, travelling_names
from shared_model.study import Phase, Study
from shared_model.subgroups import ALL
from shared_model.tally import SiteTally, to_arrays
from shared_model.wire import Answer, Arrays, Instruction, Reply, SiteFailure, SiteReply
from tests.federations import Described, MadeUpSites, counted, description, rounds_of, shifted, three_sites, tiny_study

ROUNDS = {"pretrain": {"rounds": 2}, "finetune": {"rounds": 3}}


def go(
    out: Path,
    study: Study | None = None,
    sites: MadeUpSites | None = None,
    described: Described | None = None,
    **more: Any,
) -> StudyOutcome:
    """Run a study of two and three rounds on three made-up sites."""
    described = three_sites() if described is None else described
    chosen = tiny_study(**ROUNDS) if study is None else study
    return run_study(chosen, (sites or MadeUpSites()).ask, described, out, watcher=file_watcher(out), **more)


def notices(out: Path) -> str:
    path = out / "notices.log"
    return path.read_text() if path.exists() else ""


def refused(code: ExitCode, *args: Any, **more: Any) -> str:
    """The one line a study ends with, and its exit code."""
    with pytest.raises(HemoFedError) as caught:
        go(*args, **more)
    assert caught.value.exit_code == code
    assert "\n" not in caught.value.message
    return caught.value.message


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_the_phases_follow_each_other_and_validation_is_looked_at_after_each_fine_tuning_round(tmp_path: Path) -> None:
    sites = MadeUpSites()
    outcome = go(tmp_path, sites=sites)
    asked = [(each.task, each.round_number, each.split if each.task == "evaluate" else "") for each, _ in sites.seen]
    assert asked == [
        ("pretrain", 1, ""),
        ("pretrain", 2, ""),
        *[step for n in (1, 2, 3) for step in (("finetune", n, ""), ("evaluate", n, "validation"))],
        ("evaluate", 3, "validation"),
        ("evaluate", 3, "test"),
    ]
    assert outcome.model_round == 3
    assert [row["phase"] for row in rounds_of(tmp_path)] == ["pretrain"] * 2 + ["finetune"] * 3
    assert notices(tmp_path) == ""


@pytest.mark.parametrize("model", ["final", "best_on_validation"])
def test_the_test_split_is_read_once_and_last(tmp_path: Path, model: str) -> None:
    sites = MadeUpSites()
    go(tmp_path, tiny_study(**ROUNDS, evaluation={"model": model}), sites)
    splits = [each.split for each in sites.of("evaluate")]
    assert splits.count("test") == 1
    assert sites.seen[-1][0].split == "test"
    assert sites.seen[-1][0].threshold_edge is not None


def test_the_mean_of_a_round_weighs_sites_by_their_rounded_training_patients(tmp_path: Path) -> None:
    study = tiny_study(pretrain={"rounds": 1}, finetune={"rounds": 1})
    outcome = go(tmp_path, study)
    start = take_arrays(model := build_model(study), travelling_names(study, "finetune", model))

    def moved_by(weights: dict[str, float]) -> float:
        steps = {name: (len(name) + 0.1 * ord(name[0])) * 0.001 for name in weights}
        return sum(steps[name] * weight for name, weight in weights.items()) / sum(weights.values())

    pretrain, finetune = (
        moved_by({"alpha": 60, "beta": 30, "gamma": 10}),
        moved_by({"alpha": 50, "beta": 25, "gamma": 5}),
    )
    for name, value in outcome.weights.items():
        expected = start[name] + finetune + (pretrain if name.startswith("encoder.") else 0)
        np.testing.assert_allclose(value, expected, atol=1e-5)
    equal = go(tmp_path / "equal", tiny_study(federation={"site_weights": "equal"}))
    assert not same(equal.weights, outcome.weights)


def test_only_what_travels_is_sent(tmp_path: Path) -> None:
    for share_head in (True, False):
        sites = MadeUpSites()
        go(tmp_path / str(share_head), tiny_study(**{**ROUNDS, "finetune": {"share_head": share_head}}), sites)
        for (instruction, _), names in zip(sites.seen, sites.sent, strict=True):
            heads = {name for name in names if name.startswith("head.")}
            assert bool(heads) == (share_head and instruction.task != "pretrain")
            assert any(name.startswith("encoder.") for name in names)


def rates(out: Path) -> list[float]:
    sites = MadeUpSites()
    go(out, tiny_study(finetune={"rounds": 5, "learning_rate": 1e-2}), sites)
    assert [row.learning_rate for row in load_metrics(out) if row.phase == "finetune"] == [
        each.learning_rate for each in sites.of("finetune")
    ]
    return [each.learning_rate for each in sites.of("finetune")]


def test_17_every_round_has_its_own_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(rates(tmp_path / "ours"))) == 5
    monkeypatch.setattr(Phase, "learning_rate_at", lambda self, number: self.learning_rate)  # the published fault
    assert len(set(rates(tmp_path / "fault"))) == 1


class Interrupted(Exception):
    """Stands for Ctrl-C and for a crash."""


def stopping_after(out: Path, phase: str, number: int, before_saving: bool) -> Watcher:
    """A watcher that ends the study when a round is over, or when the next one begins."""
    usual = file_watcher(out)

    def on_round(metrics: RoundMetrics) -> None:
        append_metrics(metrics, out)
        if before_saving and (metrics.phase, metrics.round) == (phase, number):
            raise Interrupted

    def on_round_start(started: str, round_number: int, rounds: int) -> None:
        following = {("pretrain", 2): ("finetune", 1), ("finetune", 3): ("evaluate", 1)}
        if not before_saving and (started, round_number) == following.get((phase, number), (phase, number + 1)):
            raise Interrupted

    return Watcher(usual.on_sites, on_round_start, on_round, usual.on_notice)


BOUNDARIES = [("pretrain", 1), ("pretrain", 2), ("finetune", 1), ("finetune", 2), ("finetune", 3)]


@pytest.mark.parametrize("before_saving", [True, False])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
def test_a_study_goes_on_where_it_was_stopped(
    tmp_path: Path, rule: str, boundary: tuple[str, int], before_saving: bool
) -> None:
    study = tiny_study(**ROUNDS, federation={"rule": rule}, evaluation={"model": "best_on_validation"})
    whole = go(tmp_path / "whole", study)
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run_study(study, MadeUpSites().ask, three_sites(), out, watcher=stopping_after(out, *boundary, before_saving))
    sites = MadeUpSites()
    again = go(out, study, sites, resume=True)
    assert same(again.weights, whole.weights)
    assert again.model_round == whole.model_round
    assert again.threshold == whole.threshold
    assert rounds_of(out) == rounds_of(tmp_path / "whole")
    done = BOUNDARIES.index(boundary) + (0 if before_saving else 1)
    assert len(sites.of("pretrain")) + len(sites.of("finetune")) == len(BOUNDARIES) - done  # nothing is done twice
    assert [each.split for each in sites.of("evaluate")].count("test") == 1


def test_a_line_cut_short_by_a_crash_is_written_again(tmp_path: Path) -> None:
    go(tmp_path / "whole")
    out = tmp_path / "stopped"
    watcher = stopping_after(out, "finetune", 1, before_saving=True)
    with pytest.raises(Interrupted):
        run_study(tiny_study(**ROUNDS), MadeUpSites().ask, three_sites(), out, watcher=watcher)
    path = out / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    go(out, resume=True)
    assert rounds_of(out) == rounds_of(tmp_path / "whole")


def test_a_study_that_was_begun_is_not_begun_again_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_study(
            tiny_study(**ROUNDS),
            MadeUpSites().ask,
            three_sites(),
            tmp_path,
            watcher=stopping_after(tmp_path, "pretrain", 1, before_saving=False),
        )
    assert "--resume" in refused(ExitCode.BAD_CHECKPOINT, tmp_path)
    assert "another study" in refused(ExitCode.BAD_CHECKPOINT, tmp_path, tiny_study(**ROUNDS, seed=2), resume=True)


def test_a_site_that_is_gone_when_the_study_resumes_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_study(
            tiny_study(**ROUNDS),
            MadeUpSites().ask,
            three_sites(),
            tmp_path,
            watcher=stopping_after(tmp_path, "pretrain", 1, before_saving=False),
        )
    sites = MadeUpSites()
    gone = {name: each for name, each in three_sites().items() if name != "beta"}
    go(tmp_path, sites=sites, described={**gone, "node 7": SiteFailure("node 7", 11, "bad site")}, resume=True)
    assert all(asked == ("alpha", "gamma") for _, asked in sites.seen)
    assert "node 7: left out: bad site" in notices(tmp_path)


def poison(site: str, instruction: Instruction, arrays: Arrays) -> Answer:
    """Alpha sends NaN; the others are honest."""
    answer = shifted(site, instruction, arrays)
    if site != "alpha" or not isinstance(answer, SiteReply):
        return answer
    bad = {**answer.arrays, "encoder.embedding.bias": np.full_like(arrays["encoder.embedding.bias"], np.nan)}
    return SiteReply(site, answer.reply, bad)


def absent(site: str, instruction: Instruction, arrays: Arrays) -> Answer:
    return SiteFailure(site, 16, "no answer") if site == "alpha" else shifted(site, instruction, arrays)


def silent(site: str, instruction: Instruction, arrays: Arrays) -> Answer:
    return SiteReply(site, Reply(site=site), arrays) if site == "alpha" else shifted(site, instruction, arrays)


@pytest.mark.parametrize(
    ("train", "said"), [(poison, "NaN or infinity"), (absent, "no answer"), (silent, "nothing of its training")]
)
def test_a_bad_answer_is_left_out_and_the_round_goes_on_with_the_rest(
    tmp_path: Path, train: Callable[[str, Instruction, Arrays], Answer], said: str
) -> None:
    outcome = go(tmp_path / "bad", sites=MadeUpSites(train))
    without = go(tmp_path / "without", described={k: v for k, v in three_sites().items() if k != "alpha"})
    assert same(outcome.weights, without.weights)
    assert all(math.isfinite(float(value.sum())) for value in outcome.weights.values())
    rows = load_metrics(tmp_path / "bad")
    assert {row.sites_failed for row in rows} == {("alpha",)}
    assert {row.sites_replied for row in rows} == {("beta", "gamma")}
    assert notices(tmp_path / "bad").startswith("alpha: not in round 1 of pretrain: ")
    assert said in notices(tmp_path / "bad")


def test_a_study_stops_when_fewer_sites_answer_than_it_needs(tmp_path: Path) -> None:
    needs = {"federation": {"minimum_sites": 3}}
    said = refused(ExitCode.TOO_FEW_SITES, tmp_path, tiny_study(**ROUNDS, **needs), MadeUpSites(poison))
    assert "2 of the 3 sites" in said
    go(tmp_path / "two", tiny_study(**ROUNDS, federation={"minimum_sites": 2}), MadeUpSites(poison))


def test_a_study_in_which_every_site_fails_is_not_finished(tmp_path: Path) -> None:
    def broken(site: str, instruction: Instruction, arrays: Arrays) -> Answer:
        return SiteFailure(site, 1, "unexpected")

    refused(ExitCode.TOO_FEW_SITES, tmp_path / "train", sites=MadeUpSites(broken))
    described = {name: SiteFailure(name, 11, "bad site") for name in three_sites()}
    refused(ExitCode.TOO_FEW_SITES, tmp_path / "describe", described=described)
    refused(ExitCode.TOO_FEW_SITES, tmp_path / "none", described={})
    lost = MadeUpSites(evaluate=lambda site, instruction: SiteFailure(site, 18, "disclosure refused"))
    refused(ExitCode.TOO_FEW_SITES, tmp_path / "evaluate", sites=lost)
    assert "alpha: not in the test figures: disclosure refused" in notices(tmp_path / "evaluate")


def test_a_site_that_runs_other_code_is_left_out(tmp_path: Path) -> None:
    sites = MadeUpSites()
    go(tmp_path, sites=sites, described=three_sites(beta=description(release_sha256="0" * 64)))
    assert all(asked == ("alpha", "gamma") for _, asked in sites.seen)
    assert "beta: left out: it runs another release" in notices(tmp_path)


def test_a_site_without_labels_pretrains_and_does_not_fine_tune(tmp_path: Path) -> None:
    sites = MadeUpSites()
    go(tmp_path, sites=sites, described=three_sites(gamma=description(labelled_train_patients=0)))
    asked = {each.task: who for each, who in sites.seen}
    assert asked["pretrain"] == ("alpha", "beta", "gamma")
    assert asked["finetune"] == ("alpha", "beta")


@pytest.mark.parametrize("site_weights", ["patients", "equal"])
def test_a_study_without_a_label_anywhere_stops_before_it_trains(tmp_path: Path, site_weights: str) -> None:
    sites = MadeUpSites()
    none = {name: description(labelled_train_patients=0) for name in three_sites()}
    study = tiny_study(federation={"site_weights": site_weights})
    said = refused(ExitCode.NO_USABLE_PATIENTS, tmp_path, study, sites, described=none)
    assert "mpcwp_mmhg" in said
    assert sites.seen == []
    assert int(ExitCode.NO_USABLE_PATIENTS) == 14


def improving_then_worse(site: str, instruction: Instruction) -> Answer:
    """Validation counts that are best in round 2."""
    outcomes = np.arange(40) % 2
    gain = {1: 0.1, 2: 0.5, 3: 0.2}[instruction.round_number]
    scores = np.clip(0.3 + gain * outcomes + 0.2 * np.sin(np.arange(40)), 0.01, 0.99)
    return SiteReply(
        site, Reply(site=site), to_arrays(SiteTally({ALL: histogram_of(scores, outcomes)}, {}, None), True)
    )


def test_the_best_round_on_validation_is_reported_where_the_study_says_so(tmp_path: Path) -> None:
    best = tiny_study(**ROUNDS, evaluation={"model": "best_on_validation"})
    sites = MadeUpSites(evaluate=improving_then_worse)
    outcome = go(tmp_path / "best", best, sites)
    two = go(tmp_path / "two", tiny_study(pretrain={"rounds": 2}, finetune={"rounds": 2, "warmup_rounds": 1}))
    assert outcome.model_round == 2
    assert same(outcome.weights, two.weights)
    assert [each.round_number for each in sites.of("evaluate")][-2:] == [2, 2]
    final = go(tmp_path / "final", sites=MadeUpSites(evaluate=improving_then_worse))
    assert final.model_round == 3
    assert not same(final.weights, two.weights)


def test_with_too_few_validation_patients_there_is_no_curve_and_no_threshold_but_a_result(tmp_path: Path) -> None:
    sites = MadeUpSites(evaluate=lambda site, each: counted(site, 2 if each.split == "validation" else 40))
    outcome = go(tmp_path, tiny_study(**ROUNDS, evaluation={"minimum_cell": 11}), sites)
    assert all(row.validation_auroc is None for row in load_metrics(tmp_path))
    assert set(outcome.test) == {"alpha", "beta", "gamma"}


def test_counts_that_cannot_be_true_are_left_out(tmp_path: Path) -> None:
    def lying(site: str, instruction: Instruction) -> Answer:
        answer = counted(site)
        assert isinstance(answer, SiteReply)
        if site != "alpha":
            return answer
        return SiteReply(
            site, answer.reply, {**answer.arrays, "all|cells": np.negative(answer.arrays["all|cells"], dtype=np.int64)}
        )

    outcome = go(tmp_path, sites=MadeUpSites(evaluate=lying))
    assert set(outcome.test) == {"beta", "gamma"}
    assert "alpha: not in the test figures" in notices(tmp_path)


class Counted:
    """`ask` that counts how many replies' arrays are alive at once."""

    def __init__(self, hoard: bool) -> None:
        self.seen: list[weakref.ref[Any]] = []
        self.kept: list[SiteReply] = []
        self.most, self.hoard = 0, hoard

    def ask(self, instruction: Instruction, arrays: Arrays, sites: Sequence[str]) -> Iterator[Answer]:
        for site in sites:
            if instruction.task == "evaluate":
                yield counted(site)
                continue
            answer = shifted(site, instruction, arrays)
            assert isinstance(answer, SiteReply)
            self.seen.append(weakref.ref(answer.arrays["encoder.embedding.bias"]))
            self.most = max(self.most, sum(ref() is not None for ref in self.seen))
            if self.hoard:
                self.kept.append(answer)
            yield answer


@pytest.mark.parametrize("number", [3, 12])
def test_replies_are_taken_one_by_one_however_many_sites(tmp_path: Path, number: int) -> None:
    described = {f"site {at:02d}": description() for at in range(number)}
    study = tiny_study(pretrain={"rounds": 1}, finetune={"rounds": 1})
    for hoard in (False, True):
        counting = Counted(hoard)
        run_study(study, counting.ask, described, tmp_path / f"{hoard}")
        assert (counting.most <= 2) is not hoard


def test_progress_is_written_for_whoever_watches(tmp_path: Path) -> None:
    go(tmp_path)
    assert json.loads((tmp_path / "progress.json").read_text()) == {"phase": "evaluate", "round": 1, "rounds": 1}
