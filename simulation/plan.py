"""A study file for one machine: the study itself, and a `[simulation]` table with the hospitals to make."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study, explain, read_toml, study_from_table
from simulation.hospitals import HospitalSpec


class Simulation(BaseModel):
    """The hospitals of a simulated study, and on how many fresh patients the oracle is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=1, ge=0)
    oracle_patients: int = Field(default=50_000, ge=1_000)
    split: str = "60/20/20"
    """Train/validation/test patients of every hospital, in percent."""
    hospitals: tuple[HospitalSpec, ...] = Field(min_length=1)

    @field_validator("hospitals")
    @classmethod
    def _names_differ(cls, hospitals: tuple[HospitalSpec, ...]) -> tuple[HospitalSpec, ...]:
        names = [hospital.name for hospital in hospitals]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two hospitals are called {', '.join(twice)}")
        return hospitals


def load_plan(path: Path) -> tuple[Study, Simulation | None]:
    """Read a study file; the second is None where it has no `[simulation]`.

    Raises:
        HemoFedError: the file cannot be read, a key is unknown or a value out of range.
    """
    table = read_toml(path)
    simulated = table.pop("simulation", None)
    study = study_from_table(table, str(path))
    if simulated is None:
        return study, None
    try:
        return study, Simulation.model_validate(simulated)
    except ValidationError as error:
        raise HemoFedError(explain(error, f"{path}: simulation"), ExitCode.BAD_STUDY) from None
