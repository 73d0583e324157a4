"""`RecoveryCurve`: how much of the lost quality is back at which step, and when to stop. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


# A loss smaller than this, in nats, is no loss that a share could be of: 0.1 % of a perplexity.
TINY = 1e-3


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        step: Optimiser steps done.
        log_perplexity: Mean negative log-likelihood of a token, in nats.
        seconds: Seconds of training up to here, measuring excluded.
    """

    step: int
    log_perplexity: float
    seconds: float = 0.0


@dataclass
class RecoveryCurve:
    """The measurements of one training, all on the same text.

    Args:
        pruned: Log-perplexity before training, in nats.
        dense: That of the dense model; `None` if it is not known.
        points: Measurements in the order of their steps, all finite; step 0 is `pruned` and not among them.
    """

    pruned: float
    dense: float | None = None
    points: list[Point] = field(default_factory=list)

    def recovered(self, log_perplexity: float) -> float | None:
        """`(pruned - now) / (pruned - dense)`: 0 is no better than before training, 1 is as good as the dense model.

        Args:
            log_perplexity: The value now, in nats.

        Returns:
            The share, below 0 for a model that got worse; `None` without a dense model, or if pruning lost nothing.
        """
        if self.dense is None or self.pruned - self.dense <= TINY:
            return None
        return (self.pruned - log_perplexity) / (self.pruned - self.dense)

    @property
    def start(self) -> Point:
        """The pruned model."""
        return Point(0, self.pruned)

    @property
    def best(self) -> Point:
        """The first measurement with the lowest log-perplexity; the pruned model itself is one."""
        return min((self.start, *self.points), key=lambda point: point.log_perplexity)

    @property
    def is_worse(self) -> bool:
        """Whether the last measurement is worse than the pruned model."""
        return bool(self.points) and self.points[-1].log_perplexity > self.pruned

    def verdict(self, *, target: float | None = None, patience: int | None = None) -> str | None:
        """Why training should stop after the last measurement.

        Args:
            target: Share of the lost log-perplexity that is enough.
            patience: Number of measurements in a row without a new best that is too many; `None` waits for ever.

        Returns:
            `"target"`, `"worse"`, or `None` to go on.
        """
        if not self.points:
            return None
        share = self.recovered(self.points[-1].log_perplexity)
        if target is not None and share is not None and share >= target:
            return "target"
        since = len(self.points) - 1 - self.points.index(self.best) if self.best in self.points else len(self.points)
        return "worse" if patience is not None and since >= patience else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RecoveryCurve:
        """Reads what `to_dict` made."""
        return cls(values["pruned"], values["dense"], [Point(**point) for point in values["points"]])


def measuring_steps(max_steps: int, evaluations: int | None) -> frozenset[int]:
    """Steps after which to measure: `evaluations` of them, evenly spaced, the last step with them.

    Args:
        max_steps: Steps of the training.
        evaluations: How many; `None` is the last step only. Fewer if there are fewer steps.
    """
    count = min(evaluations or 1, max_steps)
    return frozenset(math.ceil(max_steps * number / count) for number in range(1, count + 1))


def exp(log_perplexity: float) -> float:
    """The perplexity, infinite where the number is too large."""
    return math.exp(log_perplexity) if log_perplexity < 700 else math.inf
