"""The outcome of a study on disk: `results.json` and `metrics.jsonl`, typed (docs/results-format.md).

Three rules hold everywhere, and the models refuse what breaks them:

- a figure that was not computed is null, and the object that holds it says why in `reason`;
- a suppressed group has no figure at all: suppressed is never zero;
- counts of patients are published rounded to 5.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

RoundedCount = Annotated[int, Field(ge=0, multiple_of=5)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """A frozen table: an unknown key, NaN or an infinity is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Explained(Record):
    """A table whose `figures` may be null, but only together with a `reason`."""

    figures: ClassVar[tuple[str, ...]] = ()
    reason: str | None = None

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> "Explained":
        missing = [name for name in self.figures if getattr(self, name) is None]
        if missing and not self.reason:
            raise ValueError(f"{', '.join(missing)} is null without a reason")
        return self


class Estimate(Explained):
    """One figure with its 95% interval. `bound`: how far binning may have moved it; null: not binned, or the counts are
    noisy."""

    figures: ClassVar[tuple[str, ...]] = ("value", "low", "high")
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    method: str | None = None

    @model_validator(mode="after")
    def _interval_is_one(self) -> "Estimate":
        # The value may lie outside: a percentile bootstrap of a few patients can do that.
        if self.value is None and (self.low is not None or self.high is not None):
            raise ValueError("an interval without a value")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval {self.low:g} to {self.high:g} is the wrong way round")
        return self


class PrecisionRecall(Estimate):
    """Area under the precision-recall curve; a random score reaches `prevalence`."""

    prevalence: Probability | None = None


class CalibrationBin(Record):
    """Patients with similar predicted probability: the mean of the prediction against what was observed."""

    mean_predicted: Probability
    observed: Probability
    low: Probability
    high: Probability
    patients: RoundedCount | None = None


class Calibration(Explained):
    """Perfect: intercept 0, slope 1, expected over observed 1, `expected_error` (of the bins shown) 0."""

    figures: ClassVar[tuple[str, ...]] = ("intercept", "slope", "expected_over_observed")
    intercept: float | None = None
    slope: float | None = None
    expected_over_observed: float | None = None
    expected_error: float | None = None
    bins: tuple[CalibrationBin, ...] = ()


class OperatingPoint(Explained):
    """What the model does at the threshold that was fixed on the validation split."""

    figures: ClassVar[tuple[str, ...]] = ("threshold", "sensitivity", "specificity", "ppv", "npv")
    threshold: float | None = None
    sensitivity: Estimate | None = None
    specificity: Estimate | None = None
    ppv: Estimate | None = None
    npv: Estimate | None = None


class Regression(Explained):
    """Errors in the target's own unit (mmHg for mPCWP). `mean_predictor_rmse`: always saying the mean."""

    figures: ClassVar[tuple[str, ...]] = ("rmse", "mae", "pearson_r", "r2", "bias", "mean_predictor_rmse")
    rmse: float | None = None
    mae: float | None = None
    pearson_r: float | None = None
    r2: float | None = None
    bias: float | None = None
    mean_predictor_rmse: float | None = None


class TargetResult(Explained):
    """The federated model on the test split, one index ECG a patient, except `all_ecg_auroc`."""

    figures: ClassVar[tuple[str, ...]] = ("patients", "positives", "brier")
    kind: Literal["classification", "regression"]
    patients: RoundedCount | None = None
    positives: RoundedCount | None = None
    auroc: Estimate
    auprc: PrecisionRecall
    brier: float | None = None
    calibration: Calibration
    operating_point: OperatingPoint
    roc: tuple[tuple[Probability, Probability], ...] = ()
    all_ecg_auroc: Estimate
    regression: Regression | None = None

    @model_validator(mode="after")
    def _regression_where_asked(self) -> "TargetResult":
        if (self.kind == "regression") != (self.regression is not None):
            raise ValueError("regression is filled for a target of kind regression, and null for no other")
        return self


class SiteSummary(Explained):
    """One hospital's data. `prevalence` is of the study's own target among labelled patients."""

    figures: ClassVar[tuple[str, ...]] = (
        "patients",
        "records",
        "train_patients",
        "validation_patients",
        "test_patients",
        "labelled_train_patients",
        "prevalence",
    )
    name: str = Field(min_length=1)
    simulated: bool
    patients: RoundedCount | None = None
    records: RoundedCount | None = None
    train_patients: RoundedCount | None = None
    validation_patients: RoundedCount | None = None
    test_patients: RoundedCount | None = None
    labelled_train_patients: RoundedCount | None = None
    prevalence: Probability | None = None
    note: str = ""


class GroupResult(Explained):
    """The study's own target in one group of test patients. Suppressed: no figure, and the reason."""

    figures: ClassVar[tuple[str, ...]] = (
        "patients",
        "positives",
        "auroc",
        "sensitivity",
        "specificity",
        "calibration_slope",
        "expected_over_observed",
    )
    suppressed: bool = False
    patients: RoundedCount | None = None
    positives: RoundedCount | None = None
    auroc: Estimate | None = None
    sensitivity: Estimate | None = None
    specificity: Estimate | None = None
    calibration_slope: float | None = None
    expected_over_observed: float | None = None
    regression: Regression | None = None

    @model_validator(mode="after")
    def _suppressed_shows_nothing(self) -> "GroupResult":
        """Guarantee: a group marked suppressed carries no number; its `reason` is free text, unchecked."""
        shown = [name for name in (*self.figures, "regression") if getattr(self, name) is not None]
        if self.suppressed and shown:
            raise ValueError(f"a suppressed group must not show {', '.join(shown)}")
        return self


class SiteResult(GroupResult):
    """One hospital's test patients."""

    name: str = Field(min_length=1)


class SubgroupResult(GroupResult):
    """One subgroup over all hospitals, such as partition `sex`, group `female`."""

    partition: str
    group: str


class WorstGroup(Record):
    """The subgroup with the lowest AUROC among those shown."""

    partition: str
    group: str
    auroc: Estimate


class Gap(Estimate):
    """The largest difference in AUROC between two disjoint groups of one partition (better minus worse)."""

    partition: str | None = None
    groups: tuple[str, ...] = ()
    note: str = ""


class Fairness(Explained):
    """Null where fewer than two groups of a partition could be shown."""

    figures: ClassVar[tuple[str, ...]] = ("worst_group", "largest_gap")
    worst_group: WorstGroup | None = None
    largest_gap: Gap | None = None


class SiteMean(Record):
    """AUROC of each hospital's own model and their mean; `method` says on whose test patients."""

    mean: float | None = None
    sites: dict[str, float | None] = {}
    method: str = ""


class LocalOnly(Explained):
    """Each hospital alone. A site without a model (no labels, say) is null and named in `reason`."""

    auroc: SiteMean = SiteMean()

    @model_validator(mode="after")
    def _null_site_has_a_reason(self) -> "LocalOnly":
        if None in (self.auroc.mean, *self.auroc.sites.values()) and not self.reason:
            raise ValueError("auroc has a null without a reason")
        return self


class Pooled(Record):
    """One model trained on all hospitals' records in one place: possible only in simulation."""

    auroc: Estimate


class Comparisons(Record):
    """Paired differences in AUROC on the same test patients, for the study's own target."""

    federated_minus_local_only: Estimate
    federated_minus_pooled: Estimate


class Baselines(Record):
    """By target: what the federated model is held against."""

    local_only: dict[str, LocalOnly]
    pooled: dict[str, Pooled]
    comparisons: Comparisons
    federated: SiteMean = SiteMean()
    pooled_by_site: SiteMean = SiteMean()
    oracle_by_site: SiteMean = SiteMean()


class Oracle(Explained):
    """What the best possible reader would reach on simulated ECGs; `definition` says what it knows."""

    figures: ClassVar[tuple[str, ...]] = ("value", "on_test_patients", "noise_ceiling_auroc")
    value: float | None = None
    on_test_patients: float | None = None
    patients: int | None = None
    noise_ceiling_auroc: float | None = None
    definition: str = ""


class Threshold(Explained):
    """The probability at and above which the model says yes, and how it was chosen, never on test."""

    figures: ClassVar[tuple[str, ...]] = ("probability",)
    probability: Probability | None = None
    rule: str = ""
    chosen_on: Literal["validation"] = "validation"


class Privacy(Record):
    """What guarded the patients. `epsilon` and `delta` hold for the whole study, for one `unit` more or less at one
    hospital; `release_epsilon` and `count_noise_sd` are of the test counts. All null where training was not private."""

    differentially_private: bool = False
    secure_aggregation: bool = False
    unit: Literal["patient"] | None = None
    epsilon: float | None = None
    delta: float | None = None
    release_epsilon: float | None = None
    count_noise_sd: float | None = None
    disclosure_tier: str = "in the clear"
    score_bins: int | None = None
    minimum_cell: int = 11
    rounded_to: int = 5


class ModelSummary(Record):
    """The model that was judged."""

    encoder: str
    parameters: int
    weights_sha256: str | None = None


class Results(Record):
    """results.json, whole. The first of `targets` is the study's own."""

    schema_version: Literal[1] = 1
    name: str
    created_at: str
    hemofed_version: str
    release_sha256: str | None = None
    command: str = ""
    environment: dict[str, str] = {}
    engine: str
    seed: int
    simulated: bool
    seconds: float | None = None
    study: dict[str, Any]
    study_digest: str = ""
    model: ModelSummary | None = None
    privacy: Privacy = Privacy()
    sites: tuple[SiteSummary, ...]
    left_out: dict[str, str] = {}
    oracle_auroc: float | None = None
    oracle: Oracle
    threshold: Threshold
    targets: tuple[str, ...] = Field(min_length=1)
    test: dict[str, TargetResult]
    site_results: tuple[SiteResult, ...]
    subgroups: tuple[SubgroupResult, ...]
    fairness: Fairness
    baselines: Baselines

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Results":
        if set(self.test) != set(self.targets):
            raise ValueError("test and targets name different targets")
        if self.oracle_auroc != self.oracle.value:
            raise ValueError("oracle_auroc and oracle.value differ")
        for name in (self.baselines.local_only, self.baselines.pooled):
            if self.own_target not in name:
                raise ValueError(f"baselines leave out {self.own_target}; give null with a reason")
        return self

    @property
    def own_target(self) -> str:
        """The target the study was made for, such as `mpcwp_gt_18`."""
        return self.targets[0]

    @property
    def own(self) -> TargetResult:
        """The result for the study's own target."""
        return self.test[self.own_target]


class RoundMetrics(Record):
    """One line of metrics.jsonl: one round of one phase. A value that is not finite is written as null."""

    phase: Literal["distance", "pretrain", "finetune", "evaluate"]
    round: int = Field(ge=0)
    seconds: float | None = None
    learning_rate: float | None = None
    sites_replied: tuple[str, ...] = ()
    sites_failed: tuple[str, ...] = ()
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_auroc: float | None = None
    validation_rmse: float | None = None
    violating_share: float | None = None
    mean_cosine: float | None = None
    hub_share: float | None = None
    signal_to_noise: float | None = None
    warning: str | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _finite_or_null(cls, value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value
