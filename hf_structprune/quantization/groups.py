"""Group sizes: whether they divide the inputs of every layer."""

from __future__ import annotations

from ..errors import ConfigurationError
from .source import Source


# The sizes that kernels are written for.
USUAL = (256, 128, 64, 32)


def dividing(source: Source) -> list[int]:
    """The usual group sizes that divide the inputs of every layer, the largest first."""
    return [size for size in USUAL if all(columns % size == 0 for _, columns in source.linears.values())]


def check_groups(source: Source, size: int, *, whole_row: bool = True) -> None:
    """Refuses a group size that some layer's inputs are no multiple of.

    Args:
        source: The model.
        size: Weights of a row that share a scale; -1 for all of them.
        whole_row: Whether -1 is possible.

    Raises:
        ConfigurationError: Names the layer, its inputs and the sizes that divide all layers.
    """
    if size == -1 and whole_row:
        return
    for name, (_, columns) in source.linears.items():
        if size == -1 or columns % size:
            fitting = [*map(str, dividing(source)), *(["-1 (a whole row)"] if whole_row else [])]
            raise ConfigurationError(
                f"`group_size` is {size}, which does not divide the {columns} inputs of {name}. "
                + (f"Sizes that divide all layers: {', '.join(fitting)}." if fitting else "")
                + " `PruningConfig(align_to=...)` prunes to widths that group sizes divide."
            )
