"""The coupled groups of a model: which rows and columns of which matrices hold the same unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .families import AttentionNames, Family, MlpNames, family_of
from .groups import AttentionShape, CoupledGroup, LayerStructure, Part, Sublayer, is_linear, matrix, matrix_parameters
from .sublayers import read_sublayers


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AttentionShape",
    "CoupledGroup",
    "LayerStructure",
    "ModelStructure",
    "Part",
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
        layers, notes = [], list(family.notes)
        for index, (name, layer) in enumerate(decoder_layers(model, family)):
            structure, layer_notes = _read_layer(config, family, index, name, layer)
            layers.append(structure)
            notes += layer_notes
        notes = list(dict.fromkeys(notes))
        total = sum(p.numel() for p in model.parameters())
        return cls(family, layers, notes, total, matrix_parameters(model, _active_experts(config)))

    @property
    def groups(self) -> list[CoupledGroup]:
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


def _active_experts(config) -> int | None:
    return getattr(config, "num_experts_per_tok", None)


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _read_layer(config, family, index, name, layer) -> tuple[LayerStructure, list[str]]:
    structure, notes = LayerStructure(index, name), []
    for names, read in [(family.attention, _read_attention), *((mlp, _read_mlp) for mlp in family.mlps)]:
        if names is None or not is_linear(_submodule(layer, names.output)):
            continue
        reason = _not_understood(layer, names)
        reason = reason or (isinstance(names, AttentionNames) and _position_bound(config))
        if reason:
            notes.append(f"{names.parent or names.output}: {reason}, left alone")
        else:
            notes += read(config, names, structure, layer) or []
    active = _active_experts(config)
    structure.parameters = sum(parameter.numel() for parameter in layer.parameters())
    structure.matrix_parameters = matrix_parameters(layer, active)
    structure.sublayers, reason = read_sublayers(config, family, name, layer, active)
    return structure, notes + ([reason] if reason else [])


def _not_understood(layer: nn.Module, names: AttentionNames | MlpNames) -> str | None:
    """A reason not to touch a module: parameters in it that the description does not account for."""
    for name in names.inputs:
        if not is_linear(_submodule(layer, name)):
            return f"`{name}` is not a linear map"
    known = {*names.inputs, names.output}
    if not names.parent:
        return None
    if getattr(layer.get_submodule(names.parent), "activation_sparsity", 0):
        return "its activation compares each neuron with the mean of all, so that none can go alone"
    for name, _ in layer.get_submodule(names.parent).named_parameters(prefix=names.parent):
        owner = name.rpartition(".")[0]
        norm = isinstance(names, AttentionNames) and owner.rpartition(".")[2] in ("q_norm", "k_norm")
        if owner not in known and not norm:
            return f"parameter `{name}` is not understood"
    return None


def _position_bound(config) -> str | None:
    """Reasons why heads depend on more than their own rows and columns."""
    if getattr(config, "alibi", False):
        return "ALiBi slopes are bound to the numbers of the heads"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    return None


def _attention_shape(names: AttentionNames, layer: nn.Module, config) -> AttentionShape | None:
    module = layer.get_submodule(names.parent)
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    head_dim = head_dim or getattr(config, "head_dim", None)
    if not head_dim:
        return None
    columns = matrix(layer.get_submodule(names.output)).shape[1]
    rows = [matrix(layer.get_submodule(name)).shape[0] for name in names.inputs]
    kv_rows = rows[1] if len(rows) == 3 else (rows[0] - columns) // 2
    heads, kv_heads = columns // head_dim, kv_rows // head_dim
    widths = [columns, kv_rows, kv_rows] if len(rows) == 3 else [columns + 2 * kv_rows]
    if rows != widths or heads * head_dim != columns or kv_heads * head_dim != kv_rows or heads % kv_heads:
        return None
    return AttentionShape(heads, kv_heads, head_dim)


def _qkv_index(shape: AttentionShape, fused: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of each query, key and value head: shapes `(heads, head_dim)`, `(kv_heads, head_dim)` twice."""
    dim = torch.arange(shape.head_dim)
    q, kv = torch.arange(shape.heads)[:, None], torch.arange(shape.kv_heads)[:, None]
    if fused == "grouped":
        block = (shape.rep + 2) * shape.head_dim
        q_rows = (q // shape.rep) * block + (q % shape.rep) * shape.head_dim + dim
        k_rows = kv * block + shape.rep * shape.head_dim + dim
        return q_rows, k_rows, k_rows + shape.head_dim
    q_rows, k_rows = q * shape.head_dim + dim, kv * shape.head_dim + dim
    if fused == "concat":
        offset = shape.heads * shape.head_dim
        return q_rows, k_rows + offset, k_rows + offset + shape.kv_heads * shape.head_dim
    return q_rows, k_rows, k_rows.clone()


def _read_attention(config, names: AttentionNames, structure: LayerStructure, layer: nn.Module) -> list[str] | None:
    shape = _attention_shape(names, layer, config)
    if shape is None:
        return [f"{names.parent}: the shapes of its projections do not agree, left alone"]
    modules = [f"{structure.name}.{name}" for name in names.inputs]
    modules = modules if len(modules) == 3 else modules * 3
    q, k, v = _qkv_index(shape, names.fused)
    o = torch.arange(shape.heads * shape.head_dim).view(shape.heads, shape.head_dim)
    output = f"{structure.name}.{names.output}"
    norms = []  # (parts of the query heads, parts of the KV heads), where a norm spans all heads
    for norm, index in (("q_norm", o), ("k_norm", k)):
        weight = getattr(_submodule(layer, f"{names.parent}.{norm}"), "weight", None)
        if weight is not None and weight.numel() == index.numel() != shape.head_dim:
            norms.append((norm, f"{structure.name}.{names.parent}.{norm}", index))
        elif weight is not None and weight.numel() != shape.head_dim:
            return [f"{names.parent}.{norm}: a norm of {weight.numel()} weights is not understood, left alone"]

    def by_group(index: torch.Tensor) -> torch.Tensor:
        return index.reshape(shape.kv_heads, -1)

    structure.attention = shape
    common = dict(layer=structure.index, parent=f"{structure.name}.{names.parent}")
    structure.groups.append(
        _group(
            layer, structure.name, kind="kv_groups", num_units=shape.kv_heads, blocks=1,
            producers=tuple(Part(m, "rows", by_group(i)) for m, i in zip(modules, (q, k, v), strict=True)),
            consumer=Part(output, "columns", by_group(o)),
            norms=tuple(Part(module, "rows", by_group(index)) for _, module, index in norms), **common,
        )
    )  # fmt: skip
    if shape.rep > 1:
        structure.groups.append(
            _group(
                layer, structure.name, kind="query_heads", num_units=shape.heads, blocks=shape.kv_heads,
                producers=(Part(modules[0], "rows", q),), consumer=Part(output, "columns", o),
                norms=tuple(Part(module, "rows", index) for norm, module, index in norms if norm == "q_norm"),
                **common,
            )
        )  # fmt: skip
    return None


def _read_mlp(config, names: MlpNames, structure: LayerStructure, layer: nn.Module) -> list[str] | None:
    width = matrix(layer.get_submodule(names.output)).shape[1]
    if structure.group("mlp_neurons") is not None or "shared" in names.parent:
        return [f"{names.parent}: its width has a configuration key of its own, left alone"]
    index = torch.arange(width)[:, None]
    producers = []
    for name in names.inputs:
        rows = matrix(layer.get_submodule(name)).shape[0]
        if rows not in (width, 2 * width):
            return [f"{name}: {rows} rows do not match the {width} columns of {names.output}, left alone"]
        producers += [Part(f"{structure.name}.{name}", "rows", index + half * width) for half in range(rows // width)]
    parent = f"{structure.name}.{names.parent}" if names.parent else f"{structure.name}.{names.output}"
    structure.groups.append(
        _group(
            layer, structure.name, layer=structure.index, kind="mlp_neurons", num_units=width, blocks=1,
            producers=tuple(producers), consumer=Part(f"{structure.name}.{names.output}", "columns", index),
            norms=(), parent=parent,
        )
    )  # fmt: skip
    return None


def _group(layer_module: nn.Module, layer_name: str, **values) -> CoupledGroup:
    """A group with its `unit_parameters` counted from the shapes of its parts."""
    weights = others = 0
    for part in (*values["producers"], *values["norms"], values["consumer"]):
        module = layer_module.get_submodule(part.module[len(layer_name) + 1 :])
        width = part.index.shape[1]
        if not is_linear(module):
            others += width
            continue
        rows, columns = matrix(module).shape
        weights += width * (columns if part.axis == "rows" else rows)
        others += width if part.axis == "rows" and module.bias is not None else 0
    return CoupledGroup(**values, unit_parameters=weights + others, unit_matrix_parameters=weights)
