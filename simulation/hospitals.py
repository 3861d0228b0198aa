"""Hospitals that do not exist, and differ as real ones do: in patients, recorders and wedge readings.

A hospital is written as WFDB records and one labels.csv, and is ingested like any other. What the generator
knew, the true pressure above all, is returned in memory and is never written where a hospital could find it.
"""

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS
from simulation.circulation import (
    EFFECT_SCALE,
    MOVED_BY_PRESSURE,
    RACES,
    Circulation,
    FloatArray,
    Population,
    draw_circulation,
)
from simulation.ecg_generator import Acquisition, draw_anatomy, synthesise
from simulation.oracle import (
    ELEVATED_MMHG,
    WedgeConvention,
    WedgeReading,
    oracle_probability,
    recorded_wedge,
)
from simulation.wfdb_writer import to_adc_units, write_record

PATIENTS_A_CHUNK = 50
"""Patients drawn and written together: bounds memory, and is part of what a seed means."""

LEAD_ORDERS = {
    "standard": ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"),
    "cabrera": ("aVL", "I", "aVR", "II", "aVF", "III", "V1", "V2", "V3", "V4", "V5", "V6"),
    "mimic": ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6"),
}
"""`cabrera` is the order only: aVR is kept as aVR, not turned into -aVR. `mimic` has aVF before aVL."""

LEAD_SPELLINGS: dict[str, Callable[[str], str]] = {
    "standard": str,
    "upper": str.upper,
    "lower": str.lower,
    "mdc": lambda lead: f"MDC_ECG_LEAD_{lead.upper()}",
    "lead_prefix": lambda lead: f"Lead {lead}",
}

LABEL_COLUMNS = (
    "record", "patient_id", "age_years", "sex", "race", "recorded_at", "measured_at", "mpcwp_mmhg",
)  # fmt: skip

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class DeviceFilter(BaseModel):
    """The recorder's filter; None leaves an edge out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    high_pass_hz: Positive | None = 0.05
    low_pass_hz: Positive | None = 150.0

    @model_validator(mode="after")
    def _edges_in_order(self) -> Self:
        if self.high_pass_hz and self.low_pass_hz and self.high_pass_hz >= self.low_pass_hz:
            raise ValueError(f"high_pass_hz {self.high_pass_hz:g} must lie below low_pass_hz {self.low_pass_hz:g}")
        return self


class HospitalSpec(BaseModel):
    """One simulated hospital. A name and a number of patients are enough; all else has a usual value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    patients: Annotated[int, Field(ge=1, le=1_000_000)]
    labelled_share: Share = 1.0
    """Share of patients whose ECGs have a recorded wedge; may be 0."""

    age_mean_years: Annotated[float, Field(ge=18, le=95)] = 63.0
    age_sd_years: Annotated[float, Field(ge=0, le=40)] = 14.0
    female_share: Share = 0.42
    race_mix: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=lambda: dict(Population().race_mix)
    )
    """Relative weights of white, black, hispanic, asian, other; those left out are 0."""
    pressure_shift: Annotated[float, Field(ge=-3, le=3)] = 0.0
    """Added to the latent pressure, in SD: moves prevalence and every sign of pressure with it."""
    effect_scale: Annotated[float, Field(ge=0, le=5)] = EFFECT_SCALE
    """Strength of the signs of pressure in the ECG; 0 makes a hospital from which nothing can be learnt."""
    absent_effects: tuple[str, ...] = ()
    """Signs that are not there in these patients, by name."""
    wave_width: Annotated[float, Field(ge=0.5, le=2)] = 1.0
    """Breadth of P, QRS and T wavelets against the usual: another shape within the same intervals."""

    sampling_rate_hz: Annotated[float, Field(ge=100, le=4_000)] = 500.0
    lead_order: Literal["standard", "cabrera", "mimic"] | tuple[str, ...] = "standard"
    """A named order, or the leads themselves by canonical name; those left out are not recorded."""
    lead_spelling: Literal["standard", "upper", "lower", "mdc", "lead_prefix"] = "standard"
    gain_adc_per_mv: Annotated[float, Field(ge=50, le=5_000)] = 1_000.0
    amplitude_gain: Annotated[float, Field(ge=0.2, le=5)] = 1.0
    """Calibration error of the recorder: 0.85 reads 15% low."""
    filter: DeviceFilter = DeviceFilter()
    mains_hz: Literal[50, 60] = 60
    noise_scale: Annotated[float, Field(ge=0, le=20)] = 1.0

    wedge_convention: WedgeConvention = "end_expiratory"
    wedge_noise_sd_mmhg: Annotated[float, Field(ge=0, le=20)] = 2.5

    @field_validator("race_mix")
    @classmethod
    def _races_known(cls, mix: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(mix) - set(RACES))
        if unknown:
            raise ValueError(f"unknown race {', '.join(unknown)}; use {', '.join(RACES)}")
        if sum(mix.values()) <= 0:
            raise ValueError("at least one race needs a weight above 0")
        return mix

    @field_validator("absent_effects")
    @classmethod
    def _effects_known(cls, absent: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(absent) - set(MOVED_BY_PRESSURE))
        if unknown:
            raise ValueError(f"unknown effect {', '.join(unknown)}; use {', '.join(MOVED_BY_PRESSURE)}")
        return absent

    @field_validator("lead_order")
    @classmethod
    def _leads_known(cls, order: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(order, str):
            return order
        unknown = [lead for lead in order if lead not in LEADS]
        if unknown or not order or len(set(order)) != len(order):
            raise ValueError(f"lead_order needs each of its leads once, from {', '.join(LEADS)}; got {list(order)}")
        return order

    @property
    def leads(self) -> tuple[str, ...]:
        """Canonical names in the order written."""
        return LEAD_ORDERS[self.lead_order] if isinstance(self.lead_order, str) else self.lead_order

    @property
    def lead_names(self) -> tuple[str, ...]:
        """Names as they stand in the headers."""
        return tuple(LEAD_SPELLINGS[self.lead_spelling](lead) for lead in self.leads)

    @property
    def population(self) -> Population:
        """Whom this hospital sees."""
        return Population(
            age_mean_years=self.age_mean_years,
            age_sd_years=self.age_sd_years,
            female_share=self.female_share,
            race_mix=MappingProxyType(self.race_mix),
            pressure_shift=self.pressure_shift,
            effect_scale=self.effect_scale,
            absent_effects=self.absent_effects,
        )

    @property
    def wedge_reading(self) -> WedgeReading:
        """How this hospital reads the wedge."""
        return WedgeReading(self.wedge_noise_sd_mmhg, self.wedge_convention)

    @property
    def acquisition(self) -> Acquisition:
        """The recorder."""
        return Acquisition(
            sampling_rate_hz=self.sampling_rate_hz,
            high_pass_hz=self.filter.high_pass_hz,
            low_pass_hz=self.filter.low_pass_hz,
            mains_hz=float(self.mains_hz),
            noise_scale=self.noise_scale,
            amplitude_gain=self.amplitude_gain,
        )


@dataclass(frozen=True)
class HospitalTruth:
    """What the generator knew of each record, in the order of labels.csv. Kept in memory only."""

    spec: HospitalSpec
    records: tuple[str, ...]
    """As in the column `record`."""
    patient_ids: tuple[str, ...]
    circulation: Circulation
    """`circulation.mpcwp_mmhg` is the true pressure."""
    recorded_mpcwp_mmhg: FloatArray
    """What the chart says, or would say: unlabelled records have theirs too."""
    labelled: NDArray[np.bool_]

    def oracle_probability(self, threshold_mmhg: float = ELEVATED_MMHG) -> FloatArray:
        """P(recorded mPCWP > threshold | everything in the ECG): the best score there is for each record."""
        return oracle_probability(self.circulation, self.spec.population, self.spec.wedge_reading, threshold_mmhg)


def write_hospital(
    spec: HospitalSpec, folder: Path, seed: int, progress: Callable[[int], None] | None = None
) -> HospitalTruth:
    """Write `folder`/ecg/NNN/*.{hea,dat} and `folder`/labels.csv; return what only the generator knows.

    The bytes depend on spec and seed alone. `progress` is called after each chunk with the number of
    *patients* just finished; they add up to `spec.patients`. Raises HemoFedError where the folder holds
    something already or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HemoFedError(f"{folder}: not an empty folder; name a new one, or remove it first", ExitCode.BAD_SOURCE)
    if seed < 0:
        raise HemoFedError(f"seed {seed} is negative; use 0 or more", ExitCode.USAGE)
    try:
        return _write_hospital(spec, folder, seed, progress or (lambda _: None))
    except OSError as error:
        raise HemoFedError(
            f"{folder}: cannot write here ({error.strerror or error}); free space or choose another folder",
            ExitCode.BAD_SOURCE,
        ) from error


def _write_hospital(spec: HospitalSpec, folder: Path, seed: int, progress: Callable[[int], None]) -> HospitalTruth:
    labelled_patient = _labelled_patients(spec, seed)
    chunks: list[_Chunk] = []
    rows: list[tuple[str, ...]] = []
    for chunk, rng in _chunks(spec, seed):
        chunks.append(chunk)
        (folder / chunk.records[0]).parent.mkdir(parents=True)
        _write_records(rng, spec, folder, chunk)
        rows += [
            _label_row(chunk, ecg, bool(labelled_patient[chunk.circulation.patient[ecg]]))
            for ecg in range(len(chunk.records))
        ]
        progress(len(set(chunk.patient_ids)))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([LABEL_COLUMNS, *rows])

    circulation = _joined([chunk.circulation for chunk in chunks])
    return HospitalTruth(
        spec=spec,
        records=tuple(record for chunk in chunks for record in chunk.records),
        patient_ids=tuple(patient_id for chunk in chunks for patient_id in chunk.patient_ids),
        circulation=circulation,
        recorded_mpcwp_mmhg=np.concatenate([chunk.recorded_mpcwp_mmhg for chunk in chunks]),
        labelled=labelled_patient[circulation.patient],
    )


@dataclass(frozen=True)
class _Chunk:
    """Some consecutive patients; lists and arrays have one entry an ECG."""

    records: list[str]
    patient_ids: list[str]
    recorded_at: list[datetime]
    measured_at: list[datetime]
    circulation: Circulation
    recorded_mpcwp_mmhg: FloatArray


def _chunks(spec: HospitalSpec, seed: int) -> Iterator[tuple[_Chunk, np.random.Generator]]:
    """Each chunk and the generator to go on with; a chunk depends on spec, seed and position only."""
    for first in range(0, spec.patients, PATIENTS_A_CHUNK):
        rng = _generator(seed, spec.name, f"chunk {first}")
        drawn = draw_circulation(rng, spec.population, min(PATIENTS_A_CHUNK, spec.patients - first))
        circulation = replace(drawn, patient=drawn.patient + first)
        recorded_at = _recorded_at(rng, circulation)
        gap_s = rng.uniform(0.5 * 3600, 12 * 3600, len(circulation))
        order = np.arange(len(circulation)) - np.searchsorted(circulation.patient, circulation.patient)
        folder = f"ecg/{first // PATIENTS_A_CHUNK:03d}"
        chunk = _Chunk(
            records=[f"{folder}/p{p:06d}_{n + 1}" for p, n in zip(circulation.patient, order, strict=True)],
            patient_ids=[f"{spec.name}-{p:06d}" for p in circulation.patient],
            recorded_at=recorded_at,
            measured_at=[at + timedelta(seconds=round(gap)) for at, gap in zip(recorded_at, gap_s, strict=True)],
            circulation=circulation,
            recorded_mpcwp_mmhg=recorded_wedge(rng, circulation, spec.wedge_reading),
        )
        yield chunk, rng


def _write_records(rng: np.random.Generator, spec: HospitalSpec, folder: Path, chunk: _Chunk) -> None:
    anatomy = draw_anatomy(rng, chunk.circulation, spec.wave_width)
    signal_mv = synthesise(rng, chunk.circulation, anatomy, spec.acquisition)
    chosen = [LEADS.index(lead) for lead in spec.leads]
    samples = to_adc_units(signal_mv[:, chosen], spec.gain_adc_per_mv).transpose(0, 2, 1)
    for ecg, record in enumerate(chunk.records):
        age, sex, race = _demographics(chunk.circulation, ecg)
        comments = (
            f"patient_id: {chunk.patient_ids[ecg]}",
            f"Age: {age}",
            f"Sex: {sex.title()}",
            f"Race: {race.title()}",
        )
        write_record(
            folder / record, samples[ecg], spec.lead_names, spec.sampling_rate_hz, spec.gain_adc_per_mv,
            chunk.recorded_at[ecg], comments,
        )  # fmt: skip


def _label_row(chunk: _Chunk, ecg: int, labelled: bool) -> tuple[str, ...]:
    """One line of labels.csv, in the order of LABEL_COLUMNS."""
    measured_at, pressure = chunk.measured_at[ecg].isoformat(), f"{chunk.recorded_mpcwp_mmhg[ecg]:.0f}"
    return (
        chunk.records[ecg],
        chunk.patient_ids[ecg],
        *_demographics(chunk.circulation, ecg),
        chunk.recorded_at[ecg].isoformat(),
        measured_at if labelled else "",
        pressure if labelled else "",
    )


def _demographics(circulation: Circulation, ecg: int) -> tuple[str, str, str]:
    """Age in years, sex, race: as written in labels.csv."""
    sex = "female" if circulation.female[ecg] else "male"
    return f"{circulation.age_years[ecg]:.0f}", sex, RACES[circulation.race[ecg]]


def _recorded_at(rng: np.random.Generator, circulation: Circulation) -> list[datetime]:
    """Local times to the second: the first ECG in 2015 to 2019, each between 7 and 18 o'clock."""
    first_day = rng.integers(0, 5 * 365, int(circulation.patient[-1]) + 1)
    days = first_day[circulation.patient] + np.floor(circulation.elapsed_days)
    second = rng.integers(7 * 3600, 18 * 3600, len(circulation))
    return [
        datetime(2015, 1, 1) + timedelta(days=int(day), seconds=int(at)) for day, at in zip(days, second, strict=True)
    ]


def _labelled_patients(spec: HospitalSpec, seed: int) -> NDArray[np.bool_]:
    """Exactly the asked share of patients, rounded, at random."""
    labelled = np.zeros(spec.patients, dtype=np.bool_)
    order = _generator(seed, spec.name, "labels").permutation(spec.patients)
    labelled[order[: round(spec.labelled_share * spec.patients)]] = True
    return labelled


def _generator(seed: int, name: str, purpose: str) -> np.random.Generator:
    """A stream of its own for each hospital and purpose."""
    digest = hashlib.sha256(f"{name}/{purpose}".encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


def _joined(parts: list[Circulation]) -> Circulation:
    return Circulation(
        **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Circulation)}
    )
