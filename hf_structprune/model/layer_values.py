"""What a configuration says of layers when some are gone, and whether those that stay are built as they were."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError


COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SAME_COUNT = ("num_blocks",)  # that say it once more
# Lists of numbers of layers; all other lists with an entry for every layer are cut.
INDEX_LISTS = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
    "hybrid_layer_ids", "global_attn_indexes",
)  # fmt: skip
# How many of the first layers are of another kind.
_PREFIXES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Lists that may happen to be as long as the model is deep.
_NOT_LAYERS = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "mrope_section",
)  # fmt: skip
# Rules that a list replaces: the list says it for each layer, so the rule must not be read any more.
_REPLACED_BY = {
    "sliding_window_pattern": "layer_types", "_sliding_window_pattern": "layer_types",
    "global_attn_every_n_layers": "layer_types", "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers",
}  # fmt: skip
# Every so manieth layer is of another kind, counted from an offset (Jamba).
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
# Lists that are repeated as often as the depth needs.
_REPEATED = ("block_types",)
# Scales of what each layer adds, which the class divides by the root of the number of layers.
_BY_DEPTH = ("scale_depth",)
# Attributes that layers which are the same may differ in: their number, modes, and what is kept for other models.
_OWN_NUMBER = (
    "layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing",
    "store_full_length_kv",  # for an assistant model; where layers share keys and values, none is dropped
)  # fmt: skip
# What holds the number of all layers: what is made of it, as a rate of decay, is a buffer of its own (MiniMax).
_ALL_LAYERS = ("num_hidden_layers",)


def without_layers(
    values: dict[str, Any], dropped: Collection[int], num_layers: int, count_key: str | None = None
) -> dict[str, Any]:
    """New values of a configuration, as from `config.to_dict()`, without some layers.

    Lists with an entry for each layer (`layer_types`, ...) lose those of the dropped ones; numbers of layers
    (`mlp_only_layers`, the keys of `per_layer_config`) and counts of first layers (`first_k_dense_replace`) are those
    of the layers that stay; rules such as every fourth layer are dropped where a list says the same, or become one.
    A period and its offset are those that the layers which stay still follow.
    Where no key holds the number of layers, a list with an entry for each is enough. A scale that the class divides by
    the root of the depth is made smaller, so that each layer adds what it did. Rules that are not known here stay as
    they are: `check_layers` compares what is built with the dense layers.

    Args:
        count_key: Key of the number of layers; by default the one of `COUNT_KEYS` that holds it.

    Raises:
        CheckpointError: The number of layers is not in the values, or is another one. Or the layers that stay follow
            no period, and no list could name them.
    """
    kept = [index for index in range(num_layers) if index not in set(dropped)]
    count_key = count_key or next((key for key in COUNT_KEYS if values.get(key) == num_layers), COUNT_KEYS[0])
    counted = values.get(count_key) is not None or not any(
        isinstance(value, list) and len(value) == num_layers for value in values.values()
    )
    if counted and values.get(count_key) != num_layers:
        raise CheckpointError(f"`{count_key}` is {values.get(count_key)!r}, but the model has {num_layers} layers.")
    result = {key: value for key, value in values.items() if not values.get(_REPLACED_BY.get(key, ""))}
    for key in _REPEATED:
        if 0 < len(result.get(key) or ()) < num_layers:
            result[key] = [result[key][index % len(result[key])] for index in range(num_layers)]
    for key in _BY_DEPTH:
        if result.get(key) is not None:
            result[key] *= math.sqrt(len(kept) / num_layers)
    for period, offset in _PERIODS:
        if result.get(period):
            rule = result[period], result.get(offset, 0)
            result |= dict(zip((period, offset), _rule(rule, kept, (period, offset)), strict=True))
    step = values.get("decoder_sparse_step")
    if step and step > 1:  # Qwen MoE: every so manieth layer has experts
        dense = {index for index in range(num_layers) if (index + 1) % step} | set(values.get("mlp_only_layers") or ())
        result |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(dense)}
    for key, value in list(result.items()):
        if key in INDEX_LISTS and value is not None:
            result[key] = [kept.index(number) for number in value if number in kept]
        elif key in _PREFIXES and isinstance(value, int) and value < num_layers:
            result[key] = sum(index < value for index in kept)
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and key not in _NOT_LAYERS:
            result[key] = [value[index] for index in kept]
        elif key == "per_layer_config" and value:
            entries = {int(index): entry for index, entry in value.items()}
            result[key] = {str(new): entries[old] for new, old in enumerate(kept) if old in entries}
    if result.get("attention_types") and result.get("attention_layers"):  # GPT-Neo: runs of the list
        result["attention_types"] = [[[one], 1] for one in result["attention_layers"]]
    also = {key: len(kept) for key in _SAME_COUNT if values.get(key) == num_layers}
    return {**result, **also, count_key: len(kept)} if counted else result


def _rule(rule: tuple[int, int], kept: Sequence[int], keys: tuple[str, str]) -> tuple[int, int]:
    """The period and offset by which the layers that stay are of the kind that they are of by a rule for all."""
    period, offset = rule
    special = [index % period == offset for index in kept]
    for length in (period, *range(1, len(kept) + 2)):
        for start in (offset % length, *range(length)):
            if all((new % length == start) == one for new, one in enumerate(special)):
                return length, start
    raise CheckpointError(
        f"`{keys[0]}` is {period} and `{keys[1]}` {offset}, and no other period gives the layers that would stay the "
        f"kinds that they have. Drop {period} layers that follow each other, or the first or last ones."
    )


def check_layers(dense: Sequence[nn.Module], cut: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Compares each layer of a shallower model with the dense one it comes from, whose number is in `kept`.

    They have to be equal in their `description`, or the configuration has a rule that `without_layers` does not know.

    Raises:
        CheckpointError: Names the layer and the attribute that would differ.
    """
    if len(cut) != len(kept):
        raise CheckpointError(f"The configuration builds {len(cut)} layers, but {len(kept)} stay.")
    for new, old in enumerate(kept):
        before, after = description(dense[old]), description(cut[new])
        for name in sorted({*before, *after}):
            is_now, would_be = (one.get(name, "nothing") for one in (before, after))
            counted = name.rpartition(".")[2] in _ALL_LAYERS and (is_now, would_be) == (len(dense), len(kept))
            if not counted and not _same(is_now, would_be, len(dense), kept):
                raise CheckpointError(
                    f"Layer {old} would not be the same as layer {new} of a shallower model: its `{name}` is "
                    f"{is_now!r} and would be {would_be!r}. The configuration has a rule for layers that is not "
                    "understood; drop other layers, or skip attention and MLP."
                )


def _same(before: Any, after: Any, number: int, kept: Sequence[int]) -> bool:
    """Whether an attribute is the same: within rounding, as a list of what is in each layer, or of layers' numbers."""
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-12)
    if isinstance(before, (list, tuple)) and len(before) == number and isinstance(after, (list, tuple)):
        return after in (before, tuple(before[index] for index in kept))
    if isinstance(before, tuple) and before != after:
        return after == tuple(kept.index(number) for number in before if number in kept)
    return before == after


def description(layer: nn.Module) -> dict[str, Any]:
    """Classes, shapes and simple attributes (a sliding window, a number of experts) of everything in it, by name."""
    result: dict[str, Any] = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        result[f"{prefix}class"] = type(module).__name__
        for name, value in vars(module).items():
            if name[0] != "_" and name not in _OWN_NUMBER and _is_simple(value):
                result[prefix + name] = tuple(value) if isinstance(value, list) else value
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            result[prefix + name] = tuple(tensor.shape)
    return result


def _is_simple(value: Any) -> bool:
    is_list = isinstance(value, (tuple, list))
    return all(map(_is_simple, value)) if is_list else isinstance(value, (int, float, bool, str, type(None)))
