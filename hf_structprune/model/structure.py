"""The coupled groups of a model: which rows and columns of which matrices hold the same unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedModelError
from ..units import KINDS, Reading, WidthKind, kinds_of
from .families import Family, family_of
from .groups import AttentionShape, Group, LayerStructure, Slice, Sublayer, is_linear, matrix, matrix_parameters
from .sublayers import read_sublayers


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AttentionShape",
    "Group",
    "LayerStructure",
    "ModelStructure",
    "Slice",
    "Sublayer",
    "decoder_layers",
    "is_linear",
    "matrix",
]


@dataclass
class ModelStructure:
    """What can be cut from a model.

    Attributes:
        family: The description the groups were read from.
        layers: The decoder layers in order.
        notes: What is left alone, and why.
        total_parameters: All distinct parameters of the model, tied ones once.
        matrix_parameters: Weights of all linear maps that a token passes, the LM head included.
    """

    family: Family
    layers: list[LayerStructure]
    notes: list[str]
    total_parameters: int
    matrix_parameters: int

    @classmethod
    def of(cls, model: PreTrainedModel, whole: bool = True) -> ModelStructure:
        """Reads the coupled groups of a model; works on the meta device.

        Args:
            model: The model.
            whole: Whether it is still to be cut; of one that has been, nothing more need be left to cut.

        Raises:
            UnsupportedModelError: Neither coupled groups nor sublayers were understood; the message names what was
                not.
        """
        try:
            structure = cls._read(model)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UnsupportedModelError(
                f"The structure of {type(model).__name__} (model type {model.config.model_type!r}) cannot be read: "
                f"{reason.rstrip('.')}. It is built in a way that is not understood."
            ) from error
        if whole and not any(layer.groups or layer.sublayers for layer in structure.layers):
            raise UnsupportedModelError(f"Nothing of this model can be cut. {'; '.join(structure.notes)}.")
        return structure

    @classmethod
    def _read(cls, model: PreTrainedModel) -> ModelStructure:
        config = model.config
        family = family_of(config.model_type, getattr(config, "base_model_tp_plan", None))
        if family is None:
            raise UnsupportedModelError(
                f"Model type {config.model_type!r} has neither a usable tensor-parallel plan nor an entry in "
                f"families.py: `{_first_layer_name(model)}` was not understood. Add an entry (see CONTRIBUTING.md)."
            )
        active, notes = getattr(config, "num_experts_per_tok", None), list(family.notes)
        found = decoder_layers(model, family)
        layers = [(LayerStructure(index, name), layer) for index, (name, layer) in enumerate(found)]
        for kind in kinds_of(WidthKind):
            notes += KINDS[kind].find(Reading(model, family, layers))
        for structure, layer in layers:
            structure.parameters = sum(parameter.numel() for parameter in layer.parameters())
            structure.matrix_parameters = matrix_parameters(layer, active)
            structure.sublayers, reason = read_sublayers(config, family, structure.name, layer, active)
            notes += [reason] if reason else []
        total = sum(p.numel() for p in model.parameters())
        structures = [structure for structure, _ in layers]
        return cls(family, structures, list(dict.fromkeys(notes)), total, matrix_parameters(model, active))

    @property
    def groups(self) -> list[Group]:
        return [group for layer in self.layers for group in layer.groups]

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(group.kind for group in self.groups))


def decoder_layers(model: PreTrainedModel, family: Family) -> list[tuple[str, nn.Module]]:
    """Full names and modules of the decoder layers, in order."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    try:
        layers = base.get_submodule(family.layers)
    except AttributeError as error:
        raise UnsupportedModelError(f"`{prefix}{family.layers}` is not a module of {type(model).__name__}.") from error
    return [(f"{prefix}{family.layers}.{index}", layer) for index, layer in enumerate(layers)]


def _first_layer_name(model: PreTrainedModel) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return f"{name}.0 ({type(module[0]).__name__})"
    return type(model).__name__
