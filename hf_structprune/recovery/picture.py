"""The recovery curve as a picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..evaluation.pictures import COLOURS, GREY, INK, make_panels, save, set_title, whole_numbers
from .curve import Point, RecoveryCurve, exp


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curve_figure(curve: RecoveryCurve, best_step: int | None = None) -> Figure:
    """Log-perplexity against training steps, between the pruned and the dense model.

    The second axis says how much of the loss is back, where that is known.

    Args:
        curve: The measurements.
        best_step: The step whose weights were kept. Default: the best.
    """
    figure, (axis,) = make_panels(1, height=3.6)
    points = [curve.start, *curve.points]
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
        _label(axis, kept, curve.recovered(kept.log_perplexity), at_right=kept.step > points[-1].step / 2)
    axis.margins(x=0.02, y=0.12)
    axis.set_ylabel("log-perplexity of held-out text (nats)")
    axis.set_xlabel("training steps")
    whole_numbers(axis.xaxis)
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


def _label(axis: Axes, point: Point, share: float | None, at_right: bool) -> None:
    """What a point is worth; below it, where nothing is if it is the best."""
    back = "" if share is None else f", {100 * share:.0f} % back"
    axis.annotate(
        f"perplexity {exp(point.log_perplexity):.2f}{back}", (point.step, point.log_perplexity), (0, -9),
        textcoords="offset points", ha="right" if at_right else "left", va="top", fontsize=8, color=INK, zorder=5,
    )  # fmt: skip


def _share_axis(axis: Axes, curve: RecoveryCurve) -> None:
    if curve.recovered(curve.pruned) is None:
        return
    lost = curve.pruned - curve.dense
    second = axis.secondary_yaxis(
        "right", functions=(lambda y: 100 * (curve.pruned - y) / lost, lambda share: curve.pruned - share * lost / 100)
    )
    second.set_ylabel("% back", color=INK, fontsize=9)
    second.tick_params(colors=INK, labelsize=8)
    second.spines["right"].set_color(GREY)
