"""Two streams side by side, of the dense model and of the one with fewer channels, and what reads and writes them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.structure import is_linear
from ..stats.stream import LayerStream, _Stop


@dataclass(frozen=True)
class Stage:
    """Modules of one decoder layer that run at the same place.

    Attributes:
        modules: Full names. Readers of the same input, or one writer.
        writes: Whether it writes to the stream.
    """

    modules: tuple[str, ...]
    writes: bool


@contextmanager
def hooked(handles):
    """Removes hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def readers_and_writers(model: nn.Module, layer: str, dims: dict[str, int]) -> tuple[list[str], list[str]]:
    """Modules of a decoder layer with columns for the channels, and linear maps with rows for them; full names.

    Stacked experts are readers; as writers they are left alone, because each sees other tokens.
    """
    readers, writers = [], []
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        own = {f"{name}.{leaf}": parameter for leaf, parameter in module.named_parameters(recurse=False)}
        matrices = {key: parameter for key, parameter in own.items() if key in dims and parameter.ndim > 1}
        if any(dims[key] == parameter.ndim - 1 for key, parameter in matrices.items()):
            readers.append(name)
        elif matrices and is_linear(module):
            writers.append(name)
    return readers, writers


@torch.no_grad()
def stages_of(stream: LayerStream, index: int, model: nn.Module, layer: str, dims: dict[str, int]) -> list[Stage]:
    """What reads and writes the stream in a layer, in the order in which it runs; found by running one batch."""
    readers, writers = readers_and_writers(model, layer, dims)
    seen: list[tuple[tuple[int, ...], torch.Tensor | None, list[str]]] = []

    def enter(name: str, writes: bool):
        def hook(_, args):
            # The tensor is kept, so that no other one can have its address.
            place = (args[0].data_ptr(), args[0].numel())
            if seen and not writes and seen[-1][0] == place:
                seen[-1][2].append(name)
            else:
                seen.append((() if writes else place, args[0], [name]))

        return hook

    modules = [*((name, False) for name in readers), *((name, True) for name in writers)]
    with hooked([model.get_submodule(n).register_forward_pre_hook(enter(n, w)) for n, w in modules]):
        stream._run(index, 0, stream.hidden[0])
    return [Stage(tuple(names), not place) for place, _, names in seen]


@torch.no_grad()
def record_dense(stream: LayerStream, index: int, model: nn.Module, stages: list[Stage]) -> list[list[torch.Tensor]]:
    """Carries the dense stream through a layer.

    Returns:
        For each stage what its readers get, or what its writer gives, one tensor of shape (sequences, length, H) for
        each batch.
    """
    recorded: list[list[torch.Tensor]] = [[] for _ in stages]

    def keep(place: int, value: torch.Tensor) -> None:
        recorded[place] = recorded[place] or stream.blank(value)
        room = recorded[place][number]
        room.copy_(value.reshape(room.shape))

    handles = []
    for place, stage in enumerate(stages):
        module = model.get_submodule(stage.modules[0])
        if stage.writes:
            handles.append(module.register_forward_hook(lambda _, __, out, place=place: keep(place, out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args, place=place: keep(place, args[0])))
    with hooked(handles):
        for number, states in enumerate(stream.hidden):
            states.copy_(stream._run(index, number, states))
    return recorded


@torch.no_grad()
def head_inputs(stream: LayerStream, model: PreTrainedModel) -> list[torch.Tensor]:
    """What the LM head gets after the last layer, one tensor of shape (sequences, length, H) for each batch."""
    inputs: list[torch.Tensor] = []

    def stop(_, args):
        inputs.append(args[0])
        raise _Stop

    with hooked([model.get_output_embeddings().register_forward_pre_hook(stop)]):
        for number in range(len(stream.batches)):
            try:
                stream.finish(len(stream.layers), number)
            except _Stop:
                continue
    return inputs
