"""What every export takes and gives back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ExportError
from ..model.loading import as_tokenizer, load_config, load_model, load_tokenizer


@dataclass
class Exported:
    """A model in another format.

    Args:
        path: The file or folder.
        size: Bytes on disk.
        details: What else is worth knowing, as JSON takes it.
        notes: Sentences for people: what came out otherwise than asked, and why.
    """

    path: Path
    size: int
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_source(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer: Any = None,
    *,
    with_tokenizer: bool = True,
    check: Callable[[PreTrainedConfig], None] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """The model to export in eval mode, loaded whole and not quantised, and its tokenizer or `None`.

    Args:
        model: A folder, an id of the Hub, or a model.
        tokenizer: Tokenizer to use instead of the model's own; a model that is loaded already has none of its own.
        with_tokenizer: Whether the format has no use for a model without tokenizer.
        check: Raises an error for configurations that cannot be exported, before weights are read.
        kwargs: Given to `from_pretrained`: `dtype`, `trust_remote_code`, ...

    Raises:
        ExportError: The model is quantised, or has no tokenizer.
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
    if not loaded:
        if check is not None:
            check(config)
        tokenizer = load_tokenizer(model, **kwargs) if tokenizer is None else as_tokenizer(tokenizer)
        model = load_model(model, **kwargs)
    if tokenizer is None and with_tokenizer:
        raise ExportError("The model has no tokenizer, which this format stores with it; save one beside it.")
    return model.eval(), tokenizer
