"""Heads and neurons of zeros in the tensors of a layer: they add nothing, so that the logits stay the same."""

from __future__ import annotations

import torch

from .deci_blocks import Block


State = dict[str, torch.Tensor]


def pad_layer(state: State, prefix: str, old: Block, new: Block, head_dim: int) -> None:
    """Pads the tensors of one layer, in place in the dictionary.

    Args:
        state: Tensors by name; must hold those of another layer with attention if this one has none.
        prefix: Beginning of the layer's names, such as `"model.layers.3."`.
        old: Its sizes.
        new: The sizes it gets.
        head_dim: Size of a head.
    """
    if new.width > old.width:
        neurons = torch.arange(old.width)
        for name in ("gate_proj", "up_proj"):
            _spread(state, f"{prefix}mlp.{name}", neurons, new.width, rows=True)
        _spread(state, f"{prefix}mlp.down_proj", neurons, new.width, rows=False)
    if old.heads == new.heads and old.kv_heads == new.kv_heads:
        return
    if not old.heads:
        _add_attention(state, prefix, new, head_dim)
        return
    # Each KV head keeps its own query heads; those that are added stand behind them, and added KV heads at the end.
    heads = torch.arange(old.kv_heads)[:, None] * new.group + torch.arange(old.group)
    queries, keys = _rows_of(heads.flatten(), head_dim), _rows_of(torch.arange(old.kv_heads), head_dim)
    _spread(state, f"{prefix}self_attn.q_proj", queries, new.heads * head_dim, rows=True)
    for name in ("k_proj", "v_proj"):
        _spread(state, f"{prefix}self_attn.{name}", keys, new.kv_heads * head_dim, rows=True)
    _spread(state, f"{prefix}self_attn.o_proj", queries, new.heads * head_dim, rows=False)


def _rows_of(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _spread(state: State, name: str, index: torch.Tensor, size: int, rows: bool) -> None:
    """Puts the rows (with the bias), or the columns, of a linear map at these places among `size`."""
    weight = state[f"{name}.weight"]
    padded = weight.new_zeros((size, weight.shape[1]) if rows else (weight.shape[0], size))
    padded[(index, slice(None)) if rows else (slice(None), index)] = weight
    state[f"{name}.weight"] = padded
    if rows and f"{name}.bias" in state:
        bias = state[f"{name}.bias"]
        state[f"{name}.bias"] = bias.new_zeros(size)
        state[f"{name}.bias"][index] = bias


def _add_attention(state: State, prefix: str, new: Block, head_dim: int) -> None:
    """An attention of zeros, with the tensors that those of other layers have."""
    other = next(name for name in state if name.endswith(".self_attn.q_proj.weight")).removesuffix("q_proj.weight")
    queries, keys = new.heads * head_dim, new.kv_heads * head_dim
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("o_proj", None)):
        like = state[f"{other}{name}.weight"]
        shape = (like.shape[0], queries) if size is None else (size, like.shape[1])
        state[f"{prefix}self_attn.{name}.weight"] = like.new_zeros(shape)
        if f"{other}{name}.bias" in state:
            state[f"{prefix}self_attn.{name}.bias"] = like.new_zeros(shape[0])
    norm = state[f"{other.removesuffix('self_attn.')}input_layernorm.weight"]
    state[f"{prefix}input_layernorm.weight"] = torch.ones_like(norm)
