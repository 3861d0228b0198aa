"""What simulated hospitals need to take part in a private study, and what a hospital sets up for itself by hand."""

import shutil
from pathlib import Path

from client.bank import BANK_FOLDER
from client.policy import DECLARED_STEP, Policy, write_policy
from client.site import load_site, write_site
from shared_model.errors import ExitCode, HemoFedError
from shared_model.privacy import PrivacySettings
from shared_model.study import Study


def equip(site_dir: Path, study: Study, train_patients: int, bank: Path | None) -> None:
    """Let a simulated hospital into a private study: its policy allows that study and no more, its counts leave noised.

    Args:
        train_patients: how many it declares, rounded down to tens.
        bank: the study's bank, put into the site folder.
    """
    privacy = study.privacy
    assert privacy is not None
    declared = max(DECLARED_STEP, train_patients // DECLARED_STEP * DECLARED_STEP)
    write_policy(
        site_dir,
        Policy(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            minimum_cohort=DECLARED_STEP,
            declared_patients=declared,
            declared_labelled_patients=declared,
            tasks=("pretrain", "finetune", "evaluate"),
            objectives=(study.objective.name,),
            partitions=study.evaluation.partitions,
            require_privacy=True,
        ),
    )
    write_site(site_dir, load_site(site_dir).model_copy(update={"disclosure": "noised"}))
    put_bank(site_dir, privacy, bank)


def put_bank(site_dir: Path, privacy: PrivacySettings, bank: Path | None) -> None:
    """Copy the study's bank into a site folder, where it is asked for."""
    if bank is None:
        return
    folder = site_dir / BANK_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(bank, folder / f"{privacy.bank_sha256[:16]}.safetensors")
    except OSError as error:
        raise HemoFedError(
            f"--bank {bank}: {error.strerror}; give the file that hemofed-sim bank made", ExitCode.USAGE
        ) from None
