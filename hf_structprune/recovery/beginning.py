"""How a watched training begins: the two ends of the scale, measured or read from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .baseline import dense_log_perplexity
from .curve import Point, RecoveryCurve
from .session import Clock, Session, agreed, measure_now
from .travelling import find_state, read_state
from .wrappers import has_exact_start, underneath


def begin(
    session: Session, model: nn.Module, dense: Any, step: int, folders: list[Any], device: torch.device | str
) -> bool:
    """Gives a session its curve.

    Args:
        session: A new one.
        model: The model in training.
        dense: The dense model, see `dense_log_perplexity`.
        step: Steps that were done before; 0 for a training that is not resumed.
        folders: Where the checkpoint that is resumed may be.
        device: Where the dense model runs.

    Returns:
        Whether something was measured, and not all read from the checkpoint.
    """
    folder: Path | None = agreed(find_state(folders)) if step else None
    if folder is not None:
        read_state(session, folder)
        session.say(f"The curve goes on after step {step}; {session.in_words()}.")
        return False
    pruned = agreed(measure_now(session.watch, model, session.autocast, pruned=True))
    if not math.isfinite(pruned):
        raise ConfigurationError(
            f"The log-perplexity of the pruned model is {pruned}: it is broken before training, or needs another "
            "dtype."
        )
    value = None
    if session.best.writes:
        dtype = session.autocast or getattr(underneath(model).config, "dtype", None) or "auto"
        value = dense_log_perplexity(dense, session.watch, device=device, autocast=session.autocast, dtype=dtype)
    session.curve = RecoveryCurve(pruned, agreed(value))
    _say_ends(session)
    if step:
        _begin_in_the_middle(session, model, step)
    else:
        session.keep(model, session.curve.start)
    session.clock = Clock()
    return True


def _say_ends(session: Session) -> None:
    pruned, dense = session.curve.pruned, session.curve.dense
    if dense is None:
        session.say(f"Before training: log-perplexity {pruned:.4f}; without `dense` no share can be told.")
        return
    session.say(f"Before training: log-perplexity {pruned:.4f}; the dense model {dense:.4f}.")
    if session.curve.recovered(pruned) is None:
        session.warn(
            f"The pruned model is no worse than the dense one on {session.watch.text.name!r} (log-perplexity "
            f"{pruned:.4f} and {dense:.4f}), so there is no share to bring back; is `dense` the right model?"
        )


def _begin_in_the_middle(session: Session, model: nn.Module, step: int) -> None:
    """A checkpoint that was made without the callback: weights from before it are not known."""
    exact = has_exact_start(model)
    value = agreed(measure_now(session.watch, model, session.autocast)) if exact else session.curve.pruned
    session.curve.points.append(Point(step, value))
    session.keep(model, session.curve.points[-1])
    start = "the model under the adapters" if exact else f"the model of step {step}, which has been trained,"
    session.warn(
        f"The checkpoint of step {step} has no recovery_state.json: the curve begins there, and {start} counts as the "
        "pruned one."
    )
