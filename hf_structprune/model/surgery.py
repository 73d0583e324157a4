"""Slices tensors. Decides nothing: what stays is handed in."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .structure import CoupledGroup, ModelStructure, Part, Sublayer, is_linear, matrix
from .sublayers import expert_outputs


Kept = dict[tuple[int, str], torch.Tensor]


def mask_units(model: nn.Module, structure: ModelStructure, kept: Kept) -> None:
    """Zeroes what `cut_units` would take out, in place: the reference that a cut model has to equal.

    Zeroing the producers silences the units, zeroing the consumer's columns removes what they feed (a silenced neuron
    may still have an activation other than 0).
    """
    with torch.no_grad():
        for part, gone in _gone(structure, kept):
            module = model.get_submodule(part.module)
            if not is_linear(module):
                module.weight[gone] = 0
            elif part.axis == "columns":
                matrix(module)[:, gone] = 0
            else:
                matrix(module)[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0


def cut_units(model: nn.Module, structure: ModelStructure, kept: Kept) -> None:
    """Takes the units that are not kept out of every tensor of their groups, in place, one tensor at a time.

    Afterwards only the tensors are right; head counts and widths in modules and configuration are the business of
    `checkpoint.rebuild`.

    Args:
        model: The model.
        structure: Its coupled groups.
        kept: Numbers of the units that stay, by `(layer, kind)`; groups that are not named stay whole.
    """
    entries: dict[tuple[str, str], list[torch.Tensor]] = {}
    for part, gone in _gone(structure, kept):
        entries.setdefault((part.module, part.axis), []).append(gone)
    for (name, axis), gone in entries.items():
        module = model.get_submodule(name)
        size = module.weight.shape[0] if not is_linear(module) else matrix(module).shape[axis == "columns"]
        stay = torch.ones(size, dtype=torch.bool)
        stay[torch.cat(gone)] = False
        _slice(module, axis, stay.nonzero().squeeze(1))


def _slice(module: nn.Module, axis: str, stay: torch.Tensor) -> None:
    stay = stay.to(module.weight.device)
    if not is_linear(module):
        module.weight = _parameter(module.weight[stay], module.weight)
        return
    transposed = not isinstance(module, nn.Linear)
    dim = (axis == "columns") != transposed
    module.weight = _parameter(module.weight.index_select(int(dim), stay), module.weight)
    if axis == "rows" and module.bias is not None:
        module.bias = _parameter(module.bias[stay], module.bias)


def _parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=like.requires_grad)


def _gone(structure: ModelStructure, kept: Kept) -> list[tuple[Part, torch.Tensor]]:
    """The entries that go from each part."""
    result = []
    for group in structure.groups:
        if (group.layer, group.kind) in kept:
            gone = dropped(group, kept[group.layer, group.kind])
            result += [(part, part.index[gone].flatten()) for part in group.parts]
    return result


def dropped(group: CoupledGroup, kept: torch.Tensor) -> torch.Tensor:
    """Numbers of the units that go."""
    mask = torch.ones(group.num_units, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().squeeze(1)


def mask_sublayers(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Zeroes the output of what `drop` would take out, in place: the reference that a cut model has to equal.

    A sublayer whose last projection (`o_proj`, `down_proj`: weight and bias) is zero adds nothing to the residual
    stream; a layer of which both sublayers are silent passes it on unchanged.

    Args:
        model: The model.
        structure: Its structure.
        dropped: Numbers of the layers by kind: `"layers"`, `"attention"`, `"mlp"`.

    Raises:
        UnsupportedModelError: A layer is named whose sublayers are not understood.
    """
    with torch.no_grad():
        for sublayer in _sublayers(structure, dropped):
            module = model.get_submodule(sublayer.consumer or sublayer.module)
            for parameter in module.parameters() if sublayer.consumer else expert_outputs(module):
                parameter.zero_()


def drop(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Takes layers out of the list of layers, and the modules and norms of sublayers out of their layers, in place.

    Afterwards only the modules are right: the numbers in the layers that are left and the configuration are the
    business of `checkpoint.rebuild`, and a model with skipped sublayers runs only after it.

    Args:
        model: The model.
        structure: Its structure.
        dropped: Numbers of the layers by kind: `"layers"`, `"attention"`, `"mlp"`.
    """
    numbers = set(dropped.get("layers", ()))
    for kind in ("attention", "mlp"):
        for number in dropped.get(kind, ()):
            for name in _sublayer(structure, number, kind).modules if number not in numbers else ():
                model.set_submodule(name, nn.Identity())
    path = structure.layers[0].name.rpartition(".")[0]
    layers = model.get_submodule(path)
    for number in sorted(numbers, reverse=True):
        del layers[number]
    if numbers and getattr(model, "hf_device_map", None):
        model.hf_device_map = _renumbered(model.hf_device_map, path, len(structure.layers), numbers)


def _renumbered(device_map: dict[str, object], path: str, num_layers: int, gone: set[int]) -> dict[str, object]:
    """A device map by the numbers of the layers that are left."""
    new = {old: index for index, old in enumerate(index for index in range(num_layers) if index not in gone)}
    result = {}
    for name, device in device_map.items():
        match = re.fullmatch(rf"{re.escape(path)}\.(\d+)(.*)", name)
        if match is None:
            result[name] = device
        elif int(match[1]) in new:
            result[f"{path}.{new[int(match[1])]}{match[2]}"] = device
    return result


def _sublayers(structure: ModelStructure, dropped: dict[str, list[int]]) -> list[Sublayer]:
    pairs = [(number, kind) for kind in ("attention", "mlp") for number in dropped.get(kind, ())]
    result = [_sublayer(structure, number, kind) for number, kind in pairs]
    for number in dropped.get("layers", ()):
        layer = structure.layers[number]
        if layer.matrix_parameters != sum(sublayer.matrix_parameters for sublayer in layer.sublayers):
            raise UnsupportedModelError(f"`{layer.name}` has parts that are not understood: {structure.notes}.")
        result += layer.sublayers
    return result


def _sublayer(structure: ModelStructure, number: int, kind: str) -> Sublayer:
    sublayer = structure.layers[number].sublayer(kind)
    if sublayer is None:
        raise UnsupportedModelError(f"`{structure.layers[number].name}` has no {kind} that could be skipped alone.")
    return sublayer
