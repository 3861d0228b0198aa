"""Every method as one row: views x relation x loss, its source, its published settings and our departures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from shared_model.objectives.losses import Diagnostics, EmbeddingDistance, Reduction, triplet_loss
from shared_model.objectives.mining import Negatives, mine
from shared_model.objectives.relations import RELATIONS, Relation
from shared_model.objectives.views import VIEWS

SSL_DML = "SSL-DML: Jeong, Stultz and Ghassemi, MLHC 2023, PMLR 219 (arXiv:2308.04650)"
SSL_DML_PUBLISHED: Mapping[str, object] = {
    "margin": 0.2,
    "negatives": "farthest",
    "farthest_k": 2,
    "embedding_distance": "squared_l2",
    "reduction": "all",
    "batch_size": 64,
    "optimizer": "Adam",
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "epochs": 100,
}
SSL_DML_DEPARTURES = (
    "embeddings are L2-normalised, so that the margin has a scale; negatives are all ECGs beyond the nearest "
    "10%; the loss is averaged over triplets inside the margin; AdamW without decay on norms and biases"
)


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        views: key of `views.VIEWS`.
        relation: key of `relations.RELATIONS`.
        loss: what is minimised.
        defaults: what an `ObjectiveSettings` of this name starts from, where it differs from the class's
            defaults.
        published: the source's own hyper-parameters.
        citation: the source.
        departures: where we differ from it and why, one sentence.
    """

    name: str
    views: str
    relation: str
    loss: str
    citation: str
    departures: str
    published: Mapping[str, object]
    defaults: Mapping[str, object] = field(default_factory=dict)


def _ssl_dml(relation: str, departures: str) -> Method:
    name, text = f"ssl_dml_{relation}", f"{departures}; {SSL_DML_DEPARTURES}"
    return Method(name, "as_is", relation, "triplet", SSL_DML, text, SSL_DML_PUBLISHED)


METHODS = {
    method.name: method
    for method in (
        _ssl_dml("l1", "mean absolute difference, as the code does under the name Euclidean, at 62.5 Hz"),
        _ssl_dml("l2", "the Euclidean distance the paper names, at 62.5 Hz"),
        _ssl_dml("dtw", "warped over time, where the code warped over leads; II, V1, V5 at 62.5 Hz, band +-1 s"),
        _ssl_dml("dtw_12_lead", "warped over time, where the code warped over leads; 62.5 Hz, band +-1 s"),
        _ssl_dml("median_beat", "R-aligned median beat, RR and its variation, as raw samples measure beat phase"),
    )
}
DEFAULT_METHOD = "ssl_dml_median_beat"


class ObjectiveSettings(BaseModel):
    """The objective of pretraining: a row of the catalogue and its settings; the row gives defaults.

    Attributes:
        margin: of the triplet loss, in units of `embedding_distance`.
        negatives: all ECGs beyond the nearest `nearest_share`, one of the `farthest_k` farthest, or a random
            one.
        embedding_distance: cosine distance of L2-normalised embeddings, or squared L2 as published.
        reduction: mean over the triplets inside the margin, or over all of them as published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = DEFAULT_METHOD
    margin: float = Field(default=0.3, gt=0)
    negatives: Negatives = "beyond_nearest"
    farthest_k: int = Field(default=2, ge=1)
    nearest_share: float = Field(default=0.1, ge=0, lt=1)
    embedding_distance: EmbeddingDistance = "cosine"
    reduction: Reduction = "violating"

    @model_validator(mode="before")
    @classmethod
    def _start_from_row(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", DEFAULT_METHOD)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"unknown objective {name!r}: use one of {', '.join(sorted(METHODS))}")
        return {**METHODS[name].defaults, **given}

    @property
    def method(self) -> Method:
        """The row."""
        return METHODS[self.name]

    @property
    def relation(self) -> Relation:
        """How this objective describes and compares ECGs."""
        return RELATIONS[self.method.relation]


def pretraining_step(
    settings: ObjectiveSettings,
    encoder: Callable[[Tensor], Tensor],
    signals: Tensor,
    descriptors: Tensor,
    same_record: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Diagnostics]:
    """Loss of one batch of unlabelled ECGs; the caller takes the step.

    A batch in which no ECG has both a positive and a negative (fewer than three records) gives a loss of 0
    with zero gradients and `usable_share` 0; `losses.summarise` counts such batches.

    Args:
        signals: (batch, 12, 2500) float32, mV, 250 Hz, 0 where missing.
        descriptors: (batch, width) float32, from `settings.relation.describe`, on the device of `signals`.
        same_record: (batch, batch) bool, True where two rows are segments of one record.
        generator: draws views and negatives.
    """
    (view,) = VIEWS[settings.method.views](signals, generator)
    embeddings = encoder(view)
    with torch.autocast(signals.device.type, enabled=False):  # bfloat16 cannot tell near from nearer
        distance = settings.relation.distance(descriptors)
        triplets = mine(
            distance, same_record, settings.negatives, generator, settings.farthest_k, settings.nearest_share
        )
        return triplet_loss(embeddings, triplets, settings.margin, settings.embedding_distance, settings.reduction)
