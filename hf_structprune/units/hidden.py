"""The residual stream: its channels are shared by all layers."""

from __future__ import annotations

from .base import StreamKind


class Hidden(StreamKind):
    """A channel of the residual stream, the same in every parameter of the model."""

    name, label = "hidden", "hidden size"
    options = ("hidden_size",)
    criterion_option = "hidden_criterion"
    criteria = ("magnitude", "taylor", "activation", "pca")

    def told(self, plan):
        return plan.hidden and f"Hidden size: {plan.hidden.keep} instead of {plan.hidden.before}"


HIDDEN = Hidden.name
