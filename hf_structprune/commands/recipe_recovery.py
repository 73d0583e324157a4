"""The section `recover` of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigurationError
from ..extras import need
from ..recipe import RecoverySection
from ..recovery.recovering import TRAINING_SUFFIX, recover
from .common import ModelArguments


def check_section(section: RecoverySection) -> None:
    """Finds out before any work whether the training can be run.

    Raises:
        StructPruneError: An extra is missing, the data cannot be read, or it is of no format that is known.
    """
    need("trl", "peft", extra="recover")
    from ..recovery.data import load_rows

    load_rows(section.dataset, split=section.split, max_samples=1)


def recovered_already(section: RecoverySection, again: bool) -> bool:
    """Whether the folder holds what this section makes.

    Raises:
        ConfigurationError: It holds what other settings have made.
    """
    from ..recovery.save import RECOVERY_NAME

    report = Path(section.output_dir) / RECOVERY_NAME
    if again or not report.is_file():
        return False
    if json.loads(report.read_text(encoding="utf-8"))["configuration"] != section.config.to_public_dict():
        raise ConfigurationError(
            f"{section.output_dir} holds a checkpoint that was recovered with other settings; choose another "
            "`output_dir` in the section `recover`, or say --overwrite."
        )
    return True


def recover_section(
    section: RecoverySection, pruned: Path, dense: ModelArguments, dense_name: str, again: bool
) -> None:
    """Trains the pruned checkpoint; an interrupted training goes on where it stopped."""
    training = Path(section.output_dir + TRAINING_SUFFIX)
    resume = not again and training.is_dir() and get_last_checkpoint(str(training)) is not None
    recover(
        pruned, section.dataset, section.output_dir, section.config,
        split=section.split, dense=dense.model, teacher=dense.model, teacher_name=dense_name,
        distillation=section.distillation, resume=resume, overwrite=again, trust_remote_code=dense.trust_remote_code,
    )  # fmt: skip
