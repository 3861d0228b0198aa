"""The data card as one page, with a gallery of ECGs: for the hospital's own eyes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from client.card import DataCard, card_of, open_index
from client.card_charts import card_charts, label_charts
from client.card_labels import read_label_table
from client.card_tables import card_tables, withheld_tables
from client.gallery import Exhibit, random_rows, refused_ecgs, refused_records, stored_ecgs, worst_rows
from client.site import load_site
from client.store import Progress
from shared_model.ecg_paper import ExampleEcg, ecg_paper
from shared_model.errors import ExitCode, HemoFedError
from shared_model.page import environment
from shared_model.release import VERSION

RANDOM_ECGS, WORST_ECGS, REFUSED_ECGS = 8, 8, 12


@dataclass(frozen=True)
class Galleries:
    """The ECGs of a page."""

    random: Sequence[Exhibit]
    worst: Sequence[Exhibit]
    refused: Sequence[Exhibit]


def write_card_page(
    site_dir: Path, path: Path, seed: int = 1, show_ids: bool = False, progress: Progress | None = None
) -> DataCard:
    """Write the page of a site folder to `path` and return the card that it shows.

    `seed` chooses the random ECGs. `show_ids` puts the source's name of each stored record beside its row.
    `progress(done, total)` counts drawn ECGs.

    Guarantee: the file can be read by its owner only (mode 0600, from its first byte); the page asks for nothing
    from any network and runs no script (a Content-Security-Policy says so to the browser), every text of the store is
    escaped, and no pseudonym is on it. It shows real ECGs and counts of any size: it must stay in the hospital.

    Raises:
        HemoFedError: the store cannot be read, or the file cannot be written.
    """
    settings = load_site(site_dir)
    with open_index(site_dir) as connection:
        table = read_label_table(connection)
        card = card_of(connection, settings, table)
        galleries = Galleries(
            random=stored_ecgs(site_dir, connection, table, random_rows(connection, RANDOM_ECGS, seed), show_ids),
            worst=stored_ecgs(site_dir, connection, table, worst_rows(connection, WORST_ECGS), show_ids),
            refused=refused_ecgs(site_dir, connection, refused_records(connection, REFUSED_ECGS, seed)),
        )
    write_private(path, page_text(card, galleries, seed, progress))
    return card


def page_text(card: DataCard, galleries: Galleries, seed: int, progress: Progress | None = None) -> str:
    """The page as HTML."""
    drawn: dict[str, list[tuple[Exhibit, Markup | None]]] = {"random": [], "worst": [], "refused": []}
    shown = [(name, exhibit) for name in drawn for exhibit in getattr(galleries, name)]
    for place, (name, exhibit) in enumerate(shown, start=1):
        drawn[name].append((exhibit, paper(exhibit, f"ecg-{place}")))
        if progress is not None:
            progress(place, len(shown))
    template = environment("client").get_template("card.html.j2")
    return template.render(
        card=card,
        charts=card_charts(card),
        label_charts=label_charts(card),
        tables=card_tables(card),
        withheld=withheld_tables(card),
        galleries=drawn,
        seed=seed,
        version=VERSION,
    )


def paper(exhibit: Exhibit, name: str) -> Markup | None:
    """An exhibit on ECG paper, or None where there is nothing to draw."""
    if exhibit.signal_mv is None:
        return None
    return ecg_paper(ExampleEcg(exhibit.caption, exhibit.signal_mv), name)


def write_private(path: Path, text: str) -> None:
    """Write a text file whole or not at all, readable by its owner only, not even for a moment by others."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except OSError as error:
        raise HemoFedError(
            f"{path}: cannot be written ({error.strerror}); give --html another place", ExitCode.USAGE
        ) from None
    finally:
        partial.unlink(missing_ok=True)
