"""One step of pretraining: a batch of ECGs becomes views, the views embeddings, embeddings and relation a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from shared_model.encoder import Encoder
from shared_model.objectives.contrastive import info_nce
from shared_model.objectives.losses import Diagnostics, angular_loss, margin_loss, triplet_loss
from shared_model.objectives.mining import Triplets, mine
from shared_model.objectives.ranking import relative_contrastive
from shared_model.objectives.settings import LARGEST_INVERSE_TEMPERATURE, ObjectiveSettings
from shared_model.objectives.views import VIEWS
from shared_model.reconstruction import Decoder, Reconstructor, masked_reconstruction
from shared_model.recurrent import cpc_loss
from shared_model.time_frequency import tf_c_loss

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """n unlabelled ECGs of one site.

    Attributes:
        signals: (n, 12, 2500) float32, mV, 250 Hz, 0 where missing.
        described: (n, width) float32: what the objective's relation compares.
        record: (n,) int64: rows with one code are segments of one record.
        task_loss: of methods that learn from labels: the head's output (n,) -> the target's own loss.
    """

    signals: Tensor
    described: Tensor
    record: Tensor
    task_loss: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Parts:
    """The networks of a step.

    Attributes:
        encoder: the network itself, for methods that look inside.
        embed: (rows, 12, time) -> (rows, embedding_dim) through it, in pieces where memory is short.
        pretext: as `pretext.build_pretext`.
        head: of methods that use `task_loss`.
        learned_distance: (n, 12, 2500) -> (n, n), of a network that is trained already.
    """

    encoder: nn.Module
    embed: Embed
    pretext: Mapping[str, nn.Module]
    head: Callable[[Tensor], Tensor] | None = None
    learned_distance: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """All that a loss may look at."""

    settings: ObjectiveSettings
    parts: Parts
    batch: Batch
    views: tuple[Tensor, ...]
    generator: torch.Generator


@dataclass(frozen=True)
class Pairs:
    """Who is near whom among the rows of all views, the first view's rows first.

    Attributes:
        distance: (rows, rows) float32; +inf where two cannot be compared.
        excluded: (rows, rows) bool: a row and itself; of a single view also segments of one record.
        candidates: (rows, rows) bool: pairs that a contrastive loss compares; None is all.
    """

    distance: Tensor
    excluded: Tensor
    candidates: Tensor | None


Loss = Callable[[Step], tuple[Tensor, Diagnostics]]


def pretraining_step(
    settings: ObjectiveSettings, parts: Parts, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Diagnostics]:
    """Loss of one batch; the caller takes the step.

    A batch from which the method can learn nothing (one patient, fewer than three records, no pair) gives a loss of 0
    with zero gradients and `usable_share` 0; `losses.summarise` counts such batches.

    Args:
        generator: draws views and negatives.
    """
    with exact(batch.signals):
        views = VIEWS[settings.method.views](batch.signals, generator)
    return LOSSES[settings.method.loss](Step(settings, parts, batch, views, generator))


def pairs_of(step: Step) -> Pairs:
    """The relation between all rows, and which of them are compared."""
    signals, views = step.batch.signals, len(step.views)
    relation = step.settings.relation
    with torch.no_grad(), exact(signals):
        if relation.learned:
            assert step.parts.learned_distance is not None
            distance = step.parts.learned_distance(signals)
        else:
            distance = relation.distance(step.batch.described)
    record = step.batch.record
    same = record[:, None] == record[None, :]
    place = torch.arange(len(signals), device=signals.device)
    view = torch.arange(views, device=signals.device).repeat_interleave(len(signals))
    side = place >= len(signals) // 2
    apart = {
        "all": None,
        "across_views": view[:, None] != view[None, :],
        "across_pairs": side[:, None] != side[None, :],
    }
    itself = torch.eye(views * len(signals), dtype=torch.bool, device=signals.device)
    return Pairs(
        distance.repeat(views, views),
        same | itself if views == 1 else itself,
        apart[step.settings.method.candidates],
    )


def exact(like: Tensor) -> torch.autocast:
    """Single precision, whatever the networks run in: bfloat16 cannot tell near from nearer, and similarities over a
    small temperature, or squares that nearly cancel, lose all their digits."""
    return torch.autocast(like.device.type, enabled=False)


def embed_views(step: Step) -> Tensor:
    """(views * n, embedding_dim) float32, the first view's rows first."""
    return step.parts.embed(torch.cat(step.views)).float()


def projected(step: Step, embeddings: Tensor) -> Tensor:
    """What a contrastive loss looks at: the projector's output where the row has one."""
    return step.parts.pretext["projector"](embeddings).float() if step.settings.method.projector else embeddings


def mined(step: Step, loss: Callable[[Tensor, Triplets], tuple[Tensor, Diagnostics]]) -> tuple[Tensor, Diagnostics]:
    """Triplets by the settings, their loss, and the target's own loss beside it."""
    settings, embeddings, pairs = step.settings, embed_views(step), pairs_of(step)
    with exact(embeddings):
        triplets = mine(
            pairs.distance,
            pairs.excluded,
            settings.negatives,
            step.generator,
            settings.farthest_k,
            settings.nearest_share,
            positives=settings.positives,
            embeddings=embeddings.detach(),
            margin=settings.margin,
            embedding_distance=settings.embedding_distance,
        )
        return with_task(step, embeddings, loss(embeddings, triplets))


def with_task(step: Step, embeddings: Tensor, metric: tuple[Tensor, Diagnostics]) -> tuple[Tensor, Diagnostics]:
    """The metric loss plus `task_weight` times the target's own (alpha in the source)."""
    loss, seen = metric
    if step.settings.task_weight > 0 and step.batch.task_loss is not None and step.parts.head is not None:
        loss = loss + step.settings.task_weight * step.batch.task_loss(step.parts.head(embeddings))
    return loss, seen


def triplet(step: Step) -> tuple[Tensor, Diagnostics]:
    """Triplet loss."""
    settings = step.settings
    return mined(
        step, lambda e, t: triplet_loss(e, t, settings.margin, settings.embedding_distance, settings.reduction)
    )


def margin(step: Step) -> tuple[Tensor, Diagnostics]:
    """Margin loss with a trained boundary."""
    return mined(step, lambda e, t: margin_loss(e, t, step.parts.pretext["beta"](), step.settings.margin))


def angular(step: Step) -> tuple[Tensor, Diagnostics]:
    """Angular loss."""
    return mined(step, lambda e, t: angular_loss(e, t, step.settings.angle_degrees))


def contrast(step: Step, inside_log: bool = False) -> tuple[Tensor, Diagnostics]:
    """InfoNCE over all rows, or across views or pairs."""
    settings, seen, pairs = step.settings, projected(step, embed_views(step)), pairs_of(step)
    temperature: float | Tensor = settings.temperature
    if settings.learn_temperature:
        temperature = 1 / step.parts.pretext["log_inverse_temperature"]().exp().clamp(max=LARGEST_INVERSE_TEMPERATURE)
    with exact(seen):
        return info_nce(
            seen,
            pairs.distance,
            pairs.excluded,
            temperature,
            radius=settings.radius,
            candidates=pairs.candidates,
            positives="sum_inside_log" if inside_log else "each",
        )


def relative(step: Step) -> tuple[Tensor, Diagnostics]:
    """RelCon: every candidate against those farther than it."""
    embeddings, pairs = embed_views(step), pairs_of(step)
    with exact(embeddings):
        return relative_contrastive(embeddings, pairs.distance, pairs.excluded, step.settings.temperature)


def rank_n_contrast(step: Step) -> tuple[Tensor, Diagnostics]:
    """The same by the distance of labels, as Rank-N-Contrast defines it."""
    embeddings, pairs = embed_views(step), pairs_of(step)
    with exact(embeddings):
        metric = relative_contrastive(
            embeddings,
            pairs.distance,
            pairs.excluded,
            step.settings.temperature,
            ties="inclusive",
            similarity="negative_l2",
            reduction="mean",
        )
        return with_task(step, embeddings, metric)


def time_frequency(step: Step) -> tuple[Tensor, Diagnostics]:
    """TF-C: the two domains, and their consistency."""
    settings, (original, augmented) = step.settings, step.views
    return tf_c_loss(
        step.parts.encoder,
        step.parts.pretext["projectors"],
        original,
        augmented,
        step.generator,
        temperature=settings.temperature,
        consistency_weight=settings.consistency_weight,
        consistency_margin=settings.consistency_margin or None,
    )


def future(step: Step) -> tuple[Tensor, Diagnostics]:
    """CPC: what comes next, from what was."""
    (signals,) = step.views
    predictors = step.parts.pretext["predictors"]
    return cpc_loss(step.parts.encoder, predictors, signals, step.generator, step.settings.temperature)


def reconstruction(step: Step) -> tuple[Tensor, Diagnostics]:
    """What is hidden, from what is not."""
    (signals,) = step.views
    network = Reconstructor(cast(Encoder, step.parts.encoder), cast(Decoder, step.parts.pretext["decoder"]))
    return masked_reconstruction(network, signals, step.generator)


LOSSES: Mapping[str, Loss] = {
    "triplet": triplet,
    "margin": margin,
    "angular": angular,
    "info_nce": contrast,
    "info_nce_inside_log": lambda step: contrast(step, inside_log=True),
    "relative": relative,
    "rank_n_contrast": rank_n_contrast,
    "tf_c": time_frequency,
    "cpc": future,
    "masked_reconstruction": reconstruction,
}
