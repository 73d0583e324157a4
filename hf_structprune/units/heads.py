"""Heads: KV groups, each a key/value head with its query heads, and the query heads in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Decided, Reading, WidthKind


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from ..model.families import Projections
    from ..model.groups import AttentionShape, LayerStructure


class KVGroups(WidthKind):
    """A key/value head with its query heads: rows of q, k and v, columns of o."""

    name, label = "kv_groups", "KV groups"
    options = ("attention_ratio",)
    sublayer = "attention"
    of_heads = cached = True

    def is_in(self, layer):
        return layer.attention is not None

    def is_written(self, layers, plan):
        """Only where numbers of heads change or differ between layers."""
        shapes = {layer.attention for layer in layers if layer.attention}
        return len(shapes) > 1 or any({GROUPS, QUERIES} & plan.of_layer(layer.index).keys() for layer in layers)

    def find(self, reading: Reading) -> list[str]:
        from ..model.families import PROVEN
        from ..model.probe import head_groups

        family, config = reading.family, reading.config
        bound = _bound(config)
        if bound is not None:
            return [f"{family.attention.parent if family.attention else 'attention'}: {bound}, left alone"]
        if family.attention is None:
            return ["attention: its projections are not understood, left alone"]
        reasons = {}
        for structure, layer in reading.layers:
            found = _find_heads(config, family.attention, structure, layer)
            if structure.attention is None:
                reasons[structure.index] = found
        probed = config.model_type not in PROVEN  # of those the tests cover what is read above
        rest = [(structure, layer) for structure, layer in reading.layers if probed and reasons.get(structure.index)]
        keys = (family.key("heads_key", config), family.kv_heads_key)
        notes = head_groups((GROUPS, QUERIES), keys, reading.model, family.attention.parent, rest) if rest else []
        for structure, _ in rest:
            if structure.attention is not None:
                del reasons[structure.index]
        return [note for reason in reasons.values() for note in reason] + notes

    def config_keys(self, layer, family, config):
        """Numbers of query heads and of KV heads, where there is one; lists of them where the layers differ."""
        from ..model.probe import list_of

        keys = (family.key("heads_key", config), *filter(None, [family.kv_heads_key]))
        return tuple(list_of(config, key) or key for key in keys)

    def config_values(self, layer, plan, family, config):
        from ..model.target import overrides_of, plain_values

        if layer.attention is None or plan.is_dropped(layer.index, self.name):
            return {}
        shape = shape_after(layer, plan)
        values = dict(zip(self.config_keys(layer, family, config), (shape.heads, shape.kv_heads), strict=False))
        derived = isinstance(getattr(type(config), "head_dim", None), property)
        other = overrides_of(config, layer.index).get("head_dim", plain_values(config).get("head_dim"))
        if not derived and other in (None, shape.head_dim):  # of latent attention it is the size of something else
            values["head_dim"] = shape.head_dim
        return values

    def input_width(self, layer, plan):
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return None
        return group, layer.attention.query_width, shape_after(layer, plan).query_width


class QueryHeads(WidthKind):
    """A query head, the same number in every KV group: rows of q, columns of o."""

    name, label = "query_heads", "query heads"
    sublayer = "attention"
    within = KVGroups.name
    of_heads = True

    def find(self, reading: Reading) -> list[str]:
        return []  # with the KV groups, whose shapes they share and which describe them

    def is_in(self, layer):
        return False

    def input_width(self, layer, plan):
        return None


GROUPS, QUERIES = KVGroups.name, QueryHeads.name


def counts_of(layer: LayerStructure, kv_heads: int, rep: int) -> dict[tuple[int, str], int]:
    """Units to keep for so many KV groups with so many query heads each; what stays whole is left out."""
    shape = layer.attention
    whole = {(layer.index, GROUPS): shape.kv_heads, (layer.index, QUERIES): shape.rep}
    keep = {(layer.index, GROUPS): kv_heads, (layer.index, QUERIES): rep}
    return {key: count for key, count in keep.items() if count < whole[key]}


def pair_of(layer: LayerStructure, counts: dict[tuple[int, str], int]) -> tuple[int, int]:
    """KV groups, and query heads in each, that counts leave of a layer."""
    shape = layer.attention
    return counts.get((layer.index, GROUPS), shape.kv_heads), counts.get((layer.index, QUERIES), shape.rep)


def pairs(layer: LayerStructure, units: tuple[str, ...]) -> list[tuple[int, int]]:
    """All pairs of (KV groups, query heads in each) that could be kept of a layer, the whole one first."""
    shape = layer.attention
    if shape is None:
        return []
    kv_options = range(shape.kv_heads, 0, -1) if GROUPS in units else (shape.kv_heads,)
    rep_options = range(shape.rep, 0, -1) if QUERIES in units else (shape.rep,)
    return [(kv, rep) for kv in kv_options for rep in rep_options]


def removed_by_pair(layer: LayerStructure, kv_heads: int, rep: int) -> int:
    """Parameters that go from a layer which keeps so many KV groups with so many query heads each."""
    shape, group, head = layer.attention, layer.group(GROUPS), layer.group(QUERIES)
    removed = (shape.kv_heads - kv_heads) * group.cost
    return removed + (kv_heads * (shape.rep - rep) * head.cost if head else 0)


def shape_after(layer: LayerStructure, plan: Decided) -> AttentionShape | None:
    """Head counts of a layer after a plan."""
    from ..model.groups import AttentionShape

    if layer.attention is None:
        return None
    decisions, before = plan.of_layer(layer.index), layer.attention
    kv_heads = decisions[GROUPS].keep if GROUPS in decisions else before.kv_heads
    heads = decisions[QUERIES].keep if QUERIES in decisions else kv_heads * before.rep
    return AttentionShape(heads, kv_heads, before.head_dim)


def _bound(config: PreTrainedConfig) -> str | None:
    """What binds a head to its number, to others or to other layers, so that none can go."""
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "ALiBi slopes are bound to the numbers of the heads"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    if config.model_type == "codegen":
        return "its fused projection holds the heads in four parts, of which each would have to lose as many"
    if config.model_type == "diffllama":
        return "each head subtracts what one in the other half of the heads finds"
    return None


def _find_heads(
    config: PreTrainedConfig, names: Projections, structure: LayerStructure, layer: nn.Module
) -> list[str]:
    from ..model.groups import make_group, not_understood, submodule

    reason = not_understood(layer, names, ("q_norm", "k_norm", "q_layernorm", "k_layernorm"))
    if reason is not None:
        return reason
    shape = _attention_shape(names, layer, config)
    if shape is None:
        return [f"{names.parent}: the shapes of its projections do not agree, left alone"]
    inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
    q, k, v, o = rows_of_heads(shape, names.fused)
    norms = {}  # norms that span all heads
    for norm, index in (("q_norm", o), ("k_norm", k), ("q_layernorm", o), ("k_layernorm", k)):
        weight = getattr(submodule(layer, f"{names.parent}.{norm}"), "weight", None)
        if weight is not None and weight.numel() == index.numel() != shape.head_dim:
            norms[f"{names.parent}.{norm}"] = index
        elif weight is not None and weight.numel() != shape.head_dim:
            return [f"{names.parent}.{norm}: a norm of {weight.numel()} weights is not understood, left alone"]

    def by_group(index: torch.Tensor) -> torch.Tensor:
        return index.reshape(shape.kv_heads, -1)

    structure.attention = shape
    rows = [(name, by_group(index)) for name, index in zip(inputs, (q, k, v), strict=True)]
    spans = [(name, by_group(index)) for name, index in norms.items()]
    group = make_group(GROUPS, structure, layer, names, shape.kv_heads, rows, by_group(o), spans)
    structure.groups.append(group)
    if shape.rep > 1:
        spans = [(name, index) for name, index in norms.items() if not name.endswith(("k_norm", "k_layernorm"))]
        heads = make_group(QUERIES, structure, layer, names, shape.heads, [(inputs[0], q)], o, spans, shape.kv_heads)
        structure.groups.append(heads)
    return []


def _attention_shape(names: Projections, layer: nn.Module, config: PreTrainedConfig) -> AttentionShape | None:
    from ..model.groups import AttentionShape, matrix

    module = layer.get_submodule(names.parent)
    columns = matrix(layer.get_submodule(names.output)).shape[1]
    found = (getattr(module, name, None) for name in ("head_dim", "head_size", "attention_head_size"))
    head_dim = next(filter(None, found), None) or getattr(config, "head_dim", None)
    if not head_dim:
        heads = next((getattr(module, name) for name, one in (names.attributes or {}).items() if one == "heads"), 0)
        head_dim = columns // heads if heads else 0
    if not head_dim:
        return None
    rows = [matrix(layer.get_submodule(name)).shape[0] for name in names.inputs]
    kv_rows = rows[1] if len(rows) == 3 else (rows[0] - columns) // 2
    heads, kv_heads = columns // head_dim, kv_rows // head_dim
    widths = [columns, kv_rows, kv_rows] if len(rows) == 3 else [columns + 2 * kv_rows]
    if rows != widths or heads * head_dim != columns or kv_heads * head_dim != kv_rows or heads % kv_heads:
        return None
    return AttentionShape(heads, kv_heads, head_dim)


def rows_of_heads(shape: AttentionShape, fused: str | None) -> tuple[torch.Tensor, ...]:
    """Rows of each query, key and value head, and columns of each query head in what reads them.

    `fused` is the layout of a fused projection, see `families.Projections`.
    Shapes `(heads, head_dim)`, `(kv_heads, head_dim)` twice, `(heads, head_dim)`.
    """
    import torch

    dim = torch.arange(shape.head_dim)
    q, kv = torch.arange(shape.heads)[:, None], torch.arange(shape.kv_heads)[:, None]
    columns = q * shape.head_dim + dim
    if fused == "grouped":
        block = (shape.rep + 2) * shape.head_dim
        q_rows = (q // shape.rep) * block + (q % shape.rep) * shape.head_dim + dim
        k_rows = kv * block + shape.rep * shape.head_dim + dim
        return q_rows, k_rows, k_rows + shape.head_dim, columns
    k_rows = kv * shape.head_dim + dim
    if fused == "concat":
        return columns, k_rows + shape.query_width, k_rows + shape.query_width + shape.kv_width, columns
    return columns, k_rows, k_rows.clone(), columns
