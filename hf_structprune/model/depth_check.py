"""Whether a configuration with fewer layers builds the layers that stay as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError


_SIMPLE = (int, float, bool, str, type(None))
# What may differ: the number of the layer itself, and modes of the module.
_OWN_NUMBER = ("layer_idx", "training", "gradient_checkpointing")


def check_layers(dense: Sequence[nn.Module], cut: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Compares each layer of a shallower model with the dense one it comes from, without looking at weights.

    Classes of all submodules, shapes of parameters and buffers, and simple attributes (a sliding window, a number of
    experts, whether positions are rotated) have to be equal. This finds rules of a configuration that count layers and
    that `layer_lists` does not know.

    Args:
        dense: Layers before.
        cut: Layers after.
        kept: Number in `dense` of each layer of `cut`.

    Raises:
        CheckpointError: Names the layer and the attribute that would differ.
    """
    if len(cut) != len(kept):
        raise CheckpointError(f"The configuration builds {len(cut)} layers, but {len(kept)} stay.")
    for new, old in enumerate(kept):
        before, after = description(dense[old]), description(cut[new])
        for name in sorted({*before, *after}):
            if before.get(name, "nothing") != after.get(name, "nothing"):
                raise CheckpointError(
                    f"Layer {old} would not be the same as layer {new} of a shallower model: its `{name}` is "
                    f"{before.get(name, 'nothing')!r} and would be {after.get(name, 'nothing')!r}. The configuration "
                    "has a rule for layers that is not understood; drop other layers, or skip attention and MLP."
                )


def description(layer: nn.Module) -> dict[str, Any]:
    """Classes, shapes and simple attributes of a layer and everything in it, by name."""
    result: dict[str, Any] = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        result[f"{prefix}class"] = type(module).__name__
        for name, value in vars(module).items():
            if name[0] != "_" and name not in _OWN_NUMBER and _is_simple(value):
                result[prefix + name] = value
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            result[prefix + name] = tuple(tensor.shape)
    return result


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_simple(entry) for entry in value)
    return isinstance(value, _SIMPLE)
