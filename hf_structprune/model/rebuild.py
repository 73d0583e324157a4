"""Turns a model with cut tensors into one of the right class and configuration."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
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


Ties = frozenset[frozenset[str]]


def as_shared(model: PreTrainedModel, built: PreTrainedModel) -> PreTrainedModel:
    """A model whose configuration says of its tied weights what its tensors say.

    Args:
        model: The model; it and its configuration stay as they are.
        built: What its class builds from its configuration, on the meta device.

    Returns:
        The model where the configuration is right; else another one with the same tensors in memory, whose embeddings
        and LM head are tied (one parameter) if they share memory, and two parameters if they do not.

    Raises:
        UnsupportedModelError: Weights share memory in a way that no configuration describes.
    """
    ties, described = shared(model), _same_objects(built)
    if ties == _same_objects(model) == described:
        return model
    if not has_weights(model) and hasattr(model, "hf_device_map"):
        raise UnsupportedModelError(
            "`tie_word_embeddings` of the configuration is not what the weights say, and some of them are not in "
            "memory (offloaded). Load the model on the CPU."
        )
    for tied in (True, False):
        config = with_ties(copy.deepcopy(model.config), tied)
        target = Target(type(model), config)
        if _same_objects(target.skeleton()) == ties:
            return rebuild(model, target)
    raise UnsupportedModelError(_unknown(ties, described))


def with_ties(config: PreTrainedConfig, tied: bool) -> PreTrainedConfig:
    """The configuration, changed to say whether embeddings and LM head are tied."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    return config


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the LM head is another tensor in memory than the embeddings."""
    weights = [getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    if any(weight is None or weight.device.type == "meta" for weight in weights):
        return False
    return weights[0].data_ptr() != weights[1].data_ptr()


def shared(model: nn.Module) -> Ties:
    """Names of the parameters that are in the same memory; on the meta device of those that are the same.

    Raises:
        UnsupportedModelError: Two overlap without being the same.
    """
    places: dict[tuple, set[str]] = {}
    ranges: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type == "meta" or not parameter.numel():
            places.setdefault((id(parameter),), set()).add(name)
            continue
        begin, end = parameter.data_ptr(), parameter.data_ptr() + _extent(parameter)
        key = (parameter.device, begin, end, parameter.stride())
        if key not in places:
            ranges.setdefault(parameter.device, []).append((begin, end, name))
        places.setdefault(key, set()).add(name)
    for row in ranges.values():
        row.sort()
        for (_, end, name), (begin, _, other) in zip(row, row[1:], strict=False):
            if begin < end:
                raise UnsupportedModelError(
                    f"`{name}` and `{other}` overlap in memory, so that a change of one changes the other. Give each "
                    "its own (`parameter.data = parameter.data.clone()`)."
                )
    return _several(places.values())


def _same_objects(model: nn.Module) -> Ties:
    """Names of the parameters that are one and the same."""
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), set()).add(name)
    return _several(places.values())


def _several(groups) -> Ties:
    return frozenset(frozenset(group) for group in groups if len(group) > 1)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _unknown(there: Ties, built: Ties) -> str:
    group = next(iter(sorted(map(sorted, there - built or built - there))))
    names = " and ".join(f"`{name}`" for name in group[:3])
    if there - built:
        return (
            f"{names} share their memory, which no configuration of this model describes. Give each its own "
            "(`module.weight = torch.nn.Parameter(module.weight.detach().clone())`)."
        )
    return f"{names} are one tensor by the configuration of this model, but they do not share their memory."
