"""Flower's edge at a hospital: the ClientApp. Unpacks a message, lets `tasks` do the work, packs the reply."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import load_site
from client.tasks import describe, evaluate, train
from shared_model.errors import ExitCode, HemoFedError
from shared_model.wire import Arrays, Instruction, Reply, pack, unpack

Work = Callable[[Instruction, Arrays, Path, bool], tuple[Reply, Arrays]]

app = ClientApp()


@app.query("describe")
def on_describe(message: Message, context: Context) -> Message:
    """Say what this site has, in rounded counts."""
    return respond(message, context, describe)


@app.train("distance")
def on_distance(message: Message, context: Context) -> Message:
    """One round of training the distance that pretraining compares ECGs by."""
    return respond(message, context, train)


@app.train("pretrain")
def on_pretrain(message: Message, context: Context) -> Message:
    """One round of self-supervised training."""
    return respond(message, context, train)


@app.train("finetune")
def on_finetune(message: Message, context: Context) -> Message:
    """One round of supervised training."""
    return respond(message, context, train)


@app.evaluate("tally")
def on_evaluate(message: Message, context: Context) -> Message:
    """Counts of scores on one split, as far as the site's disclosure tier lets them out."""
    return respond(message, context, evaluate)


def respond(message: Message, context: Context, work: Work) -> Message:
    """Do the work and reply; whatever goes wrong leaves as a code and a reference number.

    Guarantee: no text of an exception, no path, no patient id and no exact count is in the reply to a
    failed instruction: Flower would send an uncaught exception's text to the centre word by word, so all
    are caught here. What went wrong is in the site's own `client.log`, under the same reference.
    """
    site_dir = Path(str(context.node_config.get("site-dir", "")))
    try:
        instruction, arrays = unpack(message.content, Instruction)
        settled = work(instruction, arrays, site_dir, context.node_config.get("secure-sum") == "in-process")
    except HemoFedError as error:
        settled = failed(site_dir, int(error.exit_code), error.message), {}
    except Exception as error:
        settled = failed(site_dir, int(ExitCode.UNEXPECTED), f"{type(error).__name__}: {error}"), {}
    return Message(pack(*settled), reply_to=message)


def failed(site_dir: Path, code: int, text: str) -> Reply:
    """A reply that says only code and reference; the text goes to the site's own log."""
    reference = secrets.token_hex(4)
    logging.getLogger("hemofed.client").error("%s: %s", reference, text)
    try:
        with (site_dir / "client.log").open("a", encoding="utf-8") as log:
            log.write(f"{reference} code {code}: {text}\n")
        name = load_site(site_dir).name
    except (OSError, HemoFedError):
        name = f"unnamed-{reference}"
    return Reply(site=name, status="failed", code=code, reference=reference)
