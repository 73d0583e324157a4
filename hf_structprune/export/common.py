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
    """The model to export and its tokenizer.

    Args:
        model: A folder, an id of the Hub, or a model.
        tokenizer: Tokenizer to use instead of the model's own; a model that is loaded already has none of its own.
        with_tokenizer: Whether the format has no use for a model without tokenizer.
        check: Raises an error for configurations that cannot be exported, before weights are read.
        kwargs: Given to `from_pretrained`: `dtype`, `trust_remote_code`, ...

    Returns:
        The model in eval mode, and the tokenizer or `None`.

    Raises:
        ExportError: The model is quantised, or has no tokenizer.
        CheckpointError: The model cannot be loaded, or weights are missing.
    """
    if isinstance(model, PreTrainedModel):
        refuse_quantised(model.config, "The model")
        return model.eval(), _checked(tokenizer, with_tokenizer)
    config = load_config(model, **kwargs)
    refuse_quantised(config, str(model))
    if check is not None:
        check(config)
    tokenizer = load_tokenizer(model, **kwargs) if tokenizer is None else as_tokenizer(tokenizer)
    return load_model(model, **kwargs), _checked(tokenizer, with_tokenizer)


def _checked(tokenizer: Any, needed: bool) -> Any:
    if tokenizer is None and needed:
        raise ExportError("The model has no tokenizer, which this format stores with it; save one beside it.")
    return tokenizer


def refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Raises if weights are stored in few bits, which other formats cannot take over."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise ExportError(
            f"{name} is quantised ({getattr(method, 'value', method)}); export the checkpoint that was quantised, and "
            "let the other format do the quantising."
        )
