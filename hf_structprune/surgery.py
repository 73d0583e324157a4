"""Slices tensors. Decides nothing: what stays is handed in."""

from __future__ import annotations

import torch
from torch import nn

from .structure import CoupledGroup, ModelStructure, Part, is_linear, matrix


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
