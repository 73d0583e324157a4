"""How much is asked for: ratios, shares of every layer, exact numbers of what is to be left."""

from __future__ import annotations

import math

from ..alignment import multiple_of, step_of
from ..checks import Ratio, checked
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError
from ..model.hidden_size import HiddenGroup
from ..units import KINDS
from ..units.heads import GROUPS, QUERIES, counts_of
from ..units.neurons import NEURONS
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
        if GROUPS in budget.config.units:
            kv_heads = max(1, kv_heads - _whole_heads(kv_heads, shape.head_dim, ratio))
        else:
            rep = max(1, rep - _whole_heads(rep, shape.head_dim, ratio))
        # Where a checkpoint cannot express the count, the next larger one that it can; or the largest that is aligned.
        options = budget.attention_options(layer)
        larger = [o for o in options if o[0] >= kv_heads and o[1] >= rep]
        kv_heads, rep = min(larger, key=lambda o: o[0] * o[1]) if larger else max(options, key=lambda o: o[0] * o[1])
        counts.update(counts_of(layer, kv_heads, rep))
    ratio = budget.config.mlp_ratio
    for group in budget.groups if ratio else ():
        if group.kind != NEURONS:
            continue
        step = budget.step(group)
        width = int(group.size * (1 - ratio))
        width = min(max(step, round(width / step) * step), budget.largest_width(group))
        if width < group.size:
            counts[group.key] = width
    return counts


def _whole_heads(heads: int, head_dim: int, ratio: float) -> int:
    """Whole heads that go: as many as fit in the channels that are to go."""
    dims = heads * head_dim
    return (dims - int(dims * (1 - ratio))) // head_dim


def allocate_stated(budget: Budget) -> Counts:
    """The widths that `keep` names, in every layer that may be cut.

    Raises:
        ConfigurationError: A layer has fewer units already, or no checkpoint can have so many.
    """
    counts: Counts = {}
    keep = budget.config.keep
    for layer in budget.attentions:
        shape = layer.attention
        kv_heads = keep.get(GROUPS, shape.kv_heads)
        heads = keep.get(QUERIES, kv_heads * shape.rep)
        options = budget.attention_options(layer)
        if (kv_heads, heads / kv_heads) not in options:
            can = ", ".join(f"{kv} x {rep}" for kv, rep in options)
            raise ConfigurationError(
                f"`keep` is {keep}, which leaves {heads} query heads in {kv_heads} KV groups of layer {layer.index}; "
                f"it has {shape.heads} in {shape.kv_heads}, and what can be kept is (groups x heads in each): {can}."
            )
        counts.update(counts_of(layer, kv_heads, heads // kv_heads))
    for group in budget.groups:
        wanted = keep[group.kind]
        if wanted > group.size:
            raise ConfigurationError(
                f"`keep` is {keep}, but layer {group.layer} has only {group.size} {KINDS[group.kind].label}."
            )
        if wanted < group.size:
            counts[group.key] = wanted
    return counts


def check_ratio(ratio: float | None, config: PruningConfig) -> None:
    """Refuses a ratio that is missing, impossible, or given where the configuration says how much goes.

    Raises:
        ConfigurationError: It is missing, or not needed.
        RatioError: It is no number in [0, 1).
    """
    if ratio is None and config.needs_ratio:
        raise ConfigurationError(
            "A ratio is missing: 0.3 removes 30 %. Instead of it `attention_ratio` and `mlp_ratio` say how much of "
            "heads and neurons goes, `num_layers` or `keep_first` how many layers, `hidden_size` how wide "
            "the rest is, `keep` what "
            "is to be left of each kind."
        )
    if ratio is None:
        return
    if not config.takes_ratio:
        stated = ", ".join(f"`{name}`" for name in config.stated_options)
        raise ConfigurationError(
            f"The ratio {ratio!r} is given, and {stated} in the configuration says how much goes: give one or the "
            "other."
        )
    checked("ratio", ratio, Ratio, RatioError)


def hidden_step(size: int, config: PruningConfig) -> int:
    """Hidden sizes are multiples of this: as configured, else a power of two, at most 1/16 of the size and 128."""
    return step_of(config.round_to, config.align_to, min(128, 2 ** int(math.log2(max(1, size // 16)))))


def hidden_sizes_for(group: HiddenGroup, parameters: float, config: PruningConfig) -> list[int]:
    """Hidden sizes, the one first that removes as near as possible to so many parameters.

    Raises:
        RatioError: Even the smallest size removes too few.
        ConfigurationError: No smaller size is aligned.
    """
    step = hidden_step(group.size, config)
    if config.align_to is not None and step >= group.size:
        raise ConfigurationError(
            f"`align_to` is {config.align_to!r}, but no hidden size below the model's own, {group.size}, is a "
            f"multiple of {step}."
        )
    if parameters > (group.size - step) * group.cost:
        raise RatioError(
            f"{parameters:,.0f} parameters are to go by the hidden size, which can take at most "
            f"{(group.size - step) * group.cost:,}. Ask for less."
        )
    wanted = group.size - parameters / group.cost
    whole = {group.size} if group.size % multiple_of(config.align_to) == 0 else set()
    return sorted({*range(step, group.size, step), *whole}, key=lambda size: (abs(size - wanted), -size))
