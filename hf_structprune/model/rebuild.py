"""Turns a model with cut tensors into one of the right class and configuration."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from .target import Target


def rebuild(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """A model of the target's class with the tensors of another one; no tensor is copied.

    Args:
        model: A model whose tensors have been cut; not to be used afterwards.
        target: Class and configuration that build these shapes.

    Returns:
        The model in eval mode, on the devices of the old one.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result = assemble(target, model.state_dict(), dict(model.named_buffers()), model)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return result


def assemble(
    target: Target, state: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """A model of the target's class out of tensors; none is copied.

    Args:
        target: Class and configuration that build these shapes.
        state: Every parameter and saved buffer by name.
        buffers: Buffers by name, also those that are not saved.
        like: A model that lends its generation configuration, its name and its devices.

    Returns:
        The model in eval mode.
    """
    result = target.skeleton()
    result.load_state_dict(state, assign=True, strict=True)
    result.tie_weights()
    for name, buffer in list(result.named_buffers()):
        if buffer.device.type == "meta" and name in buffers:
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, buffers[name])
    result.generation_config = copy.deepcopy(like.generation_config)
    result.config.architectures = [type(result).__name__]
    result.config._name_or_path = like.config._name_or_path
    if getattr(like, "hf_device_map", None) and len(set(like.hf_device_map.values())) > 1:
        from accelerate import dispatch_model

        result = dispatch_model(result, device_map=like.hf_device_map)
    return result.eval()


def has_weights(model: PreTrainedModel) -> bool:
    """Whether all weights are in memory (and not on the meta device or offloaded)."""
    return all(parameter.device.type != "meta" for parameter in model.parameters())


def dense_copy(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A clean model with the weights of one that came out of a GGUF file, which Transformers would not save."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or next(model.parameters()).dtype
    config.dtype = dtype
    result = rebuild(model, Target(type(model), config))
    return result.to(dtype)
