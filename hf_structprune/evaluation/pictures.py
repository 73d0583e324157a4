"""Pictures for cards and READMEs (PNG): widths, quality against size, speed, blocks of layers; and what they share.

The `*_figure` functions build a Matplotlib `Figure`, `save` writes it. Each picture is a light card, so that the page
around it may be light or dark. The same data gives the same bytes with the same Matplotlib.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import ConfigurationError
from ..files.writing import write_bytes
from ..installed import need
from ..units import KINDS, DepthKind, WidthKind, kinds_of
from .results import EvaluationResult
from .table import Cell, ResultTable, label_of, scale_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

    from ..criteria.depth import LayerSimilarities
    from ..plan import PruningPlan

logger = logging.get_logger(__name__)

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
CARD, INK, GREY, FAINT = "#ffffff", "#24292f", "#6e7781", "#d0d7de"
_STYLE = {
    "figure.dpi": 150, "figure.facecolor": CARD, "axes.facecolor": CARD, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": INK, "axes.labelsize": 9,
    "xtick.color": INK, "xtick.labelsize": 8, "ytick.color": INK, "ytick.labelsize": 8,
    "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.6,
}  # fmt: skip
SPEED = ("prefill_throughput", "decode_throughput", "time_to_first_token", "peak_memory", "weight_bytes")


def widths_figure(plan: PruningPlan, num_layers: int | None = None) -> Figure:
    """Units kept in each layer, in front of those there were; one panel for each kind of unit.

    `num_layers` is for plans that do not say how many layers there are.
    """
    cut = {group.layer for group in plan.groups} | {layer for layers in plan.dropped.values() for layer in layers}
    layers = range(max(num_layers or 0, plan.num_layers, 1 + max(cut, default=0)))
    panels = []  # labels, and units of each layer before and after; of dropped layers none are left
    for kind in kinds_of(WidthKind):
        groups = {group.layer: group for group in plan.groups if group.kind == kind}
        if groups:
            whole = max(group.before for group in groups.values())
            before = [groups[layer].before if layer in groups else whole for layer in layers]
            left = [groups[layer].keep if layer in groups else whole for layer in layers]
            kept = [0 if plan.is_dropped(layer, kind) else n for layer, n in zip(layers, left, strict=True)]
            panels.append((kind, before, kept))
    for kind in kinds_of(DepthKind, sublayer=True) if plan.dropped else ():
        panels.append((kind, [1] * len(layers), [int(not plan.is_dropped(layer, kind)) for layer in layers]))
    for one in plan.shared:
        panels.append((one.kind, [one.before] * len(layers), [one.keep] * len(layers)))
    if not panels:
        raise ConfigurationError("The plan cuts nothing, so there are no widths to draw.")
    title = f"Kept width of each layer (grey: cut), {100 * plan.ratio:.1f} % of all parameters gone"
    figure, axes = make_panels(len(panels), 1.9, title)
    for axis, (kind, before, kept), colour in zip(axes, panels, COLOURS, strict=False):
        axis.bar(layers, before, width=0.8, color=FAINT)
        axis.bar(layers, kept, width=0.8, color=colour)
        axis.set(ylabel=KINDS[kind].label, xlim=(-0.6, len(layers) - 0.4), ylim=(0, 1.05 * max(before)))
        whole_numbers(axis.yaxis)
    whole_numbers(axes[-1].xaxis)
    axes[-1].set_xlabel("layer")
    return figure


def quality_figure(
    results: Sequence[EvaluationResult], quality: str | None = None, size: str = "efficiency/parameters"
) -> Figure:
    """One point for each model, quality against size; the dense model is the star with the dashed line.

    Bars are 95 % intervals of the difference from the first model where all were compared with it by pairs: one that
    reaches the dashed line may be chance. Else they are two standard errors of each model alone. Two results must have
    both figures; by default the quality is the first perplexity that two have, else the first task.
    """
    table = ResultTable(results)
    rows = {row.name: row for row in table.rows()}

    def measured(name: str) -> list[tuple[str, str, Cell, Cell]]:
        both = [rows[one].cells if one in rows else [None] * len(results) for one in (size, name)]
        points = zip(table.labels, [result.state for result in results], *both, strict=True)
        return [point for point in points if all(cell and math.isfinite(cell.value) for cell in point[2:])]

    if quality is None:
        families = ("perplexity/", "word_perplexity/", "tasks/")
        names = [name for family in families for name in rows if name.startswith(family)]
        found = [name for name in names if len(measured(name)) >= 2]
        # Perplexities of tokens are not comparable where vocabularies differ; those of words are.
        alike = (name for name in found if all(point[3].comparable for point in measured(name)))
        quality = next(alike, next(iter(found), None))
    if quality is None:
        raise ConfigurationError(f"No perplexity and no task was measured on two of the results together with {size}.")
    for label, *_, cell in measured(quality):
        if not cell.comparable:
            logger.warning(f"{label} is not in the picture: {quality} was measured under other conditions.")
    points = [point for point in measured(quality) if point[3].comparable]
    if len(points) < 2:
        raise ConfigurationError(
            f"{len(points)} of the results have both {size} and {quality}, measured alike; a picture needs two."
        )
    widths, heights = ([point[i].value for point in points] for i in (2, 3))
    across, up = scale_of(rows[size].figure, widths), scale_of(rows[quality].figure, heights)
    bars, what_bars_are = _bars([point[3] for point in points])
    figure, (axis,) = make_panels(1, 3.6, f"Quality against size{what_bars_are and ', bars: '}{what_bars_are}")
    for number, ((label, state, width, height), bar) in enumerate(zip(points, bars, strict=True)):
        x, y, dense = width.value * across.factor, height.value * up.factor, state == "dense"
        if bar is not None:
            reach = [[length * up.factor] for length in bar]
            axis.errorbar(x, y, reach, color=GREY, linewidth=1, capsize=3, zorder=1)
        marker, area, colour = ("*", 220, INK) if dense else ("o", 60, COLOURS[number % len(COLOURS)])
        axis.scatter([x], [y], s=area, marker=marker, color=colour, zorder=3, label=label)
        if dense:
            axis.axhline(y, color=GREY, linewidth=1, linestyle="--", zorder=0)
        side, align = (1, "left") if 2 * width.value <= min(widths) + max(widths) else (-1, "right")
        axis.annotate(label, (x, y), (9 * side, 5), textcoords="offset points", fontsize=8, color=INK, ha=align)
    if "perplexity" in quality and max(heights) > 10 * min(heights):
        axis.set_yscale("log")
    axis.margins(0.15, 0.2)
    names = label_of(rows[size].figure)[:-2], label_of(rows[quality].figure)
    in_brackets = [scale.unit and f" ({scale.unit.strip()})" for scale in (across, up)]
    axis.set(xlabel=names[0] + in_brackets[0], ylabel=names[1] + in_brackets[1])
    return figure


def speed_figure(results: Sequence[EvaluationResult]) -> Figure:
    """Speed and memory of each model relative to the first (the dense one), as bars; only figures measured alike."""
    table = ResultTable(results)
    rows = {row.name: row for row in table.rows()}
    found = [rows[f"efficiency/{name}"] for name in SPEED if f"efficiency/{name}" in rows]
    found = [row for row in found if any(cell is not None and cell.ratio is not None for cell in row.cells[1:])]
    if not found:
        raise ConfigurationError("No speed or memory was measured alike on the first model and on another.")
    title = f"Speed and memory relative to {table.labels[0]} (↑ more is better, ↓ less)"
    figure, (axis,) = make_panels(1, 3.6, title)
    width = 0.8 / (len(results) - 1)
    for number in range(1, len(results)):
        ratios = [getattr(row.cells[number], "ratio", None) for row in found]
        heights = [math.nan if ratio is None else ratio for ratio in ratios]
        places = [i - 0.4 + width * (number - 0.5) for i in range(len(found))]
        colour = COLOURS[(number - 1) % len(COLOURS)]
        bars = axis.bar(places, heights, width=0.92 * width, color=colour, label=table.labels[number])
        texts = ["" if math.isnan(height) else f"{height:.2f}x" for height in heights]
        axis.bar_label(bars, texts, padding=2, fontsize=8, color=INK)
    axis.axhline(1.0, color=INK, linewidth=1.2, linestyle="--", label=table.labels[0])
    axis.set_xticks(range(len(found)), [textwrap.fill(label_of(row.figure), 14) for row in found], fontsize=8)
    axis.set_ylabel(f"times {table.labels[0]}")
    axis.margins(y=0.15)
    legend_below(axis)
    return figure


def distances_figure(similarities: LayerSimilarities) -> Figure:
    """One row for each block size, one column for each first layer; the best block of every size is marked."""
    last = similarities.num_layers - 1
    if last < 1:
        raise ConfigurationError("A model with one layer has no block that could go: nothing to draw.")
    values = [[math.nan] * last for _ in range(last)]
    for size in range(1, last + 1):
        for start, _, distance in similarities.blocks(size):
            values[size - 1][start - 1] = distance
    best = [similarities.best_block(size) for size in range(1, last + 1)]
    title = "How much each block of layers changes the last token (dots: least for each size)"
    figure, (axis,) = make_panels(1, 5.6, title)
    axis.grid(False)
    extent = (0.5, last + 0.5, 0.5, last + 0.5)
    look = {"origin": "lower", "aspect": "auto", "cmap": "viridis", "interpolation": "nearest"}
    image = axis.imshow(values, extent=extent, **look)
    axis.scatter(
        [start for start, _, _ in best], [end - start for start, end, _ in best],
        s=min(60.0, 900.0 / last), marker="o", color=CARD, edgecolors=INK, linewidths=0.6, zorder=3,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("angular distance (0: same direction)", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    axis.set(xlabel="first layer of the block", ylabel="layers in the block")
    whole_numbers(axis.xaxis)
    whole_numbers(axis.yaxis)
    return figure


def coverage_figure(points: Sequence[dict[str, Any]]) -> Figure:
    """The share of text that tokens cover against the share of tokens kept; what is saved on a second scale.

    Args:
        points: As `inspect --vocabulary` gives them, ascending.
    """
    figure, (axis,) = make_panels(1, 3.6, "Text covered by the tokens that stay")
    shares = [100 * point["share"] for point in points]
    for number, (name, label) in enumerate((("covered", "counted text"), ("covered_held_out", "text held out"))):
        if all(point[name] is not None for point in points):
            covered = [100 * point[name] for point in points]
            axis.plot(shares, covered, color=COLOURS[number], marker="o", markersize=3, label=label)
    axis.set(xlabel="tokens kept (% of all)", ylabel="text covered (%)")
    other = axis.twinx()
    other.plot(shares, [100 * point["ratio"] for point in points], color=GREY, linestyle="--", linewidth=1)
    other.set_ylabel("parameters saved (% of the model, dashed)", color=INK, fontsize=9)
    other.grid(False)
    axis.legend(frameon=False, fontsize=8, loc="lower center")
    return figure


def curve_figure(points: Sequence[dict[str, Any]], knee: float | None = None) -> Figure:
    """The predicted loss against the share of parameters that goes.

    Args:
        points: As `inspect --curve` gives them, ascending.
        knee: Share beyond which more costs more than on average.
    """
    figure, (axis,) = make_panels(1, 3.6, "What it costs to remove more of the model")
    shares, nats = [0, *(100 * point["ratio"] for point in points)], [0, *(point["nats"] for point in points)]
    axis.plot(shares, nats, color=COLOURS[0], marker="o", markersize=4)
    if knee is not None:
        axis.axvline(100 * knee, color=COLOURS[1], linestyle="--", label=f"knee at {knee:.0%}")
        axis.legend()
    axis.set(xlabel="parameters gone (% of the model)", ylabel="predicted loss (nats a token)")
    axis.set_ylim(bottom=0)
    return figure


def draw_all(
    results: Sequence[EvaluationResult], folder: str | os.PathLike, plan: PruningPlan | None = None
) -> list[Path]:
    """Draws `widths.png`, `quality.png` and `speed.png`, as far as plan and results (the dense model first) allow.

    Gives the files; raises a `ConfigurationError` if there is nothing to draw.
    """
    need("matplotlib", extra="report")
    drawn, missing = [], []
    pictures = [("widths.png", widths_figure, plan)] if plan is not None else []
    pictures += [("quality.png", quality_figure, results), ("speed.png", speed_figure, results)] * (len(results) > 1)
    for name, figure_of, data in pictures:
        try:
            save(figure_of(data), Path(folder) / name)
            drawn.append(Path(folder) / name)
        except ConfigurationError as error:
            missing.append(f"{name} is not drawn: {error}")
            logger.warning(missing[-1])
    if not drawn:
        raise ConfigurationError("Nothing can be drawn: " + (" ".join(missing) or "give a plan or a second result."))
    return drawn


def _bars(cells: Sequence[Cell]) -> tuple[list[tuple[float, float] | None], str]:
    """How far the bar of each point reaches below and above it, and what that is, in words."""
    others = [cell for cell in cells if cell.difference is not None]
    ends = [getattr(cell.comparison, end, None) for cell in others for end in ("low", "high")]
    if ends and all(end is not None and math.isfinite(end) for end in ends):
        reach = [
            (cell.difference - cell.comparison.low, cell.comparison.high - cell.difference) if cell in others else None
            for cell in cells
        ]
        return reach, "95 % intervals of the paired difference from the first"
    reach = [None if cell.stderr is None else (2 * cell.stderr, 2 * cell.stderr) for cell in cells]
    return reach, "two standard errors of each model alone" if any(reach) else ""


def make_panels(count: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A light card with `count` panels of `height` inches that share the horizontal axis; pyplot is not involved."""
    need("matplotlib", extra="report")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 0.9 + count * height), layout="constrained")
        axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    return figure, axes


def legend_below(axis: Axes) -> None:
    """The legend of one panel below the picture, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    where = {"loc": "outside lower center", "ncols": min(len(labels), 4)}
    axis.figure.legend(handles, labels, fontsize=8, frameon=False, labelcolor=INK, **where)


def whole_numbers(axis: XAxis | YAxis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a PNG without date and version; the same picture gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor=CARD, metadata={"Software": None})
    write_bytes(path, content.getvalue())
