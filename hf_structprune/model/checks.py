"""What has to be true of a model before a tensor of it changes: what would be lost or mistaken is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from .layer_values import description
from .rebuild import as_shared, check_whole
from .target import skeleton
from .towers import has_towers


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# Hooks of these libraries are put where they are by their own means (moving weights, recording outputs).
_OWN_HOOKS = ("accelerate", "transformers", "torch")
# What differs without a difference to what the model computes.
_HARMLESS = ("padding_idx", "name_or_path", "loss_type", "vocab_size")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTISED = "Its weights cannot be cut. Load it without quantisation, prune it, and quantise the result."


def check_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of which nothing is lost when it is pruned; works on the meta device.

    Returns:
        The same model, or one with the same tensors where its configuration is wrong about which are tied, see
        `rebuild.as_shared`.

    Raises:
        UnsupportedModelError: It is wrapped, compiled, quantised, masked or no causal language model; or it has a
            class, hooks, modules, parameters or settings of its own, which its configuration does not describe.
        StructPruneError: It is half-pruned.
    """
    _check_wrapped(model)
    check_whole(model)
    _check_plain(model)
    _check_class(model)
    return as_shared(model, _check_described(model))


def check_savable(model: PreTrainedModel, **values: Any) -> None:
    """Refuses what could not be written when everything is done.

    `values` are what will be written as JSON, by what it is called in the message.

    Raises:
        ConfigurationError: Names what cannot be written.
    """
    for name, value in values.items():
        try:
            json.dumps(value.to_dict() if hasattr(value, "to_dict") else value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"The {name} cannot be written as JSON: {error}. It is {value!r}.") from error
    if model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")] or [str(error)]
        raise ConfigurationError(
            "Transformers would refuse to save the generation configuration of this model (generation_config.json, "
            f"`model.generation_config`): {' '.join(lines)}"
        ) from error


def _check_wrapped(model: Any) -> None:
    if isinstance(model, PreTrainedModel):
        return
    name, inside = type(model).__name__, model._modules if isinstance(model, nn.Module) else {}
    if "_orig_mod" in inside:
        raise UnsupportedModelError("The model is compiled: give `model._orig_mod`, and compile the result.")
    if "base_model" in inside and hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            "The model has PEFT adapters, which would not fit the pruned weights: merge them first, and give "
            "`model.merge_and_unload()`."
        )
    for wrapped in ("module", "pretrained_model"):
        if wrapped in inside:
            raise UnsupportedModelError(f"The model is wrapped in a {name}: give `model.{wrapped}`.")
    raise UnsupportedModelError(
        f"{name} is no model of Transformers: give what `AutoModelForCausalLM.from_pretrained` returns."
    )


def _check_plain(model: PreTrainedModel) -> None:
    """Refuses modules and weights that stand for others."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "hf_quantizer", None):
        raise UnsupportedModelError(f"The model is quantised. {_QUANTISED}")
    for name, module in model.named_modules():
        reason = _stands_for_others(module)
        if reason is not None:
            raise UnsupportedModelError(f"{f'`{name}`' if name else 'The model'} {reason}")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
            raise UnsupportedModelError(f"`{name}` is a {kind} and no plain tensor (quantised?). {_QUANTISED}")
        if parameter.dtype not in _DTYPES:
            raise UnsupportedModelError(f"`{name}` is of {parameter.dtype}, which is a quantised one. {_QUANTISED}")
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"`{name}` was made inside `torch.inference_mode()` and cannot be written to: load the model outside."
            )


def _stands_for_others(module: nn.Module) -> str | None:
    """Why a module is not what it seems, and the way out."""
    library = type(module).__module__.partition(".")[0]
    if library == "peft":
        return "is an adapter of PEFT, which would not fit the pruned weights: merge first (`merge_and_unload()`)."
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled: prune the model as it was before (`_orig_mod`), and compile the result."
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))
        return (
            "is parametrised: make its weights permanent first "
            f"(`torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})`)."
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return (
                f"is masked: make the zeros permanent (`torch.nn.utils.prune.remove(module, {hook._tensor_name!r})`)."
            )
        if type(hook).__module__.startswith("torch.nn.utils"):
            return f"has its weights computed by {type(hook).__name__}: remove that first (see `torch.nn.utils`)."
    return None


def _check_class(model: PreTrainedModel) -> None:
    bases, config, seeing = type(model).__bases__, type(model.config), has_towers(model.config)
    stock = bases[1] if bases[0].__name__ == "PerLayerMixin" else type(model)
    known = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if seeing else MODEL_FOR_CAUSAL_LM_MAPPING).get(config, ())
    known = known if isinstance(known, tuple) else (known,)
    names = " or ".join(one.__name__ for one in known)
    if not stock.__module__.startswith("transformers.models."):
        parents = [one for one in stock.__mro__ if one.__module__.startswith("transformers.models.")]
        own = ", ".join(f"`{name}`" for name in vars(stock) if not name.startswith("_"))
        raise UnsupportedModelError(
            f"{stock.__name__} is a class of its own{f', with {own}' if own else ''}: the pruned model would be a "
            f"plain {parents[0].__name__} without it. Give a {parents[0].__name__}."
            if parents
            else f"{stock.__name__} is no class of Transformers, and its code is not understood."
        )
    if not known:
        raise UnsupportedModelError(
            f"{stock.__name__} is no causal language model, and `AutoModelForCausalLM` loads none from a "
            f"{config.__name__}, so that the result could not be loaded. A part of a model cannot be pruned alone: "
            "give the whole model (one that sees as `AutoModelForImageTextToText` loads it)."
        )
    if stock not in known:
        raise UnsupportedModelError(
            f"{stock.__name__} is no causal language model: give a {names} "
            f"(`{'AutoModelForImageTextToText' if seeing else 'AutoModelForCausalLM'}.from_pretrained`), whose head "
            "predicts the next token."
        )


def _check_described(model: PreTrainedModel) -> PreTrainedModel:
    """Compares a model with what its class builds from its configuration, module by module; returns the latter."""
    try:
        expected = skeleton(model)
    except CheckpointError as error:
        raise UnsupportedModelError(f"`model.config` builds no {type(model).__name__}: {error}") from error
    there, built = description(model), description(expected)
    tensors = {name for one in (model, expected) for name in one.state_dict(keep_vars=True)}
    tensors |= {name for one in (model, expected) for name, _ in one.named_buffers()}
    for name in (name for name in there | built if there.get(name) != built.get(name)):
        if name in tensors or _matters(name, there, built):
            raise UnsupportedModelError(
                f"`{name}` of this {type(model).__name__} is {there.get(name, 'nothing')}, but its configuration "
                f"builds {built.get(name, 'nothing')}: the pruned model, which is built from the configuration, would "
                "lose that. Write it into `model.config`, or load the model as it was saved."
            )
    stock = dict(expected.named_modules())
    for name, module in model.named_modules():
        what = f"`{name}`" if name else "the model"
        for method in _replaced_methods(module, stock[name], getattr(model, "hf_device_map", None) is not None):
            raise UnsupportedModelError(
                f"`{method}` of {what} was replaced by a function, which the pruned model would not have. Give the "
                "model as its class makes it."
            )
        for hook in sorted(_hooks(module) - _hooks(stock[name])):
            if hook.partition(".")[0] not in _OWN_HOOKS:
                raise UnsupportedModelError(
                    f"{what[0].upper()}{what[1:]} has a hook ({hook}), which the pruned model would not have. "
                    "Remove it (`handle.remove()`) and add it to the result."
                )
    return expected


def _matters(name: str, there: dict[str, Any], built: dict[str, Any]) -> bool:
    """Whether another attribute is a difference to what the model computes when it is not trained."""
    owner, _, leaf = name.rpartition(".")
    dropout = "drop" in leaf or (leaf == "p" and "Dropout" in built.get(f"{owner}.class", ""))
    # What is on one side alone is a note that somebody, or running the model, has left.
    return leaf == "class" or (name in there and name in built and not dropout and leaf not in _HARMLESS)


def _replaced_methods(module: nn.Module, stock: nn.Module, dispatched: bool) -> Iterator[str]:
    for name, value in vars(module).items():
        method = inspect.getattr_static(type(module), name, None)
        own = dispatched and name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")  # Accelerate's
        if name == "forward" and "_hf_hook" in vars(module):  # Accelerate's around the class's, or around another
            own = getattr(vars(module).get("_old_forward"), "__func__", None) is method
        if name not in vars(stock) and inspect.isfunction(method) and callable(value) and not own:
            yield name


def _hooks(module: nn.Module) -> set[str]:
    """Full names of the hooks of a module and its parameters: of functions, in wrappers too, or of classes."""
    places = [place for name, place in vars(module).items() if name.endswith("_hooks") and isinstance(place, dict)]
    places += [getattr(own, place, None) or {} for own in module._parameters.values() for place in _TENSOR_HOOKS]
    hooks = [getattr(hook, "hook", hook) for place in places for hook in place.values()]
    hooks = [getattr(hook, "func", hook) for hook in hooks]
    named = [hook if hasattr(hook, "__qualname__") else type(hook) for hook in hooks]
    return {f"{one.__module__}.{one.__qualname__}" for one in named}
