"""What a Trainer's arguments mean for measuring: tokenizer, precision, metric, context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..errors import ConfigurationError, StructPruneError
from ..evaluation.protocols import context_length
from ..model.loading import load_config
from .wrappers import underneath


logger = logging.get_logger(__name__)

METRIC = "eval_recovery_log_perplexity"


def tokenizer_of(processing_class: Any, trainer: Trainer | None) -> Any:
    """The tokenizer of a training, also out of a processor or a collator.

    Raises:
        ConfigurationError: There is none.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None and trainer is not None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is None:
        raise ConfigurationError("The Trainer has no tokenizer to measure with: give it `processing_class=tokenizer`.")
    return tokenizer


def mixed_precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype that mixed-precision training computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def prefer_lower(args: TrainingArguments) -> None:
    """Makes a low log-perplexity the better one.

    Transformers takes any metric for one of which more is better, unless its name ends with `loss`.
    """
    if args.metric_for_best_model in (METRIC, METRIC.removeprefix("eval_")) and args.greater_is_better:
        logger.warning(f"{METRIC} is better when lower, so `greater_is_better` is set to False.")
        args.greater_is_better = False


def fitting_window(window: int, model: nn.Module) -> int:
    """The window, or the model's context where that is shorter."""
    context = context_length(underneath(model))
    if context is None or window <= context:
        return window
    logger.warning(f"`window` is {window}, but the model's context is {context} tokens: {context} are taken.")
    return context


def source_of(model: nn.Module) -> Path | None:
    """The pruned checkpoint that a model was loaded from, if it is one of ours."""
    folder = Path(str(getattr(underneath(model).config, "_name_or_path", "") or ""))
    return folder if (folder / "pruning_plan.json").is_file() else None


def saved_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the checkpoint that a model was loaded from, in which it is saved again, whatever it is trained in.

    `None` where it came from none, or from one that is neither a folder nor in the cache.
    """
    name = str(getattr(underneath(model).config, "_name_or_path", "") or "")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return getattr(load_config(name, **options), "dtype", None) if name else None
    except StructPruneError:
        return None
