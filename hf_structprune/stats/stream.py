"""Hidden states of the calibration text, carried through the model one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..hooks import as_output, others_of, replaced_forwards
from ..model.measuring import check_numbers


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
        dense: Also carry the hidden states of the model as it was, see `step_dense`.

    Attributes:
        additive: Whether every layer's output is its input plus the outputs of its consumers, and nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[tuple[str, nn.Module]],
        tokens: torch.Tensor,
        batch_size: int,
        parents: Iterable[tuple[str, str]] = (),
        dense: bool = False,
    ) -> None:
        self.model = model
        self.layers = [layer for _, layer in layers]
        self.batches = list(tokens.split(batch_size))
        self._arguments: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        self._replayable: dict[str, int | None] = {}
        self._replaced: dict[str, list[torch.Tensor]] = {}
        self._layer_extras: int | None = None
        self._leading: list[torch.Size] = []
        self.hidden = self._entered()
        self.dense_hidden = self.copy(self.hidden) if dense else []
        self.additive = True
        for batch in self.batches:
            if len(batch) not in self._arguments:
                self._record(batch, list(parents) if not self._arguments else [])

    def blank(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Room for one tensor of shape (sequences, length, d) for each batch, `d` and device as in `like`.

        One block of memory for all of them: freed blocks of this size go back to the system, while many smaller ones
        would leave a heap full of holes.
        """
        shape = (sum(map(len, self.batches)), self.batches[0].shape[1], like.shape[-1])
        block = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        return list(block.split([len(batch) for batch in self.batches]))

    def copy(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """A copy of hidden states, in one block of memory."""
        return [room.copy_(state) for room, state in zip(self.blank(states[0]), states, strict=True)]

    def _entered(self) -> list[torch.Tensor]:
        """The hidden states that enter the first layer."""
        states = None
        for number, batch in enumerate(self.batches):
            state = self._enter(batch)
            if state.ndim != 3:
                raise UnsupportedModelError(
                    f"The layers of {type(self.model).__name__} pass on hidden states of shape {tuple(state.shape)} "
                    "and not (sequences, length, hidden size): they cannot be carried from layer to layer."
                )
            states = states or self.blank(state)
            states[number].copy_(state)
        return states

    @torch.no_grad()
    def _enter(self, batch: torch.Tensor) -> torch.Tensor:
        """The hidden states of a batch that enter the first layer."""
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
        """One full forward pass that records the arguments of every layer and how modules add up."""
        arguments: list[tuple[tuple, dict[str, Any]]] = []
        outputs: dict[str, torch.Tensor] = {}
        entered: list[torch.Tensor] = []

        def before_layer(_, args, kwargs):
            arguments.append(_without_hidden(args, kwargs))
            entered.append(_hidden(args, kwargs))

        def after_layer(_, __, output):
            check_numbers(_first(output), f"The hidden states that leave layer {len(entered) - 1}")
            self._layer_extras = others_of(output)
            if outputs:
                self.additive &= _is_sum(_first(output), [entered[-1], *outputs.values()])
                outputs.clear()

        def after_consumer(name):
            # A copy: some layers add to the output in place.
            return lambda _, __, output: outputs.update({name: output.clone()})

        def after_parent(consumer, parent):
            def compare(_, __, output):
                first, expected = _first(output), outputs[consumer]
                if first.numel() == expected.numel() and torch.equal(first.view_as(expected), expected):
                    self._replayable[parent] = others_of(output)

            return compare

        handles = []
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            handles.append(layer.register_forward_hook(after_layer))
        for consumer, parent in parents:
            handles.append(self.model.get_submodule(consumer).register_forward_hook(after_consumer(consumer)))
            handles.append(self.model.get_submodule(parent).register_forward_hook(after_parent(consumer, parent)))
        try:
            self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._arguments[len(batch)] = arguments

    def _run(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._arguments[len(self.batches[number])][index]
        with _replay(self.model, self._replayable, self._replaced, number):
            return _first(self.layers[index](hidden, *args, **kwargs))

    def enter(self, index: int) -> None:
        """Moves the hidden states to the device of layer `index`, where layers are spread over several."""
        device = next(self.layers[index].parameters()).device
        self.hidden = [hidden.to(device) for hidden in self.hidden]
        self.dense_hidden = [hidden.to(device) for hidden in self.dense_hidden]

    @torch.no_grad()
    def capture(self, index: int, consumer: str) -> list[torch.Tensor]:
        """Inputs of a consumer in layer `index`, one tensor of shape (sequences, length, d) for each batch."""
        seen: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []
        self._leading = []  # some layers flatten sequences and tokens into one dimension

        def stop(module, args):
            seen.append(args[0])
            raise _Stop

        handle = self.model.get_submodule(consumer).register_forward_pre_hook(stop)
        try:
            for number, batch in enumerate(self.batches):
                with suppress(_Stop):
                    self._run(index, number, self.hidden[number])
                captured = seen.pop()
                check_numbers(captured, f"The inputs of `{consumer}`")
                self._leading.append(captured.shape[:-1])
                inputs = inputs or self.blank(captured)
                inputs[number].copy_(captured.reshape(*batch.shape, -1))
        finally:
            handle.remove()
        return inputs

    @torch.no_grad()
    def step_dense(self, index: int, consumers: list[str]) -> dict[str, list[torch.Tensor]]:
        """Carries the dense hidden states through layer `index`, which must not have been changed yet.

        Returns:
            Outputs of the consumers, one tensor of shape (sequences, length, out) for each batch.
        """
        outputs: dict[str, list[torch.Tensor]] = {}
        number = 0

        def keep(name):
            def store(_, __, output):
                if name not in outputs:
                    outputs[name] = self.blank(output)
                outputs[name][number].copy_(output.reshape(outputs[name][number].shape))

            return store

        handles = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in consumers]
        try:
            for number, states in enumerate(self.dense_hidden):
                states.copy_(self._run(index, number, states))
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @torch.no_grad()
    def outputs(self, index: int, number: int, last: int | None = None, skip: Collection[int] = ()) -> torch.Tensor:
        """What layers make of the current hidden states of a batch, which stay as they are.

        Args:
            index: First layer to run.
            number: Number of the batch.
            last: Last layer to run. Default: the last there is.
            skip: Numbers of layers that are passed over, as if they were not there.
        """
        hidden = self.hidden[number]
        for later in range(index, len(self.layers) if last is None else last + 1):
            if later not in skip:
                hidden = self._run(later, number, hidden)
        return hidden

    @torch.no_grad()
    def head(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states that leave the last layer, for the token ids at the same positions.

        What comes after it (norm, head, scaling) is the model's own business: the model is run with layers that
        return what is known already.
        """
        value = as_output(hidden, self._layer_extras)
        with replaced_forwards((layer, lambda *args, **kwargs: value) for layer in self.layers):
            device = self.model.get_input_embeddings().weight.device
            return self.model(input_ids=ids.to(device), use_cache=False).logits

    def finish(self, index: int, number: int, every: int = 1, skip: Collection[int] = ()) -> torch.Tensor:
        """Logits of a batch when the layers from `index` on run as they are now, see `outputs`.

        Args:
            index, number, skip: As for `outputs`.
            every: Only each so many-th position, to save the LM head work.
        """
        hidden = self.outputs(index, number, skip=skip)
        return self.head(hidden[:, ::every], self.batches[number][:, ::every])

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
        for number, states in enumerate(self.hidden):
            states.copy_(self._run(index, number, states))
        self._replaced.clear()


@contextmanager
def _replay(model: nn.Module, replayable: dict[str, int | None], replaced: dict[str, list[torch.Tensor]], number: int):
    """Lets modules return recorded outputs."""
    forwards = []
    for name, outputs in replaced.items():
        output = outputs[number].clone()  # some layers add to it in place
        value = as_output(output, replayable[name])
        forwards.append((model.get_submodule(name), lambda *args, value=value, **kwargs: value))
    with replaced_forwards(forwards):
        yield


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _is_sum(total: torch.Tensor, terms: list[torch.Tensor]) -> bool:
    """Whether a tensor is the sum of others, within the rounding of low-precision additions."""
    parts = sum(term.reshape(total.shape).float() for term in terms[1:])
    rest = (total.float() - terms[0].reshape(total.shape).float() - parts).norm(dim=-1)
    return float((rest / parts.norm(dim=-1).clamp_min(1e-30)).median()) < 0.1


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return (args[1:] if args else ()), kwargs
