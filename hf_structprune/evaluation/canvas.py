"""What all pictures share: colours, panels, and saving the same bytes for the same picture."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from ..errors import EvaluationError
from ..files.writing import write_bytes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
CARD, INK, GREY, FAINT = "#ffffff", "#24292f", "#6e7781", "#d0d7de"


def require_matplotlib() -> None:
    """Raises an `EvaluationError` that names the extra if Matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EvaluationError('Pictures need Matplotlib: pip install "hf-structprune[report]".') from error


def make_panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A light card with panels below each other that share the horizontal axis; pyplot is not involved.

    Args:
        count: Number of panels.
        height: Inches of each.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.9 + count * height), dpi=150, facecolor=CARD, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.set_facecolor(CARD)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.tick_params(which="both", colors=INK, labelsize=8)
        for where in ("xaxis", "yaxis"):
            getattr(axis, where).label.set(color=INK, fontsize=9)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, axes


def set_title(axis: Axes, text: str) -> None:
    """A title at the left edge."""
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def legend_below(axis: Axes) -> None:
    """The legend of one panel below the picture, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    axis.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )


def whole_numbers(axis: XAxis | YAxis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a PNG without date and version; the same picture gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor=CARD, metadata={"Software": None})
    write_bytes(path, content.getvalue())
