"""What a GGUF file says of a model besides its tensors and its vocabulary: sizes, norms, rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ExportError
from .gguf_layout import Layout, context_of


if TYPE_CHECKING:
    from gguf import GGUFWriter

# Architectures that read factors of the rotary frequencies from a tensor.
_FREQUENCIES = ("llama", "deci", "granite", "smollm3")
# Configuration values of Granite and the names of llama.cpp.
_GRANITE = {
    "attention_multiplier": "add_attention_scale", "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale", "logits_scaling": "add_logit_scale",
}  # fmt: skip


def write_metadata(writer: GGUFWriter, config: PreTrainedConfig, layout: Layout, name: str) -> None:
    """Writes the hyperparameters.

    Args:
        writer: The file, made for the layout's architecture.
        config: Configuration of the model.
        layout: Shapes of the layers.
        name: What the file calls the model.

    Raises:
        ExportError: The rotary positions are of a kind that llama.cpp would compute differently.
    """
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.widths))
    for add, sizes in (
        (writer.add_feed_forward_length, layout.widths),
        (writer.add_head_count, layout.heads),
        (writer.add_head_count_kv, layout.kv_heads),
    ):
        add(list(sizes) if layout.architecture == "deci" else sizes[0])
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    _write_rope(writer, config, layout)
    if layout.architecture == "granite":
        for key, add in _GRANITE.items():
            getattr(writer, add)(getattr(config, key))


def _write_rope(writer: GGUFWriter, config: PreTrainedConfig, layout: Layout) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("llama.cpp rotates whole heads of this architecture; here only a part of each is rotated.")
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _write_yarn(writer, config, rope)
    elif kind not in ("default", "linear") and not (kind == "llama3" and layout.architecture in _FREQUENCIES):
        raise ExportError(
            f"Rotary positions of type {kind!r} cannot be written for llama.cpp's {layout.architecture}; those that "
            "can are default, linear and yarn, and llama3 for models like Llama."
        )


def _write_yarn(writer: GGUFWriter, config: PreTrainedConfig, rope: dict) -> None:
    """YaRN as both compute it by default; other settings mean something else there."""
    stated = {key for key, value in rope.items() if value is not None}
    other = sorted({"attention_factor", "mscale", "mscale_all_dim", "truncate"} & stated)
    if other:
        raise ExportError(f"YaRN with `{other[0]}` set cannot be written for llama.cpp.")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)


def rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """By what llama.cpp divides the rotary frequencies, as Transformers computes them; `None` if by nothing.

    Returns:
        One number for each pair of channels, float32.
    """
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    return (1.0 / config.rope_parameters["rope_theta"] ** steps) / frequencies
