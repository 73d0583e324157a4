"""How a watched training ends: the best weights go back, and the result is saved."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.utils import logging

from .curve import Point
from .picture import draw_curve
from .report import can_draw, write_report
from .session import Session, agreed, measure_now
from .setting import saved_dtype, source_of
from .wrappers import is_sharded


logger = logging.get_logger(__name__)

RECOVERED_FOLDER = "recovered"


def put_back_best(session: Session, model: nn.Module, step: int) -> None:
    """Gives the model the best weights; says so if they are the untrained ones.

    Args:
        session: The training.
        model: The model, as the last step left it.
        step: That step.
    """
    if session.curve.is_worse and session.stopped is None:  # otherwise it has been said
        session.warn_worse()
    if session.kept.step != step or session.stopped == "nan":
        session.best.restore(model)


def measure_chosen(session: Session, model: nn.Module, state: TrainerState) -> None:
    """Says what the weights are worth that `load_best_model_at_end` has chosen, and keeps to that choice."""
    step = state.best_global_step
    chosen = Point(step, agreed(measure_now(session.watch, model, session.autocast)))
    session.kept = chosen
    session.say(f"The Trainer has loaded its checkpoint of step {step}: log-perplexity {chosen.log_perplexity:.4f}.")
    if chosen.log_perplexity > session.curve.pruned:
        session.warn(
            f"The model is worse than before training: log-perplexity {chosen.log_perplexity:.4f} in the checkpoint "
            f"that `load_best_model_at_end` has chosen, {session.curve.pruned:.4f} before; keeping that checkpoint."
        )


def save_all(
    session: Session,
    model: nn.Module,
    tokenizer: Any,
    report: dict[str, Any],
    folder: Path,
    merged: str | os.PathLike | None,
) -> None:
    """Writes the report and the picture, and the merged model.

    Args:
        session: The training.
        model: The model with the weights to save; it stays as it is.
        tokenizer: Its tokenizer.
        report: `recovery.json`.
        folder: Where report and picture go.
        merged: Where the merged model goes; `None` writes none.

    Raises:
        CheckpointError: Something cannot be merged or written.
    """
    write_report(report, session, folder)
    if merged is None:
        return
    if is_sharded(model):
        logger.warning(
            "The weights are spread over several processes, so they are not merged here: save them with "
            "`trainer.save_model()` and merge them in one process."
        )
        return
    from .merge import merge_adapter
    from .save import save_recovered

    picture = partial(draw_curve, session.curve, best_step=session.kept.step) if can_draw() else None
    source = source_of(model)
    plain = merge_adapter(model, dtype=saved_dtype(model))
    save_recovered(plain, tokenizer, merged, source=source, report=report, picture=picture)
