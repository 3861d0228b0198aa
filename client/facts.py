"""What a site knows of its ECGs besides their signals, as the columns that relations and draws look at."""

import numpy as np
from numpy.typing import NDArray

from client.store import RecordIndex
from shared_model.objectives.draws import Cohort, Rows
from shared_model.study import Study

AGE_BAND_YEARS = 10.0
SEX_CODES = {"male": 0.0, "female": 1.0}


def fact_table(study: Study, index: RecordIndex, names: tuple[str, ...]) -> NDArray[np.float64]:
    """(n, len(names)): one column a fact, NaN where it is unknown.

    Facts: `record` and `patient` (codes), `age_band` (decade), `female` (0, 1), `value` (the target's label),
    `positive` (whether it is above the threshold), `group` (the objective's `group_column`).
    """
    if not names:
        return np.empty((len(index), 0))
    return np.stack([_fact(study, index, name) for name in names], axis=1)


def _fact(study: Study, index: RecordIndex, name: str) -> NDArray[np.float64]:
    unknown = np.full(len(index), np.nan)
    value = index.labels.get(study.target.column, unknown).astype(np.float64)
    match name:
        case "record":
            return index.record.astype(np.float64)
        case "patient":
            return index.patient.astype(np.float64)
        case "age_band":
            return np.floor(index.age_years.astype(np.float64) / AGE_BAND_YEARS)
        case "female":
            return np.array([SEX_CODES.get(sex, np.nan) for sex in index.sex.tolist()])
        case "value":
            return value
        case "positive":
            return np.where(np.isnan(value), np.nan, value > study.target.threshold)
        case "group":
            return index.labels.get(study.objective.group_column, unknown).astype(np.float64)
    raise KeyError(name)


def columns_of(study: Study) -> tuple[str, ...]:
    """The columns of the site's records that the objective's relation looks at, and that may be empty."""
    names = {"age_band": "age_years", "female": "sex", "group": study.objective.group_column}
    names |= dict.fromkeys(("value", "positive"), study.target.column)
    return tuple(names[fact] for fact in study.objective.relation.facts if fact in names)


def can_be_compared(study: Study, index: RecordIndex) -> NDArray[np.bool_]:
    """(n,): which ECGs the study's objective can learn from: those with all facts that its relation looks at."""
    known = ~np.isnan(fact_table(study, index, study.objective.relation.facts))
    return np.asarray(known.all(axis=1), np.bool_)


def cohort_of(study: Study, index: RecordIndex, rows: Rows) -> Cohort:
    """The training ECGs as draws see them; an ECG's event is the measurement that its label of the target is from."""
    value = index.labels.get(study.target.column, np.full(len(index), np.nan, np.float32))
    event_at = np.where(np.isnan(value), np.nan, index.measured_at)
    return Cohort(rows, index.patient[rows], index.record[rows], index.recorded_at[rows], event_at[rows])
