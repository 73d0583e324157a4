"""The model to export: loaded whole, with its tokenizer, and not quantised."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ExportError
from ..hub.network import gated_errors
from ..loading import load_model, load_tokenizer


def load_source(
    model: str | os.PathLike | PreTrainedModel, tokenizer: Any = None, **kwargs: Any
) -> tuple[PreTrainedModel, Any]:
    """The model to export and its tokenizer.

    Args:
        model: A folder, an id of the Hub, or a model.
        tokenizer: Tokenizer to use instead of the model's own; a model that is loaded already has none of its own.
        kwargs: Given to `from_pretrained`: `dtype`, `trust_remote_code`, ...

    Returns:
        The model in eval mode, and the tokenizer or `None`.

    Raises:
        ExportError: The model is quantised, or cannot be loaded.
        CheckpointError: Weights are missing.
    """
    if isinstance(model, PreTrainedModel):
        refuse_quantised(model.config, "The model")
        return model.eval(), tokenizer
    options = {name: kwargs[name] for name in ("revision", "trust_remote_code") if kwargs.get(name)}
    try:
        with gated_errors(str(model)):
            refuse_quantised(AutoConfig.from_pretrained(model, **options), str(model))
        tokenizer = load_tokenizer(model, **kwargs) if tokenizer is None else tokenizer
        return load_model(model, **kwargs), tokenizer
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ExportError(f"cannot load {str(model)!r}: {error}") from error


def refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Raises if weights are stored in few bits, which other formats cannot take over."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise ExportError(
            f"{name} is quantised ({getattr(method, 'value', method)}); export the checkpoint that was quantised, and "
            "let the other format do the quantising."
        )
