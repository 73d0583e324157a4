"""`RecoveryCurve`: how much of the lost quality is back at which step, when to stop, and the picture of it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..evaluation.pictures import COLOURS, GREY, INK, make_panels, save, set_title, whole_numbers


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

        Returns:
            The share, below 0 for a model that got worse; `None` without a dense model, or if pruning lost nothing.
        """
        if self.dense is None or self.pruned - self.dense <= TINY:
            return None
        return (self.pruned - log_perplexity) / (self.pruned - self.dense)

    @property
    def all_points(self) -> list[Point]:
        """The pruned model, at step 0, and the measurements."""
        return [Point(0, self.pruned), *self.points]

    @property
    def best(self) -> Point:
        """The first measurement with the lowest log-perplexity; the pruned model itself is one."""
        return min(self.all_points, key=lambda point: point.log_perplexity)

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
        since = len(self.points) - self.all_points.index(self.best)
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


def curve_figure(curve: RecoveryCurve, best_step: int | None = None) -> Figure:
    """Log-perplexity against training steps, between the pruned and the dense model.

    The second axis says how much of the loss is back, where that is known.

    Args:
        curve: The measurements.
        best_step: The step whose weights were kept. Default: the best.
    """
    figure, (axis,) = make_panels(1, height=3.6)
    points = curve.all_points
    axis.plot(
        [p.step for p in points], [p.log_perplexity for p in points],
        color=COLOURS[0], linewidth=2, marker="o", markersize=4, zorder=3,
    )  # fmt: skip
    _line(axis, curve.pruned, "pruned", COLOURS[5], above=not curve.is_worse)
    if curve.dense is not None:
        _line(axis, curve.dense, "dense", COLOURS[2])
    kept = next((p for p in points if p.step == best_step), curve.best)
    axis.plot([kept.step], [kept.log_perplexity], marker="*", markersize=14, color=COLOURS[0], zorder=4)
    if kept.step:  # the pruned model has its own line
        share = curve.recovered(kept.log_perplexity)
        back = "" if share is None else f", {100 * share:.0f} % back"
        axis.annotate(  # below it, where nothing is if it is the best
            f"perplexity {exp(kept.log_perplexity):.2f}{back}", (kept.step, kept.log_perplexity), (0, -9),
            textcoords="offset points", ha="right" if kept.step > points[-1].step / 2 else "left", va="top",
            fontsize=8, color=INK, zorder=5,
        )  # fmt: skip
    axis.margins(x=0.02, y=0.12)
    axis.set_ylabel("log-perplexity of held-out text (nats)")
    axis.set_xlabel("training steps")
    whole_numbers(axis.xaxis)
    if curve.recovered(curve.pruned) is not None:
        _share_axis(axis, curve)
    set_title(axis, "Recovery: quality that comes back with training")
    return figure


def draw_curve(curve: RecoveryCurve, path: str | os.PathLike, best_step: int | None = None) -> None:
    """Saves `curve_figure` as PNG."""
    save(curve_figure(curve, best_step), path)


def _line(axis: Axes, height: float, name: str, colour: str, above: bool = True) -> None:
    axis.axhline(height, color=colour, linewidth=1.2, linestyle="--", zorder=2)
    axis.annotate(
        f"{name}, perplexity {exp(height):.2f}", (0.5, height), (0, 3 if above else -4),
        xycoords=axis.get_yaxis_transform(), textcoords="offset points", ha="center",
        va="bottom" if above else "top", fontsize=8, color=colour,
    )  # fmt: skip


def _share_axis(axis: Axes, curve: RecoveryCurve) -> None:
    lost = curve.pruned - curve.dense
    second = axis.secondary_yaxis(
        "right", functions=(lambda y: 100 * (curve.pruned - y) / lost, lambda share: curve.pruned - share * lost / 100)
    )
    second.set_ylabel("% back", color=INK, fontsize=9)
    second.tick_params(colors=INK, labelsize=8)
    second.spines["right"].set_color(GREY)
