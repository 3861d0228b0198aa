"""What a hospital lets studies cost and ask: `policy.toml` in the site folder. The centre may be stricter only."""

import json
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared_model.errors import ExitCode, HemoFedError
from shared_model.objectives.catalogue import METHODS
from shared_model.study import Study, explain
from shared_model.subgroups import factors_of

POLICY_FILE = "policy.toml"
DECLARED_STEP = 10
Allowed = Literal["pretrain", "finetune", "evaluate"]


class Policy(BaseModel):
    """The hospital's policy. No key has a default: what is not set is refused.

    Attributes:
        epsilon, delta: the most that all studies together may cost one patient of this cohort, ever.
        minimum_cohort: with fewer declared patients a study is refused.
        declared_patients: public number of training patients, a multiple of 10: what sums are divided by, and the
            site's weight. The exact number never leaves.
        declared_labelled_patients: the same of those with a label, for fine-tuning.
        tasks: what a study may do here.
        objectives: rows of the catalogue that a study may use.
        partitions: subgroups that counts may be released by.
        require_privacy: a study without [privacy] is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    minimum_cohort: int = Field(ge=1)
    declared_patients: int = Field(ge=DECLARED_STEP, multiple_of=DECLARED_STEP)
    declared_labelled_patients: int = Field(ge=0, multiple_of=DECLARED_STEP)
    tasks: tuple[Allowed, ...]
    objectives: tuple[str, ...]
    partitions: tuple[str, ...]
    require_privacy: bool

    @field_validator("objectives")
    @classmethod
    def _objectives_known(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        for name in objectives:
            if name not in METHODS:
                raise ValueError(f"{name!r} is not a row of the catalogue; hemofed-sim methods lists them")
        return objectives

    @field_validator("partitions")
    @classmethod
    def _partitions_known(cls, partitions: tuple[str, ...]) -> tuple[str, ...]:
        for partition in partitions:
            try:
                known = set(factors_of(partition)) <= {"sex", "age", "race"}
            except HemoFedError:
                known = False
            if not known:
                raise ValueError(f"partition {partition!r}: use sex, age and race, joined by ' x '")
        return partitions

    @model_validator(mode="after")
    def _labelled_are_patients(self) -> "Policy":
        if self.declared_labelled_patients > self.declared_patients:
            raise ValueError("declared_labelled_patients is above declared_patients")
        return self

    def declared(self, task: str) -> int:
        """The declared number of patients that a task learns from."""
        return self.declared_labelled_patients if task == "finetune" else self.declared_patients


def load_policy(site_dir: Path) -> Policy:
    """Read and check `policy.toml`.

    Raises:
        HemoFedError: it is absent, not TOML, lacks a key or has one that is unknown or bad (POLICY_REFUSED).
    """
    path = site_dir / POLICY_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(
            f"{path}: cannot be read ({error.strerror}), and what no policy allows is refused; write it with the keys "
            f"{', '.join(Policy.model_fields)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _refused(f"{path}: not TOML: {error}; mend that line") from None
    try:
        return Policy.model_validate(table)
    except ValidationError as error:
        missing = [str(fault["loc"][0]) for fault in error.errors() if fault["type"] == "missing"]
        if missing:
            raise _refused(f"{path}: {', '.join(missing)} not set, and nothing is assumed; add it") from None
        raise _refused(explain(error, str(path))) from None


def write_policy(site_dir: Path, policy: Policy) -> None:
    """Write `policy.toml`, whole or not at all. A hospital writes its own by hand; this is for simulated ones."""
    path = site_dir / POLICY_FILE
    partial = path.with_suffix(".partial")
    # A JSON text, number, boolean or list of texts is also a TOML one.
    lines = [f"{key} = {json.dumps(value)}" for key, value in policy.model_dump().items()]
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def check_study(policy: Policy, study: Study) -> None:
    """Whether the policy lets this study in. Looks at no record: cohorts are the declared ones.

    Raises:
        HemoFedError: it does not; the line names every breach (POLICY_REFUSED).
    """
    if found := breaches(policy, study):
        raise _refused(f"{POLICY_FILE} refuses the study {study.name!r}: {'; '.join(found)}")


def breaches(policy: Policy, study: Study) -> list[str]:
    """What a study asks for that the policy does not allow, a line each."""
    return [*_forbidden(policy, study), *_too_small(policy, study), *_too_costly(policy, study)]


def _forbidden(policy: Policy, study: Study) -> list[str]:
    # A distance that is learned belongs to pretraining.
    tasks = dict.fromkeys("pretrain" if task == "distance" else task for task in (*study.phases, "evaluate"))
    partitions = [each for each in study.evaluation.partitions if each not in policy.partitions]
    lines = [f"the task {task} is not in tasks" for task in tasks if task not in policy.tasks]
    if study.objective.name not in policy.objectives:
        lines.append(f"the objective {study.objective.name} is not in objectives")
    return [*lines, *(f"subgroups by {partition} are not in partitions" for partition in partitions)]


def _too_small(policy: Policy, study: Study) -> list[str]:
    return [
        f"{policy.declared(task)} patients are declared for {task}, minimum_cohort is {policy.minimum_cohort}"
        for task in study.phases
        if policy.declared(task) < policy.minimum_cohort
    ]


def _too_costly(policy: Policy, study: Study) -> list[str]:
    privacy = study.privacy
    if privacy is None:
        return ["it has no [privacy], which require_privacy asks for"] if policy.require_privacy else []
    lines = []
    if privacy.epsilon > policy.epsilon:
        lines.append(f"its epsilon of {privacy.epsilon:g} is above {policy.epsilon:g}")
    if privacy.delta > policy.delta:
        lines.append(f"its delta of {privacy.delta:g} is above {policy.delta:g}")
    if Decimal(repr(privacy.delta)) * 10 * policy.declared_patients > 1:
        limit = 1 / (10 * policy.declared_patients)
        lines.append(f"its delta of {privacy.delta:g} is above 1 / (10 x declared_patients) = {limit:g}")
    return lines


def _refused(line: str) -> HemoFedError:
    return HemoFedError(line, ExitCode.POLICY_REFUSED)
