"""What exports share: what they take and give back, and the sizes of the layers of Llamas, which zeros can enlarge."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import ConfigurationError, ExportError
from ..files.writing import check_folder
from ..model.loading import as_tokenizer, load_config, load_model, load_tokenizer
from ..model.store import OnDisk
from ..streaming import load_streamed


@dataclass
class Exported:
    """A model in another format: file or folder, its bytes on disk, details as JSON takes them, notes for people."""

    path: Path
    size: int
    details: dict[str, Any]
    notes: list[str]


def output_folder(model: str | os.PathLike | PreTrainedModel, output: str | os.PathLike) -> Path:
    """The folder to write; refuses one that cannot be written, and that of the model itself."""
    check_folder(output)
    folder = Path(output)
    if not isinstance(model, PreTrainedModel) and folder.exists() and Path(model).exists() and folder.samefile(model):
        raise ConfigurationError(f"{output} is the checkpoint itself; choose another folder for its other form.")
    return folder


def load_source(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer: Any = None,
    *,
    with_tokenizer: bool = True,
    stream: bool = False,
    check: Callable[[PreTrainedConfig], Any] = lambda config: None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Any, OnDisk | None]:
    """The model to export in eval mode, not quantised, its tokenizer or `None`, and where its weights are on disk.

    `check` refuses configurations before weights are read; with `stream` they are not read at all; `kwargs` go to
    `from_pretrained`.

    Raises:
        ExportError: The model is quantised, or has no tokenizer and shall have one.
        CheckpointError: The model cannot be loaded, or weights are missing.
    """
    loaded = isinstance(model, PreTrainedModel)
    config = model.config if loaded else load_config(model, **kwargs)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise ExportError(
            f"{'The model' if loaded else model} is quantised ({getattr(method, 'value', method)}); export the "
            "checkpoint that was quantised, and let the other format do the quantising."
        )
    check(config)
    store = None
    if loaded and stream:
        raise ConfigurationError("`stream` reads a model from disk, and this one is loaded: give its id or folder.")
    if not loaded:
        tokenizer = load_tokenizer(model, **kwargs) if tokenizer is None else as_tokenizer(tokenizer)
        model, store = load_streamed(model, **kwargs) if stream else (load_model(model, **kwargs), None)
    if tokenizer is None and with_tokenizer:
        raise ExportError("The model has no tokenizer, which this format stores with it; save one beside it.")
    return model.eval(), tokenizer, store


def class_name(config: PreTrainedConfig) -> str:
    """The class of Transformers for a configuration, or the model type where there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


State = dict[str, torch.Tensor]
EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Block:
    """The sizes of one layer of a Llama, or of what has tensors of the same names; 0 of what it lacks."""

    kv_heads: int
    group: int  # query heads of each
    width: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


def llama_layers(model: PreTrainedModel) -> tuple[State, list[Block], int]:
    """The tensors by name, without a head that is tied to the embeddings; the sizes of all layers; those of a head."""
    config, parameters = model.config, dict(model.state_dict(keep_vars=True))
    state = {name: tensor.detach() for name, tensor in parameters.items()}
    head, embeddings = parameters.get("lm_head.weight"), parameters[EMBEDDINGS]
    if head is embeddings or (head is not None and head.data_ptr() and head.data_ptr() == embeddings.data_ptr()):
        del state["lm_head.weight"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def rows(layer: int, name: str) -> int:
        weight = state.get(f"model.layers.{layer}.{name}.weight")
        return 0 if weight is None else weight.shape[0]

    blocks = []
    for layer in range(config.num_hidden_layers):
        heads, kv_heads = (rows(layer, f"self_attn.{part}_proj") // head_dim for part in "qk")
        blocks.append(Block(kv_heads, kv_heads and heads // kv_heads, rows(layer, "mlp.gate_proj")))
    return state, blocks, head_dim


def pad_layer(state: State, layer: int, old: Block, new: Block, head_dim: int) -> None:
    """Pads the tensors of one layer in place with heads and neurons of zeros, which add nothing to the logits.

    Each KV head keeps its own query heads; those that are added stand behind them, and added KV heads at the end. A
    sublayer that was not there gets all its tensors.
    """
    prefix, embeddings = f"model.layers.{layer}.", state[EMBEDDINGS]
    kv_heads, neurons = torch.arange(old.kv_heads), torch.arange(old.width)
    heads = (kv_heads[:, None] * new.group + torch.arange(old.group)).flatten()
    queries, keys = ((which[:, None] * head_dim + torch.arange(head_dim)).flatten() for which in (heads, kv_heads))
    for dim, name, places, size in (
        (0, "self_attn.q_proj", queries, new.heads * head_dim),
        (0, "self_attn.k_proj", keys, new.kv_heads * head_dim),
        (0, "self_attn.v_proj", keys, new.kv_heads * head_dim),
        (1, "self_attn.o_proj", queries, new.heads * head_dim),
        (0, "mlp.gate_proj", neurons, new.width),
        (0, "mlp.up_proj", neurons, new.width),
        (1, "mlp.down_proj", neurons, new.width),
    ):
        if len(places) == size:
            continue
        shape = (size, embeddings.shape[1]) if dim == 0 else (embeddings.shape[1], size)
        _spread(state, f"{prefix}{name}.weight", shape, dim, places)
        if any(key.endswith(f"{name}.bias") for key in state) and (dim == 0 or f"{prefix}{name}.bias" not in state):
            _spread(state, f"{prefix}{name}.bias", shape[:1], dim, places)
    if new.heads and not old.heads:
        state[f"{prefix}input_layernorm.weight"] = torch.ones_like(embeddings[0])
    if new.width and not old.width:
        state[f"{prefix}post_attention_layernorm.weight"] = torch.ones_like(embeddings[0])


def _spread(state: State, name: str, shape: tuple[int, ...], dim: int, places: torch.Tensor) -> None:
    """Puts the entries of a tensor at these places of one of zeros; without the tensor, all are zero."""
    padded = state[EMBEDDINGS].new_zeros(shape)
    if name in state:
        padded.index_copy_(dim, places.to(padded.device), state[name])
    state[name] = padded
