"""`recovery.json`: what was trained, how much came back, and how that was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import EvaluationError
from ..evaluation.environment import describe_environment
from ..evaluation.pictures import require_matplotlib
from ..files.writing import write_text
from .picture import draw_curve
from .session import Session
from .wrappers import is_peft, without_parallel


logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
REPORT_NAME, PICTURE_NAME = "recovery.json", "recovery.png"


def build_report(session: Session, training: dict[str, Any], about: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report as it is saved.

    Args:
        session: The training.
        training: See `describe_training`.
        about: More that belongs into it: `configuration` (`RecoveryConfig.to_dict()`), `data`, ...
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "curve": session.curve.to_dict(),
        "text": session.watch.describe(),
        "stopped": session.stopped,
        "best_step": session.kept.step,
        "recovered": session.curve.recovered(session.kept.log_perplexity),
        "configuration": {},
        "training": training,
        "versions": _versions(),
        **(about or {}),
    }


def describe_training(
    args: TrainingArguments, state: TrainerState, model: nn.Module, seconds: float
) -> dict[str, Any]:
    """What was trained, and how long; no names of folders."""
    plain = without_parallel(model)
    tokens = [logs["num_tokens"] for logs in state.log_history if "num_tokens" in logs]
    trained = sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad)
    return {
        "steps": state.global_step,
        "max_steps": state.max_steps,
        "seconds": round(seconds, 1),
        "tokens": int(tokens[-1] if tokens else state.num_input_tokens_seen) or None,
        "method": str(plain.active_peft_config.peft_type.value).lower() if is_peft(plain) else "full",
        "trainable_parameters": trained,
        "learning_rate": args.learning_rate,
        "epochs": state.epoch,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
    }


def _versions() -> dict[str, str]:
    versions = describe_environment()["versions"]
    for name in ("peft", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def can_draw() -> bool:
    """Whether Matplotlib is there; says so if it is not."""
    try:
        require_matplotlib()
    except EvaluationError as error:
        logger.warning(f"The recovery curve is not drawn. {error}")
        return False
    return True


def write_report(report: dict[str, Any], session: Session, folder: Path) -> None:
    """Writes `recovery.json` and `recovery.png` into a folder."""
    write_text(folder / REPORT_NAME, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if can_draw():
        draw_curve(session.curve, folder / PICTURE_NAME, session.kept.step)
