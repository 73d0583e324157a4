"""Skipped sublayers in a configuration: the `skip` of Transformers' `per_layer_config`."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from ..plan import PruningPlan
from ..units import KINDS, DepthKind, kinds_of
from ..units.depth import LAYERS
from ..units.neurons import NEURONS
from .groups import LayerStructure
from .structure import ModelStructure
from .target import overrides_of


# The width of experts, where it has a key of its own.
_EXPERT_WIDTH = "moe_intermediate_size"


def layers_left(structure: ModelStructure, plan: PruningPlan) -> list[LayerStructure]:
    """The layers that a plan leaves, in order."""
    return [layer for layer in structure.layers if not plan.is_dropped(layer.index, LAYERS)]


def skips_after(config, layers: list[LayerStructure], plan: PruningPlan) -> list[list[str]]:
    """The sublayers that each layer lacks after a plan, those it lacked before included."""
    result = []
    for layer in layers:
        gone = {kind for kind in kinds_of(DepthKind, sublayer=True) if layer.index in plan.dropped.get(kind, ())}
        result.append(sorted({*overrides_of(config, layer.index).get("skip", ()), *gone}))
    return result


def write_skips(
    values: dict[str, Any],
    widths: list[dict[str, Any]],
    skips: list[list[str]],
    modules: dict[str, list[str]],
    width_key: str,
) -> None:
    """Writes the skipped sublayers into configuration values, in place.

    The width of the MLP is named for every layer and not for the model. Whoever builds the layers from the model's
    values alone, as stock classes do, is then refused by the configuration and does not build whole layers with random
    weights where some are skipped.

    Args:
        values: Values for the model.
        widths: Values for each layer.
        skips: Sublayers that each layer lacks.
        modules: Names of the modules of each sublayer, see `skip_modules`.
        width_key: Key of the MLP width.
    """
    for key in (width_key, _EXPERT_WIDTH):
        if key not in values:
            continue
        for width, skip in zip(widths, skips, strict=True):
            width.setdefault(key, values[key])
            if KINDS[NEURONS].sublayer in skip:
                width[key] = 1  # of a module that is not kept
        values[key] = 0
    for width, skip in zip(widths, skips, strict=True):
        width.update({"skip": skip} if skip else {})
    values["skip_modules"] = modules


def skip_modules(config, structure: ModelStructure, plan: PruningPlan) -> dict[str, list[str]]:
    """Names below the layer of the modules that are gone with a sublayer, the one that gives its output last.

    Raises:
        CheckpointError: They differ between layers.
    """
    result = {kind: list(names) for kind, names in (getattr(config, "skip_modules", None) or {}).items()}
    for kind in kinds_of(DepthKind, sublayer=True):
        for number in plan.dropped.get(kind, ()):
            layer = structure.layers[number]
            sublayer = layer.sublayer(kind)
            if sublayer is None:
                raise CheckpointError(f"`{layer.name}` has no {kind} that could be skipped alone.")
            names = [name.removeprefix(f"{layer.name}.") for name in sublayer.modules]
            if result.setdefault(kind, names) != names:
                raise CheckpointError(
                    f"`{layer.name}`: the modules of its {kind} are {names}, those of other layers {result[kind]}; "
                    "one configuration cannot name both."
                )
    return result
