"""What a person declares about a source: which rows to take, and what the files do not say themselves."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from client.records.wfdb_header import HIGHEST_RATE_HZ, LOWEST_RATE_HZ
from shared_model.errors import ExitCode, HemoFedError
from shared_model.leads import LEADS, canonical_lead, millivolt_per_unit

AXES = ("lead-time", "time-lead")
PATIENT_COLUMNS = ("patient_id", "subject_id")


@dataclass(frozen=True)
class ReaderOptions:
    """The reader options of `hemofed-client ingest`; what is empty is not declared.

    Raises:
        HemoFedError: a value is none that the option can have.
    """

    where: tuple[str, ...] = ()
    """COLUMN=VALUE of the archive's table."""
    sampling_rate_hz: float | None = None
    unit: str = ""
    """mV, uV or V."""
    variable: str = ""
    """The array in a MATLAB file; a field of a struct as STRUCT.FIELD."""
    axis: str = ""
    """`lead-time`: a row a lead; `time-lead`: a column a lead."""
    leads: tuple[str, ...] = ()
    """The leads in the order of the array, where it is not the canonical one; canonical names."""

    def __post_init__(self) -> None:
        rate_hz = self.sampling_rate_hz
        if rate_hz is not None and not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
            raise _wrong("--sampling-rate-hz", f"{rate_hz:g}", f"an ECG has {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz")
        for condition in self.where:
            if condition.partition("=")[0].strip().lower() in PATIENT_COLUMNS:
                detail = "the index keeps conditions as they are, and it must hold no patient id; use another column"
                raise _wrong("--where", condition.partition("=")[0], detail)
        if self.unit and millivolt_per_unit(self.unit) is None:
            raise _wrong("--unit", self.unit, "use mV, uV or V")
        if self.axis and self.axis not in AXES:
            raise _wrong("--axis", self.axis, f"use {' or '.join(AXES)}")
        names = [canonical_lead(name) for name in self.leads]
        for name, lead in zip(self.leads, names, strict=True):
            if lead is None:
                raise _wrong("--leads", name, f"use names of {', '.join(LEADS)}")
            if names.count(lead) > 1:
                raise _wrong("--leads", name, "it stands twice")
        object.__setattr__(self, "leads", tuple(names))

    def declared(self) -> dict[str, str]:
        """The options that were given, as on the command line: name -> value."""
        values = {
            "--where": " ".join(self.where),
            "--sampling-rate-hz": "" if self.sampling_rate_hz is None else f"{self.sampling_rate_hz:g}",
            "--unit": self.unit,
            "--variable": self.variable,
            "--axis": self.axis,
            "--leads": ",".join(self.leads),
        }
        return {name: value for name, value in values.items() if value}

    def selection(self) -> list[str]:
        """What tells two ingests of one folder apart, for the index: conditions first, then declarations."""
        declared = [f"{name} {value}" for name, value in self.declared().items() if name != "--where"]
        return [*self.where, *declared]

    @classmethod
    def from_selection(cls, selection: Sequence[str]) -> "ReaderOptions":
        """The options that `selection` was made of, to open an archive again as an earlier ingest did.

        Raises:
            HemoFedError: it names an option that this release does not have.
        """
        declared: dict[str, Any] = {"where": tuple(item for item in selection if not item.startswith("--"))}
        for item in selection[len(declared["where"]) :]:
            option, _, value = item.partition(" ")
            name = option.removeprefix("--").replace("-", "_")
            if name not in {field.name for field in fields(cls)}:
                raise _wrong(option, value, "this release has no such option; use the one that made the store")
            declared[name] = value
        if "sampling_rate_hz" in declared:
            declared["sampling_rate_hz"] = float(declared["sampling_rate_hz"])
        if "leads" in declared:
            declared["leads"] = tuple(declared["leads"].split(","))
        return cls(**declared)

    def refuse_unused(self, format_name: str, takes: Collection[str]) -> None:
        """Raises HemoFedError if an option was given that the reader has no use for: silence would mislead."""
        for name in self.declared():
            if name not in takes:
                used = f"it takes {', '.join(sorted(takes))}" if takes else "its files say all that is needed"
                raise HemoFedError(
                    f"{name}: the format {format_name} has no use for it ({used}); leave it out", ExitCode.USAGE
                )


def _wrong(option: str, value: str, remedy: str) -> HemoFedError:
    return HemoFedError(f"{option} {value}: {remedy}", ExitCode.USAGE)
