"""What can be cut of a model: the coupled groups in its layers, and the sublayers that can be skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import UnsupportedModelError
from ..units import KINDS, DepthKind, Reading, SharedKind, WidthKind, kinds_of
from .families import NORMS, Family, family_of
from .groups import (
    AttentionShape,
    Group,
    LayerStructure,
    Slice,
    Sublayer,
    is_linear,
    matrix,
    matrix_parameters,
    submodule,
)  # fmt: skip
from .reading_modules import family_from_modules


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .towers import Towers

__all__ = [
    "AttentionShape", "Group", "LayerStructure", "ModelStructure", "Slice", "Sublayer", "decoder_layers", "is_linear",
    "matrix",
]  # fmt: skip

_LATENTS = "kv_a_proj_with_mqa"  # in all classes of latent attention
# Layers that are not `stream + sublayer(stream)`, although their modules have the usual names.
_SCALED_STREAMS = ("minimax",)
# What mixes tokens in the place of attention, or beside it, and is not skipped alone.
_MIXERS = ("mamba", "linear_attn", "conv", "short_conv")
_NORM_NAMES = frozenset(name for row in NORMS for name in row.all)
# What a block of experts may hold; each expert's output, and that of one all tokens share, is `down_proj`'s.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_EXPERTS = ("experts", "shared_expert", "shared_experts")
_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass
class ModelStructure:
    """What can be cut from a model.

    Attributes:
        family: The description the groups were read from.
        layers: The decoder layers in order.
        notes: What is left alone, and why.
        total_parameters: All distinct parameters of the model, tied ones once, with those beside a text decoder.
        matrix_parameters: Weights of all linear maps that a token passes, the LM head included.
        towers: What stands beside a text decoder that is a part of a larger model; `None` for a model of its own.
        shared: Kinds of units that all layers share and that its configuration has.
    """

    family: Family
    layers: list[LayerStructure]
    notes: list[str]
    total_parameters: int
    matrix_parameters: int
    towers: Towers | None = None
    shared: tuple[str, ...] = kinds_of(SharedKind)

    @classmethod
    def of(cls, model: PreTrainedModel, whole: bool = True, towers: Towers | None = None) -> ModelStructure:
        """Reads the coupled groups of a model; works on the meta device.

        Args:
            whole: Whether it is still to be cut; of one that has been, nothing more need be left to cut.
            towers: What stands beside it, if it is the text decoder of a larger model.

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
        if whole and len(structure.layers) < 2 and not any(one.groups or one.sublayers for one in structure.layers):
            raise UnsupportedModelError(f"Nothing of this model can be cut. {'; '.join(structure.notes)}.")
        if towers is not None:
            structure.towers, structure.notes = towers, [*structure.notes, *filter(None, [towers.note])]
            structure.total_parameters += towers.parameters
        return structure

    @classmethod
    def _read(cls, model: PreTrainedModel) -> ModelStructure:
        config = model.config
        family = family_of(config.model_type, getattr(config, "base_model_tp_plan", None))
        if family is None or submodule(model.base_model, family.layers) is None:
            family = family_from_modules(model)
        elif family.attention is None or not (family.mlps or family.experts):
            family = family.completed(family_from_modules(model))
        if family is None:
            raise UnsupportedModelError(
                f"Model type {config.model_type!r}: no list of decoder layers was found "
                f"(`{_first_layer_name(model)}`). Add an entry to families.py (see CONTRIBUTING.md)."
            )
        active, notes = getattr(config, "num_experts_per_tok", None), list(family.notes)
        found = decoder_layers(model, family)
        layers = [(LayerStructure(index, name), layer) for index, (name, layer) in enumerate(found)]
        for kind in kinds_of(WidthKind):
            notes += KINDS[kind].find(Reading(model, family, layers))
        notes += _without_shared(layers)
        for structure, layer in layers:
            structure.parameters = sum(parameter.numel() for parameter in layer.parameters())
            structure.matrix_parameters = matrix_parameters(layer, active)
            structure.latent = _cached_latents(layer)
            notes += _find_sublayers(config, family, structure, layer, active)
        total = sum(p.numel() for p in model.parameters())
        structures = [structure for structure, _ in layers]
        shared = tuple(kind for kind in kinds_of(SharedKind) if KINDS[kind].is_of(config))
        matrices = matrix_parameters(model, active)
        return cls(family, structures, list(dict.fromkeys(notes)), total, matrices, shared=shared)

    @property
    def own_parameters(self) -> int:
        """Parameters of the text decoder alone."""
        return self.total_parameters - (self.towers.parameters if self.towers else 0)

    @property
    def groups(self) -> list[Group]:
        return [group for layer in self.layers for group in layer.groups]

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(group.kind for group in self.groups))


def _cached_latents(layer: nn.Module) -> int:
    """Values of latents and rotated keys that latent attention caches of a token: what one map gives."""
    maps = (module for name, module in layer.named_modules() if name.rpartition(".")[2] == _LATENTS)
    return sum(matrix(module).shape[0] for module in maps if is_linear(module))


def _without_shared(layers: list[tuple[LayerStructure, nn.Module]]) -> list[str]:
    """Leaves alone units whose weights several layers share (Zamba): they could not go from one of them."""
    owners, notes = Counter(id(parameter) for _, layer in layers for parameter in layer.parameters()), []
    for structure, layer in layers:
        own = {name for name, parameter in layer.named_parameters(prefix=structure.name) if owners[id(parameter)] > 1}
        for group in structure.groups:
            if own & group.dims().keys():
                short = group.parent[len(structure.name) + 1 :]
                notes.append(f"{short}: several layers share its weights, left alone")
        structure.groups = [group for group in structure.groups if not own & group.dims().keys()]
        if not any(KINDS[group.kind].of_heads for group in structure.groups):
            structure.attention = None
    return notes


def decoder_layers(model: PreTrainedModel, family: Family) -> list[tuple[str, nn.Module]]:
    """Full names and modules of the decoder layers, in order."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    try:
        layers = base.get_submodule(family.layers)
    except AttributeError as error:
        raise UnsupportedModelError(f"`{prefix}{family.layers}` is not a module of {type(model).__name__}.") from error
    return [(f"{prefix}{family.layers}.{index}", layer) for index, layer in enumerate(layers)]


def _find_sublayers(config, family: Family, structure: LayerStructure, layer: nn.Module, active) -> list[str]:
    """Adds the sublayers of a layer that can be skipped; returns what is left alone, and why."""
    there = [name for name, _ in layer.named_children() if name in _NORM_NAMES]
    norms = next((row for row in NORMS if row.all == set(there)), None)
    reason = _more_than_a_sum(config)
    if reason is None and norms is None:
        found = ", ".join(name for name, _ in layer.named_children() if "norm" in name or name in there)
        reason = f"the norms of the layers ({found}) are not understood"
    if reason is not None:
        return [f"sublayers: {reason}, left alone"]
    parts = {kind: KINDS[kind].modules(family, layer) for kind in kinds_of(DepthKind, sublayer=True)}
    mixers = [name for name, _ in layer.named_children() if name in _MIXERS]
    if mixers:  # its norms are those of the attention
        parts = {kind: modules for kind, modules in parts.items() if KINDS[kind].sublayer == "mlp"}
    attention = (family.attention.parent,) if mixers and family.attention else ()
    known = {*norms.all, *mixers, *attention, *(module for modules in parts.values() for module in modules)}
    stranger = next((name for name, _ in layer.named_parameters() if name.partition(".")[0] not in known), None)
    if stranger is not None:
        return [f"sublayers: parameter `{stranger}` is not understood, left alone"]
    notes = [f"{name}: it is not skipped alone, left alone" for name in mixers]
    for kind, modules in parts.items():
        consumer = _consumer(layer, modules, KINDS[kind].outputs(family)) if modules else None
        if consumer is None:
            notes += [f"{modules[-1]}: its output is not understood, it is not skipped alone"] if modules else []
            continue
        own = getattr(norms, KINDS[kind].sublayer)
        gone = [layer.get_submodule(name) for name in (*own, *modules)]
        parameters = sum(parameter.numel() for module in gone for parameter in module.parameters())
        matrices = sum(matrix_parameters(module, active) for module in gone)
        *inner, last = (f"{structure.name}.{module}" for module in modules)
        names, consumer = (f"{structure.name}.{norm}" for norm in own), consumer and f"{structure.name}.{consumer}"
        structure.sublayers.append(Sublayer(kind, last, tuple(names), consumer, parameters, matrices, tuple(inner)))
    return notes[:1]


def _more_than_a_sum(config) -> str | None:
    """Reasons why a layer without a sublayer is more than its residual stream."""
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    if getattr(config, "do_layer_norm_before", True) is False:
        return "the norms follow the sum with the residual stream"
    if config.model_type in _SCALED_STREAMS:
        return "the residual stream itself is normalised and scaled in each layer"
    return None


def _consumer(layer: nn.Module, modules: tuple[str, ...], outputs: list[str]) -> str | None:
    """The last linear map of a sublayer, `""` for a block of experts, `None` if neither is there."""
    for output in outputs:
        if output.rpartition(".")[0] in (modules[-1], "") and is_linear(submodule(layer, output)):
            return output
    return "" if _is_experts(layer.get_submodule(modules[-1])) else None


def _is_experts(block: nn.Module) -> bool:
    """Whether all parameters of a block are those of routers and experts whose outputs are added up."""
    names = [name.split(".") for name, _ in block.named_parameters()]
    return any(name[0] == "experts" for name in names) and all(
        name[0] in _ROUTERS or (name[0] in _EXPERTS and _projection(name) in _PROJECTIONS) for name in names
    )


def _projection(name: list[str]) -> str:
    """`down_proj` of `experts.down_proj`, `experts.down_proj_bias` and `shared_expert.down_proj.weight`."""
    return next((part.removesuffix("_bias") for part in name[1:] if not part.isdigit()), "")


def expert_outputs(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block of experts that give its output: zeroed, the output is zero."""
    return [p for name, p in block.named_parameters() if _projection(name.split(".")) == "down_proj"]


def _first_layer_name(model: PreTrainedModel) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return f"{name}.0 ({type(module[0]).__name__})"
    return type(model).__name__
