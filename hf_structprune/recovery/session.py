"""`Session`: one training that is watched: what was measured, what is kept, why it stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .best import BestWeights
from .curve import Point, RecoveryCurve, exp
from .watch import Watch
from .wrappers import as_before_training


logger = logging.get_logger(__name__)

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


@dataclass
class Session:
    """The state of one training.

    Args:
        watch: What is measured on.
        curve: What was measured.
        best: The file with the weights of the best measurement.
        kept: The measurement that those are of.
        target: See `RecoveryCurve.verdict`.
        patience: The same.
        autocast: As in `Watch.measure`.
        speaks: Whether this process says things.
        clock: Seconds of training.
        stopped: Why training stops: `"target"`, `"worse"` or `"nan"`.
    """

    watch: Watch
    curve: RecoveryCurve
    best: BestWeights
    kept: Point
    target: float | None = None
    patience: int | None = None
    autocast: torch.dtype | None = None
    speaks: bool = True
    clock: Clock = field(default_factory=Clock)
    stopped: str | None = None

    def value_at(self, step: int) -> float | None:
        """What was measured after a step, `None` if nothing was."""
        points = [self.curve.start, *self.curve.points]
        return next((point.log_perplexity for point in points if point.step == step), None)

    def measure(self, model: nn.Module, step: int) -> float:
        """Measures the model after a step, keeps it if it is the best, and decides whether training should stop.

        Returns:
            Log-perplexity; not finite if the model is broken.
        """
        seconds = round(self.clock.seconds, 3)
        with self.clock.paused():
            value = agreed(measure_now(self.watch, model, self.autocast))
        if not math.isfinite(value):
            self.break_off(step, f"the log-perplexity of {self.watch.text.name!r} is {value}")
            return value
        was_worse = self.curve.is_worse
        point = Point(step, value, seconds)
        self.curve.points.append(point)
        if value < self.kept.log_perplexity:
            with self.clock.paused():
                self.keep(model, point)
        self.say_measured(was_worse)
        self.stopped = self.stopped or self.curve.verdict(target=self.target, patience=self.patience)
        if self.stopped:
            self.warn(f"Recovery stops after step {step}: {REASONS[self.stopped]}; {self.in_words()}.")
        return value

    def keep(self, model: nn.Module, point: Point) -> None:
        """Keeps the weights as they are, which a measurement is of."""
        self.best.keep(model, point.step)
        self.kept = point

    def break_off(self, step: int, what: str) -> None:
        """Stops a training that has no future."""
        self.stopped = "nan"
        self.warn(
            f"Recovery stops after step {step}: {what}; {self.in_words()}. Lower the learning rate, or train in bf16 "
            "or fp32."
        )

    def say_measured(self, was_worse: bool) -> None:
        """What the last measurement means."""
        point = self.curve.points[-1]
        share = self.curve.recovered(point.log_perplexity)
        back = "" if share is None else f", {100 * share:.1f} % back"
        self.say(f"Step {point.step}: log-perplexity {point.log_perplexity:.4f}{back}.")
        if self.curve.is_worse and not was_worse:
            self.warn_worse()

    def warn_worse(self) -> None:
        """Says that training has made the model worse than it was."""
        point = self.curve.points[-1]
        self.warn(
            f"The model is worse than before training: log-perplexity {point.log_perplexity:.4f} after step "
            f"{point.step}, {self.curve.pruned:.4f} before; {self.in_words()}."
        )

    def in_words(self) -> str:
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


def measure_now(watch: Watch, model: nn.Module, autocast: torch.dtype | None, *, pruned: bool = False) -> float:
    """Measures a model, or the pruned one that it was.

    Args:
        watch: What to measure on.
        model: The model in training.
        autocast: As in `Watch.measure`.
        pruned: Whether to switch its adapters off.
    """
    with as_before_training(model) if pruned else contextlib.nullcontext():
        return watch.measure(model, autocast=autocast)


def agreed(value: Any) -> Any:
    """The first process's value: all must take the same decisions, and rounding may differ from one to another."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
