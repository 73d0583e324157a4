"""`Session`: one training that is measured: its curve, what is kept, why it stops, and what its checkpoints carry."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError
from ..files.writing import write_text
from .curve import Point, RecoveryCurve, exp
from .held_out import HeldOutText, dense_log_perplexity
from .weights import BestWeights, agreed, has_pruned_base, underneath


logger = logging.get_logger(__name__)

STATE_NAME, BEST_NAME = "recovery_state.json", "recovery_best.safetensors"  # in every checkpoint of a training
REASONS = {
    "target": "the target is reached",
    "worse": "there was no new best for too many measurements",
    "nan": "the loss is not a number",
}


class Clock:
    """Seconds of training, those of measuring left out.

    Args:
        before: Seconds of the training that this one goes on with.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._start, self._apart = time.perf_counter() - before, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._apart

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._apart += time.perf_counter() - start


class Session:
    """The state of one training.

    Args:
        held_out: What is measured on.
        best: The file with the weights of the best measurement.
        target: See `RecoveryCurve.verdict`.
        patience: The same.
        autocast: As in `HeldOutText.measure`.
        speaks: Whether this process says things.

    Attributes:
        curve: What was measured.
        kept: The measurement that the kept weights are of.
        clock: Seconds of training.
        stopped: Why training stops: `"target"`, `"worse"` or `"nan"`.
    """

    def __init__(
        self,
        held_out: HeldOutText,
        best: BestWeights,
        *,
        target: float | None = None,
        patience: int | None = None,
        autocast: torch.dtype | None = None,
        speaks: bool = True,
    ) -> None:
        self.held_out, self.best, self.target, self.patience = held_out, best, target, patience
        self.autocast, self.speaks = autocast, speaks
        self.curve, self.kept, self.clock = RecoveryCurve(math.inf), Point(0, math.inf), Clock()
        self.stopped: str | None = None

    def begin(self, model: nn.Module, dense: Any, step: int, folders: list[Any], device: torch.device | str) -> bool:
        """Gets the curve: measures the pruned and the dense model, or reads them from the checkpoint that is resumed.

        Args:
            model: The model in training.
            dense: The dense model, see `dense_log_perplexity`.
            step: Steps that were done before; 0 for a training that is not resumed.
            folders: Where the checkpoint that is resumed may be.
            device: Where the dense model runs.

        Returns:
            Whether something was measured, and not all read from the checkpoint.
        """
        there = (Path(folder) for folder in folders if folder and (Path(folder) / STATE_NAME).is_file())
        folder = agreed(next(there, None)) if step else None
        if folder is not None:
            self._read_state(folder)
            self.say(f"The curve goes on after step {step}; {self._in_words()}.")
            return False
        pruned = self._value(model, pruned=True)
        if not math.isfinite(pruned):
            raise ConfigurationError(
                f"The log-perplexity of the pruned model is {pruned}: it is broken before training, or needs another "
                "dtype."
            )
        value = None
        if self.best.writes:
            dtype = self.autocast or getattr(underneath(model).config, "dtype", None) or "auto"
            value = dense_log_perplexity(dense, self.held_out, device=device, autocast=self.autocast, dtype=dtype)
        self.curve = RecoveryCurve(pruned, agreed(value))
        self._say_ends()
        if step:
            self._begin_in_the_middle(model, step)
        else:
            self._keep(model, self.curve.best)
        self.clock = Clock()
        return True

    def _say_ends(self) -> None:
        pruned, dense = self.curve.pruned, self.curve.dense
        if dense is None:
            self.say(f"Before training: log-perplexity {pruned:.4f}; without `dense` no share can be told.")
            return
        self.say(f"Before training: log-perplexity {pruned:.4f}; the dense model {dense:.4f}.")
        if self.curve.recovered(pruned) is None:
            self.warn(
                f"The pruned model is no worse than the dense one on {self.held_out.text.name!r} (log-perplexity "
                f"{pruned:.4f} and {dense:.4f}), so there is no share to bring back; is `dense` the right model?"
            )

    def _begin_in_the_middle(self, model: nn.Module, step: int) -> None:
        """A checkpoint that was made without the callback: weights from before it are not known."""
        exact = has_pruned_base(model)
        self.curve.points.append(Point(step, self._value(model) if exact else self.curve.pruned))
        self._keep(model, self.curve.points[-1])
        start = "the model under the adapters" if exact else f"the model of step {step}, which has been trained,"
        self.warn(
            f"The checkpoint of step {step} has no {STATE_NAME}: the curve begins there, and {start} counts as the "
            "pruned one."
        )

    def value_at(self, step: int) -> float | None:
        """What was measured after a step, `None` if nothing was."""
        return next((point.log_perplexity for point in self.curve.all_points if point.step == step), None)

    def measure(self, model: nn.Module, step: int) -> float:
        """Measures the model after a step, keeps it if it is the best, and decides whether training should stop.

        Returns:
            Log-perplexity; not finite if the model is broken.
        """
        seconds, was_worse = round(self.clock.seconds, 3), self.curve.is_worse
        with self.clock.paused():
            value = self._value(model)
            if not math.isfinite(value):
                self.break_off(step, f"the log-perplexity of {self.held_out.text.name!r} is {value}")
                return value
            point = Point(step, value, seconds)
            self.curve.points.append(point)
            if value < self.kept.log_perplexity:
                self._keep(model, point)
        share = self.curve.recovered(value)
        back = "" if share is None else f", {100 * share:.1f} % back"
        self.say(f"Step {step}: log-perplexity {value:.4f}{back}.")
        if self.curve.is_worse and not was_worse:
            self._warn_worse(value, f"after step {step}", self._in_words())
        self.stopped = self.stopped or self.curve.verdict(target=self.target, patience=self.patience)
        if self.stopped:
            self.warn(f"Recovery stops after step {step}: {REASONS[self.stopped]}; {self._in_words()}.")
        return value

    def _value(self, model: nn.Module, pruned: bool = False) -> float:
        return agreed(self.held_out.measure(model, autocast=self.autocast, pruned=pruned))

    def _keep(self, model: nn.Module, point: Point) -> None:
        """Keeps the weights as they are, which a measurement is of."""
        self.best.keep(model, point.step)
        self.kept = point

    def break_off(self, step: int, what: str) -> None:
        """Stops a training that has no future."""
        self.stopped = "nan"
        self.warn(
            f"Recovery stops after step {step}: {what}; {self._in_words()}. Lower the learning rate, or train in bf16 "
            "or fp32."
        )

    def put_back_best(self, model: nn.Module, step: int) -> None:
        """Gives the model, as the last step left it, the best weights; says so if they are the untrained ones."""
        if self.curve.is_worse and self.stopped is None:  # otherwise it has been said
            last = self.curve.points[-1]
            self._warn_worse(last.log_perplexity, f"after step {last.step}", self._in_words())
        if self.kept.step != step or self.stopped == "nan":
            self.best.restore(model)

    def accept_choice(self, model: nn.Module, state: TrainerState) -> None:
        """Says what the weights are worth that `load_best_model_at_end` has chosen, and keeps to that choice."""
        step, value = state.best_global_step, self._value(model)
        self.kept = Point(step, value)
        self.say(f"The Trainer has loaded its checkpoint of step {step}: log-perplexity {value:.4f}.")
        if value > self.curve.pruned:
            where = "in the checkpoint that `load_best_model_at_end` has chosen"
            self._warn_worse(value, where, "keeping that checkpoint")

    def _warn_worse(self, value: float, where: str, kept: str) -> None:
        self.warn(
            f"The model is worse than before training: log-perplexity {value:.4f} {where}, {self.curve.pruned:.4f} "
            f"before; {kept}."
        )

    def _in_words(self) -> str:
        """Which weights are kept."""
        if self.kept.step == 0:
            return "keeping the pruned model"
        return f"keeping the best of step {self.kept.step} (log-perplexity {self.kept.log_perplexity:.4f})"

    def say(self, text: str) -> None:
        if self.speaks:
            logger.info(text)

    def warn(self, text: str) -> None:
        if self.speaks:
            logger.warning(text)

    def logs(self, value: float, step: int) -> dict[str, float]:
        """What is logged after a measurement."""
        logs = {
            "recovery/log_perplexity": value,
            "recovery/perplexity": exp(value),
            "recovery/best_log_perplexity": self.curve.best.log_perplexity,
        }
        share = self.curve.recovered(value)
        if share is not None:
            logs["recovery/recovered"] = share
        if step == 0 and self.curve.dense is not None:
            logs["recovery/dense_log_perplexity"] = self.curve.dense
        return logs

    def write_state(self, folder: Path, settings: dict[str, Any]) -> None:
        """Writes the curve so far and the best weights into a checkpoint; the curve last, so that it is never alone.

        Args:
            folder: The checkpoint.
            settings: What the training was begun with, see `resume`; empty for one that `recover` does not run.
        """
        self.best.copy_to(folder / BEST_NAME)
        state = {
            "schema_version": 1,
            "curve": self.curve.to_dict(),
            "kept": asdict(self.kept),
            "text": self.held_out.describe(),
            "seconds": round(self.clock.seconds, 3),
            "settings": settings,
        }
        write_text(folder / STATE_NAME, json.dumps(state, indent=1, allow_nan=False) + "\n")

    def _read_state(self, folder: Path) -> None:
        """Goes back to where `write_state` was called; the first process reads for all."""
        state = agreed(_read_state(folder / STATE_NAME, self.held_out.describe()) if self.best.writes else None)
        self.curve, self.kept = RecoveryCurve.from_dict(state["curve"]), Point(**state["kept"])
        self.best.take_from(folder / BEST_NAME)
        self.clock = Clock(state["seconds"])


def _read_state(path: Path, text: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        ConfigurationError: It was measured on another text.
        CheckpointError: It cannot be read.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        theirs = state["text"]
        complete = all(key in state for key in ("curve", "kept", "seconds"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if not complete:
        raise CheckpointError(f"{path} is incomplete: remove it to measure anew.")
    differing = [key for key in text if key != "source" and theirs.get(key) != text[key]]
    if differing:
        raise ConfigurationError(
            f"{path} is of another text or other windows ({', '.join(differing)}): give the callback the same ones, "
            "or remove the file to measure anew."
        )
    return state
