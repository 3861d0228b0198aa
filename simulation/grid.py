"""Two engines for a federation on one machine: Flower's Grid in this process, and Flower's own on Ray.

Both call the very ServerApp and ClientApp that run in deployment.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import cast
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import client.app
import server.app
from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study
from shared_model.workers import worker_pool

RUN_ID = 1
CENTRE_NODE_ID = 1


class InProcessGrid(Grid):
    """A Grid whose nodes are site folders; a reply is computed when it is pulled.

    With `workers` above 1, clients run in that many processes, and while one reply is awaited the next
    ones are already under way; never more than `workers` replies exist at a time, however many sites.
    """

    def __init__(self, site_dirs: Sequence[Path], workers: int = 1) -> None:
        self._site_dirs = dict(enumerate((str(path) for path in site_dirs), CENTRE_NODE_ID + 1))
        self._waiting: dict[str, Message] = {}
        self._asked: dict[str, Message] = {}
        self._running: dict[str, Future[Message]] = {}
        self._workers = workers
        self._pool = worker_pool(workers) if workers > 1 else None
        # Flower stamps each message with its process's identity, which a launcher would have set.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, CENTRE_NODE_ID, RUN_ID

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    @property
    def run(self) -> Run:
        """A run without a past."""
        return Run.create_empty(run_id=RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message; Flower's Message constructor does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """One node a site folder."""
        return list(self._site_dirs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hold messages until their replies are asked for."""
        ids = []
        for message in messages:
            # The message id is the grid's to give, and Flower offers no setter: its own grids do the same.
            message.metadata.__dict__["_message_id"] = uuid4().hex
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Compute the replies to these messages, one after the other."""
        return [self._reply(message_id) for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull all. `timeout` has no meaning where the caller does the work itself."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _reply(self, message_id: str) -> Message:
        if self._pool is None:
            message = self._waiting.pop(message_id)
            return answer(message, self._site_dirs[message.metadata.dst_node_id])
        self._start(message_id)
        for other in list(self._waiting):
            if len(self._running) >= self._workers:
                break
            self._start(other)
        asked = self._running.pop(message_id)
        message = self._asked.pop(message_id)
        try:
            return asked.result()
        except BrokenProcessPool:
            # A worker was killed, out of memory most often: all that was under way is lost and named so.
            self._pool = worker_pool(self._workers)
            return Message(Error(0, "worker process died"), reply_to=message)

    def _start(self, message_id: str) -> None:
        if self._pool is None or message_id in self._running:
            return
        message = self._waiting.pop(message_id)
        self._asked[message_id] = message
        site_dir = self._site_dirs[message.metadata.dst_node_id]
        try:
            self._running[message_id] = self._pool.submit(answer, message, site_dir)
        except BrokenProcessPool:  # a worker was killed since the last reply
            self._pool = worker_pool(self._workers)
            self._running[message_id] = self._pool.submit(answer, message, site_dir)


def answer(message: Message, site_dir: str) -> Message:
    """Let the ClientApp answer one message for one site folder."""
    context = Context(
        run_id=RUN_ID,
        node_id=message.metadata.dst_node_id,
        node_config={"site-dir": site_dir, "secure-sum": "in-process"},
        state=RecordDict(),
        run_config={},
    )
    return client.app.app(message, context)


class SiteClientApp(ClientApp):
    """The ClientApp with a site folder chosen by Flower's partition number: Ray's nodes have no other name."""

    def __init__(self, site_dirs: Sequence[Path]) -> None:
        super().__init__()
        self._site_dirs = tuple(str(path) for path in site_dirs)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message for the site of this partition."""
        return answer(message, self._site_dirs[int(cast(int, context.node_config["partition-id"]))])


def run_in_process(
    study: Study, site_dirs: Sequence[Path], out: Path, *, resume: bool, workers: int, start: Path | None = None
) -> None:
    """Run a study on site folders in this process and `workers` others; results go to `out`."""
    grid = InProcessGrid(site_dirs, min(workers, len(site_dirs)))
    try:
        server.app.app(grid, _server_context(study, site_dirs, out, "in-process", resume, start))
    finally:
        grid.close()


def run_on_ray(
    study: Study, site_dirs: Sequence[Path], out: Path, *, resume: bool, workers: int, start: Path | None = None
) -> None:
    """Run a study on site folders with Flower's simulation engine, `workers` clients at a time.

    Raises:
        HemoFedError: Ray is not installed, or the study itself failed.
    """
    try:
        import ray  # noqa: F401  an extra that a hospital node does without
        from flwr.simulation import run_simulation
    except ImportError:
        raise HemoFedError(
            "Ray is not installed: pip install 'hemofed[ray]', or use --engine in-process", ExitCode.USAGE
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    engine = ServerApp()

    @engine.main()
    def main(grid: Grid, _context: Context) -> None:
        server.app.app(grid, _server_context(study, site_dirs, out, "ray", resume, start))

    run_simulation(
        server_app=engine,
        client_app=SiteClientApp(site_dirs),
        num_supernodes=len(site_dirs),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
        },
    )


def _server_context(
    study: Study, site_dirs: Sequence[Path], out: Path, engine: str, resume: bool, start: Path | None
) -> Context:
    config: dict[str, bool | float | int | str] = {
        "study": study.model_dump_json(),
        "out": str(out),
        "engine": engine,
        "resume": resume,
        "start": str(start or ""),
        "expected-sites": len(site_dirs),
    }
    return Context(run_id=RUN_ID, node_id=CENTRE_NODE_ID, node_config={}, state=RecordDict(), run_config=config)
