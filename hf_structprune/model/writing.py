"""Models that read and write text alone: what of a model does, and what short sequences are filled up with."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .towers import Towers, has_towers


_ASKS_WHAT_WAS_SEEN = ("llama4",)  # in Transformers 5.24, of text alone too


def for_text(model: PreTrainedModel) -> PreTrainedModel:
    """What runs on text alone: the model itself, or the text decoder of one that sees and fails without a picture.

    Such are BLIP-2 and InstructBLIP, whose `forward` has no default for the pixels, and Llama 4. The decoder is a
    causal language model with the same tensors, of which none is copied, and the same generation configuration. Models
    that are quantised, or whose decoder is not understood, are left as they are.
    """
    # What stands for a model whose weights are sharded has no configuration.
    if not has_towers(getattr(model, "config", None)) or getattr(model, "hf_quantizer", None) is not None:
        return model
    needed = {
        name for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }  # fmt: skip
    if not needed - {"input_ids"} and model.config.model_type not in _ASKS_WHAT_WAS_SEEN:
        return model
    try:
        return Towers(model).decoder()
    except UnsupportedModelError:
        return model


def padding_of(tokenizer: Any) -> int:
    """The token that shorter sequences, and those that have ended, are filled up with; masked, so that any will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
