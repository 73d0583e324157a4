"""Hidden states of the calibration text, carried through the model one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .calibration import as_batches


class _Stop(Exception):
    """Ends a forward pass as soon as what was wanted has been seen."""


class LayerStream:
    """Runs calibration batches through one layer after the other, so that each sees what the layers before left.

    What a layer gets besides hidden states (masks, position embeddings) is recorded in one full forward pass for each
    shape of batch; it does not depend on the hidden states. The inputs of a consumer are captured by stopping the
    layer right there. After a consumer was changed, its output is computed from the captured inputs and the module
    around it is not run again, so that a layer costs one forward pass in all.

    Args:
        model: A causal language model in eval mode.
        layers: Full names and modules of its decoder layers.
        tokens: Token ids of shape (sequences, length).
        batch_size: Sequences in a batch.
        parents: Pairs of the full names of a consumer and of the module whose output should be the consumer's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[tuple[str, nn.Module]],
        tokens: torch.Tensor,
        batch_size: int,
        parents: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.model = model
        self.layers = [layer for _, layer in layers]
        self.batches = list(as_batches(tokens, batch_size))
        self._arguments: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        self._replayable: dict[str, int | None] = {}
        self._replaced: dict[str, list[torch.Tensor]] = {}
        self._leading: list[torch.Size] = []
        self.hidden = [self._enter(batch) for batch in self.batches]
        for batch in self.batches:
            if len(batch) not in self._arguments:
                self._record(batch, list(parents) if not self._arguments else [])

    @torch.no_grad()
    def _enter(self, batch: torch.Tensor) -> torch.Tensor:
        """The hidden states that enter the first layer."""
        seen = []

        def stop(module, args, kwargs):
            seen.append(_hidden(args, kwargs))
            raise _Stop

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(batch)
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0]

    def _forward(self, batch: torch.Tensor) -> None:
        device = self.model.get_input_embeddings().weight.device
        self.model.base_model(input_ids=batch.to(device), use_cache=False)

    @torch.no_grad()
    def _record(self, batch: torch.Tensor, parents: list[tuple[str, str]]) -> None:
        """One full forward pass that records the arguments of every layer and which modules can be replayed."""
        arguments: list[tuple[tuple, dict[str, Any]]] = []
        outputs: dict[str, Any] = {}
        handles = []
        for layer in self.layers:
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: arguments.append(_without_hidden(args, kwargs)), with_kwargs=True
                )
            )
        for consumer, parent in parents:

            def keep(_, __, output, consumer=consumer):
                outputs[consumer] = output

            def compare(_, __, output, consumer=consumer, parent=parent):
                first = output[0] if isinstance(output, tuple) else output
                expected = outputs.pop(consumer)
                same = first.numel() == expected.numel() and torch.equal(first.view_as(expected), expected)
                if same:
                    self._replayable[parent] = len(output) - 1 if isinstance(output, tuple) else None

            handles.append(self.model.get_submodule(consumer).register_forward_hook(keep))
            handles.append(self.model.get_submodule(parent).register_forward_hook(compare))
        try:
            self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._arguments[len(batch)] = arguments

    def _run(self, index: int, number: int) -> torch.Tensor:
        hidden = self.hidden[number]
        args, kwargs = self._arguments[len(self.batches[number])][index]
        with _replay(self.model, self._replayable, self._replaced, number):
            output = self.layers[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def capture(self, index: int, consumer: str) -> list[torch.Tensor]:
        """Inputs of a consumer in layer `index`, one tensor of shape (sequences, length, d) for each batch."""
        seen: list[torch.Tensor] = []
        self._leading = []  # some layers flatten sequences and tokens into one dimension

        def stop(module, args):
            seen.append(args[0])
            self._leading.append(args[0].shape[:-1])
            raise _Stop

        handle = self.model.get_submodule(consumer).register_forward_pre_hook(stop)
        try:
            for number, batch in enumerate(self.batches):
                try:
                    self._run(index, number)
                except _Stop:
                    seen[-1] = seen[-1].reshape(*batch.shape, -1)
        finally:
            handle.remove()
        return seen

    def replace(self, parent: str, outputs: list[torch.Tensor]) -> None:
        """Lets later runs of the current layer use these outputs of a module instead of running it.

        Modules whose output is not simply their consumer's are run again instead, which gives the same.
        """
        if parent in self._replayable:
            shapes = self._leading
            self._replaced[parent] = [o.reshape(*shape, -1) for o, shape in zip(outputs, shapes, strict=True)]

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replaces the hidden states by the outputs of layer `index`."""
        for number in range(len(self.batches)):
            self.hidden[number] = self._run(index, number)
        self._replaced.clear()


@contextmanager
def _replay(model: nn.Module, replayable: dict[str, int | None], replaced: dict[str, list[torch.Tensor]], number: int):
    """Lets modules return recorded outputs."""
    originals = []
    for name, outputs in replaced.items():
        module, others = model.get_submodule(name), replayable[name]
        output = outputs[number]
        value = output if others is None else (output, *[None] * others)
        originals.append((module, module.__dict__.get("forward")))
        module.forward = lambda *args, value=value, **kwargs: value
    try:
        yield
    finally:
        for module, forward in originals:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return (args[1:] if args else ()), kwargs
