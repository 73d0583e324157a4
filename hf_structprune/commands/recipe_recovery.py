"""The section `recover` of a recipe."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError
from ..extras import need
from ..hub.recovery import read_report
from ..recovery.recovering import recover, training_folder
from ..recovery.resume import newest_whole
from .common import ModelArguments
from .recipe import RecoverySection


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
        CheckpointError: Its report cannot be read.
    """
    report = None if again else read_report(Path(section.output_dir))
    if report is None:
        return False
    if report["configuration"] != section.config.to_public_dict():
        raise ConfigurationError(
            f"{section.output_dir} holds a checkpoint that was recovered with other settings; choose another "
            "`output_dir` in the section `recover`, or say --overwrite."
        )
    return True


def recover_section(
    section: RecoverySection, pruned: Path, dense: ModelArguments, dense_name: str, again: bool
) -> None:
    """Trains the pruned checkpoint; an interrupted training goes on where it stopped."""
    resume = not again and newest_whole(training_folder(section.output_dir))[0] is not None
    recover(
        pruned, section.dataset, section.output_dir, section.config,
        split=section.split, dense=dense.model, teacher=dense.model, teacher_name=dense_name,
        distillation=section.distillation, resume=resume, overwrite=again, trust_remote_code=dense.trust_remote_code,
    )  # fmt: skip
