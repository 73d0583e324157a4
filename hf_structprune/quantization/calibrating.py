"""Calibration text of the methods that look at activations."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigurationError
from ..evaluation.protocol import context_length
from ..text.calibration import check_token_ids, load_tokens
from .configuration import QuantizationConfig
from .source import Source


def calibration_rows(source: Source, config: QuantizationConfig, tokenizer: Any) -> torch.LongTensor:
    """Token ids of shape `(num_samples, length)`.

    Raises:
        ConfigurationError: The sequences are longer than the model's context.
        CalibrationError: The data cannot be used.
    """
    context = context_length(source.shapes)
    if context is not None and config.calibration.length > context:
        raise ConfigurationError(
            f"`calibration.length` is {config.calibration.length}, but the model's context is {context} tokens."
        )
    tokens = load_tokens(config.calibration, tokenizer)
    check_token_ids(tokens, source.shapes.get_input_embeddings().weight.shape[0])
    return tokens
