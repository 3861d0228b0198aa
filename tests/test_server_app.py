"""The centre's edge: sites that keep silent, fail, come late or lie about their name, over grids made for it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

import server.app
from server.app import asker, enrol, wait_for_nodes
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Federation
from shared_model.wire import Instruction, Reply, SiteFailure, SiteReply, pack
from simulation.grid import InProcessGrid
from tests.federations import copy_site, description, tiny_study

RUN = "0" * 32
SECRET = "patient 8812 Ada Byron"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app, "POLL_S", 0.01)


class ScriptedGrid(InProcessGrid):
    """A grid whose nodes answer as they are told: a reply, an error of Flower's own, or silence (None)."""

    def __init__(self, answers: Mapping[int, Reply | Error | None], late: int = 0) -> None:
        super().__init__([])
        self.answers, self.late, self.asked = answers, late, 0

    def get_node_ids(self) -> Iterable[int]:
        self.asked += 1
        return list(self.answers) if self.asked > self.late else []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting[message_id]
            answer = self.answers[message.metadata.dst_node_id]
            if isinstance(answer, Reply):
                yield Message(pack(answer, {"w": np.zeros(2, np.float32)}), reply_to=message)
            elif answer is not None:
                yield Message(answer, reply_to=message)


def names(count: int) -> dict[str, int]:
    return {f"site {number}": number for number in range(2, 2 + count)}


def ask(grid: ScriptedGrid, timeout_s: float = 0.1) -> list[Any]:
    instruction = Instruction(run_id=RUN, task="pretrain", study=tiny_study())
    federation = Federation(round_timeout_s=timeout_s)
    nodes = names(len(grid.answers))
    return list(asker(grid, nodes, federation)(instruction, {}, list(nodes)))


def test_a_silent_site_is_a_failure_at_the_deadline_and_the_others_are_heard() -> None:
    silent, good = ask(ScriptedGrid({2: None, 3: Reply(site="x")}))
    assert isinstance(silent, SiteFailure)
    assert silent.site == "site 2"
    assert "no answer before the round's deadline" in silent.reason
    assert isinstance(good, SiteReply)  # its reply was there in time: pulling it late costs it nothing
    assert good.site == "site 3"


def test_the_sites_share_one_deadline() -> None:
    """Ten silent sites take one deadline, not ten."""
    clock = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.app, "time", Clock)
        answers = ask(ScriptedGrid(dict.fromkeys(range(2, 12))), timeout_s=60)
    assert len(answers) == 10
    assert 60 <= clock[0] < 61


def test_an_error_of_flowers_own_says_its_code_and_not_its_text() -> None:
    (failed,) = ask(ScriptedGrid({2: Error(7, SECRET)}))
    assert isinstance(failed, SiteFailure)
    assert "Flower error 7" in failed.reason
    assert "8812" not in repr(failed)


def test_a_failed_reply_says_what_its_code_means_and_where_to_look() -> None:
    (failed,) = ask(ScriptedGrid({2: Reply(site="x", status="failed", code=19, reference="00ff00ff")}))
    assert (failed.site, failed.code, failed.reference) == ("site 2", 19, "00ff00ff")
    assert "device missing" in failed.reason
    assert "00ff00ff" in failed.reason
    (strange,) = ask(ScriptedGrid({2: Reply(site="x", status="failed", code=4321)}))
    assert "unknown code" in strange.reason


def test_a_site_cannot_speak_for_another() -> None:
    (answer,) = ask(ScriptedGrid({2: Reply(site="somebody else")}))
    assert answer.site == "site 2"


def described(**changes: Any) -> Reply:
    return Reply(site=str(changes.pop("site")), description=description(**changes))


def test_enrolment_takes_each_nodes_own_name() -> None:
    grid = ScriptedGrid({2: described(site="beta"), 3: described(site="alpha"), 4: Error(1), 5: Reply(site="mute")})
    nodes, said = enrol(grid, tiny_study(federation={"round_timeout_s": 0.1}), [2, 3, 4, 5])
    assert (nodes["alpha"], nodes["beta"]) == (3, 2)
    assert not isinstance(said["alpha"], SiteFailure)
    failures = [answer for answer in said.values() if isinstance(answer, SiteFailure)]
    assert len(failures) == 2


def test_two_nodes_of_one_name_are_refused() -> None:
    grid = ScriptedGrid({2: described(site="alpha"), 3: described(site="alpha")})
    with pytest.raises(HemoFedError, match="'alpha'") as caught:
        enrol(grid, tiny_study(), [2, 3])
    assert caught.value.exit_code == ExitCode.BAD_SITE


def test_the_study_waits_for_sites_that_come_late_but_not_for_ever() -> None:
    federation = Federation(wait_for_sites_s=0.3, minimum_sites=2)
    answers: dict[int, Reply | None] = {2: None, 3: None}
    assert wait_for_nodes(ScriptedGrid(answers, late=3), federation, expected=2) == [2, 3]
    assert wait_for_nodes(ScriptedGrid(answers), federation, expected=5) == [2, 3]  # enough, after the wait
    with pytest.raises(HemoFedError, match="1 of the 2 sites") as caught:
        wait_for_nodes(ScriptedGrid({2: None}), federation, expected=2)
    assert caught.value.exit_code == ExitCode.TOO_FEW_SITES
    with pytest.raises(HemoFedError):
        wait_for_nodes(ScriptedGrid({}), federation, expected=0)


def test_a_site_that_cannot_read_its_own_settings_is_named_in_no_way_that_harms(
    site_dirs: Mapping[str, Path], tmp_path: Path
) -> None:
    site = copy_site(site_dirs["beta"], tmp_path / SECRET)
    (site / "site.toml").write_text(f"{SECRET}")
    _, said = enrol(InProcessGrid([site]), tiny_study(), [2])
    assert all(isinstance(answer, SiteFailure) for answer in said.values())
    assert "8812" not in repr(said)
