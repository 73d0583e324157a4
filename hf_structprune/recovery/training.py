"""The arguments of TRL's trainer that follow from a `RecoveryConfig`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..hardware import has_accelerator
from .configuration import RecoveryConfig
from .precision import choose_precision


if TYPE_CHECKING:
    from trl import SFTConfig

# Optimiser steps between checkpoints, as a share of the training.
_SAVED_SHARE = 0.1


def training_arguments(config: RecoveryConfig, output_dir: str | os.PathLike) -> SFTConfig:
    """TRL's arguments. Rows are expected to be tokenised, cut and packed already, see `data.prepare`.

    Args:
        config: The settings.
        output_dir: Where checkpoints to resume from go.

    Raises:
        ConfigurationError: The batch cannot be shared out evenly among the processes.
    """
    from trl import SFTConfig

    precision = choose_precision(config.precision)
    return SFTConfig(
        output_dir=str(Path(output_dir)),
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,  # a share, below 1
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(config, number_of_processes()),
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not has_accelerator(),  # Transformers trains in bfloat16 on a CPU only if it is told to be there
        max_length=None,
        packing=False,
        padding_free=config.packing,  # positions begin anew in every packed example
        save_strategy="steps",
        save_steps=_SAVED_SHARE if config.save_steps is None else config.save_steps,
        eval_strategy="no",
        report_to=list(config.report_to or ["none"]),
        seed=config.seed,
        data_seed=config.seed,
    )


def number_of_processes() -> int:
    """Processes that train together, one a device."""
    from accelerate import PartialState

    return PartialState().num_processes


def accumulation_steps(config: RecoveryConfig, processes: int) -> int:
    """Forward passes of a device in one optimiser step: `batch_size / (micro_batch_size * processes)`.

    Raises:
        ConfigurationError: That is no whole number.
    """
    at_once = config.micro_batch_size * processes
    if config.batch_size % at_once:
        raise ConfigurationError(
            f"`batch_size` is {config.batch_size}, which {processes} processes with `micro_batch_size` "
            f"{config.micro_batch_size} cannot share out: make it a multiple of {at_once}."
        )
    return config.batch_size // at_once
