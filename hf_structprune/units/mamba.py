"""Heads of Mamba 2 mixers, as Minitron-SSM takes them out (Taghibakhshi et al., 2025,
https://huggingface.co/papers/2504.11409): the same number of each group."""

from __future__ import annotations

from .base import WidthKind


class MambaHeads(WidthKind):
    """A head of a Mamba 2 mixer: its gate, channels, step and decay, and columns of `out_proj`; every group of heads
    that shares `B` and `C` keeps as many."""

    name, label = "mamba_heads", "Mamba heads"
    part = "Mamba mixer"

    def find(self, reading):
        from ..model.mamba import mamba_head_groups

        return mamba_head_groups(self.name, reading.model, reading.layers)

    def config_keys(self, layer, family, config):
        group = layer.group(self.name)
        return () if group is None else (group.key_in_config, *dict(group.keys_along))

    def config_values(self, layer, plan, family, config):
        from ..model.probe import size_in

        group = layer.group(self.name)
        if group is None:
            return {}
        keep = plan.keep(layer.index, self.name, group.size)
        values = {group.key_in_config: keep}
        for key, each in group.keys_along:
            value = size_in(config, layer.index, key) + each * (keep - group.size)
            values[key] = int(value) if value.denominator == 1 else float(value)
        return values
