"""A study file for one machine: the study itself, a `[simulation]` table with the hospitals to make, and a
`[comparison]` table with what is compared."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared_model.errors import ExitCode, HemoFedError
from shared_model.study import Study, explain, read_toml, study_from_table
from simulation.comparison_plan import Comparison
from simulation.hospitals import HospitalSpec
from simulation.tradeoff_plan import Tradeoff

Table = TypeVar("Table", bound=BaseModel)


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
    study, simulated, _ = _tables(path)
    return study, _checked(Simulation, simulated, f"{path}: simulation")


def load_comparison(path: Path) -> tuple[Study, Simulation | None, Comparison]:
    """Read a study file with a `[comparison]`.

    Raises:
        HemoFedError: as `load_plan`, or there is no such table.
    """
    study, simulated, table = _tables(path)
    comparison = _checked(Comparison, table, f"{path}: comparison")
    if comparison is None:
        raise HemoFedError(
            f"{path}: no [comparison] table, which says what is compared; see docs/comparison.md", ExitCode.BAD_STUDY
        )
    return study, _checked(Simulation, simulated, f"{path}: simulation"), comparison


def load_tradeoff(path: Path) -> tuple[Study, Simulation, Tradeoff]:
    """Read a study file with `[simulation]` and `[tradeoff]`. The banks are made, so the study need not name one.

    Raises:
        HemoFedError: as `load_plan`, or one of the tables is missing.
    """
    table = read_toml(path)
    if isinstance(table.get("privacy"), dict):
        table["privacy"].setdefault("bank_sha256", "0" * 64)
    found, study, simulated = table.pop("tradeoff", None), *_parted(table, path)[:2]
    tradeoff = _checked(Tradeoff, found, f"{path}: tradeoff")
    plan = _checked(Simulation, simulated, f"{path}: simulation")
    if tradeoff is None or plan is None:
        raise HemoFedError(
            f"{path}: a trade-off needs [tradeoff] and [simulation]; see docs/tradeoff.md",
            ExitCode.BAD_STUDY,
        )
    return study, plan, tradeoff


def _tables(path: Path) -> tuple[Study, Any, Any]:
    """The study of a file, and what it says of simulated hospitals and of a comparison, unchecked."""
    return _parted(read_toml(path), path)


def _parted(table: dict[str, Any], path: Path) -> tuple[Study, Any, Any]:
    simulated, comparison = table.pop("simulation", None), table.pop("comparison", None)
    table.pop("tradeoff", None)
    return study_from_table(table, str(path)), simulated, comparison


def _checked(kind: type[Table], table: Any, where: str) -> Table | None:
    if table is None:
        return None
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise HemoFedError(explain(error, where), ExitCode.BAD_STUDY) from None
