"""A small model with the structure of a large one: sizes shrink together, all else in its configuration stays."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import StructPruneError, UnsupportedModelError
from ..model.layer_values import INDEX_LISTS, description, without_layers
from ..model.structure import ModelStructure, decoder_layers
from ..model.target import make_target, named_values, skeleton


VOCABULARY, WINDOW, EXPERTS = 128, 8, 16
_KINDS = 8  # of layers, that differences in numbers may make
# An epsilon that shows: beside activations of about 1, one of 1e-6 would hide what is wrong with it.
EPSILON = 0.02
_HEAD_COUNTS = re.compile(r"(^|_)n_(kv_)?head$|heads(_per_layer)?$|num_query_groups$")
_HEAD_SIZES = re.compile(
    r"head_?(dim|size)$|^head_dim|(rope|nope|rotary|v_head)_dim$|_rank$|kv_channels$|d_kv$|d_head$"
)
_WIDTHS = re.compile(
    r"^(hidden_size|n_embd|d_model|dim|n_inner|d_ff|embed_dim|emb_dim|embedding_(size|dim)|hidden_dim|lru_width|block_dim)$"
    r"|^(in|out)_features$|intermediate|ffn|feed_?forward|embed_proj_dim|block_ff_dim|(^|_)hidden_size|_mlp$|mamba_d_ssm"
)
_GROUPS = re.compile(r"(^|_)n_?groups$")  # of heads of Mamba 2, which share their inputs
_MIXED = re.compile(r"mamba_(num|n)_heads$|^n_mamba_heads$|^num_heads$")  # those heads
_NOT_SIZES = re.compile(r"_dims$|multiplier|factor|scale|group")
_WINDOWS = re.compile(r"sliding_window(_size)?$|attention_chunk_size$|attention_window$|window_size$|index_topk$")


def shrunk_values(model: PreTrainedModel, structure: ModelStructure) -> tuple[dict[str, Any], list[int]]:
    """Configuration values of a small model with the structure of a model.

    The size of a head shrinks by one factor, the number of heads by another, every width by both, so that all
    relations between them hold. Vocabulary, windows and the number of experts become small; epsilons large enough to
    matter. Everything else stays: activation, biases, norms, patterns, scalings, rotation of positions. One or two
    layers of every distinct kind are left, all of them where the configuration cannot name just those.

    Returns:
        The values, and the numbers of the layers in the model that are left.
    """
    values = model.config.to_dict()
    for key in ("quantization_config", "auto_map", "architectures", "_name_or_path"):
        values.pop(key, None)
    values, kept = _with_few_layers(model, structure, values)
    size, count = _factors(model, values)
    return _shrunk(values, size, count, _experts(named_values(model.config))), kept


def _experts(values: dict[str, Any]) -> int:
    """How many experts are left: in each group they are chosen from, two at least, as many as a token needs, and 1."""
    groups, chosen = values.get("n_group") or 1, values.get("topk_group") or 1
    each = 1 + max(2, -(-(values.get("num_experts_per_tok") or 1) // chosen))
    return groups * max(each, -(-EXPERTS // groups))


def _factors(model: PreTrainedModel, values: dict[str, Any]) -> tuple[int, int]:
    """By what the sizes of heads and the numbers of heads are divided."""
    numbers, names = list(_numbers(values)), getattr(model.config, "attribute_map", {})
    hidden, heads, head = (values.get(names.get(k, k)) for k in ("hidden_size", "num_attention_heads", "head_dim"))
    counts = [value for key, value in numbers if _HEAD_COUNTS.search(key) and value > 1]
    if not isinstance(hidden, int):
        raise UnsupportedModelError("its configuration has no hidden size of its own, but parts that have one")
    head = head or (hidden // heads if heads else 64)
    sizes = [head, *(value for key, value in numbers if key.endswith(("head_dim", "headdim", "d_head")) and value)]
    sections = [sum(section) for section in _named(values, "mrope_section") if section]
    most = min(
        (sum(section) // sum(map(bool, section)) for section in _named(values, "mrope_section") if section),
        default=head,
    )
    partial = any(isinstance(value, float) and value < 1 for value in _named(values, "partial_rotary_factor"))
    smallest = 16 if partial else 8
    possible = (n for n in _divisors(math.gcd(*sizes, *sections)) if min(sizes) / n >= smallest and n <= most)
    size = max(possible, default=1)
    groups = max((value for key, value in numbers if _GROUPS.search(key)), default=1)
    mixed = [value for key, value in numbers if _MIXED.search(key)] or [max(counts, default=1)]
    possible = (
        n
        for n in _divisors(math.gcd(*counts))
        if min(counts) / n >= 2 and all(not m // n % groups and m // n >= min(m, 2 * groups) for m in mixed)
    )
    count = max(possible, default=1)
    while hidden % (size * count) and count > 1:
        count = _divisors(count)[-2]
    while hidden % (size * count) and size > 1:
        size = _divisors(size)[-2]
    return size, count


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _numbers(values: Any, key: str = ""):
    """Every integer in nested values, with the key that holds it."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name) if not str(name).isdigit() else key)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, int) and not isinstance(values, bool):
        yield key, values


def _named(values: Any, name: str):
    if isinstance(values, dict):
        for key, value in values.items():
            yield from [value] if key == name else _named(value, name)


def _shrunk(values: Any, size: int, count: int, experts: int, key: str = "") -> Any:
    again = (size, count, experts)
    if isinstance(values, dict):
        return {k: _shrunk(v, *again, key if str(k).isdigit() else str(k)) for k, v in values.items()}
    if key in ("short_factor", "long_factor") and isinstance(values, (list, tuple)):
        return list(values[::size])
    if key == "mrope_section" and isinstance(values, (list, tuple)):
        return _sections(values, size)
    if isinstance(values, (list, tuple)):
        return [_shrunk(value, *again, key) for value in values]
    if isinstance(values, float) and "eps" in key.split("_") + [key[-3:]] and 0 < values < EPSILON:
        return EPSILON
    if isinstance(values, bool) or not isinstance(values, int) or _NOT_SIZES.search(key):
        return values
    return _number(key, values, *again)


def _sections(sections: Sequence[int], size: int) -> list[int]:
    """Shares of the frequencies of a smaller head: their sum is right, and none becomes empty."""
    small = [max(part // size, min(part, 1)) for part in sections]
    while sum(small) != sum(sections) // size:
        far = [part / size - one for part, one in zip(sections, small, strict=True)]
        more = sum(small) < sum(sections) // size
        place = (
            far.index(max(far)) if more else min((i for i, one in enumerate(small) if one > 1), key=far.__getitem__)
        )
        small[place] += 1 if more else -1
    return small


def _number(key: str, value: int, size: int, count: int, experts: int) -> int:
    if "vocab_size" in key or key == "n_words":
        return min(value, VOCABULARY)
    if key.endswith(("token_id", "token_index")):
        return value if value < VOCABULARY else 3
    if _WINDOWS.search(key):
        return min(value, WINDOW)
    if _HEAD_COUNTS.search(key) and value > 1:
        return value // count
    if _HEAD_SIZES.search(key) and value:
        return max(value // size, min(value, 2))
    if "experts" in key and "tok" not in key:
        return min(value, experts)
    if _WIDTHS.search(key) and value > 4:
        return max(value // (size * count), 4)
    return value


def _with_few_layers(
    model: PreTrainedModel, structure: ModelStructure, values: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Values with one or two layers of each kind, three at least; with all layers if that cannot be written."""
    layers = [layer for _, layer in decoder_layers(skeleton(model), structure.family)]
    everything, kept = list(range(len(layers))), representatives(values, layers)
    if kept == everything:
        return values, everything
    key = structure.family.key("layers_key", model.config)
    try:
        fewer = without_layers(
            values, set(everything) - set(kept), len(layers), key if values.get(key) == len(layers) else None
        )
        shallow = make_target(model, fewer).skeleton()
    except StructPruneError:
        return values, everything
    cut = [_without_numbers(layer) for _, layer in decoder_layers(shallow, structure.family)]
    return (fewer, kept) if cut == [_without_numbers(layers[old]) for old in kept] else (values, everything)


def _without_numbers(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, whatever its numbers: some classes scale by the number of layers."""
    return {key: "number" if type(value) in (int, float) else value for key, value in description(layer).items()}


def representatives(values: dict[str, Any], layers: Sequence[nn.Module]) -> list[int]:
    """The first two layers of every kind; three where all are of one kind.

    Layers are alike if they have the same entries in all lists of the configuration, too. Those that differ in numbers
    alone (a scale, a window) are of different kinds, unless there are too many.
    """
    lists = [
        [index in value for index in range(len(layers))] if key in INDEX_LISTS else value
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and (key in INDEX_LISTS or len(value) == len(layers))
    ]
    kinds: dict[str, list[int]] = {}
    for describe in (description, _without_numbers):
        kinds = {}
        for index, layer in enumerate(layers):
            kinds.setdefault(repr((describe(layer), [value[index] for value in lists])), []).append(index)
        if len(kinds) <= _KINDS:
            break
    most = 3 if len(kinds) == 1 else 2
    return sorted(index for indices in kinds.values() for index in indices[:most])
