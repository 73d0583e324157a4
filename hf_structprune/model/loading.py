"""Loads models so that they can be pruned and saved again."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..library_errors import readable, refuse_adapter, unreachable
from ..masking import remember
from ..quantization.four_bit import compute_as_stored
from .rebuild import rebuild, with_ties
from .stored import StoredWeights
from .target import Target
from .towers import has_towers


logger = logging.get_logger(__name__)

_ALIKE = 0.3  # relative difference of two matrices that are one, in types of a few bits; independent ones: above 1

# Options of loading a model that go to the tokenizer too.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_TOKENIZER_OPTIONS = (*_WHERE, "gguf_file", "trust_remote_code")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of loading with `dtype` for `torch_dtype`, which Transformers does not look at beside a `dtype`.

    Raises:
        ConfigurationError: Both are given.
    """
    options = dict(options)
    old = options.pop("torch_dtype", None)
    if old is not None and options.get("dtype") is not None:
        raise ConfigurationError("`dtype` and `torch_dtype`, its old name, are both given; give `dtype`.")
    return options if old is None else {**options, "dtype": old}


def load_config(model_id: str | os.PathLike, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a model, alone; options of loading the model will do.

    Raises:
        CheckpointError: There is no such model, it is an adapter, or its configuration is damaged.
        HubError: The model is gated and the token has no access to it.
    """
    remember(kwargs.get("token"))
    options = _for_tokenizer(kwargs)
    where = {name: options[name] for name in _WHERE if name in options}
    try:
        with readable(model_id, "config.json", kwargs.get("subfolder")):
            config = AutoConfig.from_pretrained(model_id, **options)
    except CheckpointError as error:
        if unreachable(error) is not None:  # the Hub is not asked again, each time for half a minute
            where["local_files_only"] = True
        refuse_adapter(model_id, **where)
        raise
    refuse_adapter(model_id, **where)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise CheckpointError(f"cannot load {str(model_id)!r}: config.json says that it has {layers} layers.")
    return config


def shapes_of(config: PreTrainedConfig, model_id: str, towers: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A model of a configuration on the meta device, without weights; `model_id` is what messages call it.

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


def _names(mapping: Any, config: PreTrainedConfig) -> set[str]:
    """Names of the classes that a mapping has for a configuration."""
    found = mapping.get(type(config), ())
    return {one.__name__ for one in (found if isinstance(found, tuple) else (found,))}


def _check_architecture(config: PreTrainedConfig, model_id: str | os.PathLike) -> str:
    """Refuses a checkpoint of a class of Transformers with another head; says more of one without any, `""` if not.

    Such weights may fit the class that is loaded, as those of a masked language model, which does something else.
    """
    known = _names(MODEL_FOR_CAUSAL_LM_MAPPING, config) | _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)
    names = [name for name in getattr(config, "architectures", None) or [] if hasattr(transformers, name)]
    if not names or known & {*names}:
        return ""
    whole = f"A part of a model cannot be pruned alone: give a {' or '.join(sorted(known))}."
    if names[0] in _names(MODEL_MAPPING, config):  # with tied embeddings it lacks nothing
        return f" This is the checkpoint of a {names[0]}, which has no head. {whole}"
    raise UnsupportedModelError(
        f"{model_id} is the checkpoint of a {names[0]}, whose head does not predict the next token of a text: give a "
        f"{' or '.join(sorted(known))}."
    )


def load_model(
    model_id: str | os.PathLike, towers: bool = False, stored: StoredWeights | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model with all its weights, in eval mode; 4-bit layers of bitsandbytes are right on every CPU.

    Args:
        model_id: Hub id or folder.
        towers: Take a model that sees as well, with `AutoModelForImageTextToText`.
        stored: Takes the weights, which are then not read: parameters stay on the meta device.
        kwargs: Given to `from_pretrained`; `dtype` is the checkpoint's by default, bfloat16 for a `gguf_file`.

    Raises:
        CheckpointError: There is no such model, a file of it is damaged, it is an adapter, weights are missing, which
            Transformers would make up at random, or there are others that it would leave out.
        HubError: The model is gated and the token has no access to it.
        UnsupportedModelError: It has no head that predicts the next token.
    """
    kwargs = plain_options(kwargs)
    config = load_config(model_id, **kwargs)  # what is wrong with it is found before the weights are read
    gguf = bool(kwargs.get("gguf_file"))
    if gguf:
        # Quantised weights have fewer bits than bfloat16 holds, and the file names no dtype of its own.
        kwargs = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16, **kwargs}
    options = {"dtype": "auto", **kwargs, "output_loading_info": True}
    reading = nullcontext() if stored is None else stored.taken()
    auto_class, part = _auto_class(config, towers), _check_architecture(config, model_id)
    with readable(model_id, subfolder=kwargs.get("subfolder")), reading:
        model, info = auto_class.from_pretrained(model_id, **options)
    cls = type(model).__name__
    lacking, surplus = [*info["missing_keys"], *info["mismatched_keys"]], info["unexpected_keys"]
    names = sorted(map(str, lacking or surplus))
    names = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    if lacking:
        raise CheckpointError(f"{model_id} lacks weights of a {cls}, which would be random: {names}.{part}")
    if surplus:
        raise CheckpointError(
            f"{model_id} has weights that its configuration does not name, so that a {cls} would lose them: {names}. "
            "If they are of no use, load it with `AutoModelForCausalLM` and give the model, or save that model and "
            "give its folder."
        )
    compute_as_stored(model)
    if gguf:  # as a plain model: Transformers would not save this one
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        config.dtype = next(model.parameters()).dtype
        model = rebuild(model, Target(type(model), config)).to(config.dtype)
    weights = [getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    there = all(weight is not None and (weight.device.type != "meta" or stored) for weight in weights)
    if there and weights[0] is not weights[1] and (stored or weights[0].data_ptr() != weights[1].data_ptr()):
        with_ties(model.config, False)  # Transformers keeps a head of its own, even if the configuration says tied
        if gguf:
            _warn_of_one_matrix(model_id, *weights)
    return model.eval()


def _warn_of_one_matrix(model_id: str | os.PathLike, embeddings: torch.Tensor, head: torch.Tensor) -> None:
    """Says so where a GGUF file holds the matrix of a tied model twice, in two types: as a head, and as embeddings."""
    if embeddings.shape != head.shape:
        return
    some, others = (weight.detach()[:: max(1, len(weight) // 1024)].float() for weight in (embeddings, head))
    differ = float((some - others).norm() / others.norm())
    if differ < _ALIKE:
        logger.warning(
            f"Embeddings and head of {model_id} are the same to {differ:.0%}: the file holds the one matrix of a tied "
            f"model twice, in two types. As it is, {head.numel():,} parameters more than that model has are counted "
            "and kept; docs/troubleshooting.md says how to tie them first."
        )


def load_tokenizer(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The tokenizer of a model, or `None` with a warning where there is none: pruning without text needs none.

    It stands beside the weights or, where these have a `subfolder`, else at the top of the repository.

    Raises:
        CheckpointError: There is one in the folder, and it is damaged.
    """
    options = _for_tokenizer(kwargs)
    reasons = []
    for subfolder in dict.fromkeys((options.get("subfolder") or "", "")):
        try:
            return _read_tokenizer(model_id, **{**options, "subfolder": subfolder})
        except CheckpointError as error:
            if _tokenizer_file(model_id, subfolder) is not None:
                load_config(model_id, **kwargs)  # which the tokenizer's class is read from
                raise
            reasons.append(f"{error}")
    logger.warning(f"No tokenizer could be loaded, so that calibration needs token ids: {reasons[0]}")
    return None


def load_processor(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The processor of a model that sees; its tokenizer alone, with a warning, where there is no processor."""
    try:
        return AutoProcessor.from_pretrained(model_id, **_for_tokenizer(kwargs))
    except (OSError, ValueError, ImportError) as error:
        logger.warning(f"The processor could not be loaded, and will not be saved: {error}")
    return load_tokenizer(model_id, **kwargs)


def _for_tokenizer(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _TOKENIZER_OPTIONS}


def _read_tokenizer(model_id: str | os.PathLike, subfolder: str = "", **options: Any) -> Any:
    with readable(model_id, _tokenizer_file(model_id, subfolder) or "its tokenizer", subfolder):
        return AutoTokenizer.from_pretrained(model_id, subfolder=subfolder, **options)


def _tokenizer_file(folder: str | os.PathLike, subfolder: str) -> str | None:
    """The first file of a tokenizer that is in a folder."""
    return next((name for name in _TOKENIZER_FILES if Path(folder, subfolder, name).exists()), None)


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
