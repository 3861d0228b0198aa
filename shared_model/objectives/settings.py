"""The `[objective]` table of a study: a row of the catalogue, and its settings."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared_model.objectives.catalogue import DEFAULT_METHOD, METHODS, Method
from shared_model.objectives.draws import DrawSettings
from shared_model.objectives.facts import equal_distance
from shared_model.objectives.losses import Reduction
from shared_model.objectives.mining import Negatives, Positives
from shared_model.objectives.relations import RELATIONS, Relation
from shared_model.objectives.similarity import EmbeddingDistance

MINED = ("positives", "negatives", "farthest_k", "nearest_share")
USED_BY_LOSS = {
    "none": (),
    "triplet": (*MINED, "margin", "embedding_distance", "reduction"),
    "margin": (*MINED, "margin", "beta"),
    "angular": (*MINED, "angle_degrees"),
    "info_nce": ("temperature", "learn_temperature"),
    "info_nce_inside_log": ("temperature",),
    "relative": ("temperature",),
    "rank_n_contrast": ("temperature",),
    "tf_c": ("temperature", "consistency_weight", "consistency_margin"),
    "cpc": ("temperature", "horizon"),
    "masked_reconstruction": (),
}
LARGEST_INVERSE_TEMPERATURE = 100.0  # of a trained temperature, as in CLIP (Radford et al. 2021): else it runs away
USED_BY_DRAW = {"around_events": ("window_days", "random_split"), "whole_patients": ("ecgs_per_patient",)}


class ObjectiveSettings(BaseModel):
    """The objective of pretraining: a row of the catalogue and its settings; the row gives defaults.

    A setting that the row does not look at is refused, so that nobody believes to have changed something.

    Attributes:
        margin: of the triplet and margin losses, in units of `embedding_distance`.
        positives: the nearest other ECG, or a random one within distance 0 (the same class).
        negatives: all ECGs beyond the nearest `nearest_share`, one of the `farthest_k` farthest, a random one, or one
            that the embedding finds hard.
        embedding_distance: cosine distance of L2-normalised embeddings, or squared L2 as published.
        reduction: mean over the triplets inside the margin, or over all of them as published.
        beta: margin loss: where the boundary between near and far starts; it is trained.
        angle_degrees: angular loss: the largest angle at the negative.
        temperature: contrastive losses: what similarities are divided by.
        learn_temperature: `temperature` is the start of a trained parameter.
        radius: two ECGs this near are a pair: 0 where the relation is yes or no.
        consistency_weight: TF-C: lambda, the share of the losses inside each domain.
        consistency_margin: TF-C: delta of the paper's eq. 3; 0 is NT-Xent between an ECG and its spectrum, as the
            published code trains.
        horizon: CPC: how many steps of 64 ms ahead are predicted; an ECG has 156.
        window_days, random_split, ecgs_per_patient: as `draws.DrawSettings`.
        task_weight: methods that learn from labels: weight of the target's own loss beside the metric loss (alpha).
        group_column: Good Views' rhythm: the label column whose equal values make a pair.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = DEFAULT_METHOD
    margin: float = Field(default=0.3, gt=0)
    positives: Positives = "nearest"
    negatives: Negatives = "beyond_nearest"
    farthest_k: int = Field(default=2, ge=1)
    nearest_share: float = Field(default=0.1, ge=0, lt=1)
    embedding_distance: EmbeddingDistance = "cosine"
    reduction: Reduction = "violating"
    beta: float = Field(default=1.2, gt=0)
    angle_degrees: float = Field(default=45.0, gt=0, lt=90)
    temperature: float = Field(default=0.1, gt=0)
    learn_temperature: bool = False
    radius: float = Field(default=0.0, ge=0)
    consistency_weight: float = Field(default=0.2, ge=0, le=1)
    consistency_margin: float = Field(default=0.0, ge=0)
    horizon: int = Field(default=12, ge=1, le=128)
    window_days: float = Field(default=30.0, gt=0)
    random_split: bool = False
    ecgs_per_patient: int = Field(default=4, ge=2)
    task_weight: float = Field(default=0.0, ge=0)
    group_column: str = ""

    @model_validator(mode="before")
    @classmethod
    def _start_from_row(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", DEFAULT_METHOD)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"unknown objective {name!r}: use one of {', '.join(sorted(METHODS))}")
        return {**METHODS[name].defaults, **given}

    @model_validator(mode="after")
    def _used(self) -> "ObjectiveSettings":
        if self.method.relation == "same_group" and not self.group_column:
            raise ValueError(f"{self.name} needs group_column, the label column whose equal values make a pair")
        for key in sorted(self.model_fields_set - {"name"} - settings_of(self.method)):
            if getattr(self, key) != self._start(key):
                raise ValueError(f"{self.name} does not use {key}; remove it")
        if self.learn_temperature and self.temperature * LARGEST_INVERSE_TEMPERATURE < 1:
            raise ValueError("a learned temperature starts at 0.01 or above: below it nothing is learned")
        if "negatives" in settings_of(self.method):
            self._mining()
        return self

    def _mining(self) -> None:
        """Refuse choices of triplets that the relation cannot make, and settings of a choice not taken."""
        classes = self.relation.distance is equal_distance
        if self.positives == "nearest" and classes:
            raise ValueError(f'{self.name}: all ECGs of a class are equally near; use positives = "random"')
        if self.positives == "random" and not classes and self.method.relation != "label":
            raise ValueError(f'{self.name}: no two ECGs are at distance 0; use positives = "nearest"')
        if self.negatives == "softhard" and self.positives != "random":
            raise ValueError(f'{self.name}: negatives = "softhard" needs classes, positives = "random"')
        for key, value in {"farthest_k": "farthest", "nearest_share": "beyond_nearest"}.items():
            if self.negatives != value and getattr(self, key) != self._start(key):
                raise ValueError(f'{key} is used with negatives = "{value}" only; remove it')

    def _start(self, key: str) -> Any:
        """What a setting is if nobody gives it."""
        return self.method.defaults.get(key, ObjectiveSettings.model_fields[key].default)

    @property
    def method(self) -> Method:
        """The row."""
        return METHODS[self.name]

    @property
    def relation(self) -> Relation:
        """How this objective describes and compares ECGs."""
        return RELATIONS[self.method.relation]

    @property
    def draw_settings(self) -> DrawSettings:
        """What the row's draw is told."""
        return DrawSettings(self.window_days, self.random_split, self.ecgs_per_patient)


def settings_of(method: Method) -> set[str]:
    """The settings that a row looks at."""
    used = {*USED_BY_LOSS[method.loss], *USED_BY_DRAW.get(method.draw, ())}
    if method.relation == "same_group":
        used.add("group_column")
    if method.relation == "wave_attributes" and method.loss.startswith("info_nce"):
        used.add("radius")
    if method.labels:
        used.add("task_weight")
    return used
