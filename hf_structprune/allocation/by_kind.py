"""Ratios by kind: the same share of heads and neurons in every layer that may be cut, rounded as LLM-Pruner does."""

from __future__ import annotations

from .budget import Budget, Counts


def allocate_by_kind(budget: Budget) -> Counts:
    """Cuts `attention_ratio` of the heads and `mlp_ratio` of the neurons of every layer that may be cut.

    The rounding is LLM-Pruner's: `dims - int(dims * (1 - ratio))` channels of the KV heads are to go, and as many
    whole KV groups as fit in them do; `int(width * (1 - ratio))` neurons stay (then rounded to `round_to`).
    """
    counts: Counts = {}
    ratio = budget.config.attention_ratio
    for layer in budget.attentions if ratio else ():
        shape = layer.attention
        kv_heads, rep = shape.kv_heads, shape.rep
        if "kv_groups" in budget.config.units:
            kv_heads = max(1, kv_heads - _whole_heads(kv_heads, shape.head_dim, ratio))
        else:
            rep = max(1, rep - _whole_heads(rep, shape.head_dim, ratio))
        # Where a checkpoint cannot express the count, the next larger one that it can; or the largest that is aligned.
        options = budget.attention_options(layer)
        larger = [o for o in options if o[0] >= kv_heads and o[1] >= rep]
        kv_heads, rep = min(larger, key=lambda o: o[0] * o[1]) if larger else max(options, key=lambda o: o[0] * o[1])
        counts.update(budget.keep_heads(layer, kv_heads, rep))
    ratio = budget.config.mlp_ratio
    for group in budget.mlps if ratio else ():
        step = budget.step(group)
        width = int(group.num_units * (1 - ratio))
        width = min(max(step, round(width / step) * step), budget.largest_width(group))
        if width < group.num_units:
            counts[group.layer, group.kind] = width
    return counts


def _whole_heads(heads: int, head_dim: int, ratio: float) -> int:
    """Whole heads that go: as many as fit in the channels that are to go."""
    dims = heads * head_dim
    return (dims - int(dims * (1 - ratio))) // head_dim
