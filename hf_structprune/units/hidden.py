"""The residual stream: its channels are shared by all layers."""

from __future__ import annotations

from .base import StreamKind


class Hidden(StreamKind):
    """A channel of the residual stream, the same in every parameter of the model."""

    name, label = "hidden", "hidden size"
    options = ("hidden_size",)
    criterion_option = "hidden_criterion"
    criteria = ("magnitude", "taylor", "activation", "pca")


HIDDEN = Hidden.name
