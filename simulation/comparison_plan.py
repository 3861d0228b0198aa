"""The `[comparison]` table of a study file: which methods, ways of sharing, shares of labels and seeds are compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared_model.objectives.catalogue import METHODS

Mode = Literal["local", "federated", "pooled"]
Task = Literal["classification", "regression"]
Reading = Literal["frozen", "finetuned"]

BASELINE = "supervised"
WITHOUT = "without-"
LOCAL = "local-"


class Block(BaseModel):
    """Some methods and how widely they are compared.

    Attributes:
        methods: rows of the catalogue.
        modes: each hospital alone, all together without moving data, all data in one place.
        fractions: shares of the labelled training patients, above 0 to 1.
        seeds: how many; the first is 1.
        readings: linear probes on the frozen encoder, and fine-tuning.
        tasks: the target above its threshold, and its value.
        leave_one_out_seeds: of how many seeds a federation is also trained without each hospital and tested on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = ("local", "federated", "pooled")
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    seeds: int = Field(default=5, ge=1)
    readings: tuple[Reading, ...] = ("frozen", "finetuned")
    tasks: tuple[Task, ...] = ("classification",)
    leave_one_out_seeds: int = Field(default=0, ge=0)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}: use one of {', '.join(sorted(METHODS))}")
        return methods

    @field_validator("fractions")
    @classmethod
    def _shares(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
            raise ValueError("fractions lie above 0, up to 1, and there is at least one")
        return tuple(sorted(set(fractions)))


class Comparison(Block):
    """The table: the methods compared in full, and `further` ones compared less widely.

    `supervised` is always among the methods, since all others are held against it.
    """

    further: tuple[Block, ...] = ()

    @model_validator(mode="after")
    def _no_method_twice(self) -> "Comparison":
        names = [name for block in self.blocks for name in block.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands in two tables")
        if BASELINE not in self.methods:
            raise ValueError(f"methods lacks {BASELINE!r}, which all others are held against")
        return self

    @property
    def blocks(self) -> tuple[Block, ...]:
        """This table and the further ones."""
        return (self, *self.further)


@dataclass(frozen=True)
class Job:
    """One method, trained by one arm under one seed: pretrained once, then read at every share of labels.

    Attributes:
        arm: "federated", "pooled", "local-<site>" or "without-<site>" (a federation of all others).
    """

    method: str
    arm: str
    seed: int
    fractions: tuple[float, ...]
    readings: tuple[Reading, ...]
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """Folder of its files, and what a person sees."""
        return f"{self.method}/{self.arm}/seed-{self.seed}"


def jobs_of(comparison: Comparison, sites: Sequence[str]) -> list[Job]:
    """All jobs, those first that say most: of each table a whole seed of every method before the next seed."""
    order = {"federated": 0, "pooled": 1}

    def rank(job: Job) -> tuple[int, int]:
        return job.seed, order.get(job.arm, 3 if job.arm.startswith(WITHOUT) else 2)

    return [job for block in comparison.blocks for job in sorted(_jobs(block, sites), key=rank)]


def _jobs(block: Block, sites: Sequence[str]) -> Iterator[Job]:
    for method in block.methods:
        for seed in range(1, block.seeds + 1):
            for arm in arms_of(block, sites, seed):
                # Of a hospital that is left out all labels are asked for: it is a question of place, not of scarcity.
                fractions = block.fractions[-1:] if arm.startswith(WITHOUT) else block.fractions
                yield Job(method, arm, seed, fractions, block.readings, block.tasks)


def arms_of(block: Block, sites: Sequence[str], seed: int) -> list[str]:
    """Names of the arms of one seed."""
    arms: list[str] = [mode for mode in ("federated", "pooled") if mode in block.modes]
    if "local" in block.modes:
        arms += [LOCAL + site for site in sites]
    if seed <= block.leave_one_out_seeds and len(sites) > 1:
        arms += [WITHOUT + site for site in sites]
    return arms


def trained_on(arm: str, sites: Sequence[str]) -> list[str]:
    """The sites whose training patients an arm learns from."""
    if arm.startswith(LOCAL):
        return [arm.removeprefix(LOCAL)]
    return [site for site in sites if arm != WITHOUT + site]


def judged_on(arm: str, sites: Sequence[str]) -> list[str]:
    """The sites whose test patients an arm is judged on."""
    if arm.startswith(LOCAL) or arm.startswith(WITHOUT):
        return [arm.split("-", 1)[1]]
    return list(sites)
