"""The centre follows each hospital's ledger: an answer that is not in it, or a ledger that went back, is no answer."""

from pathlib import Path

import numpy as np
import pytest

from server import checkpoint as checkpoints
from server.conductor import Watcher
from server.rounds import prepare, train
from shared_model.errors import ExitCode, HemoFedError
from shared_model.ledger_chain import tip_of
from shared_model.wire import Answer, Instruction, SiteReply
from tests.federations import MadeUpSites, description, paid_entries, private_study, three_sites


class Cheats(MadeUpSites):
    """Beta's ledger is changed by `cheat` before its second answer."""

    cheat = "none"

    def paid(self, answer: Answer, instruction: Instruction) -> Answer:
        if not isinstance(answer, SiteReply) or answer.site != "beta" or instruction.round_number != 2:
            return super().paid(answer, instruction)
        if self.cheat == "set back":  # to before round 1, and then worked with
            self.ledgers["beta"] = []
        honest = super().paid(answer, instruction)
        assert isinstance(honest, SiteReply)
        entries = honest.reply.ledger
        if self.cheat == "edited":
            entries = (entries[0].model_copy(update={"round_number": 9}), *entries[1:])
        if self.cheat == "unpaid":
            entries = ()
        if self.cheat == "of another round":
            other = instruction.model_copy(update={"round_number": 7})
            entries = tuple(paid_entries(other, self.ledgers["beta"][:-2]))
        return SiteReply("beta", honest.reply.model_copy(update={"ledger": entries}), honest.arrays)


def two_rounds(sites: MadeUpSites, out: Path, notices: list[str]) -> None:
    study = private_study()
    described = three_sites(**{name: description(disclosure="noised") for name in ("alpha", "beta", "gamma")})
    watcher = Watcher(on_notice=notices.append)
    conductor, state = prepare(study, sites.ask, described, out, resume=True, watcher=watcher)
    train(conductor, state, study.phases)


def test_honest_ledgers_are_followed_and_kept_with_the_checkpoint(tmp_path: Path) -> None:
    sites, notices = MadeUpSites(), list[str]()
    two_rounds(sites, tmp_path, notices)
    assert not notices
    saved = checkpoints.load(tmp_path / "checkpoint", private_study().digest)
    assert saved is not None
    assert saved.position.ledger_tips == {name: tip_of(entries[-1]) for name, entries in sites.ledgers.items()}
    second = sites.of("finetune")[1]
    assert second.ledger_tips["alpha"] == tip_of(sites.ledgers["alpha"][2])


@pytest.mark.parametrize("cheat", ["set back", "edited", "unpaid", "of another round"])
def test_an_answer_beside_the_ledger_does_not_touch_the_mean(cheat: str, tmp_path: Path) -> None:
    sites, notices = Cheats(), list[str]()
    sites.cheat = cheat
    two_rounds(sites, tmp_path / "cheated", notices)
    (notice,) = [text for text in notices if "beta" in text]
    assert "not in round 2 of finetune" in notice
    honest = MadeUpSites()
    two_rounds(honest, tmp_path / "honest", [])
    ends = [checkpoints.load(tmp_path / name / "checkpoint", private_study().digest) for name in ("cheated", "honest")]
    one, other = (end.weights for end in ends if end is not None)
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_site_sees_its_own_tip_and_no_others() -> None:
    tips = {name: tip_of(paid_entries(instruction(), [])[-1]) for name in ("alpha", "beta")}
    asked = instruction().model_copy(update={"ledger_tips": tips})
    personal = asked.for_site("beta")
    assert personal.ledger_tip == tips["beta"]
    assert personal.ledger_tips == {}
    assert asked.for_site("gamma").ledger_tip.sequence == 0


def instruction() -> Instruction:
    return Instruction(run_id="0" * 32, task="finetune", round_number=1, study=private_study())


def test_all_sites_cheating_stops_the_study(tmp_path: Path) -> None:
    class Nothing(MadeUpSites):
        def paid(self, answer: Answer, instruction: Instruction) -> Answer:
            return answer

    with pytest.raises(HemoFedError) as caught:
        two_rounds(Nothing(), tmp_path, [])
    assert caught.value.exit_code == ExitCode.TOO_FEW_SITES
