"""Depth: whole decoder layers, and the attention or the MLP of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import DepthKind


if TYPE_CHECKING:
    from torch import nn


class Layers(DepthKind):
    """A whole decoder layer."""

    name, label, heading = "layers", "decoder layers", "Decoder layers"
    options = ("num_layers", "keep_first")


def _has_parameters(layer: nn.Module, name: str) -> bool:
    module = getattr(layer, name, None) if name else None
    return hasattr(module, "parameters") and any(True for _ in module.parameters())


class Attention(DepthKind):
    """The attention of a layer, with the norms that belong to it alone."""

    name, label, heading = "attention", "attention sublayers", "Attention of layers"
    sublayer = "attention"

    def modules(self, family, layer):
        parent = family.attention.parent if family.attention else ""
        return (parent,) if _has_parameters(layer, parent) else ()

    def outputs(self, family):
        return [family.attention.output]


class Mlp(DepthKind):
    """The MLP of a layer, with the norms that belong to it alone."""

    name, label, heading = "mlp", "MLP sublayers", "MLP of layers"
    sublayer = "mlp"

    def modules(self, family, layer):
        """Its own module, or projections that stand in the layer itself."""
        for names in family.mlps:
            projections, parent = (*names.inputs, names.output), names.parent.partition(".")[0]
            if not parent and all(_has_parameters(layer, name) for name in projections):
                return projections
            if _has_parameters(layer, parent):
                return (parent,)
        experts = (family.experts or "").partition(".")[0]
        return (experts,) if _has_parameters(layer, experts) else ()

    def outputs(self, family):
        return [names.output for names in family.mlps]


LAYERS = Layers.name
