"""DeciLM, the format of NVIDIA's Nemotron-NAS models: Llama layers of different widths that vLLM reads.

As vLLM 0.33.0 (model_executor/models/nemotron_nas.py) and SGLang 0.5.23 (srt/models/nemotron_nas.py) read it:

* All layers have `num_attention_heads` query heads; `n_heads_in_group` of a layer says how many share a KV head.
* The width of an MLP is `2 * ffn_mult * hidden_size / 3`, rounded up to a multiple of 256. Where `ffn_mult` is not
  there, vLLM reads the width itself from `intermediate_size`; SGLang does not.
* Attention and MLP of a layer may be `no_op`, and have no norm then. The first sublayer of all must be an attention:
  the norm in front of an MLP adds to a residual stream that is only there after one.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from ..errors import ExportError
from ..export import configuration_decilm
from ..files.writing import check_folder, write_folder
from .common import Exported, load_source
from .configuration_decilm import DeciLMConfig


# Models that compute what a Llama computes, from tensors of the same names.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_KEYS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
WIDTH_MULTIPLE = 256  # of widths that `ffn_mult` can say
_ARCHITECTURE = "DeciLMForCausalLM"
State = dict[str, torch.Tensor]
_LAYER = "model.layers."
_NOT_RUN = (
    "Not run in vLLM or SGLang: written for what the source of vLLM 0.33.0 and SGLang 0.5.23 reads. Serve it with "
    "`--trust-remote-code`, which lets them read configuration_decilm.py."
)


def export_deci(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    pad: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a model as a `DeciLMForCausalLM` checkpoint, whose `block_configs` describe every layer.

    Layers may differ in MLP width and KV heads, and lack attention or MLP.

    Args:
        model: A checkpoint (folder or id of the Hub), or a model: Llama, Mistral or Qwen2 without sliding window.
        output: The folder; it appears complete or not at all.
        pad: Add heads and neurons of zeros where a layer does not fit: all layers get as many query heads, and MLP
            widths become multiples of 256. The logits stay the same; how much larger the model becomes is said.
        tokenizer: Tokenizer to use instead of the model's own.
        trust_remote_code: Run modelling code that comes with the model.

    Returns:
        The folder, with `details` of the layers and of how many parameters were added.

    Raises:
        PlaceError: The output cannot be written.
        ExportError: The model is of another kind, or a layer does not fit; says what to do.
    """
    check_folder(output)
    output = Path(output)
    model, tokenizer = load_source(model, tokenizer, with_tokenizer=False, trust_remote_code=trust_remote_code)
    _check_kind(model)
    head_dim, state = _head_dim(model), _tensors(model)
    dense = [_block(state, number, head_dim) for number in range(model.config.num_hidden_layers)]
    blocks = fit(dense, pad)
    before = _parameters(state)
    for number, (old, new) in enumerate(zip(dense, blocks, strict=True)):
        pad_layer(state, f"{_LAYER}{number}.", old, new, head_dim)
    config = _config(model, state, blocks, head_dim)

    def write(folder: Path) -> None:
        save_torch_state_dict(state, folder)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        shutil.copy(configuration_decilm.__file__, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(output, write, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    details = {
        "architecture": _ARCHITECTURE, "parameters": _parameters(state), "padding": _parameters(state) - before,
        "query_heads": config.num_attention_heads, "kv_heads": [block.kv_heads for block in blocks],
        "mlp_widths": [block.width for block in blocks],
    }  # fmt: skip
    notes = _notes(blocks, details["padding"] / before, tokenizer)
    return Exported(output, sum(path.stat().st_size for path in output.iterdir() if path.is_file()), details, notes)


def _check_kind(model: PreTrainedModel) -> None:
    """Refuses a model that does not compute what a Llama computes."""
    names = [base.__name__ for base in type(model).__mro__]
    if not set(FAMILIES) & set(names):
        raise ExportError(
            f"{names[0]} cannot be written as DeciLM, which computes what a Llama computes; what can be: "
            f"{', '.join(FAMILIES)}. A uniform checkpoint needs no export: vLLM reads it as it is."
        )
    window = getattr(model.config, "sliding_window", None)
    if window is not None and getattr(model.config, "use_sliding_window", True):
        raise ExportError(f"The model has a sliding window ({window}), which the DeciLM format does not have.")


def _head_dim(model: PreTrainedModel) -> int:
    """The size of a head, which all layers have in common."""
    attentions = [getattr(layer, "self_attn", None) for layer in model.model.layers]
    sizes = {attention.head_dim for attention in attentions if hasattr(attention, "head_dim")}
    if len(sizes) != 1:
        raise ExportError(f"The DeciLM format has one size of heads for all layers; this model has {sorted(sizes)}.")
    return sizes.pop()


def _tensors(model: PreTrainedModel) -> State:
    """The tensors by name, without a head that is tied to the embeddings."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name != tied}


def _block(state: State, number: int, head_dim: int) -> Block:
    """The sizes of a layer, read from its weights."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    query, key, down = (state.get(f"{_LAYER}{number}.{name}.weight") for name in names)
    kv_heads = 0 if key is None else key.shape[0] // head_dim
    group = 0 if query is None else query.shape[0] // head_dim // kv_heads
    return Block(kv_heads, group, 0 if down is None else down.shape[1])


def _parameters(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _config(model: PreTrainedModel, state: State, blocks: list[Block], head_dim: int) -> DeciLMConfig:
    """The configuration of the exported model."""
    first = next(block for block in blocks if block.heads)
    biased = {part: any(name.endswith(f"{part}.bias") for name in state) for part in ("q_proj", "o_proj", "down_proj")}
    # vLLM takes `attention_bias` for all four maps of an attention, unless `qkv_bias` says it of three of them.
    qkv = {"qkv_bias": biased["q_proj"]} if biased["q_proj"] != biased["o_proj"] else {}
    config = DeciLMConfig(
        **{key: getattr(model.config, key) for key in _KEYS}, **qkv,
        num_hidden_layers=len(blocks), num_attention_heads=first.heads, num_key_value_heads=first.kv_heads,
        head_dim=head_dim, intermediate_size=max(block.width for block in blocks), sliding_window=None,
        attention_bias=biased["o_proj"], mlp_bias=biased["down_proj"], dtype=model.dtype,
        block_configs=block_configs(blocks, model.config.hidden_size),
    )  # fmt: skip
    config.architectures = [_ARCHITECTURE]
    config.auto_map = {"AutoConfig": f"{configuration_decilm.__name__.rpartition('.')[2]}.{DeciLMConfig.__name__}"}
    return config


def _notes(blocks: list[Block], padding: float, tokenizer: Any) -> list[str]:
    """What to know of the checkpoint."""
    notes = [_NOT_RUN]
    if padding:
        notes.append(f"Zeros were added: {padding:.1%} more parameters than before. The logits are the same.")
    odd = [str(number) for number, block in enumerate(blocks) if block.width % WIDTH_MULTIPLE]
    if odd:
        notes.append(
            f"MLP widths of layers {', '.join(odd)} are no multiples of {WIDTH_MULTIPLE}. They are written as "
            "`intermediate_size`, which vLLM reads and SGLang does not; pad them (`pad`), or prune with "
            f"round_to={WIDTH_MULTIPLE}."
        )
    if len({block.kv_heads for block in blocks if block.heads}) > 1:
        notes.append("KV heads differ between layers, which SGLang refuses.")
    if tokenizer is None:
        notes.append("The model has no tokenizer; put one into the folder.")
    return notes


@dataclass(frozen=True)
class Block:
    """The sizes of one layer; 0 where it has no attention or no MLP.

    Attributes:
        kv_heads: KV heads.
        group: Query heads of each.
        width: Neurons of the MLP.
    """

    kv_heads: int
    group: int
    width: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


def fit(blocks: list[Block], pad: bool) -> list[Block]:
    """The sizes that are written for the layers of a model with such sizes.

    With `pad` they may be larger, with heads and neurons of zeros: as many query heads in all layers, MLP widths
    that `ffn_mult` can say, and an attention before the first MLP.

    Raises:
        ExportError: A layer has sizes that the format cannot say; names it and the way out.
    """
    if not any(block.heads for block in blocks):
        raise ExportError("No layer has attention, but a DeciLM model begins with one.")
    if pad:
        blocks = [replace(block, width=-(-block.width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) for block in blocks]
        blocks = _with_equal_heads(blocks)
    heads = max(block.heads for block in blocks)
    for number, block in enumerate(blocks):
        if block.heads not in (0, heads):
            raise ExportError(
                f"Layer {number} has {block.heads} query heads and another one {heads}, but in the DeciLM format all "
                "layers have as many (only their KV heads may differ). Pad it with heads of zeros (`pad`), prune "
                "heads in the uniform layout, or prune 'mlp_neurons' and leave heads alone."
            )
    first = next(number for number, block in enumerate(blocks) if block.heads or block.width)
    if not blocks[first].heads and pad:
        blocks[first] = replace(blocks[first], kv_heads=1, group=heads)
    elif not blocks[first].heads:
        raise ExportError(
            f"Layer {first} has an MLP but no attention, and none before it: in the DeciLM format the first sublayer "
            "is an attention. Pad it with one of zeros (`pad`), or keep that attention (`protect_first`)."
        )
    return blocks


def _with_equal_heads(blocks: list[Block]) -> list[Block]:
    """The least number of query heads that all layers can be padded to, whole groups in each."""
    there = [block for block in blocks if block.heads]
    most = max(block.kv_heads for block in there) * max(block.group for block in there)
    for heads in range(max(block.heads for block in there), most + 1):
        # As few KV heads as hold those of the layer: the smallest groups that hold its own have the most room.
        padded = [_padded_heads(block, heads) for block in blocks]
        if all(padded):
            return padded
    raise AssertionError("one group size and one number of KV heads always hold all layers")


def _padded_heads(block: Block, heads: int) -> Block | None:
    """A layer with so many query heads and as few KV heads as possible, `None` if none holds it."""
    if not block.heads:
        return block
    groups = [group for group in range(heads, block.group - 1, -1) if heads % group == 0]
    return next((replace(block, kv_heads=heads // g, group=g) for g in groups if heads // g >= block.kv_heads), None)


def block_configs(blocks: list[Block], hidden_size: int) -> list[dict[str, dict[str, Any]]]:
    """Layers with sizes that fit the format as the configuration describes them."""
    configs = []
    for block in blocks:
        # As a multiple of the hidden size where the format can say it so.
        width = {"ffn_mult": 3 * block.width / (2 * hidden_size) if block.width else None}
        width = {"intermediate_size": block.width} if block.width % WIDTH_MULTIPLE else width
        attention = {"no_op": not block.heads, "n_heads_in_group": block.group or None, "replace_with_linear": False}
        configs.append(
            {"attention": attention, "ffn": {"no_op": not block.width, **width, "replace_with_linear": False}}
        )
    return configs


def pad_layer(state: State, prefix: str, old: Block, new: Block, head_dim: int) -> None:
    """Pads the tensors of one layer in place with heads and neurons of zeros, which add nothing to the logits.

    Args:
        state: Tensors by name; must hold those of another layer with attention if this one has none.
        prefix: Beginning of the layer's names, such as `"model.layers.3."`.
        old, new: Its sizes, and those it gets.
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
