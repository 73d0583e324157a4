"""`load_quantised`: a model in 4 or 8 bits, frozen and ready to train adapters on."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..extras import need
from ..model.loading import load_config, load_model


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_quantised(
    model_id: str | os.PathLike,
    *,
    bits: int = 4,
    dtype: str | torch.dtype = "bfloat16",
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model whose linear maps are quantised by bitsandbytes: nf4 with quantised scales (QLoRA), or int8.

    Embeddings and the head are not quantised. Everything is frozen, and what is not quantised goes to float32 (PEFT's
    `prepare_model_for_kbit_training`): put an adapter on it. Do not save it: save the adapter, or what `merge_adapter`
    makes of both.

    Args:
        model_id: Hub id or folder, also of a checkpoint whose layers differ in width.
        bits: 4 or 8.
        dtype: What is computed in, and what `merge_adapter` will give.
        gradient_checkpointing: Compute activations again in the backward pass.
        kwargs: Given to `from_pretrained`.

    Raises:
        ConfigurationError: `bits` or `dtype` is none of the possible ones.
        StructPruneError: bitsandbytes or PEFT is missing.
        CheckpointError: The checkpoint is quantised already, or lacks weights.
    """
    if bits not in (4, 8):
        raise ConfigurationError(f"`bits` is {bits!r}; it must be 4 or 8.")
    compute = _dtype(dtype)
    need("bitsandbytes", "peft", extra="qlora")
    from peft import prepare_model_for_kbit_training

    _check_plain(model_id, kwargs)
    model = load_model(model_id, **{**kwargs, "dtype": compute, "quantization_config": _quantisation(bits, compute)})
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def _quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name not in _DTYPES.values():
        raise ConfigurationError(f"`dtype` is {dtype!r}; allowed values are {', '.join(_DTYPES.values())}.")
    return getattr(torch, name)


def _check_plain(model_id: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Refuses a quantised checkpoint, of which Transformers would keep the quantisation it has."""
    if getattr(load_config(model_id, **kwargs), "quantization_config", None) is not None:
        raise CheckpointError(f"{model_id} is quantised already: give the checkpoint as it was before.")
