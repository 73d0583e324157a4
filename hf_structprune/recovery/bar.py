"""`TrainingBar`: the progress bar of a training, in the place of Transformers' bars and of its prints of every log."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..progress import tqdm


class TrainingBar(TrainerCallback):
    """A bar of optimiser steps, beside which the loss that was logged last stands.

    Args:
        minutes: How long the training takes, where that is what ends it: the bar is then one of seconds, from its
            first step on, or from when it went on.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._seconds = None if minutes is None else round(60 * minutes)
        self._bar: tqdm | None = None
        self._start = 0.0

    @classmethod
    def put_into(cls, trainer: Trainer, minutes: float | None = None) -> None:
        """Takes out what Transformers shows by default, and puts this in."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(minutes))

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        hidden = not state.is_world_process_zero
        about = {"total": state.max_steps, "initial": state.global_step, "unit": "it"}
        if self._seconds is not None:
            self._start, about = time.perf_counter(), {"total": self._seconds, "unit": "s"}
        self._bar = tqdm(desc="Training", disable=hidden, **about)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            gone = int(time.perf_counter() - self._start)
            done = state.global_step if self._seconds is None else min(gone, self._seconds)
            self._bar.update(done - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            self._bar.close()
