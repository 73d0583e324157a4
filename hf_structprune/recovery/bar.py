"""`TrainingBar`: the progress bar of a training, in the place of Transformers' bars and of its prints of every log."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..progress import tqdm
from .time_limit import TimeLimit


class TrainingBar(TrainerCallback):
    """A bar of optimiser steps, beside which the loss that was logged last stands.

    Args:
        limit: Its clock, where that is what ends it: the bar is then one of seconds.
    """

    def __init__(self, limit: TimeLimit | None = None) -> None:
        self._limit = limit
        self._bar: tqdm | None = None

    @classmethod
    def put_into(cls, trainer: Trainer, limit: TimeLimit | None = None) -> None:
        """Takes out what Transformers shows by default, and puts this in, behind what starts the clock."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(limit))

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        hidden = not state.is_world_process_zero
        about = {"total": state.max_steps, "initial": state.global_step, "unit": "it"}
        if self._limit is not None:
            about = {"total": round(self._limit.seconds), "initial": self._gone(), "unit": "s"}
        self._bar = tqdm(desc="Training", disable=hidden, **about)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            done = state.global_step if self._limit is None else self._gone()
            self._bar.update(done - self._bar.n)

    def _gone(self) -> int:
        """Whole seconds of the limit."""
        return int(min(self._limit.elapsed, self._limit.seconds))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            self._bar.close()
