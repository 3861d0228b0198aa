"""What became of a source, for people and machines."""

import sqlite3
from collections import Counter
from dataclasses import dataclass, field

from client.pseudonym import SPLIT_NAMES
from client.quality_policy import Finding
from client.records.record import Noticed, Reason

EXAMPLES = 10
# Counted, but not worth a line each: whole archives have no patient ids, and a noisy lead is everyday.
QUIET = {Noticed.PATIENT_FROM_RECORD_NAME, Noticed.SEGMENTS_LEFT_OUT, *Finding} - {
    Finding.LIMB_LEAD_REVERSAL,
    Finding.INCONSISTENT_LIMB_LEADS,
}
# A record's own labels, and those of the event that was joined to it.
LABELS = "SELECT row, name FROM labels UNION SELECT row, name FROM record_events JOIN event_values USING (event)"


@dataclass(frozen=True)
class IngestSummary:
    """What became of a source. `read` = `stored` + `already_stored` + all of `turned_away`."""

    source: str
    format: str
    read: int
    """Records that the source lists."""
    stored: int
    """Records that are new in the store."""
    already_stored: int
    """Records that an earlier ingest had stored."""
    segments: int
    """New 10 s ECGs."""
    turned_away: dict[str, int]
    """Reason -> records."""
    noticed: dict[str, int]
    """Remark -> how often."""
    duplicates: list[list[str]]
    """Groups of source records with the same signal; the first of each is the stored one."""
    patients: int
    """Patients in the store, all ingests together."""
    splits: dict[str, int]
    """Patients of each split, likewise."""
    labels: dict[str, int]
    """Label column -> 10 s ECGs that have it, likewise."""
    source_rates_hz: dict[str, int]
    """Sampling rate of the source -> 10 s ECGs, likewise."""
    examples: tuple[str, ...]
    """The first records turned away: one line each with file, reason and remedy."""
    remarks: tuple[str, ...]
    """The first remarks, likewise."""

    @property
    def usable(self) -> bool:
        """Whether any record of the source is in the store."""
        return self.stored + self.already_stored > 0


@dataclass
class Count:
    """What an ingest has counted so far."""

    stored: int = 0
    already_stored: int = 0
    segments: int = 0
    turned_away: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def turn_away(self, source: str, reason: Reason, detail: str) -> None:
        """One more record that does not enter the store."""
        self.turned_away[reason.value] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{source}: {reason}: {detail}")

    def remark(self, source: str, noticed: Noticed | Finding, detail: str) -> None:
        """One more thing to tell."""
        self.noticed[noticed.value] += 1
        if len(self.remarks) < EXAMPLES and noticed not in QUIET:
            self.remarks.append(f"{source}: {noticed}: {detail}")


def sum_up(count: Count, source: str, format_name: str, connection: sqlite3.Connection) -> IngestSummary:
    """The count of one ingest, and what the store holds after it."""
    ask = connection.execute
    splits = dict(ask("SELECT split, count(DISTINCT patient) FROM records GROUP BY split"))
    return IngestSummary(
        source=source,
        format=format_name,
        read=count.stored + count.already_stored + count.turned_away.total(),
        stored=count.stored,
        already_stored=count.already_stored,
        segments=count.segments,
        turned_away=dict(sorted(count.turned_away.items())),
        noticed=dict(sorted(count.noticed.items())),
        duplicates=list(count.duplicates.values()),
        patients=ask("SELECT count(DISTINCT patient) FROM records").fetchone()[0],
        splits={name: splits.get(split, 0) for split, name in enumerate(SPLIT_NAMES)},
        labels=dict(ask(f"SELECT name, count(*) FROM ({LABELS}) GROUP BY name ORDER BY name")),
        source_rates_hz={
            f"{rate:g}": rows
            for rate, rows in ask("SELECT source_rate_hz, count(*) FROM records GROUP BY 1 ORDER BY 1")
        },
        examples=tuple(count.examples),
        remarks=tuple(count.remarks),
    )
