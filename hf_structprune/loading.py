"""Loads models so that they can be pruned and saved again."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging

from .checkpoint import dense_copy
from .errors import CheckpointError, ConfigurationError
from .folders import settle
from .four_bit import compute_as_stored
from .hub.network import gated_errors
from .tied_weights import has_own_head, with_ties


logger = logging.get_logger(__name__)

# Options of loading a model that go to the tokenizer too.
_TOKENIZER_OPTIONS = (
    "revision", "subfolder", "gguf_file", "trust_remote_code", "token", "cache_dir", "local_files_only",
)  # fmt: skip


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of loading under the names that Transformers has now: `dtype` for `torch_dtype`.

    Beside a `dtype`, also one that this package gives, Transformers does not look at `torch_dtype`.

    Raises:
        ConfigurationError: Both are given.
    """
    if options.get("torch_dtype") is None:
        return {name: value for name, value in options.items() if name != "torch_dtype"}
    if options.get("dtype") is not None:
        raise ConfigurationError("`dtype` and `torch_dtype`, its old name, are both given; give `dtype`.")
    return {"dtype" if name == "torch_dtype" else name: value for name, value in options.items() if name != "dtype"}


def load_model(model_id: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with all its weights, in eval mode; 4-bit layers of bitsandbytes are right on every CPU.

    Args:
        model_id: Hub id or folder.
        kwargs: Given to `AutoModelForCausalLM.from_pretrained`; `dtype` is the checkpoint's by default. Weights of a
            `gguf_file` are de-quantised, to bfloat16 by default.

    Raises:
        CheckpointError: Weights are missing, which Transformers would make up at random, or there are others that it
            would leave out.
        HubError: The model is gated and the token has no access to it.
    """
    settle(model_id)
    kwargs = plain_options(kwargs)
    gguf = bool(kwargs.get("gguf_file"))
    if gguf:
        # Quantised weights have fewer bits than bfloat16 holds, and the file names no dtype of its own.
        kwargs = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16, **kwargs}
    options = {"dtype": "auto", **kwargs, "output_loading_info": True}
    with gated_errors(str(model_id)):
        model, info = AutoModelForCausalLM.from_pretrained(model_id, **options)
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"{model_id} lacks weights of a {type(model).__name__}, which would be random: "
            f"{', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}."
        )
    compute_as_stored(model)
    surplus = sorted(map(str, info["unexpected_keys"]))
    if surplus:
        raise CheckpointError(
            f"{model_id} has weights that its configuration does not name, so that a {type(model).__name__} would "
            f"lose them: {', '.join(surplus[:5])}{' ...' if len(surplus) > 5 else ''}. If they are of no use, load it "
            "with `AutoModelForCausalLM` and give the model, or save that model and give its folder."
        )
    model = (dense_copy(model) if gguf else model).eval()
    if has_own_head(model):  # which Transformers keeps, even if the configuration says tied
        with_ties(model.config, False)
    return model


def load_tokenizer(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The tokenizer of a model, or `None` with a warning where there is none: pruning without text needs none.

    It stands beside the weights or, where these have a `subfolder`, else at the top of the repository.
    """
    settle(model_id)
    options = {name: value for name, value in kwargs.items() if name in _TOKENIZER_OPTIONS}
    places = [options] + ([{**options, "subfolder": ""}] if options.get("subfolder") else [])
    reasons = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(model_id, **place)
        except (OSError, ValueError, KeyError) as error:
            reasons.append(f"{error}")
    logger.warning(f"No tokenizer could be loaded, so that calibration needs token ids: {reasons[0]}")
    return None
