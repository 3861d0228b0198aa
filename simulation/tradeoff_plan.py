"""The `[tradeoff]` table of a study file: at which epsilons, from which starts and with what a private study is
tried."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared_model.privacy import Trained

Start = Literal["scratch", "public", "public_and_private"]
BankKind = Literal["shifted", "same"]
WHOLE = 0


class Sweep(BaseModel):
    """Some cells: every epsilon with every start, kind of training, bank and size, under every seed.

    Attributes:
        epsilons: of the whole study; 0 stands for no privacy at all.
        starts: random weights and private pretraining; pretraining on public ECGs and none here; both.
        trained: which weights are changed, as in `[privacy.finetune]`; with public_and_private in pretraining too.
        banks: public ECGs from the shifted generator, or, too good to be had, from the hospitals' own.
        patients: training patients of one hospital alone; 0 is the study's federation.
        seeds: how many; the first is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilons: tuple[float, ...] = (0.0, 8.0, 3.0, 1.0)
    starts: tuple[Start, ...] = ("scratch", "public", "public_and_private")
    trained: tuple[Trained, ...] = ("norms_and_biases",)
    banks: tuple[BankKind, ...] = ("shifted",)
    patients: tuple[int, ...] = (WHOLE,)
    seeds: int = Field(default=5, ge=1)

    @field_validator("epsilons")
    @classmethod
    def _not_negative(cls, epsilons: tuple[float, ...]) -> tuple[float, ...]:
        if not epsilons or min(epsilons) < 0:
            raise ValueError("epsilons are above 0, or 0 for no privacy, and there is at least one")
        return epsilons


class Tradeoff(Sweep):
    """The main sweep, and `further` ones that change one thing.

    Attributes:
        public_patients: of the simulated public archive that the public start is trained on.
        bank_ecgs: of the bank that is made of others of that kind.
    """

    public_patients: int = Field(default=2000, ge=50)
    bank_ecgs: int = Field(default=512, ge=16)
    further: tuple[Sweep, ...] = ()

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """This one and the further ones."""
        return (self, *self.further)


@dataclass(frozen=True)
class Cell:
    """One private study to try. `epsilon` 0 is none; `patients` 0 is the federation."""

    start: Start
    epsilon: float
    trained: Trained
    bank: BankKind
    patients: int
    seed: int

    @property
    def arm(self) -> str:
        """All but the seed, as the name of a folder."""
        size = f"-of-{self.patients}" if self.patients else ""
        epsilon = f"{self.epsilon:g}" if self.epsilon else "none"
        return f"{self.start}-{self.trained}-{self.bank}{size}/epsilon-{epsilon}"

    @property
    def name(self) -> str:
        """Folder of its files."""
        return f"{self.arm}/seed-{self.seed}"


def cells_of(tradeoff: Tradeoff) -> list[Cell]:
    """All cells, each once, whole seeds of a sweep before the next seed."""
    found: dict[Cell, None] = {}
    for sweep in tradeoff.sweeps:
        for seed in range(1, sweep.seeds + 1):
            found |= dict.fromkeys(_cells(sweep, seed))
    return list(found)


def _cells(sweep: Sweep, seed: int) -> Iterator[Cell]:
    for patients in sweep.patients:
        for start in sweep.starts:
            for trained in sweep.trained:
                for bank in sweep.banks if start != "public" else sweep.banks[:1]:
                    for epsilon in sweep.epsilons:
                        yield Cell(start, epsilon, trained, bank, patients, seed)
