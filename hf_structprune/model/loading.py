"""Loads models so that they can be pruned and saved again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..library_errors import readable, refuse_adapter
from ..masking import remember
from ..quantization.four_bit import compute_as_stored
from .rebuild import dense_copy, has_own_head, with_ties
from .towers import has_towers


logger = logging.get_logger(__name__)

# Options of loading a model that go to the tokenizer too.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_TOKENIZER_OPTIONS = (*_WHERE, "gguf_file", "trust_remote_code")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


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


def load_config(model_id: str | os.PathLike, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a model alone, which also tells whether there is one; options of the model will do.

    Raises:
        CheckpointError: There is no such model, it is an adapter, or its configuration is damaged.
        HubError: The model is gated and the token has no access to it.
    """
    remember(kwargs.get("token"))
    options = {name: value for name, value in kwargs.items() if name in _TOKENIZER_OPTIONS}
    refuse_adapter(model_id, **{name: options[name] for name in _WHERE if name in options})
    with readable(model_id, "config.json", kwargs.get("subfolder")):
        config = AutoConfig.from_pretrained(model_id, **options)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise CheckpointError(f"cannot load {str(model_id)!r}: config.json says that it has {layers} layers.")
    return config


def shapes_of(config: PreTrainedConfig, model_id: str, towers: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A model of a configuration on the meta device, without weights; `model_id` is what messages call it.

    With `towers`, one that sees is the whole of it.

    Raises:
        CheckpointError: No model can be made of it.
    """
    with readable(model_id, "config.json"), torch.device("meta"):
        return _auto_class(config, towers).from_config(config, **kwargs)


def _auto_class(config: PreTrainedConfig, towers: bool) -> type:
    if towers and has_towers(config):
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    if has_towers(config):
        raise UnsupportedModelError(
            f"A model of type {config.model_type!r} sees: it can be pruned and measured on text, and the rest is left "
            "to Transformers (`AutoModelForImageTextToText`)."
        )
    raise UnsupportedModelError(
        f"`AutoModelForCausalLM` loads no model of type {config.model_type!r}, which has no head that predicts the "
        "next token. A part of a model cannot be pruned alone: give the whole model."
    )


def load_model(model_id: str | os.PathLike, towers: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with all its weights, in eval mode; 4-bit layers of bitsandbytes are right on every CPU.

    Args:
        model_id: Hub id or folder.
        towers: Load a model that sees as well, with `AutoModelForImageTextToText`.
        kwargs: Given to `AutoModelForCausalLM.from_pretrained`; `dtype` is the checkpoint's by default. Weights of a
            `gguf_file` are de-quantised, to bfloat16 by default.

    Raises:
        CheckpointError: There is no such model, a file of it is damaged, it is an adapter, weights are missing, which
            Transformers would make up at random, or there are others that it would leave out.
        HubError: The model is gated and the token has no access to it.
    """
    kwargs = plain_options(kwargs)
    config = load_config(model_id, **kwargs)  # what is wrong with it is found before the weights are read
    gguf = bool(kwargs.get("gguf_file"))
    if gguf:
        # Quantised weights have fewer bits than bfloat16 holds, and the file names no dtype of its own.
        kwargs = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16, **kwargs}
    options = {"dtype": "auto", **kwargs, "output_loading_info": True}
    with readable(model_id, subfolder=kwargs.get("subfolder")):
        model, info = _auto_class(config, towers).from_pretrained(model_id, **options)
    cls = type(model).__name__
    if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise CheckpointError(f"{model_id} lacks weights of a {cls}, which would be random: {_some(lacking)}.")
    if surplus := info["unexpected_keys"]:
        raise CheckpointError(
            f"{model_id} has weights that its configuration does not name, so that a {cls} would lose them: "
            f"{_some(surplus)}. If they are of no use, load it with `AutoModelForCausalLM` and give the model, or "
            "save that model and give its folder."
        )
    compute_as_stored(model)
    model = (dense_copy(model) if gguf else model).eval()
    if has_own_head(model):  # which Transformers keeps, even if the configuration says tied
        with_ties(model.config, False)
    return model


def _some(names: Iterable[Any]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def load_tokenizer(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The tokenizer of a model, or `None` with a warning where there is none: pruning without text needs none.

    It stands beside the weights or, where these have a `subfolder`, else at the top of the repository.

    Raises:
        CheckpointError: There is one in the folder, and it is damaged.
    """
    options = {name: value for name, value in kwargs.items() if name in _TOKENIZER_OPTIONS}
    places = [options] + ([{**options, "subfolder": ""}] if options.get("subfolder") else [])
    reasons = []
    for place in places:
        try:
            return _read_tokenizer(model_id, **place)
        except CheckpointError as error:
            if _tokenizer_file(model_id, place.get("subfolder")) is not None:
                load_config(model_id, **kwargs)  # which the tokenizer's class is read from
                raise
            reasons.append(f"{error}")
    logger.warning(f"No tokenizer could be loaded, so that calibration needs token ids: {reasons[0]}")
    return None


def load_processor(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The processor of a model that sees; its tokenizer alone, with a warning, where there is no processor."""
    options = {name: value for name, value in kwargs.items() if name in _TOKENIZER_OPTIONS}
    try:
        return AutoProcessor.from_pretrained(model_id, **options)
    except (OSError, ValueError, ImportError) as error:
        logger.warning(f"The processor could not be loaded, and will not be saved: {error}")
    return load_tokenizer(model_id, **kwargs)


def _read_tokenizer(source: str | os.PathLike, **options: Any) -> Any:
    subfolder = options.get("subfolder")
    with readable(source, _tokenizer_file(source, subfolder) or "its tokenizer", subfolder):
        return AutoTokenizer.from_pretrained(source, **options)


def _tokenizer_file(folder: str | os.PathLike, subfolder: str | None = None) -> str | None:
    """The first file of a tokenizer that is in a folder."""
    return next((name for name in _TOKENIZER_FILES if Path(folder, subfolder or "", name).exists()), None)


def as_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer that was given, or the one in the folder or of the Hub id that was; `None` stays.

    Raises:
        ConfigurationError: It is neither.
        CheckpointError: It cannot be loaded.
    """
    if tokenizer is None or callable(tokenizer):
        return tokenizer
    if not isinstance(tokenizer, (str, os.PathLike)):
        raise ConfigurationError(
            f"`tokenizer` is a {type(tokenizer).__name__}; it must be a tokenizer, or the folder or Hub id of one."
        )
    return _read_tokenizer(tokenizer)


def refuse_quantised(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose weights are stored in few bits, before libraries are asked to read them.

    Raises:
        UnsupportedModelError: Says what to do first.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{name} is quantised; its weights cannot be cut. Prune the checkpoint that was quantised first, then "
            "quantise the result."
        )
