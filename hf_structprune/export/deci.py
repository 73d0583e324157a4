"""DeciLM, the format of NVIDIA's Nemotron-NAS models: Llama layers of different widths that vLLM reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel

from ..errors import ExportError
from ..export import configuration_decilm
from ..files.folders import check_folder, write_folder
from .configuration_decilm import DeciLMConfig
from .deci_blocks import WIDTH_MULTIPLE, Block, block_configs, fit
from .deci_padding import State, pad_layer
from .result import Exported
from .source import load_source


# Models that compute what a Llama computes, from tensors of the same names.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_KEYS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_ARCHITECTURE = "DeciLMForCausalLM"
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

    Layers may differ in MLP width and KV heads, and lack attention or MLP. What the format can say and what not stands
    in [`deci_blocks`].

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
