"""`TimeLimit`: a training that ends after so many minutes, with the learning rate at its end by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .weights import agreed


_GRACE = 0.05  # of the time
WARMUP_STEPS = 10  # at least, of a schedule that begins below its peak


class TimeLimit:
    """The clock of a training that has so many minutes, measuring included, from its first step on.

    The schedule of the learning rate is a function of the step. It is given the step that a training of `max_steps`
    would have reached, `max_steps * max(step / max_steps, elapsed / limit)`, so that a cosine ends at zero when time
    is up, however fast the machine is and whatever else it does. One that warms up does so for `WARMUP_STEPS` steps at
    least: where a step takes long, a share of the time would be none, and Adam's first steps at the whole rate undo
    more than the others bring.

    Args:
        minutes: How long.
        parts: In how many equal parts `next_part` divides the time.
        until: When it has to be over, by `time.monotonic`: `minutes` become fewer if they would end later.
    """

    def __init__(self, minutes: float, parts: int, until: float | None = None) -> None:
        self.seconds, self.parts, self._until = 60.0 * minutes, parts, until
        self._start, self._done = 0.0, 0

    def begin(self, scheduler: Any, max_steps: int, elapsed: float = 0.0) -> None:
        """Starts the clock, `elapsed` seconds after the first step of an interrupted training.

        Args:
            scheduler: The Trainer's, or what accelerate has wrapped around it; one without functions of the step, as
                DeepSpeed has them, stays as it is.
        """
        self._start = time.monotonic() - elapsed
        if self._until is not None:
            self.seconds = agreed(max(1.0, min(self.seconds, self._until - self._start)))
        self._done = int(self.progress * self.parts)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [self._by_time(one, max_steps) for one in scheduler.lr_lambdas]

    def _by_time(self, schedule: Callable[[float], float], max_steps: int) -> Callable[[int], float]:
        most = [(step + 1) / WARMUP_STEPS for step in range(WARMUP_STEPS if schedule(0) < 1 else 0)]

        def factor(step: int) -> float:
            return min([schedule(max(step, self.progress * max_steps)), *most[step : step + 1]])

        return factor

    @property
    def elapsed(self) -> float:
        """Seconds since the first step, without those between an interrupt and going on."""
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """The share of the time that is gone, from 0 to 1; the same in all processes."""
        return agreed(min(1.0, self.elapsed / self.seconds))

    @property
    def overrun(self) -> bool:
        """Whether it has been over for a while: a step that ends soon after is worth more than none."""
        return agreed(self.elapsed > (1 + _GRACE) * self.seconds)

    def next_part(self) -> bool:
        """Whether another part of the time is over since this was last asked."""
        done, self._done = self._done, int(self.progress * self.parts)
        return self._done > done
