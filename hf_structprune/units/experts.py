"""Experts: whole ones, each with its row of the router, and the neurons inside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .base import Reading, RoutedKind, WidthKind
from .neurons import Neurons


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class _InBlocks(WidthKind):
    """Units of blocks of experts, whose key in the configuration depends on the model."""

    sublayer = "mlp"

    def config_keys(self, layer, family, config):
        group = layer.group(self.name)
        return () if group is None else (group.key_in_config,)

    def config_values(self, layer, plan, family, config):
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return {}
        each = group.blocks if group.in_experts else 1
        return {group.key_in_config: plan.keep(layer.index, self.name, group.size) // each}

    def input_width(self, layer, plan):
        return None


class RoutedExperts(_InBlocks, RoutedKind):
    """An expert of a mixture of experts with its row of the router; experts that all tokens share stay."""

    name, label = "experts", "experts"
    part = "block of experts"

    def find(self, reading):
        from ..model.experts import expert_groups

        return expert_groups(self.name, reading.model, reading.layers)


class ExpertNeurons(_InBlocks):
    """A neuron of an expert: rows of its `gate` and `up`, a column of its `down`; all experts keep as many."""

    name, label = "expert_neurons", "neurons of experts"
    criteria = ("random", "l1", "l2", "wanda", "wifv", "obs")
    part = "experts"
    aligns = within_experts = True
    # Experts are multiplied in groups, whose rows have to be multiples of 16 bytes.
    step = 8

    def find(self, reading):
        from ..model.experts import expert_neuron_groups

        return expert_neuron_groups(self.name, EXPERTS, reading.model, reading.layers)

    def multiple(self, whole, round_to, align_to):
        return math.lcm(Neurons.multiple(self, whole, round_to, align_to), self.step)


class SharedNeurons(WidthKind):
    """A neuron of the expert that all tokens share, where its width has a key of its own."""

    name, label = "shared_neurons", "neurons of shared experts"
    sublayer = "mlp"
    part = "shared expert"
    aligns = True
    multiple = Neurons.multiple

    def find(self, reading):
        from ..model.probe import grouped

        notes = []
        for key in _shared_key(reading.config):
            notes += grouped(self.name, key, reading.model, reading.layers)
        return notes + _shared_left(reading)

    def config_keys(self, layer, family, config):
        return _shared_key(config)

    def config_values(self, layer, plan, family, config):
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return {}
        return dict.fromkeys(_shared_key(config), plan.keep(layer.index, self.name, group.size))


def _shared_key(config: PreTrainedConfig) -> tuple[str, ...]:
    """The key that holds the width of shared experts alone; none where there is no such key."""
    names = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
    values = config.to_dict()
    return tuple(name for name in names if values.get(name) is not None)[:1]


def _shared_left(reading: Reading) -> list[str]:
    """Says which shared experts no key of the configuration sizes, alone or together with the others."""
    left = []
    for structure, layer in reading.layers:
        cut = [part.tensor for group in structure.groups for part in group.slices]
        for name, module in layer.named_modules():
            shared = name.rpartition(".")[2].startswith("shared") and len(list(module.children())) > 1
            if shared and not any(tensor.startswith(f"{structure.name}.{name}.") for tensor in cut):
                left.append(f"{name}: no key of the configuration is its width, left alone")
    return list(dict.fromkeys(left))


EXPERTS = RoutedExperts.name
