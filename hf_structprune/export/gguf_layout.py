"""Which architecture of llama.cpp describes a model, and the shapes of its layers, read from the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import ExportError
from ..model.modeling_structprune import PREFIX


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
    layout = _with_shapes(model, *_FAMILIES[name])
    if not layout.is_uniform:
        return _as_deci(layout, name)
    if layout.architecture == "qwen2" and layout.heads[0] * layout.head_dim != config.hidden_size:
        return replace(layout, architecture="llama", interleaved=True)
    return layout


def _with_shapes(model: PreTrainedModel, architecture: str, interleaved: bool) -> Layout:
    state, config = model.state_dict(), model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def rows(module: str) -> tuple[int, ...]:
        names = [f"{LAYER.format(i)}{module}.weight" for i in range(config.num_hidden_layers)]
        return tuple(state[name].shape[0] if name in state else 0 for name in names)

    heads, kv_heads = (tuple(n // head_dim for n in rows(f"self_attn.{p}_proj")) for p in "qk")
    return Layout(architecture, interleaved, head_dim, heads, kv_heads, rows("mlp.gate_proj"))


def _as_deci(layout: Layout, name: str) -> Layout:
    if layout.architecture not in _LIKE_LLAMA:
        raise ExportError(
            f"The layers of this {name} are not alike, and llama.cpp reads such layers of Llama, Mistral and Qwen2 "
            "models only. Prune with layout='uniform'."
        )
    heads, kv_heads = ((sizes[0] or 1, *sizes[1:]) for sizes in (layout.heads, layout.kv_heads))
    widths = tuple(width or DUMMY_WIDTH for width in layout.widths)
    return replace(layout, architecture="deci", interleaved=True, heads=heads, kv_heads=kv_heads, widths=widths)


def check(config: PreTrainedConfig, name: str | None = None) -> None:
    """Refuses models that cannot be written, and what llama.cpp would read without an error and compute differently.

    Args:
        config: Configuration of the model.
        name: Name of its class in Transformers. Default: the one that is made for such a configuration.

    Raises:
        ExportError: Says what is not understood.
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
