"""Which runs have used the store: so that a forgotten patient can be told apart from what was learned with them."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from client.schema import utc_now
from client.store import Store

USES_FILE = "uses.jsonl"


class Use(BaseModel):
    """That a run did a task with this store. The stored ECGs of the split are those before `rows`."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    study: str
    task: str
    """pretrain, finetune or evaluate."""
    split: str
    """train, validation or test."""
    first_at: str
    """When the run first did it here, ISO 8601."""
    rows: int
    """Rows of the signal file at that time."""


def note_use(site_dir: Path, store: Store, run_id: str, study: str, task: str, split: str) -> None:
    """Add a line for a run, task and split; one for every size the store had meanwhile."""
    use = Use(
        run_id=run_id,
        study=study,
        task=task,
        split=split,
        first_at=utc_now(),
        rows=store.rows_in_file,
    )
    if all(use.model_copy(update={"first_at": known.first_at}) != known for known in uses_of(site_dir)):
        with (site_dir / USES_FILE).open("a", encoding="utf-8") as file:
            file.write(use.model_dump_json() + "\n")


def uses_of(site_dir: Path) -> list[Use]:
    """All uses in the order they were noted; a line that a crash cut short is left out."""
    path = site_dir / USES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    uses = []
    for line in lines:
        try:
            uses.append(Use.model_validate(json.loads(line)))
        except (ValueError, ValidationError):
            continue
    return uses
