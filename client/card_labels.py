"""The labels of a store for its data card: coverage, distribution, prevalence, and which groups evaluation would
withhold."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from client.evaluation import Scores, count, index_ecgs
from client.pseudonym import SPLIT_NAMES, TEST
from client.spread import Histogram, Spread, histogram_of, spread_of
from client.store import label_columns
from shared_model.disclosure import suppressed_groups
from shared_model.subgroups import PARTITIONS, RACES, Levels, attributes_of, restrict_levels

# Above 15 mmHg at rest the wedge pressure is raised (ESC/ERS 2022 guidelines, doi:10.1093/eurheartj/ehac237);
# 18 mmHg is the threshold of SSL-DML (MLHC 2023).
WEDGE_THRESHOLDS_MMHG = (15.0, 18.0)
WEDGE = "mpcwp"
BINARY_THRESHOLD = 0.5
ANY_ECG = "any"
# The rule takes a tenth of a second a target; a store with more labels shows its fullest ones.
MOST_TARGETS = 12

RECORD_COLUMNS = np.dtype(
    [("row", "i8"), ("patient", "S32"), ("split", "u1"), ("recorded_at", "f8"), ("measured_at", "f8")]
)
TEST_COLUMNS = np.dtype([("sex", "U7"), ("age_years", "f4"), ("race", "U41")])


@dataclass(frozen=True)
class Prevalence:
    """Who is above a threshold."""

    ecgs: int
    patients: int
    """Patients whose index ECG (docs/adr/0004) is."""
    share_of_patients: float


@dataclass(frozen=True)
class LabelCard:
    """One label column."""

    ecgs: int
    patients: int
    patients_by_split: dict[str, int]
    spread: Spread
    histogram: Histogram | None
    """None where all values are 0 or 1."""
    above: dict[str, Prevalence]
    """Threshold -> who is above: 0.5 of a label of 0 and 1, 15 and 18 mmHg of a wedge pressure."""


@dataclass(frozen=True)
class WithheldGroup:
    """A group of the test split that evaluation would not show."""

    patients: int
    positives: int | None
    """None for a target without a usual threshold."""
    reason: str


@dataclass(frozen=True, eq=False)
class LabelTable:
    """All rows of a store with their labels, as columns in ascending row."""

    row: NDArray[np.int64]
    patient: NDArray[np.int64]
    """Code of the patient."""
    split: NDArray[np.uint8]
    recorded_at: NDArray[np.float64]
    measured_at: NDArray[np.float64]
    labels: dict[str, NDArray[np.float32]]
    """Wedge pressures first, then what most ECGs have; NaN where absent. A name without any value is left out."""

    def of(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places of the ECGs that have a label, and its values."""
        place = np.flatnonzero(~np.isnan(self.labels[name]))
        return place, self.labels[name][place]

    def at(self, row: int) -> dict[str, float]:
        """The labels of one row."""
        place = int(np.searchsorted(self.row, row))
        return {name: float(values[place]) for name, values in self.labels.items() if not np.isnan(values[place])}


def read_label_table(connection: sqlite3.Connection) -> LabelTable:
    """Read the columns in one pass each, labels as training and evaluation see them (`client.store.label_columns`)."""
    asked = ", ".join(RECORD_COLUMNS.names or ())
    records = np.fromiter(connection.execute(f"SELECT {asked} FROM records ORDER BY row"), RECORD_COLUMNS)
    row, recorded_at = records["row"].copy(), records["recorded_at"].copy()
    labels, measured_at = label_columns(connection, row, recorded_at, records["measured_at"].copy())
    known = {name: int((~np.isnan(values)).sum()) for name, values in labels.items()}
    in_order = sorted(known, key=lambda name: (not name.startswith(WEDGE), -known[name], name))
    return LabelTable(
        row=row,
        patient=np.unique(records["patient"], return_inverse=True)[1].astype(np.int64),
        split=records["split"].copy(),
        recorded_at=recorded_at,
        measured_at=measured_at,
        labels={name: labels[name] for name in in_order if known[name]},
    )


def label_cards(table: LabelTable) -> dict[str, LabelCard]:
    """A card for each label."""
    return {name: label_card(table, name) for name in table.labels}


def label_card(table: LabelTable, name: str) -> LabelCard:
    """Coverage, distribution and prevalence of one label."""
    place, value = table.of(name)
    patient, split = table.patient[place], table.split[place]
    spread = spread_of(value)
    assert spread is not None  # a name without values is not in the table
    index = index_ecgs(patient, table.recorded_at[place], table.measured_at[place])
    return LabelCard(
        ecgs=len(value),
        patients=len(index),
        patients_by_split={SPLIT_NAMES[code]: int((split[index] == code).sum()) for code in range(len(SPLIT_NAMES))},
        spread=spread,
        histogram=None if is_binary(value) else histogram_of(value),
        above={
            f"{threshold:g}": Prevalence(
                ecgs=int((value > threshold).sum()),
                patients=int((value[index] > threshold).sum()),
                share_of_patients=float((value[index] > threshold).mean()),
            )
            for threshold in thresholds(name, value)
        },
    )


def is_binary(value: NDArray[np.float32]) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.isin(value, (0, 1)).all())


def thresholds(name: str, value: NDArray[np.float32]) -> tuple[float, ...]:
    """Above what a label counts as positive; () where there is no usual threshold."""
    if is_binary(value):
        return (BINARY_THRESHOLD,)
    return WEDGE_THRESHOLDS_MMHG if name.startswith(WEDGE) else ()


def withheld_by_target(
    connection: sqlite3.Connection, table: LabelTable, minimum_cell: int
) -> dict[str, dict[str, WithheldGroup]]:
    """Groups of the test split that evaluation would withhold, by target; a target that shows all has {}.

    The rule is evaluation's own: index ECGs by `client.evaluation.count`, groups of `subgroups`, and
    `disclosure.suppressed_groups` as the tier `clear` applies it, for the partitions and races that a study has unless
    it says otherwise. `any` stands for a label that every ECG has.
    """
    test = table.split == TEST
    asked = "SELECT sex, age_years, substr(race, 1, 41) FROM records WHERE split = ? ORDER BY row"
    people = np.fromiter(connection.execute(asked, (TEST,)), TEST_COLUMNS)
    place_in_test = np.cumsum(test) - 1
    found = {}
    for target, place, outcome in targets(table):
        inside = test[place]
        chosen = place[inside]
        who = people[place_in_test[chosen]]
        attributes = attributes_of(who["sex"], who["age_years"], who["race"])
        attributes = restrict_levels(attributes, {"race": RACES})
        found[target] = withheld(
            table, chosen, outcome[inside] if outcome is not None else None, attributes, minimum_cell
        )
    return found


def targets(table: LabelTable) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.bool_] | None]]:
    """What evaluation could be asked for: name, places of the ECGs that have it, who is positive (None: a number)."""
    yield ANY_ECG, np.arange(len(table.row)), None
    for name in islice(table.labels, MOST_TARGETS):
        place, value = table.of(name)
        for threshold in thresholds(name, value):
            yield target_name(name, f"{threshold:g}"), place, value > threshold
        if not thresholds(name, value):
            yield name, place, None


def target_name(name: str, threshold: str) -> str:
    """A label as a target: `mpcwp_mmhg > 18`; of 0 and 1 its own name."""
    return name if threshold == f"{BINARY_THRESHOLD:g}" else f"{name} > {threshold}"


def withheld(
    table: LabelTable,
    chosen: NDArray[np.int64],
    positive: NDArray[np.bool_] | None,
    attributes: dict[str, Levels],
    minimum_cell: int,
) -> dict[str, WithheldGroup]:
    """The groups of one target's test ECGs that would be withheld."""
    nothing = np.zeros(len(chosen))
    tally = count(
        Scores(
            patients=table.patient[chosen],
            patient_keys=(),  # of use to the bootstrap only
            recorded_at=table.recorded_at[chosen],
            measured_at=table.measured_at[chosen],
            attributes=attributes,
            outcomes=None if positive is None else positive.astype(np.float64),
            probabilities=None if positive is None else nothing,
            measured_mmhg=nothing if positive is None else None,
            predicted_mmhg=nothing if positive is None else None,
        ),
        PARTITIONS,
        replicates=0,
    )
    # A number has no classes: a group's size stands for both, as in `client.evaluation.release`.
    sizes = {name: (each.positives, each.negatives) for name, each in tally.histograms.items()}
    sizes |= {name: (each.count, each.count) for name, each in tally.moments.items()}
    suppressed = suppressed_groups(sizes, minimum_cell, whole_intersections=True)
    return {
        name: WithheldGroup(
            patients=sizes[name][0] if positive is None else sum(sizes[name]),
            positives=None if positive is None else sizes[name][0],
            reason=said.reason,
        )
        for name, said in suppressed.items()
    }
