"""Models that see: their text decoder as a causal language model, which is what is cut, and the whole again."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..errors import CheckpointError, UnsupportedModelError
from .per_layer import needs_per_layer_class
from .placement import has_weights, is_spread
from .rebuild import assemble, with_ties
from .target import REFUSALS, Target, make_target, plain_values


# Text decoders without a causal language model of their own: the type that computes the same where all positions are
# those of text, and what that has to be told.
_AS_TEXT = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_omni_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "glm4v_text": ("glm4", {}),
    "glm4v_moe_text": ("glm4_moe", {}),
}
_DIRECTIONS = {"mrope_section", "mrope_interleaved"}
# What causal language models do to their logits or masks and larger models do not, or do themselves.
_NOT_IN_WHOLE = {"logit_scale": 1.0, "final_logit_softcapping": None, "use_bidirectional_attention": None}
# What a configuration says of where it came from and how it is held, and not of what it builds.
_NOT_BUILT = ("_name_or_path", "dtype", "model_type", "transformers_version")

Tensors = dict[str, torch.Tensor]


def has_towers(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a model for images and text, with one for its text alone inside."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config


class Towers:
    """What stands beside the text decoder of a model, and how the two go together.

    Attributes:
        parameters: Distinct parameters that are no part of the decoder.
        note: What is left alone, for the plan.
        deep: Whether what is seen enters several layers, each by its number.

    Raises:
        UnsupportedModelError: The decoder is not one of the causal language models that are understood.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, name = model, type(model).__name__
        self.deep = "deepstack" in model.config.to_json_string(use_diff=False)
        if is_spread(model):
            raise UnsupportedModelError(f"The {name} is spread over several devices: load it on one.")
        text = model.config.get_text_config()
        self._key = next(key for key, value in vars(model.config).items() if value is text)
        self._target = _decoder_target(model, text)
        shell, paths = self._target.skeleton(), {module: path for path, module in model.named_modules()}
        inner = {module: path for path, module in shell.named_modules()}
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        if isinstance(decoder, type(shell)):  # with its head
            self._places = {paths[decoder]: ""}
        elif head is None or head not in paths:
            raise UnsupportedModelError(f"{name} has no LM head that is understood: its decoder cannot be cut.")
        else:
            self._places = {
                paths[decoder]: inner[shell.get_decoder()],
                paths[head]: inner[shell.get_output_embeddings()],
            }
        self._beside = [key for key in model.state_dict() if _moved(key, self._places) is None]
        view = self.decoder()
        self.parameters = _size(model) - _size(view)
        modules = dict.fromkeys(
            ".".join(key.split(".")[: 2 if key.startswith("model.") else 1]) for key in self._beside
        )
        self.note = f"{', '.join(modules)}: no part of the text decoder ({self.parameters:,} parameters), left alone"
        self.note = self.note if modules else ""

    def place(self, name: str) -> str:
        """Where a module of the decoder stands in the whole model."""
        return _moved(name, {new: old for old, new in self._places.items()})

    def decoder(self) -> PreTrainedModel:
        """The text decoder as a causal language model with the tensors of the whole one; none is copied.

        Raises:
            UnsupportedModelError: Its tensors are others than those of the class.
        """
        model, places = self._model, self._places
        try:
            view = assemble(
                self._target, _renamed(model.state_dict(keep_vars=True), places),
                _renamed(dict(model.named_buffers()), places), model,
            )  # fmt: skip
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"The text decoder of {type(model).__name__} is no {self._target.model_class.__name__}: {error}"
            ) from error
        lost = [name for name, buffer in view.named_buffers() if buffer.device.type == "meta"]
        if lost and has_weights(model):
            raise UnsupportedModelError(f"The text decoder of {type(model).__name__} lacks `{lost[0]}`.")
        return view

    def whole(self, decoder: PreTrainedModel, empty: bool = False) -> PreTrainedModel:
        """The whole model around another decoder, of its own class; no tensor is copied.

        What stands beside it is that of the dense model, or zeros, which take no memory, if `empty`.
        """
        target, places = self.target(Target(type(decoder), decoder.config)), {v: k for k, v in self._places.items()}
        beside = target.skeleton() if empty else self._model
        state = {key: value for key, value in beside.state_dict(keep_vars=True).items() if key in self._beside}
        buffers = {key: value for key, value in beside.named_buffers() if _moved(key, self._places) is None}
        if empty:
            state, buffers = _zeros(state, decoder.dtype), _zeros(buffers, decoder.dtype)
        return assemble(
            target, state | _renamed(decoder.state_dict(keep_vars=True), places),
            buffers | _renamed(dict(decoder.named_buffers()), places), self._model,
        )  # fmt: skip

    def target(self, target: Target) -> Target:
        """Class and configuration of the whole model around another decoder.

        Raises:
            CheckpointError: They do not take what the decoder's do.
        """
        name = type(self._model).__name__
        if needs_per_layer_class(target.config):
            raise CheckpointError(f"{name} builds all its layers alike. Use layout='uniform'.")
        before, after = plain_values(self._target.config), plain_values(target.config)
        values = plain_values(self._model.config)
        if type(target.config) is type(self._target.config):
            changed = {
                key: value for key, value in after.items() if before.get(key) != value and key not in _NOT_BUILT
            }
            own = values[self._key]
            for name, key in target.config.attribute_map.items():  # what the whole may call by the other name
                if key in changed and key not in own and name in own:
                    changed[name] = changed.pop(key)
            kept = {key: v for key, v in own.items() if key in after or key not in before or key in changed}
            after = kept | changed
        elif self._target.config.model_type != values[self._key]["model_type"]:
            raise CheckpointError(f"The decoder of {name} cannot be of another type.")
        result = make_target(self._model, {**values, self._key: after})
        for part in result.config.sub_configs:
            own, new = getattr(self._model.config, part), getattr(result.config, part)
            if isinstance(new, PreTrainedConfig):
                new._attn_implementation = own._attn_implementation
                new._experts_implementation = own._experts_implementation
        return result

    def check(self, target: Target) -> None:
        """Checks that the class of the whole model builds the tensors that a decoder's does.

        Raises:
            CheckpointError: Names the first tensor that would not fit.
        """
        places = {new: old for old, new in self._places.items()}
        wanted, dense = _renamed(_shapes(target.skeleton()), places), _shapes(self._model)
        wanted |= {key: dense[key] for key in self._beside}
        built = _shapes(self.target(target).skeleton())
        for name in (*wanted, *built):
            if built.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{type(self._model.config).__name__} cannot describe `{name}` of shape "
                    f"{wanted.get(name, 'none')}: it gives {built.get(name, 'none')}."
                )


def _decoder_target(model: PreTrainedModel, text: PreTrainedConfig) -> Target:
    """The causal language model that a text decoder is."""
    values, config_class = plain_values(text), type(text)
    if text.model_type in _AS_TEXT:
        model_type, more = _AS_TEXT[text.model_type]
        # A subclass, so that nothing is said of the keys for several directions of positions, which stay.
        parent, known = CONFIG_MAPPING[model_type], {"ignore_keys_at_rope_validation": _DIRECTIONS}
        size = (
            values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        )  # not the twin's default
        values = {**values, "model_type": model_type, "head_dim": size, **more}
        config_class = type(parent.__name__, (parent,), {"__module__": parent.__module__, **known})
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[parent]
    else:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if model_class is None or isinstance(model_class, tuple):
        raise UnsupportedModelError(
            f"The text decoder of {type(model).__name__} (model type {text.model_type!r}) has no causal language "
            "model in Transformers, and it is not known which one computes the same."
        )
    try:
        config = config_class.from_dict(copy.deepcopy(values))
    except REFUSALS as error:
        raise UnsupportedModelError(f"The text decoder of {type(model).__name__} cannot be built: {error}") from error
    for key, value in _NOT_IN_WHOLE.items():
        if hasattr(config, key):
            with suppress(*REFUSALS):  # what a class insists on is compared with the whole before anything is cut
                setattr(config, key, value)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with_ties(config, head is not None and head.weight is embeddings.weight)
    config._attn_implementation = text._attn_implementation
    config._experts_implementation = text._experts_implementation
    config.dtype = text.dtype or model.config.dtype
    return Target(model_class, config)


def _moved(name: str, places: dict[str, str]) -> str | None:
    """The name of a tensor of modules that stand elsewhere, `None` for what is in none of them."""
    for old, new in places.items():
        if not old or name.startswith(f"{old}."):
            return ".".join(filter(None, [new, name[len(old) :].lstrip(".")]))
    return None


def _renamed(tensors: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    names = {name: _moved(name, places) for name in tensors}
    return {new: tensors[old] for old, new in names.items() if new is not None}


def _zeros(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    return {name: torch.zeros((), dtype=types[name]).expand(tensor.shape) for name, tensor in tensors.items()}


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
