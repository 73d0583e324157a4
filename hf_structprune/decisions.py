"""The single decisions that a plan is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .errors import ConfigurationError
from .model.structure import LayerStructure, ModelStructure
from .units.kinds import DEPTH_UNITS, SUBLAYER_UNITS


Dropped = dict[str, list[int]]
# The widths that go with a sublayer.
WIDTHS_OF = {"attention": ("kv_groups", "query_heads"), "mlp": ("mlp_neurons",)}


@dataclass
class GroupPlan:
    """The decision for one coupled group.

    Attributes:
        layer: Number of the decoder layer.
        kind: Kind of unit.
        num_units: Units before.
        keep: Units after. For query heads: all heads left in the layer, the loss of whole KV groups included.
        kept: Their numbers in ascending order, once they are chosen.
    """

    layer: int
    kind: str
    num_units: int
    keep: int
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.num_units:
            raise ConfigurationError(
                f"Layer {self.layer}: {self.keep} of {self.num_units} {self.kind} cannot be kept; at least one must."
            )
        if self.kept is None:
            return
        if len(self.kept) != self.keep or sorted(set(self.kept) & set(range(self.num_units))) != self.kept:
            raise ConfigurationError(
                f"Layer {self.layer}: `kept` of {self.kind} must name {self.keep} of {self.num_units}, ascending."
            )


@dataclass
class HiddenPlan:
    """The decision for the residual stream.

    Attributes:
        before: Hidden size before.
        keep: Hidden size after.
        kept: Numbers of the channels that stay, ascending, once they are chosen.
    """

    before: int
    keep: int
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.before:
            raise ConfigurationError(f"A hidden size of {self.keep} is asked for; it must be 1 to {self.before - 1}.")
        if self.kept is None:
            return
        if len(self.kept) != self.keep or sorted(set(self.kept) & set(range(self.before))) != self.kept:
            raise ConfigurationError(
                f"`kept` of the hidden size must name {self.keep} channels of {self.before}, ascending."
            )


def normalised(dropped: Dropped | None, structure: ModelStructure) -> Dropped:
    """Dropped layers and sublayers in one form: ascending, without empty kinds, a layer that loses all is dropped.

    Args:
        dropped: Layer numbers by kind: `"layers"`, `"attention"`, `"mlp"`.
        structure: Of the model that they are dropped from.

    Raises:
        ConfigurationError: A kind or a number is wrong, or nothing would be left.
    """
    dropped = {kind: set(numbers) for kind, numbers in (dropped or {}).items()}
    for kind, numbers in dropped.items():
        if kind not in DEPTH_UNITS or not numbers <= set(range(len(structure.layers))):
            raise ConfigurationError(
                f"`dropped` names {kind} {sorted(numbers)}; the kinds are {', '.join(DEPTH_UNITS)} and the layers 0 "
                f"to {len(structure.layers) - 1}."
            )
    layers = dropped.get("layers", set()) | emptied(dropped, structure)
    if len(layers) >= len(structure.layers):
        raise ConfigurationError(f"All {len(structure.layers)} layers are to go; at least one must stay.")
    result = {"layers": layers, **{kind: dropped.get(kind, set()) - layers for kind in ("attention", "mlp")}}
    for kind in ("attention", "mlp"):
        for number in sorted(result[kind]):
            if structure.layers[number].sublayer(kind) is None:
                raise ConfigurationError(f"Layer {number} has no {kind} that could go alone.")
    return {kind: sorted(numbers) for kind, numbers in result.items() if numbers}


def emptied(dropped: Mapping[str, Collection[int]], structure: ModelStructure) -> set[int]:
    """Layers that lose both sublayers, or the only one that an earlier pruning has left.

    Args:
        dropped: Numbers of the layers that lose their `"attention"`, their `"mlp"`.
        structure: Of the model.
    """
    layers = set(dropped.get("attention", ())) & set(dropped.get("mlp", ()))
    for kind in SUBLAYER_UNITS:
        layers |= {number for number in dropped.get(kind, ()) if _is_all(structure.layers[number], kind)}
    return layers


def _is_all(layer: LayerStructure, kind: str) -> bool:
    """Whether a layer does nothing but what this sublayer does."""
    sublayer = layer.sublayer(kind)
    return sublayer is not None and sublayer.matrix_parameters == layer.matrix_parameters


def is_dropped(dropped: Dropped, layer: int, kind: str) -> bool:
    """Whether the layer goes, or the sublayer with units of this kind."""
    if layer in dropped.get("layers", ()):
        return True
    return any(layer in dropped.get(part, ()) and kind in (part, *widths) for part, widths in WIDTHS_OF.items())
