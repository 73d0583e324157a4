"""Cutting channels of the residual stream: one coupled group through the whole model."""

from .cut import cut_hidden
from .group import HiddenGroup, hidden_group
from .target import shrunk_config_model


__all__ = ["HiddenGroup", "cut_hidden", "hidden_group", "shrunk_config_model"]
