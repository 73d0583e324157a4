"""Hooks, and letting modules run something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .model.groups import Sublayer
from .model.structure import ModelStructure


@contextmanager
def hooked(handles: Iterable[RemovableHandle]):
    """Hooks are there as long as this is open."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]):
    """Modules run these functions instead of their own `forward` as long as this is open.

    A `forward` that was set on a module before (as Accelerate does where it moves weights) is put back.
    """
    originals: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module, forward in replacements:
            originals.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in reversed(originals):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def as_output(value: Any, others: list | tuple | None) -> Any:
    """A first output in the form that a module returns it, with `others` behind it unless those are `None`."""
    return value if others is None else type(others)((value, *others))


def others_of(output: Any) -> list | tuple | None:
    """What stands for the other outputs of a module that returned several, with the first, see `as_output`."""
    if isinstance(output, list):
        return [None] * (len(output) - 1)
    return (None,) * (len(output) - 1) if isinstance(output, tuple) else None


def first_of(output: Any) -> torch.Tensor:
    """What a module returned, or the first where that is several."""
    return output[0] if isinstance(output, (list, tuple)) else output


class Silencer:
    """Makes sublayers add nothing to the residual stream, as if their last projection were zero, without their work.

    The module that gives a sublayer's output returns zeros instead, and the modules before it are not run. What
    follows it sees the zeros: a norm of the output (Gemma 2, OLMo 2) is an RMSNorm and leaves them zero. A few token
    ids, shape (1, length), show in what form each module returns its output.
    """

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor) -> None:
        self.model = model
        self._silent: dict[str, Callable[..., Any]] = {}

        def look(name: str, output: Any) -> None:
            self._silent[name] = _zeros(first_of(output).shape[-1], others_of(output))

        names = [sublayer.module for layer in structure.layers for sublayer in layer.sublayers]
        modules = [(name, model.get_submodule(name)) for name in names]
        handles = (m.register_forward_hook(lambda *seen, name=name: look(name, seen[-1])) for name, m in modules)
        with hooked(handles), torch.no_grad():
            model.base_model(input_ids=tokens.to(model.get_input_embeddings().weight.device), use_cache=False)

    def silenced(self, sublayers: Iterable[Sublayer]) -> AbstractContextManager[None]:
        """These sublayers add nothing as long as this is open."""
        forwards = {}
        for sublayer in sublayers:
            forwards |= {**dict.fromkeys(sublayer.inner, _pass_on), sublayer.module: self._silent[sublayer.module]}
        return replaced_forwards((self.model.get_submodule(name), forward) for name, forward in forwards.items())


def _pass_on(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def _zeros(hidden: int, others: list | tuple | None) -> Callable[..., Any]:
    def zeros(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return as_output(states.new_zeros(*states.shape[:-1], hidden), others)

    return zeros
