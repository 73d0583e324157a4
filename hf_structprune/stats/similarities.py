"""`LayerSimilarities`: the distances between positions of the residual stream, and the blocks they suggest."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..allocation.removal import Unit
from ..errors import ConfigurationError, RatioError
from ..files.writing import write_text


Block = tuple[int, int, float]  # first layer, the layer behind the last, distance

COLUMNS = ("block_start", "block_end", "average_distance")


@dataclass
class LayerSimilarities:
    """What `layer_similarities` found.

    Attributes:
        angular: Mean angular distance between the positions `i` and `j` of the residual stream, 0 to 1, shape
            (layers + 1, layers + 1), float64. Position `i` is what enters layer `i`.
        distances: Angular distance between the two ends of each layer, and of each sublayer if asked for.
        influences: Block influence of the same.
    """

    angular: torch.Tensor
    distances: dict[Unit, float]
    influences: dict[Unit, float]

    @property
    def num_layers(self) -> int:
        return len(self.angular) - 1

    def blocks(self, size: int, allowed: Collection[int] | None = None) -> list[Block]:
        """All blocks of `size` neighbouring layers as `(start, end, distance)`; the layers `start` to `end - 1` go.

        Layer 0 is in none of them, as in PruneMe.

        Args:
            size: Layers in a block.
            allowed: Only blocks of these layers. Default: all.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"The block size is {size!r}; it must be a whole number, 1 or more.")
        allowed = set(range(self.num_layers) if allowed is None else allowed)
        starts = range(1, self.num_layers - size + 1)
        return [
            (start, start + size, float(self.angular[start, start + size]))
            for start in starts
            if allowed.issuperset(range(start, start + size))
        ]

    def best_block(self, size: int, allowed: Collection[int] | None = None) -> Block:
        """The block with the least distance, the lowest of equal ones; arguments as for `blocks`.

        Raises:
            RatioError: There is no such block; says how long the longest is.
        """
        blocks = self.blocks(size, allowed)
        if not blocks:
            longest = max((n for n in range(1, size) if self.blocks(n, allowed)), default=0)
            raise RatioError(
                f"{size} neighbouring layers are to go, but at most {longest} can: layer 0 stays, and so do layers "
                "that are protected or not named."
            )
        return min(blocks, key=lambda block: (block[2], block[0]))

    def to_csv(self, path: str | os.PathLike, size: int | None = None) -> None:
        """Writes the distances of blocks as PruneMe does: `block_start,block_end,average_distance`.

        PruneMe reads the last position from Transformers' `hidden_states`, where it stands behind the final norm;
        here it is in front of it, as in the paper. Only rows that end behind the last layer differ by that.

        Args:
            path: The file; PruneMe's is called `layer_distances.csv`.
            size: Only blocks of so many layers, as in PruneMe's file. Default: every size, the smallest first.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for n in range(1, self.num_layers) if size is None else (size,):
            writer.writerows(self.blocks(n))
        write_text(path, text.getvalue())
