"""MLP neurons: rows of what goes up, columns of what comes down."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..alignment import step_of
from .base import Reading, WidthKind


if TYPE_CHECKING:
    from torch import nn

    from ..model.families import Projections
    from ..model.groups import LayerStructure


_ADJUSTED = "block_auto_adjust_ff_dim"
_OWN_KEY = "its width has a configuration key of its own"


class Neurons(WidthKind):
    """A neuron of an MLP: a row of `gate` and `up`, a column of `down`."""

    name, label = "mlp_neurons", "MLP neurons"
    options = ("mlp_ratio",)
    sublayer = "mlp"
    activated = aligns = True
    part = "MLP"

    def find(self, reading: Reading) -> list[str]:
        from ..model.families import PROVEN
        from ..model.probe import grouped

        probed = reading.config.model_type not in PROVEN  # of those the tests cover what is read here
        reasons, rest = {}, []
        for structure, layer in reading.layers:
            found = [note for names in reading.family.mlps for note in self._in_layer(structure, layer, names)]
            reasons[structure.index] = found
            other = structure.group(self.name) or any(_OWN_KEY in one for one in found)
            if probed and found and not other:
                rest.append((structure, layer))
        notes = grouped(self.name, reading.family.width_key, reading.model, rest)
        for structure, _ in rest:
            if structure.group(self.name):
                reasons[structure.index] = []
        return [note for found in reasons.values() for note in found] + notes

    def _in_layer(self, structure: LayerStructure, layer: nn.Module, names: Projections) -> list[str]:
        import torch

        from ..model.groups import make_group, matrix, not_understood, submodule

        reason = not_understood(layer, names)
        if reason is not None:
            return reason
        width = matrix(layer.get_submodule(names.output)).shape[1]
        if "shared" in names.parent:
            return []  # of a kind of its own, see `experts`
        if structure.group(self.name) is not None:
            return [f"{names.parent}: {_OWN_KEY}, left alone"]
        index = torch.arange(width)[:, None]
        producers = []
        for name in names.inputs:
            rows = matrix(layer.get_submodule(name)).shape[0]
            if rows not in (width, 2 * width):
                return [f"{name}: {rows} rows do not match the {width} columns of {names.output}, left alone"]
            producers += [(name, index + half * width) for half in range(rows // width)]
        group = make_group(self.name, structure, layer, names, width, producers, index)
        # Gemma 3n compares each neuron with a threshold that depends on all of them.
        sparse = getattr(submodule(layer, names.parent), "activation_sparsity", 0)
        structure.groups.append(replace(group, coupled=bool(sparse)))
        return []

    def multiple(self, whole, round_to, align_to):
        """As configured, else a power of two that suits the hardware, at most 1/32 of the width and at most 128."""
        step = step_of(round_to, align_to, min(128, 2 ** int(math.log2(max(1, whole // 32)))))
        return step if align_to is not None else min(step, whole)

    def key_of(self, family):
        return family.width_key

    def has_key(self, family, config):
        values = config.to_dict()
        own = (values.get("per_layer_config") or {}).values()
        return any(family.width_key in names for names in (values, config.attribute_map, *own))

    def config_values(self, layer, plan, family, config):
        from ..model.probe import size_in

        values, key = super().config_values(layer, plan, family, config), family.width_key
        if values and getattr(config, _ADJUSTED, False):  # LFM2 makes another width of the one that it is given
            values[_ADJUSTED] = False
        elif values:  # some classes give their MLPs a half of it
            size, own = size_in(config, layer.index, key) or 0, layer.group(self.name).size
            times, rest = divmod(max(size, own), min(size, own) or 1)
            if size > own and not rest:
                values[key] *= times
            elif size and not rest and not values[key] % times:  # or, as Gemma 4, twice as much
                values[key] //= times
        return values


NEURONS = Neurons.name
