"""DeciLM, the format of NVIDIA's Nemotron-NAS models: Llama layers of different widths that vLLM reads.

As vLLM 0.32.0 and 0.33.0 (model_executor/models/nemotron_nas.py) and SGLang 0.5.23 (srt/models/nemotron_nas.py)
read it:

* All layers have `num_attention_heads` query heads; `n_heads_in_group` of a layer says how many share a KV head.
* The width of an MLP is `2 * ffn_mult * hidden_size / 3`, rounded up to a multiple of 256. Where `ffn_mult` is not
  there, vLLM reads the width itself from `intermediate_size`; SGLang does not.
* Attention and MLP of a layer may be `no_op`, and have no norm then. The first sublayer of all must be an attention:
  the norm in front of an MLP adds to a residual stream that is only there after one.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ExportError
from ..files.writing import write_folder
from ..units.neurons import NEURONS
from . import configuration_decilm
from .common import Block, Exported, State, class_name, llama_layers, load_source, output_folder, pad_layer
from .configuration_decilm import DeciLMConfig


# Models that compute what a Llama computes, from tensors of the same names.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_KEYS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
WIDTH_MULTIPLE = 256  # of widths that `ffn_mult` can say
_ARCHITECTURE = "DeciLMForCausalLM"
_SERVING = (
    "Run in vLLM 0.32.0 on a CPU (`make test-vllm`); not run in SGLang: written for what the source of SGLang 0.5.23 "
    "reads. Serve it with `--trust-remote-code`, which lets them read configuration_decilm.py."
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

    Layers may differ in MLP width and KV heads, and lack attention or MLP. The folder appears complete or not at all.

    Args:
        model: A checkpoint (folder or id of the Hub), or a model: Llama, Mistral or Qwen2 without sliding window.
        output: The folder.
        pad: Add heads and neurons of zeros where a layer does not fit: all layers get as many query heads, and MLP
            widths become multiples of 256. The logits stay the same; `details` say how many parameters were added.
        tokenizer, trust_remote_code: As in `export_gguf`.

    Raises:
        PlaceError: The output cannot be written.
        ExportError: The model is of another kind, or a layer does not fit; says what to do.
    """
    output = output_folder(model, output)
    options = {"with_tokenizer": False, "check": _check_kind, "trust_remote_code": trust_remote_code}
    model, tokenizer, _ = load_source(model, tokenizer, **options)
    state, dense, head_dim = llama_layers(model)
    before, blocks = sum(tensor.numel() for tensor in state.values()), fit(dense, pad)
    for layer, (old, new) in enumerate(zip(dense, blocks, strict=True)):
        pad_layer(state, layer, old, new, head_dim)
    config = _config(model, state, blocks, head_dim)

    def write(folder: Path) -> None:
        save_torch_state_dict(state, folder)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        shutil.copy(configuration_decilm.__file__, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(output, write, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    after = sum(tensor.numel() for tensor in state.values())
    details = {
        "architecture": _ARCHITECTURE, "parameters": after, "padding": after - before,
        "query_heads": config.num_attention_heads, "kv_heads": [block.kv_heads for block in blocks],
        "mlp_widths": [block.width for block in blocks],
    }  # fmt: skip
    notes = _notes(blocks, details["padding"] / before, tokenizer)
    return Exported(output, sum(path.stat().st_size for path in output.iterdir() if path.is_file()), details, notes)


def _check_kind(config: PreTrainedConfig) -> None:
    """Refuses a model that does not compute what a Llama computes."""
    name, window = class_name(config), getattr(config, "sliding_window", None)
    if name not in FAMILIES:
        raise ExportError(
            f"{name} cannot be written as DeciLM, which computes what a Llama computes; what can be: "
            f"{', '.join(FAMILIES)}. A uniform checkpoint needs no export: vLLM reads it as it is."
        )
    if window is not None and getattr(config, "use_sliding_window", True):
        raise ExportError(f"The model has a sliding window ({window}), which the DeciLM format does not have.")


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
    notes = [_SERVING]
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


def fit(blocks: list[Block], pad: bool) -> list[Block]:
    """The sizes that are written for layers of such sizes; with `pad` they may be larger, see `export_deci`.

    Raises:
        ExportError: A layer has sizes that the format cannot say; names it and the way out.
    """
    if not any(block.heads for block in blocks):
        raise ExportError("No layer has attention, but a DeciLM model begins with one.")
    if pad:
        blocks = [replace(block, width=-(-block.width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) for block in blocks]
        # The least number of query heads that all layers can be padded to, whole groups in each: one group size and
        # one number of KV heads always hold all layers.
        tries = ([_padded_heads(block, heads) for block in blocks] for heads in count(max(b.heads for b in blocks)))
        blocks = next(padded for padded in tries if all(padded))
    heads = max(block.heads for block in blocks)
    for number, block in enumerate(blocks):
        if block.heads not in (0, heads):
            raise ExportError(
                f"Layer {number} has {block.heads} query heads and another one {heads}, but in the DeciLM format all "
                "layers have as many (only their KV heads may differ). Pad it with heads of zeros (`pad`), prune "
                f"heads in the uniform layout, or prune {NEURONS!r} and leave heads alone."
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


def _padded_heads(block: Block, heads: int) -> Block | None:
    """A layer with so many query heads and as few KV heads as possible, `None` if none holds it."""
    if not block.heads:
        return block
    # As few KV heads as hold those of the layer: of the groups that hold its own, the largest.
    groups = [group for group in range(heads, block.group - 1, -1) if heads % group == 0]
    return next((replace(block, kv_heads=heads // g, group=g) for g in groups if heads // g >= block.kv_heads), None)


def block_configs(blocks: list[Block], hidden_size: int) -> list[dict[str, dict[str, Any]]]:
    """Layers with sizes that fit the format as the configuration describes them."""
    configs = []
    for block in blocks:
        odd = {"intermediate_size": block.width} if block.width % WIDTH_MULTIPLE else None
        width = odd or {"ffn_mult": 3 * block.width / (2 * hidden_size) or None}
        attention = {"no_op": not block.heads, "n_heads_in_group": block.group or None, "replace_with_linear": False}
        configs.append(
            {"attention": attention, "ffn": {"no_op": not block.width, "replace_with_linear": False, **width}}
        )
    return configs
