"""`TrainingBar`: the progress bar of a training, in the place of Transformers' bars and of its prints of every log."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..progress import tqdm


class TrainingBar(TrainerCallback):
    """A bar of optimiser steps, beside which the loss that was logged last stands."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    @classmethod
    def put_into(cls, trainer: Trainer) -> None:
        """Takes out what Transformers shows by default, and puts this in."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls())

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        hidden = not state.is_world_process_zero
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._bar is not None:
            self._bar.close()
