"""Models taken apart and put together again: marked while they are not whole, rebuilt as the class that fits."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import StructPruneError, UnsupportedModelError
from .placement import has_weights, spread_like
from .target import Target


_MARK = "_structprune_not_whole"


def check_whole(model: nn.Module) -> None:
    """Refuses a model that was marked with a `StructPruneError` that says what happened to it."""
    if hasattr(model, _MARK):
        raise StructPruneError(getattr(model, _MARK))


def mark(model: nn.Module, reason: str) -> None:
    """Marks a model as not whole; its own `save_pretrained` and `push_to_hub` raise the reason from now on."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise StructPruneError(reason)

    setattr(model, _MARK, reason)
    model.save_pretrained = model.push_to_hub = refuse


def interrupted(error: BaseException) -> str:
    """The reason for a mark, where an error or an interrupt has ended the pruning of a model."""
    return (
        f"This model is half-pruned: its weights were being changed when {type(error).__name__}"
        f"{f' ({error})' if str(error) else ''} ended it. It is neither the dense model nor the planned one; load the "
        "dense one again."
    )


@contextmanager
def marked_if_changed(*models: nn.Module | None) -> Iterator[None]:
    """Marks those of these models whose tensors have changed when the block ends, however it does."""
    before = [(weakref.ref(model), _versions(model)) for model in models if model is not None]
    del models
    reason = (
        "This model has been pruned, which has taken its layers apart: use the model that `prune` has returned, or "
        "load the dense one again."
    )
    try:
        yield
    except BaseException as error:
        reason = interrupted(error)
        raise
    finally:
        for model, versions in ((reference(), versions) for reference, versions in before):
            if model is not None and _versions(model) != versions:
                mark(model, reason)


def _versions(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and how often it has been written to, by name."""
    return {name: (p._version, *p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def rebuild(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """A model of the target's class in eval mode with the cut tensors of another one, which is of no use any more."""
    return assemble(target, model.state_dict(), dict(model.named_buffers()), model)


def assemble(
    target: Target, state: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """A model of the target's class in eval mode out of tensors; none is copied.

    Another one, `like`, lends its generation configuration, its name, its devices, and which parameters are trained.
    """
    result, named = target.skeleton(), dict(like.named_parameters())
    named |= {name: tensor for name, tensor in state.items() if isinstance(tensor, nn.Parameter)}
    trained = {name: parameter.requires_grad for name, parameter in named.items()}
    result.load_state_dict(state, assign=True, strict=True)
    result.tie_weights()
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    for name, buffer in list(result.named_buffers()):
        if buffer.device.type == "meta" and name in buffers:
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, buffers[name])
    result.generation_config = copy.deepcopy(like.generation_config)
    result.config.architectures = [type(result).__name__]
    result.config._name_or_path = like.config._name_or_path
    return spread_like(result, like).eval()


Ties = frozenset[frozenset[str]]


def as_shared(model: PreTrainedModel, built: PreTrainedModel) -> PreTrainedModel:
    """A model whose configuration says of its tied weights what its tensors say.

    That is the model itself, where its configuration, which builds `built`, is right; else another one with the same
    tensors, whose embeddings and LM head are one parameter if they share memory.

    Raises:
        UnsupportedModelError: Weights share memory in a way that no configuration describes.
    """
    ties, described = shared(model), _ties(built, id)
    if ties == _ties(model, id) == described:
        return model
    if not has_weights(model) and hasattr(model, "hf_device_map"):
        raise UnsupportedModelError(
            "`tie_word_embeddings` of the configuration is not what the weights say, and some of them are not in "
            "memory (offloaded). Load the model on the CPU."
        )
    for tied in (True, False):
        target = Target(type(model), with_ties(copy.deepcopy(model.config), tied))
        if _ties(target.skeleton(), id) == ties:
            return rebuild(model, target)
    group = min(sorted(group) for group in ties - described or described - ties)
    reason = "are one tensor by the configuration of this model, but they do not share their memory."
    if ties - described:
        reason = (
            "share their memory, which no configuration of this model describes. Give each its own "
            "(`module.weight = torch.nn.Parameter(module.weight.detach().clone())`)."
        )
    raise UnsupportedModelError(f"{' and '.join(f'`{name}`' for name in group[:3])} {reason}")


def with_ties(config: PreTrainedConfig, tied: bool) -> PreTrainedConfig:
    """The configuration, changed to say whether embeddings and LM head are tied."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    return config


def shared(model: nn.Module) -> Ties:
    """Names of the parameters that are in the same memory; on the meta device of those that are the same.

    Raises:
        UnsupportedModelError: Two overlap without being the same.
    """
    places = sorted((_place(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False))
    for (place, name), (behind, other) in pairwise(places):
        if place != behind and place[0] == behind[0] and behind[1] < place[2]:
            raise UnsupportedModelError(
                f"`{name}` and `{other}` overlap in memory, so that a change of one changes the other. Give each "
                "its own (`parameter.data = parameter.data.clone()`)."
            )
    return _ties(model, _place)


def _place(parameter: nn.Parameter) -> tuple[str, int, int, tuple[int, ...]]:
    """Device, first byte, the one behind the last, and strides; without any memory the parameter itself."""
    if parameter.device.type == "meta" or not parameter.numel():
        return "", id(parameter), id(parameter), ()
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    begin = parameter.data_ptr()
    return str(parameter.device), begin, begin + (last + 1) * parameter.element_size(), parameter.stride()


def _ties(model: nn.Module, key: Callable[[nn.Parameter], Any]) -> Ties:
    """Names of the parameters that have the same key."""
    groups: dict[Any, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(key(parameter), set()).add(name)
    return frozenset(frozenset(group) for group in groups.values() if len(group) > 1)
