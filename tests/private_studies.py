"""A private study that is cheap to account for, and the policy of a hospital that lets it in."""

from pathlib import Path
from typing import Any

from client.policy import Policy, write_policy
from shared_model.study import Study, study_from_table

BANK = "ab" * 32
RUN = "0123456789abcdef"
POLICY: dict[str, Any] = {
    "epsilon": 8.0,
    "delta": 1e-4,
    "minimum_cohort": 100,
    "declared_patients": 400,
    "declared_labelled_patients": 200,
    "tasks": ["pretrain", "finetune", "evaluate"],
    "objectives": ["ssl_dml_median_beat", "supervised"],
    "partitions": ["sex", "age"],
    "require_privacy": True,
}


def policy_of(**changes: Any) -> Policy:
    return Policy.model_validate({**POLICY, **changes})


def private_table(**privacy: Any) -> dict[str, Any]:
    """Costs about 2.1 at delta 1e-5: 5 rounds of pretraining and 3 of fine-tuning, 20 steps each, and two releases."""
    phase = {"sampling_rate": 0.2, "noise_multiplier": 6.0, "steps_per_round": 20}
    usual = {"epsilon": 3.0, "delta": 1e-5, "bank_sha256": BANK, "pretrain": dict(phase), "finetune": dict(phase)}
    return {
        "name": "a private study",
        "pretrain": {"rounds": 4},
        "finetune": {"rounds": 2},
        "evaluation": {"every_round": False, "partitions": ["sex", "age"]},
        "privacy": {**usual, **privacy},
    }


def private_study(seed: int = 1, **privacy: Any) -> Study:
    """The study of `private_table`; another seed is another study."""
    return study_from_table({**private_table(**privacy), "seed": seed}, "test")


def site_with(folder: Path, **changes: Any) -> Policy:
    """A site folder that holds a policy and nothing else."""
    folder.mkdir(exist_ok=True)
    policy = policy_of(**changes)
    write_policy(folder, policy)
    return policy
