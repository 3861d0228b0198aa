"""Flower's edge at the centre: the ServerApp. Finds the sites, turns a Grid into `ask`, starts the study."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from server.conduct import conduct
from server.conductor import Ask
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Federation, Study
from shared_model.wire import (
    Answer,
    Arrays,
    Instruction,
    Reply,
    SiteDescription,
    SiteFailure,
    SiteReply,
    pack_arrays,
    pack_with,
    unpack,
)

POLL_S = 0.2
MESSAGE_TYPES = {
    "describe": "query.describe",
    "distance": "train.distance",
    "pretrain": "train.pretrain",
    "finetune": "train.finetune",
    "evaluate": "evaluate.tally",
}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in `run_config["study"]` (JSON) on the nodes of the grid; results go to the folder `out`."""
    config = context.run_config
    study = Study.model_validate_json(str(config["study"]))
    node_ids = wait_for_nodes(grid, study.federation, int(str(config.get("expected-sites", 0))))
    nodes, described = enrol(grid, study, node_ids)
    conduct(
        study,
        asker(grid, nodes, study.federation),
        described,
        Path(str(config["out"])),
        engine=str(config.get("engine", "flower")),
        resume=bool(config.get("resume", False)),
        start=Path(str(config["start"])) if config.get("start") else None,
    )


def wait_for_nodes(grid: Grid, federation: Federation, expected: int) -> list[int]:
    """Node ids once `expected` nodes are there, or, after the study's wait, the minimum number of sites.

    Raises:
        HemoFedError: fewer than the minimum came. Flower itself would wait for ever.
    """
    deadline = time.monotonic() + federation.wait_for_sites_s
    while True:
        nodes = sorted(grid.get_node_ids())
        late = time.monotonic() > deadline
        if nodes and len(nodes) >= (federation.minimum_sites if late else max(expected, federation.minimum_sites)):
            return nodes
        if late:
            raise HemoFedError(
                f"{len(nodes)} of the {federation.minimum_sites} sites the study needs were there after "
                f"{federation.wait_for_sites_s:g} s; start the others, then run again",
                ExitCode.TOO_FEW_SITES,
            )
        time.sleep(POLL_S)


def enrol(
    grid: Grid, study: Study, node_ids: Sequence[int]
) -> tuple[dict[str, int], dict[str, SiteDescription | SiteFailure]]:
    """Ask each node who it is and what it has: node ids by site name, and the descriptions by site name.

    Raises:
        HemoFedError: two nodes give one name.
    """
    instruction = Instruction(run_id="0" * 32, task="describe", study=study)
    nodes: dict[str, int] = {}
    described: dict[str, SiteDescription | SiteFailure] = {}
    by_number = {f"node {number}": number for number in node_ids}
    for answer in asker(grid, by_number, study.federation)(instruction, {}, sorted(by_number)):
        if isinstance(answer, SiteFailure):
            name = f"{answer.site} ({answer.says})" if answer.says else answer.site
        else:
            name = answer.reply.site
        if name in described:
            raise HemoFedError(
                f"two nodes call themselves {name!r}; give each its own name in site.toml", ExitCode.BAD_SITE
            )
        nodes[name] = by_number[answer.site]
        if isinstance(answer, SiteReply) and answer.reply.description is not None:
            described[name] = answer.reply.description
        else:
            described[name] = answer if isinstance(answer, SiteFailure) else failure(name, "it says nothing of itself")
    return nodes, described


def failure(site: str, reason: str, code: int = int(ExitCode.SITE_FAILED)) -> SiteFailure:
    """A failure that the centre found."""
    return SiteFailure(site, code, reason)


def asker(grid: Grid, nodes: Mapping[str, int], federation: Federation) -> Ask:
    """`ask` over a Flower grid: instructions go out to all at once, replies are pulled one site at a time.

    Pulling in site-name order keeps the order of addition fixed and one reply in memory; early replies wait
    in Flower's own store.
    """

    def ask(instruction: Instruction, arrays: Arrays, sites: Sequence[str]) -> Iterator[Answer]:
        shared = pack_arrays(arrays)
        messages = [
            Message(
                pack_with(instruction.for_site(site), shared),
                dst_node_id=nodes[site],
                message_type=MESSAGE_TYPES[instruction.task],
                group_id=f"{instruction.task}-{instruction.round_number}",
            )
            for site in sorted(sites)
        ]
        deadline = time.monotonic() + federation.round_timeout_s
        for site, message_id in zip(sorted(sites), list(grid.push_messages(messages)), strict=True):
            yield read_answer(site, pull(grid, message_id, deadline))

    return ask


def pull(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """The reply to one message, or None once the deadline has passed."""
    while True:
        for message in grid.pull_messages([message_id]):
            return message
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)


def read_answer(site: str, message: Message | None) -> Answer:
    """A reply that can be used, or why not. A site's own words never pass: only its code and reference."""
    if message is None:
        return failure(site, "no answer before the round's deadline")
    if message.has_error():
        return failure(site, f"its node failed (Flower error {message.error.code})")
    try:
        reply, arrays = unpack(message.content, Reply)
    except HemoFedError as error:
        return failure(site, error.message, int(error.exit_code))
    if reply.status == "failed":
        known = {int(code): code.name.lower().replace("_", " ") for code in ExitCode}
        reason = f"{known.get(reply.code, 'unknown code')}; its own log says more under {reply.reference}"
        return SiteFailure(site, reply.code, reason, reply.reference, reply.site)
    return SiteReply(site, reply, arrays)
