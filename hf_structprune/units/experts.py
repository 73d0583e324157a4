"""Experts: whole ones, each with its row of the router."""

from __future__ import annotations

from .base import RoutedKind


class RoutedExperts(RoutedKind):
    """An expert of a mixture of experts with its row of the router; experts that all tokens share stay."""

    name, label = "experts", "experts"
    sublayer = "mlp"
    part = "block of experts"

    def find(self, reading):
        from ..model.experts import expert_groups

        return expert_groups(self.name, reading.model, reading.layers)

    def config_keys(self, layer, family, config):
        group = layer.group(self.name)
        return () if group is None else (group.key_in_config,)

    def config_values(self, layer, plan, family, config):
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return {}
        return {group.key_in_config: plan.keep(layer.index, self.name, group.size)}


EXPERTS = RoutedExperts.name
