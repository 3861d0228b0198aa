"""Every method as one row: draw x views x relation x loss, its source, its published settings and our departures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SSL_DML = "SSL-DML: Jeong, Stultz and Ghassemi, MLHC 2023, PMLR 219 (arXiv:2308.04650)"
SUPERVISED_DML = f"supervised deep metric learning in {SSL_DML}"
GOOD_VIEWS = "Good Views: arXiv:2411.17702"

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
SUPERVISED_DML_PUBLISHED: Mapping[str, object] = {
    "margin": 0.2,
    "beta": 1.2,
    "angle_degrees": 45.0,
    "task_weight": 3.0,
    "embedding_dim": 128,
    "batch_size": 64,
    "optimizer": "Adam",
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
}
GOOD_VIEWS_PUBLISHED: Mapping[str, object] = {
    "temperature": 0.07,
    "embedding_dim": 128,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "epochs": 50,
}
SSL_DML_DEPARTURES = (
    "embeddings are L2-normalised, so that the margin, of 0.3, has a scale; negatives are all ECGs beyond the nearest "
    "10%; the loss is averaged over triplets inside the margin; AdamW without decay on norms and biases"
)
SUPERVISED_DML_DEPARTURES = (
    "embeddings are L2-normalised; ties are never a negative; all labelled training patients are used, where the code "
    "pretrains on one half of them and fine-tunes on the other; the task loss is off unless task_weight is set"
)
ONE_ENCODER = "our encoder, AdamW and schedule, the same for every row"

Private = Literal["no", "bank", "alone"]
EncoderKind = Literal["residual", "time_frequency", "recurrent"]
Candidates = Literal["all", "across_views", "across_pairs"]


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        relation: key of `relations.RELATIONS`: who is near whom.
        loss: key of `step.LOSSES`.
        citation: the source.
        departures: where we differ from it and why, one sentence.
        published: the source's own hyper-parameters, as far as they are known.
        draw: key of `draws.DRAWS`: which ECGs meet in a batch.
        views: key of `views.VIEWS`: how each of them becomes rows to embed.
        candidates: which rows a contrastive loss compares: all, those of different views, or those of different
            sides of a drawn pair.
        defaults: what an `ObjectiveSettings` of this name starts from, where it differs from the class's
            defaults.
        projector: the loss looks at a small network's output, which is thrown away after pretraining.
        encoder: which network is trained; `residual` is the study's ResNet.
        labels: pretraining uses the target's labels, so that it sees labelled training ECGs only.
        pretrains: False leaves the phase out.
        private: how it can be trained under differential privacy: "bank" compares an ECG with public ones alone,
            "alone" with none; "no" compares the patients of a batch with each other, which no clipping makes private.
    """

    name: str
    relation: str
    loss: str
    citation: str
    departures: str
    published: Mapping[str, object] = field(default_factory=dict)
    draw: str = "shuffled"
    views: str = "as_is"
    candidates: Candidates = "all"
    defaults: Mapping[str, object] = field(default_factory=dict)
    projector: bool = False
    encoder: EncoderKind = "residual"
    labels: bool = False
    pretrains: bool = True
    private: Private = "no"


def _ssl_dml(relation: str, departures: str) -> Method:
    text = f"{departures}; {SSL_DML_DEPARTURES}"
    # A learned distance is trained on the patients themselves, and wave attributes may miss in a bank.
    private: Private = "no" if relation in ("learned", "wave_attributes") else "bank"
    return Method(f"ssl_dml_{relation}", relation, "triplet", SSL_DML, text, SSL_DML_PUBLISHED, private=private)


def _supervised_dml(kind: str, relation: str, loss: str, departures: str, **defaults: object) -> Method:
    return Method(
        f"supervised_dml_{kind}",
        relation,
        loss,
        SUPERVISED_DML,
        f"{departures}; {SUPERVISED_DML_DEPARTURES}",
        SUPERVISED_DML_PUBLISHED,
        defaults=defaults,
        labels=True,
        # The others look at a trained boundary, at angles or at who is in a class: not shown for a bank.
        private="bank" if kind == "triplet" else "no",
    )


def _good_views(
    kind: str, relation: str, departures: str, views: str = "as_is", draw: str = "shuffled", **defaults: object
) -> Method:
    return Method(
        f"good_views_{kind}",
        relation,
        "info_nce_inside_log",
        GOOD_VIEWS,
        f"{departures}; {ONE_ENCODER}",
        GOOD_VIEWS_PUBLISHED,
        draw=draw,
        views=views,
        defaults={"temperature": 0.07, **defaults},
    )


NEAREST_AND_FARTHEST = {"negatives": "farthest", "farthest_k": 1}

ROWS = (
    Method(
        "supervised",
        "label",
        "none",
        f"supervised baseline in {SSL_DML}",
        "no pretraining; classification or regression as the study's target says; augmented by crop, gain and noise",
        pretrains=False,
    ),
    _supervised_dml(
        "triplet",
        "label",
        "triplet",
        "positive: nearest label; negative: farthest label",
        margin=0.2,
        **NEAREST_AND_FARTHEST,
    ),
    _supervised_dml(
        "margin",
        "label",
        "margin",
        "one boundary for all labels, trained, where the code indexes it by the label and never trains it",
        margin=0.2,
        **NEAREST_AND_FARTHEST,
    ),
    _supervised_dml(
        "angular", "label", "angular", "positive: nearest label; negative: farthest label", **NEAREST_AND_FARTHEST
    ),
    _supervised_dml(
        "npair",
        "same_class",
        "triplet",
        "positive: any ECG of the same class, where the code needs the very same label; negative: any of the other",
        positives="random",
        negatives="random",
        margin=0.2,
    ),
    _supervised_dml(
        "semihard",
        "same_class",
        "triplet",
        "positive: any ECG of the same class; negative: farther than it, but inside the margin",
        positives="random",
        negatives="semihard",
        margin=0.2,
    ),
    _supervised_dml(
        "softhard",
        "same_class",
        "triplet",
        "positive and negative drawn among those that the embedding confuses",
        positives="random",
        negatives="softhard",
        margin=0.2,
    ),
    Method(
        "rank_n_contrast",
        "label",
        "rank_n_contrast",
        "Rank-N-Contrast: Zha et al., NeurIPS 2023 (arXiv:2210.01189)",
        f"one view an ECG where the source takes two; {ONE_ENCODER}",
        {
            "temperature": 2.0,
            "batch_size": 256,
            "optimizer": "SGD",
            "learning_rate": 0.5,
            "weight_decay": 1e-4,
            "epochs": 400,
        },
        defaults={"temperature": 2.0},
        labels=True,
    ),
    _ssl_dml("l1", "mean absolute difference, as the code does under the name Euclidean, at 62.5 Hz"),
    _ssl_dml("l2", "the Euclidean distance the paper names, at 62.5 Hz"),
    _ssl_dml("dtw", "warped over time, where the code warped over leads; II, V1, V5 at 62.5 Hz, band +-1 s"),
    _ssl_dml("dtw_12_lead", "warped over time, where the code warped over leads; 62.5 Hz, band +-1 s"),
    _ssl_dml("median_beat", "R-aligned median beat, RR and its variation, as raw samples measure beat phase"),
    _ssl_dml("wave_attributes", "rate, intervals and axes, as Good Views compares them, in place of samples"),
    _ssl_dml("learned", "RelCon's motif distance, trained before, in place of samples"),
    Method(
        "simclr",
        "same_record",
        "info_nce",
        "SimCLR: Chen et al., ICML 2020 (arXiv:2002.05709)",
        f"physiological augmentations in place of those of images; {ONE_ENCODER}",
        {"temperature": 0.1, "projection_dim": 128},
        views="two_augmented",
        projector=True,
    ),
    Method(
        "cmsc",
        "same_patient",
        "info_nce",
        "CLOCS (CMSC): Kiyasseh, Zhu and Clifton, ICML 2021 (arXiv:2005.13249)",
        "the patient's own id, where the published SSL-DML code took the ECG's number; a half's positives count as "
        f"one, where the source averages over the same ECG's and the patient's other ECGs' apart; {ONE_ENCODER}",
        {
            "temperature": 0.1,
            "embedding_dims": (32, 64, 128, 256, 320),
            "batch_size": 256,
            "learning_rate": 1e-4,
            "epochs": 400,
        },
        draw="whole_patients",
        views="two_halves",
        candidates="across_views",
    ),
    Method(
        "tf_c",
        "same_record",
        "tf_c",
        "TF-C: Zhang et al., NeurIPS 2022 (arXiv:2206.08496)",
        "residual networks in both domains; the spectrum of each lead up to 50 Hz; physiological augmentations in "
        "time; consistency as the published code trains it, since the paper's margin can be met by pushing augmented "
        f"views away; fine-tuned from the encoders, where the source keeps the projections; {ONE_ENCODER}",
        {
            "temperature": 0.2,
            "consistency_weight": 0.2,
            "consistency_margin": 1.0,
            "embedding_dim": 128,
            "batch_size": 128,
            "optimizer": "Adam",
            "learning_rate": 3e-4,
            "epochs": 40,
        },
        views="original_and_augmented",
        defaults={"temperature": 0.2},
        encoder="time_frequency",
    ),
    Method(
        "pclr",
        "same_patient",
        "info_nce",
        "PCLR: Diamant et al., PLoS Computational Biology 2022 (arXiv:2104.04569)",
        f"two ECGs of a patient are drawn whenever they were taken; {ONE_ENCODER}",
        {"embedding_dim": 320},
        draw="patient_pairs",
        projector=True,
    ),
    Method(
        "relcon",
        "learned",
        "relative",
        "RelCon: Xu et al., ICLR 2025 (arXiv:2411.18822)",
        "12 leads; the motif distance is trained federated, then frozen, on physiological augmentations; it compares "
        "whole ECGs, not the crops that are embedded; candidates within the patient are the other crop and the "
        "patient's other ECGs, since an archive holds about two, where the source draws 20 of one hour; the other "
        f"crops of all ECGs of the batch are candidates too; {ONE_ENCODER}",
        {
            "temperature": 0.1,
            "within_user_candidates": 20,
            "batch_size": 64,
            "learning_rate": 1e-6,
            "epochs": 100,
            "distance_embedding_dim": 64,
            "distance_kernel": 15,
            "distance_learning_rate": 1e-3,
            "distance_epochs": 10,
        },
        draw="whole_patients",
        views="two_crops",
    ),
    Method(
        "relcon_median_beat",
        "median_beat",
        "relative",
        "RelCon: Xu et al., ICLR 2025 (arXiv:2411.18822)",
        f"as relcon, with the distance of R-aligned median beats in place of the learned one; {ONE_ENCODER}",
        {"temperature": 0.1},
        draw="whole_patients",
        views="two_crops",
    ),
    Method(
        "ebcl",
        "same_patient",
        "info_nce",
        "EBCL: Oufattole et al., MLHC 2024 (arXiv:2312.10308)",
        "the event is a catheterisation, of which the time and never the pressure is used; the views are the last ECG "
        "before and the first after it, in place of up to 512 observations on each side; fine-tuned from one ECG, not "
        f"from both sides; the temperature is learned and clamped, the projection has two layers; {ONE_ENCODER}",
        {"embedding_dim": 32, "batch_size": 256, "learning_rate": 3e-4, "dropout": 0.5, "epochs": 100},
        draw="around_events",
        candidates="across_pairs",
        projector=True,
        defaults={"learn_temperature": True},
    ),
    _good_views("time", "same_record", "the two halves of an ECG", views="two_halves"),
    _good_views("lead", "same_record", "limb leads and chest leads of an ECG", views="two_lead_groups"),
    _good_views("augmentation", "same_record", "physiological augmentations", views="two_augmented"),
    _good_views(
        "patient",
        "same_patient",
        "two ECGs of a patient, with the paper's loss: not of the paper, whose patients have one ECG each",
        draw="patient_pairs",
    ),
    _good_views("demographics", "same_demographics", "the same sex and decade of age"),
    _good_views(
        "rhythm",
        "same_group",
        "the same value in `group_column`, a label column, for example the rhythm, of the ECGs that have one: with the "
        "target's own column, or one that tells it, this is supervised, as in the paper",
    ),
    _good_views(
        "wave_attributes",
        "wave_attributes",
        "attributes within `radius`, as the paper says, where its code clusters training and test ECGs together",
        radius=1.0,
    ),
    Method(
        "masked_reconstruction",
        "same_record",
        "masked_reconstruction",
        "masked autoencoders: He et al., CVPR 2022 (arXiv:2111.06377)",
        "a convolutional encoder sees hidden stretches as zeros, where the source's transformer leaves them out; half "
        "of the time is hidden in all leads at once, where images bear three quarters; the ECG is rebuilt at 62.5 Hz; "
        f"{ONE_ENCODER}",
        {"hidden_share": 0.75, "optimizer": "AdamW", "learning_rate": 1.5e-4, "weight_decay": 0.05, "epochs": 800},
        private="alone",
    ),
    Method(
        "cpc",
        "same_record",
        "cpc",
        "CPC: van den Oord et al. 2018 (arXiv:1807.03748); for ECGs Mehari and Strodthoff 2022 (arXiv:2103.12676)",
        "a small strided convolution and a GRU in place of the larger networks; cosine similarity over a temperature "
        "in place of the plain product; a step is 64 ms and shares no sample with the next; all steps up to the "
        "horizon are predicted, as in the first source, where the second predicts the last alone; AdamW and schedule "
        "as of every row",
        {
            "horizon": 12,
            "negatives": 128,
            "width": 512,
            "recurrent_layers": 2,
        },
        encoder="recurrent",
    ),
)
METHODS = {method.name: method for method in ROWS}
DEFAULT_METHOD = "ssl_dml_median_beat"
