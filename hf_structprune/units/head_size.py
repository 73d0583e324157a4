"""The size of a head: dimensions of queries, keys and values, the same in every head of the model."""

from __future__ import annotations

from ..errors import ConfigurationError
from .base import SharedKind


_KERNELS = (192, 128, 96, 64, 32)  # sizes that attention kernels of servers are compiled for, beside 256


class HeadSize(SharedKind):
    """A dimension of all heads: of queries and keys two make a pair that is rotated, of values it is any direction."""

    name, label = "head_dim", "head size"
    always_tried = cached = True
    criterion_option = "head_dim_criterion"
    criteria = ("attention", "energy", "magnitude", "taylor")

    def sizes(self, size, round_to, align_to):
        """Those that servers have kernels for."""
        smaller = [kernel for kernel in _KERNELS if kernel < size]
        if not smaller:
            raise ConfigurationError(
                f"The heads have {size} dimensions, and servers have no kernels for fewer. Ask for a size by "
                f"keep={{'{self.name}': {size // 2}}}."
            )
        return [*smaller, size]

    def remarks(self, decision):
        if decision.keep in _KERNELS:
            return []
        found = ", ".join(map(str, reversed(_KERNELS)))
        return [
            f"heads of {decision.keep} dimensions: Transformers runs them, but attention kernels of servers are made "
            f"for {found} and 256, and may refuse others"
        ]


HEAD_SIZE = HeadSize.name
