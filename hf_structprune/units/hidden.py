"""The residual stream: its channels are shared by all layers."""

from __future__ import annotations

import math

from ..alignment import multiple_of, step_of
from ..errors import ConfigurationError
from .base import StreamKind


class Hidden(StreamKind):
    """A channel of the residual stream, the same in every parameter of the model."""

    name, label = "hidden", "hidden size"
    options = ("hidden_size",)
    criterion_option = "hidden_criterion"
    criteria = ("magnitude", "taylor", "activation", "pca")

    def sizes(self, size, round_to, align_to):
        """Multiples as configured, else of 2^n, at most 1/16 and 128."""
        step = step_of(round_to, align_to, min(128, 2 ** int(math.log2(max(1, size // 16)))))
        if align_to is not None and step >= size:
            raise ConfigurationError(
                f"`align_to` is {align_to!r}, but no {self.label} below the model's own, {size}, is a multiple of "
                f"{step}."
            )
        return [*range(step, size, step), *([size] if size % multiple_of(align_to) == 0 else [])]


HIDDEN = Hidden.name
