"""A model as llama.cpp describes it: its architecture, its hyperparameters and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import ExportError
from ..model.modeling_structprune import PREFIX


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

LAYER = "model.layers.{}."
# Neurons of the MLP that stands for none: all zero, so that it adds nothing. A block of `q8_0` is that wide.
DUMMY_WIDTH = 32


@dataclass(frozen=True)
class Layout:
    """How llama.cpp reads a model.

    Args:
        architecture: Name in llama.cpp.
        interleaved: Whether it rotates neighbouring rows of queries and keys, where Transformers rotates the first
            half with the second: their rows are written in another order then.
        head_dim: Size of a head.
        heads (`heads`, `kv_heads`, `widths`): Query heads, KV heads and MLP neurons of every layer.
    """

    architecture: str
    interleaved: bool
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same shapes, and none lacks a sublayer."""
        return all(len(set(sizes)) == 1 and 0 not in sizes for sizes in (self.heads, self.kv_heads, self.widths))


# Transformers class: architecture, interleaved. The tensors of each are those of a Llama, and norms of queries and
# keys (qwen3) or biases (qwen2).
_FAMILIES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "SmolLM3ForCausalLM": ("smollm3", True),
    "GraniteForCausalLM": ("granite", True),
}
# These compute what a Llama computes, biases included: what they cannot say of heads or layers, llama and deci can.
_LIKE_LLAMA = ("llama", "qwen2")


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model.

    Layers that are not alike need the architecture `deci`, the only one of llama.cpp with sizes for every layer. It
    reads a layer without attention, but not as the first one, and forgets the attention of a layer without MLP: these
    get a sublayer of zeros, which adds nothing to the residual stream either. `qwen2` knows no head count that does
    not multiply to the hidden size; such a model is written as a `llama` with biases.

    Raises:
        ExportError: llama.cpp has no architecture for it; says what to do.
    """
    config, name = model.config, type(model).__name__.removeprefix(PREFIX)
    check(config, name)
    architecture, interleaved = _FAMILIES[name]
    state, head_dim = model.state_dict(), getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads

    def rows(module: str, unit: int) -> tuple[int, ...]:
        names = [f"{LAYER.format(i)}{module}.weight" for i in range(config.num_hidden_layers)]
        return tuple(state[name].shape[0] // unit if name in state else 0 for name in names)

    heads, kv_heads = (rows(f"self_attn.{part}_proj", head_dim) for part in "qk")
    layout = Layout(architecture, interleaved, head_dim, heads, kv_heads, rows("mlp.gate_proj", 1))
    if not layout.is_uniform:
        if architecture not in _LIKE_LLAMA:
            raise ExportError(
                f"The layers of this {name} are not alike, and llama.cpp reads such layers of Llama, Mistral and "
                "Qwen2 models only. Prune with layout='uniform'."
            )
        heads, kv_heads = ((sizes[0] or 1, *sizes[1:]) for sizes in (heads, kv_heads))
        widths = tuple(width or DUMMY_WIDTH for width in layout.widths)
        return Layout("deci", True, head_dim, heads, kv_heads, widths)
    if layout.architecture == "qwen2" and layout.heads[0] * layout.head_dim != config.hidden_size:
        return replace(layout, architecture="llama", interleaved=True)
    return layout


def check(config: PreTrainedConfig, name: str | None = None) -> None:
    """Refuses models that cannot be written, and what llama.cpp would read without an error and compute differently.

    `name` is that of its class in Transformers, by default the one that is made for such a configuration.
    """
    name = name or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    if name not in _FAMILIES:
        raise ExportError(
            f"{name} cannot be written as GGUF here; what can be: {', '.join(_FAMILIES)}. For others take "
            "convert_hf_to_gguf.py of llama.cpp, which reads checkpoints whose layers are alike."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"llama.cpp computes the MLP of a {name} with SiLU; this model's is {config.hidden_act!r}.")
    if name == "SmolLM3ForCausalLM":
        rotated = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != rotated:
            raise ExportError(
                "llama.cpp leaves every fourth layer of a SmolLM3 without rotary positions, but the layers without "
                f"them here are {[i for i, rope in enumerate(config.no_rope_layers) if not rope]}: drop no layers, or "
                "four neighbouring ones at a time."
            )


def context_of(config: PreTrainedConfig) -> int:
    """Tokens up to which llama.cpp computes what Transformers computes: it reads no sliding window of these models."""
    sliding = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if sliding and (types is None or "sliding_attention" in types):
        return min(config.max_position_embeddings, sliding)
    return config.max_position_embeddings


# Architectures that read factors of the rotary frequencies from a tensor.
_FREQUENCIES = ("llama", "deci", "granite", "smollm3")
# Configuration values of Granite and the names of llama.cpp.
_GRANITE = {
    "attention_multiplier": "add_attention_scale", "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale", "logits_scaling": "add_logit_scale",
}  # fmt: skip


def write_metadata(writer: GGUFWriter, config: PreTrainedConfig, layout: Layout, name: str) -> None:
    """Writes the hyperparameters of a model that the file calls `name`.

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
    if kind == "yarn":  # as both compute it by default; other settings mean something else there
        stated = {key for key, value in rope.items() if value is not None}
        other = sorted({"attention_factor", "mscale", "mscale_all_dim", "truncate"} & stated)
        if other:
            raise ExportError(f"YaRN with `{other[0]}` set cannot be written for llama.cpp.")
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
    elif kind not in ("default", "linear") and not (kind == "llama3" and layout.architecture in _FREQUENCIES):
        raise ExportError(
            f"Rotary positions of type {kind!r} cannot be written for llama.cpp's {layout.architecture}; those that "
            "can are default, linear and yarn, and llama3 for models like Llama."
        )


def rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """By what llama.cpp divides the rotary frequency of each pair of channels, float32; `None` if by nothing."""
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    return (1.0 / config.rope_parameters["rope_theta"] ** steps) / frequencies


@dataclass
class StoredTensor:
    """One tensor of the file.

    Args:
        name: Its name there.
        shape: Rows first, as in PyTorch.
        kind: The type it is stored in.
        read: Gives its values, so that one is in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size

    def encode(self) -> np.ndarray:
        """The bytes of the file.

        Raises:
            ExportError: A value is too large for half precision.
        """
        from gguf.quants import quantize

        values = self.read().detach().to("cpu", torch.float32).contiguous()
        if self.kind.name == "F16" and values.abs().max() > torch.finfo(torch.float16).max:
            raise ExportError(f"{self.name} holds {values.abs().max():.4g}, too large for f16. Say --quant bf16.")
        return quantize(values.numpy(), self.kind)


def stored_tensors(model: PreTrainedModel, layout: Layout, quant: str) -> list[StoredTensor]:
    """All tensors of the file.

    Matrices are stored in the type that is asked for, or in half precision where rows do not divide into its blocks;
    vectors in float32, as llama.cpp wants them.

    Raises:
        ExportError: The model has a tensor that the architecture has no name for.
    """
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    asked, half = GGMLQuantizationType[quant.upper()], GGMLQuantizationType.F16
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = get_tensor_name_map(MODEL_ARCH(arch), len(layout.widths))
    result = []
    for name, shape, read in _tensors(model, layout):
        stored = name if name == "rope_freqs.weight" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"llama.cpp's {layout.architecture} has no tensor for `{name}`.")
        kind = half if shape[-1] % GGML_QUANT_SIZES[asked][0] else asked
        result.append(StoredTensor(stored, shape, GGMLQuantizationType.F32 if len(shape) == 1 else kind, read))
    return result


def _tensors(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name in Transformers, shape, and what reads the values, as llama.cpp wants them."""
    factors = rope_factors(model.config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    state = model.state_dict()
    head = state.get("lm_head.weight")
    tied = head is not None and head.data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        rotated = name.rpartition(".")[0].endswith(("self_attn.q_proj", "self_attn.k_proj"))
        order = partial(interleave, head_dim=layout.head_dim) if rotated and layout.interleaved else _as_it_is
        yield name, tuple(tensor.shape), partial(order, tensor)
    for name, shape in _silent(layout, state, model.config.hidden_size):
        yield name, shape, lambda shape=shape: torch.zeros(shape)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows `(heads * head_dim, ...)` of a query or key projection in the order of rotation by neighbours.

    Transformers rotates row `i` of a head with row `i + head_dim / 2`; in the result these two are neighbours.
    """
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _silent(layout: Layout, state: dict, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Sublayers that the model lacks and the file has: of zeros, so that they add nothing."""
    rows = layout.head_dim
    attention = {
        "self_attn.q_proj": (rows, hidden), "self_attn.k_proj": (rows, hidden), "self_attn.v_proj": (rows, hidden),
        "self_attn.o_proj": (hidden, rows), "input_layernorm": (hidden,),
    }  # fmt: skip
    mlp = {
        "mlp.gate_proj": (DUMMY_WIDTH, hidden), "mlp.up_proj": (DUMMY_WIDTH, hidden),
        "mlp.down_proj": (hidden, DUMMY_WIDTH), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for i, heads in enumerate(layout.heads):
        for sublayer, present in ((attention, heads), (mlp, True)):
            names = {f"{LAYER.format(i)}{name}.weight": shape for name, shape in sublayer.items()}
            if present and not names.keys() & state.keys():
                yield from names.items()
