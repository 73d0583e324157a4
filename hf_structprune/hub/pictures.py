"""The pictures of a card: quality against size of what was measured, and the widths of the layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..evaluation.pictures import quality_figure, save, widths_figure
from .contents import QUALITY_NAME, WIDTHS_NAME, Contents


def draw_pictures(folder: str | os.PathLike) -> list[Path]:
    """Draws `quality.png` and `pruned_widths.png` into a checkpoint folder; `make_card` puts them into the card.

    The first needs a perplexity or a task of two states of the model; its size is the number of parameters, or the
    bytes of the weights where they are quantised. Pictures of which there is nothing to draw are taken away.

    Raises:
        HubError, CheckpointError: As of `make_card`.
        StructPruneError: Matplotlib is not installed.
    """
    folder, contents = Path(folder), Contents(Path(folder))
    size = "efficiency/weight_bytes" if contents.state == "quantised" else "efficiency/parameters"
    figures: dict[str, Callable[[], Any]] = {
        QUALITY_NAME: lambda: quality_figure(contents.columns(), size=size),
        WIDTHS_NAME: lambda: widths_figure(contents.plan),
    }
    drawn = []
    for name, draw in figures.items():
        try:
            save(draw(), folder / name)
            drawn.append(folder / name)
        except ConfigurationError:  # nothing was measured twice, or no widths were cut
            (folder / name).unlink(missing_ok=True)
    return drawn
