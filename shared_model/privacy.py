"""The `[privacy]` table of a study: how much of a patient may show in what leaves a hospital, and by which plan.

The unit is the patient, neighbours differ by adding or removing one patient at one hospital. Everything here is public:
the plan is fixed before the first step and is the same at every hospital.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_ORDER = 8.0
Trained = Literal["all", "last_stage", "norms_and_biases", "head"]


class Settings(BaseModel):
    """A frozen table; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrivatePhase(Settings):
    """How a phase of training is made private: the sampled Gaussian mechanism over patients.

    Attributes:
        sampling_rate: q: each patient is in a step with this probability, independently of all others.
        noise_multiplier: sigma: the noise's SD in units of `clip_norm`.
        clip_norm: C: the longest gradient, in L2, that one patient may contribute to a step.
        steps_per_round: steps that a hospital takes before its weights leave it.
        units: m: ECGs of a patient that are drawn for a step; their mean gradient is what is clipped.
        trained: which weights are changed: fewer of them drown in less noise. `norms_and_biases` are those alone (Bu et
            al. 2022, arXiv:2210.00036), `last_stage` the encoder's last stage and embedding, `head` no part of the
            encoder; the head is always among them in fine-tuning.
        spare_rounds: rounds beyond the phase's own that the plan pays for, since a round that a crash cut short is
            spent and cannot be had back.
    """

    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    steps_per_round: int = Field(ge=1)
    units: int = Field(default=4, ge=1, le=64)
    trained: Trained = "all"
    spare_rounds: int = Field(default=1, ge=0)


class PrivacySettings(Settings):
    """A study's share of each hospital's budget, and what it is spent on.

    Attributes:
        epsilon, delta: the share: what the whole plan may cost any one patient. A hospital sets it aside when it
            admits the study, and does not get it back.
        accounting: "plan": parameters are fixed here and composed exactly; "filter": they may change from round to
            round, within the share, by a Renyi filter at `order`.
        order: of the filter alone; fixed here, since a filter that looks for its best order is none.
        bank_sha256: the file of public ECGs that positives and negatives of pretraining are looked for in.
        bank_weight: weight of the term that pulls an ECG to its nearest bank ECG, beside that of its own other view.
        pretrain, finetune: how these phases are made private. A phase that a study has must be here.
        release_epsilon: of each of the two releases of counts (validation and test patients).
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    accounting: Literal["plan", "filter"] = "plan"
    order: float = Field(default=DEFAULT_ORDER, gt=1)
    bank_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    bank_weight: float = Field(default=1.0, ge=0)
    pretrain: PrivatePhase | None = None
    finetune: PrivatePhase | None = None
    release_epsilon: float = Field(default=0.25, gt=0)

    @model_validator(mode="after")
    def _order(self) -> "PrivacySettings":
        # By its value, not by whether it was given: a study that travelled as JSON has every key given.
        if self.accounting == "plan" and self.order != DEFAULT_ORDER:
            raise ValueError('order is used with accounting = "filter" only; remove it')
        if self.pretrain is not None and self.pretrain.trained == "head":
            raise ValueError('pretrain.trained = "head" leaves nothing to train; use another, or leave pretraining out')
        return self

    def phase(self, task: str) -> PrivatePhase | None:
        """How a task is made private, or None."""
        return {"pretrain": self.pretrain, "finetune": self.finetune}.get(task)
