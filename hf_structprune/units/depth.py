"""Depth: whole decoder layers, and the attention or the MLP of one."""

from __future__ import annotations

from .base import DepthKind


class Layers(DepthKind):
    """A whole decoder layer."""

    name, label, heading = "layers", "decoder layers", "Decoder layers"
    options = ("num_layers", "keep_first")


class Attention(DepthKind):
    """The attention of a layer, with the norms that belong to it alone."""

    name, label, heading = "attention", "attention sublayers", "Attention of layers"
    sublayer = "attention"


class Mlp(DepthKind):
    """The MLP of a layer, with the norms that belong to it alone."""

    name, label, heading = "mlp", "MLP sublayers", "MLP of layers"
    sublayer = "mlp"


LAYERS = Layers.name
