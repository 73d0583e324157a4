"""The angular distances of all blocks of layers as a heat map."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..criteria.depth import LayerSimilarities
from ..errors import ConfigurationError
from ..evaluation.pictures import CARD, INK, make_panels, save, set_title, whole_numbers


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def distances_figure(similarities: LayerSimilarities) -> Figure:
    """One row for each block size, one column for each first layer; the best block of every size is marked.

    Args:
        similarities: Of a model with at least two layers.
    """
    last = similarities.num_layers - 1
    if last < 1:
        raise ConfigurationError("A model with one layer has no block that could go: nothing to draw.")
    values = [[float("nan")] * last for _ in range(last)]
    for size in range(1, last + 1):
        for start, _, distance in similarities.blocks(size):
            values[size - 1][start - 1] = distance
    figure, (axis,) = make_panels(1, height=5.6)
    axis.grid(False)
    image = axis.imshow(
        values, origin="lower", aspect="auto", extent=(0.5, last + 0.5, 0.5, last + 0.5), cmap="viridis",
        interpolation="nearest",
    )  # fmt: skip
    best = [similarities.best_block(size) for size in range(1, last + 1)]
    axis.scatter(
        [start for start, _, _ in best], [end - start for start, end, _ in best],
        s=min(60.0, 900.0 / last), marker="o", color=CARD, edgecolors=INK, linewidths=0.6, zorder=3,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("angular distance (0: same direction)", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    axis.set_xlabel("first layer of the block")
    axis.set_ylabel("layers in the block")
    whole_numbers(axis.xaxis)
    whole_numbers(axis.yaxis)
    set_title(axis, "How much each block of layers changes the last token (dots: least for each size)")
    return figure


def draw_distances(similarities: LayerSimilarities, path: str | os.PathLike) -> None:
    """Saves `distances_figure` as PNG."""
    save(distances_figure(similarities), path)
