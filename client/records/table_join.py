"""A record with what labels.csv says of it."""

import math
from collections.abc import Iterator
from dataclasses import replace

from client.pseudonym import plain_patient_id
from client.records.labels_csv import LABELS_FILE, LabelRow
from client.records.record import UNKNOWN, EcgRecord, Item, Noticed, Remark


def joined(record: EcgRecord, row: LabelRow | None, places: str = f"{LABELS_FILE} or in the file") -> Iterator[Item]:
    """The record with its row of the table, after a remark where neither names a patient.

    The table's word goes before the file's; labels of the file that the table does not name stay. A record without a
    patient counts as a patient of its own; `places` says where an id was looked for.
    """
    if row is None and record.patient_id:
        yield record
        return
    row = row or LabelRow()
    patient_id = plain_patient_id(row.patient_id) or record.patient_id
    if not patient_id:
        detail = f"no patient id in {places}, so this record counts as a patient of its own"
        yield Remark(record.source, Noticed.PATIENT_FROM_RECORD_NAME, detail)
    yield replace(
        record,
        patient_id=patient_id or f"record:{record.record_id}",
        recorded_at=record.recorded_at if math.isnan(row.recorded_at) else row.recorded_at,
        age_years=record.age_years if math.isnan(row.age_years) else row.age_years,
        sex=record.sex if row.sex == UNKNOWN else row.sex,
        race=row.race or record.race,
        labels={**record.labels, **row.labels},
        measured_at=record.measured_at if math.isnan(row.measured_at) else row.measured_at,
    )
