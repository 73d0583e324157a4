"""Hidden states of the calibration text, carried through the model one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..hooks import as_output, first_of, hooked, others_of, replaced_forwards
from ..model.groups import Group
from ..model.measuring import check_numbers
from ..model.store import OUTSIDE, Store
from ..model.structure import ModelStructure, decoder_layers
from ..progress import tqdm
from .addends import Addend, factors_of_sum, norms_of
from .seen import Calibration, SeenRows


class _Stop(Exception):
    """Ends a forward pass as soon as what was wanted has been seen."""


@torch.no_grad()
def first_input(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """What a module receives when `run` comes to it, which goes no further."""
    seen = []

    def stop(_, args, kwargs):
        seen.append(_hidden(args, kwargs))
        raise _Stop

    with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Stop):
        run()
    return seen[0]


class LayerStream:
    """Runs calibration batches through one layer after the other, so that each sees what the layers before left.

    What a layer gets besides hidden states (masks, position embeddings) is recorded in one full forward pass for each
    shape of batch. The inputs of a consumer are captured by stopping the layer right there. After a consumer was
    changed, its output is computed from these and the module around it is not run again, so that a layer costs one
    forward pass in all.

    Args:
        model, structure: The model.
        tokens: Token ids, shape (sequences, length), or rows with images, each of its own length and a batch.
        batch_size: Sequences that go through the model at once.
        store: Where the weights are. From the recording on, layers have to be in memory whenever they are run.

    Attributes:
        hidden: What enters the next layer, one tensor of shape (sequences, length, H) for each batch; of a model with
            several residual streams (DeepSeek-V4, Gemma 3n) of shape (sequences, length, streams, H).
        sums: Whether every layer's output is its input plus what is made of the outputs of its consumers, and nothing
            else.
        additive: Whether it is these outputs themselves.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, batch_size: int,
        store: Store | None = None,
    ) -> None:  # fmt: skip
        self.model, self.store = model, store or Store()
        self.layers = [layer for _, layer in decoder_layers(model, structure.family)]
        self.rows = tokens.rows if isinstance(tokens, SeenRows) else None
        self.batches = tokens.split(batch_size) if self.rows is None else [row.ids for row in self.rows]
        self._arguments = {number: row.arguments for number, row in enumerate(self.rows or [])}
        self._by_name = [False] * len(self.layers)  # whether layers get hidden states by their name
        self._streams_first = False
        self._replayable: dict[str, list | tuple | None] = {}
        self._replaced: dict[str, list[torch.Tensor]] = {}
        self._layer_extras: list | tuple | None = None
        self._leading: list[torch.Size] = []
        self._addends: dict[str, Addend] = {}
        self.hidden: list[torch.Tensor] = []
        with self.store.holding(OUTSIDE):
            self._begin(structure)

    def _begin(self, structure: ModelStructure) -> None:
        """Computes what enters the first layer, and runs the whole model once for each shape of batch."""
        for number, batch in enumerate(self.batches):
            state = first_input(self.layers[0], partial(self._forward, number))
            self._streams_first = state.ndim == 4 and state.shape[1:3] == batch.shape
            state = self._turned(state, 0, 2)
            if state.ndim not in (3, 4) or state.shape[:2] != batch.shape:
                raise UnsupportedModelError(
                    f"The layers of {type(self.model).__name__} pass on hidden states of shape {tuple(state.shape)} "
                    f"for token ids of shape {tuple(batch.shape)}, and not (sequences, length, hidden size): they "
                    "cannot be carried from layer to layer."
                )
            self.hidden = self.hidden or self.blank(state, tail=state.shape[2:])
            self.hidden[number].copy_(state)
        self.sums = self.additive = True
        parents = _outermost(structure.groups)
        if self.rows is not None:
            self._record(0, parents)
            return
        for number in range(len(self.batches)):
            if self._shape(number) not in self._arguments:
                self._record(number, () if self._arguments else parents)

    def _shape(self, number: int) -> int:
        """What batches have in common that get the same masks and position embeddings."""
        return len(self.batches[number]) if self.rows is None else number

    def _turned(self, state: torch.Tensor, source: int, to: int) -> torch.Tensor:
        """Moves the dimension of residual streams, where the layers have it first and not third."""
        return state.movedim(source, to) if self._streams_first else state

    def blank(
        self, like: torch.Tensor, dtype: torch.dtype | None = None, tail: torch.Size | None = None
    ) -> list[torch.Tensor]:
        """Room for one tensor of shape (sequences, length, d) for each batch, `d` and device as in `like`.

        With `tail` of shape (sequences, length, *tail). One block for all of them, in memory or on disk, as the store
        has it: freed blocks of this size go back to the system, many smaller ones would leave a heap full of holes.
        """
        tail, sizes = tail or like.shape[-1:], [batch.numel() for batch in self.batches]
        block = self.store.room((sum(sizes), *tail), dtype or like.dtype, like.device)
        parts = zip(block.split(sizes), self.batches, strict=True)
        return [part.view(*batch.shape, *tail) for part, batch in parts]

    def copy(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """A copy of hidden states, in one block of memory."""
        rooms = self.blank(states[0], tail=states[0].shape[2:])
        return [room.copy_(state) for room, state in zip(rooms, states, strict=True)]

    @torch.no_grad()
    def _forward(self, number: int) -> None:
        if self.rows is not None:
            hidden = self.rows[number].hidden
            for index in range(len(self.layers)):
                hidden = self._run(index, number, hidden)
            return
        device = self.model.get_input_embeddings().weight.device
        self.model.base_model(input_ids=self.batches[number].to(device), use_cache=False)

    def _record(self, number: int, parents: Iterable[tuple[str, str]]) -> None:
        """Records the arguments of every layer, and which consumers' outputs are those of the modules around them."""
        arguments: list[tuple[tuple, dict[str, Any]]] = []
        outputs: dict[str, torch.Tensor] = {}
        raw: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # as it was put out, and as it is now
        entered: list[torch.Tensor] = []
        by_name: list[bool] = []

        def before_layer(_, args, kwargs):
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            arguments.append((args[1:], others))
            by_name.append(not args)
            entered.append(_hidden(args, kwargs))

        def after_layer(_, __, output):
            check_numbers(first_of(output), f"The hidden states that leave layer {len(entered) - 1}")
            self._layer_extras = others_of(output)
            if outputs:
                factors = factors_of_sum(first_of(output), [entered[-1], *outputs.values()])
                self.sums &= factors is not None
                for name, factor in zip(outputs, factors or (), strict=False):
                    self._addends.setdefault(name, Addend()).factor = factor
                self.additive &= self.sums and not normed and all(factor == 1 for factor in factors)
                outputs.clear()
                raw.clear()

        def after_consumer(name):  # a copy: some layers add to the output in place
            return lambda _, __, output: outputs.update({name: first_of(output).clone()})

        def after_parent(consumer, parent, output):
            first, expected = first_of(output), outputs[consumer]
            if first.numel() == expected.numel() and torch.equal(first.view_as(expected), expected):
                self._replayable[parent] = others_of(output)
                raw[consumer] = (expected, first)

        def after_norm(module, args, output):
            """Looks whether a norm got what a module had just put out: then the layer adds what the norm gives."""
            for name, (before, first) in list(raw.items()):
                same = args and args[0].data_ptr() == first.data_ptr() and args[0].shape == first.shape
                if same and torch.equal(first.view_as(before), before):
                    self._addends[name] = Addend(module)
                    normed.add(name)
                    outputs[name] = output.clone()
                    del raw[name]

        normed: set[str] = set()
        load, free = self.store.load, self.store.free
        handles = [layer.register_forward_pre_hook(lambda *_, n=n: load(n)) for n, layer in enumerate(self.layers)]
        handles += [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in self.layers]
        handles += [layer.register_forward_hook(after_layer) for layer in self.layers]
        for names in parents:
            consumer, parent = map(self.model.get_submodule, names)
            handles.append(consumer.register_forward_hook(after_consumer(names[0])))
            handles.append(parent.register_forward_hook(lambda _, __, out, names=names: after_parent(*names, out)))
        for module in norms_of(self.layers) if parents else ():
            handles.append(module.register_forward_hook(after_norm))
        handles += [layer.register_forward_hook(lambda *_, n=n: free(n)) for n, layer in enumerate(self.layers)]
        with hooked(handles):
            self._forward(number)
        if len(arguments) != len(self.layers):
            raise UnsupportedModelError(
                f"The {len(self.layers)} layers of {type(self.model).__name__} run {len(arguments)} times for text "
                "and not once each: hidden states cannot be carried from layer to layer."
            )
        self._arguments[self._shape(number)], self._by_name = arguments, by_name

    def _run(
        self, index: int, number: int, hidden: torch.Tensor, run: Callable[[tuple, dict[str, Any]], Any] | None = None
    ) -> torch.Tensor:
        """The output of a layer for a batch; modules whose outputs were replaced return those.

        `run` is called with the layer's arguments, by position and by name, in its place.
        """
        args, kwargs = self._arguments[self._shape(number)][index]
        forwards = []
        for name, outputs in self._replaced.items():
            value = outputs[number].to(self.device(index), copy=True)  # some layers add to it in place
            value = as_output(value, self._replayable[name])
            forwards.append((self.model.get_submodule(name), lambda *args, value=value, **kwargs: value))
        with replaced_forwards(forwards):
            hidden = self._turned(hidden.to(self.device(index)), 2, 0)
            if self._by_name[index]:
                kwargs = {**kwargs, "hidden_states": hidden}
            else:
                args = (hidden, *args)
            output = run(args, kwargs) if run is not None else self.layers[index](*args, **kwargs)
            output = self._turned(first_of(output), 0, 2)
        return output if self.rows is None else self.rows[number].behind(index, output)

    def device(self, index: int) -> torch.device:
        """Where layer `index` is."""
        parameters = self.layers[index].parameters()
        return next(parameters, self.model.get_input_embeddings().weight).device

    def enter(self, index: int) -> None:
        """Moves the hidden states to the device of layer `index`, where layers are spread over several."""
        self.hidden = self.placed(index, self.hidden)

    def placed(self, index: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states on the device of layer `index`, unless the store keeps them elsewhere."""
        return states if self.store.device is not None else [state.to(self.device(index)) for state in states]

    def addend(self, consumer: str) -> Addend:
        """What layers add to the hidden states of the output of a consumer (or of a block of experts)."""
        return self._addends.get(consumer, Addend())

    @torch.no_grad()
    def capture(self, index: int, consumer: str) -> list[torch.Tensor]:
        """Inputs of a consumer in layer `index`, one tensor of shape (sequences, length, d) for each batch."""
        module, inputs = self.model.get_submodule(consumer), []
        self._leading = []  # some layers flatten sequences and tokens into one dimension
        for number, batch in enumerate(self.batches):
            captured = first_input(module, partial(self._run, index, number, self.hidden[number]))
            check_numbers(captured, f"The inputs of `{consumer}`")
            self._leading.append(captured.shape[:-1])
            inputs = inputs or self.blank(captured)
            inputs[number].copy_(captured.reshape(*batch.shape, -1))
        return inputs

    @torch.no_grad()
    def carry(
        self, index: int, states: list[torch.Tensor], inputs_of: Iterable[str] = (), outputs_of: Iterable[str] = ()
    ) -> dict[str, list[torch.Tensor]]:
        """Replaces hidden states by what layer `index` makes of them.

        Returns:
            What some modules get, and what others give, one tensor of shape (sequences, length, d) for each batch.
        """
        seen: dict[str, list[torch.Tensor]] = {}

        def keep(name: str, value: torch.Tensor) -> None:
            if name not in seen:
                seen[name] = self.blank(value)
            room = seen[name][number]
            room.copy_(value.reshape(room.shape))

        modules = {name: self.model.get_submodule(name) for name in (*inputs_of, *outputs_of)}
        handles = [modules[n].register_forward_pre_hook(lambda _, args, n=n: keep(n, args[0])) for n in inputs_of]
        for name in outputs_of:
            handles.append(modules[name].register_forward_hook(lambda _, __, out, n=name: keep(n, first_of(out))))
        with hooked(handles):
            for number, state in enumerate(states):
                state.copy_(self._run(index, number, state))
        return seen

    def through(self, index: int, number: int, run: Callable[[tuple, dict[str, Any]], Any]) -> torch.Tensor:
        """What is made of the hidden states of a batch if `run` is called with the arguments of layer `index`.

        Gradients are recorded if they are switched on.
        """
        return self._run(index, number, self.hidden[number], run)

    @contextmanager
    def unreplaced(self) -> Iterator[None]:
        """Modules run themselves, also those whose outputs are known, as long as this is open."""
        replaced, self._replaced = self._replaced, {}
        try:
            yield
        finally:
            self._replaced = replaced

    def run_anew(self) -> None:
        """Forgets what modules of the current layer put out: they have changed."""
        self._replaced.clear()

    def advance(self, index: int) -> None:
        """Replaces the hidden states by the outputs of layer `index`."""
        self.carry(index, self.hidden)
        self._replaced.clear()

    def replace(self, parent: str, outputs: list[torch.Tensor]) -> None:
        """Lets later runs of the current layer use these outputs of a module instead of running it.

        Modules whose output is not simply their consumer's are run again instead, which gives the same.
        """
        if parent in self._replayable:
            shapes = self._leading
            self._replaced[parent] = [o.reshape(*shape, -1) for o, shape in zip(outputs, shapes, strict=True)]

    @torch.no_grad()
    def outputs(self, index: int, number: int, last: int | None = None, skip: Collection[int] = ()) -> torch.Tensor:
        """What the layers from `index` to `last`, but for those in `skip`, make of the hidden states, which stay."""
        hidden = self.hidden[number]
        for later in range(index, len(self.layers) if last is None else last + 1):
            if later not in skip:
                hidden = self._run(later, number, hidden)
        return hidden

    @torch.no_grad()
    def head(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states that leave the last layer, for the token ids at the same positions.

        What comes after it (norm, head, scaling) is the model's own business: it is run with layers that return them.
        """
        with self.passed(hidden):
            device = self.model.get_input_embeddings().weight.device
            return self.model(input_ids=ids.to(device), use_cache=False).logits

    def passed(self, hidden: torch.Tensor) -> AbstractContextManager[None]:
        """The model runs no layer, and takes these hidden states for what leaves the last, as long as this is open."""
        value = as_output(self._turned(hidden, 2, 0), self._layer_extras)
        return replaced_forwards((layer, lambda *args, **kwargs: value) for layer in self.layers)

    def finish(self, index: int, number: int, every: int = 1) -> torch.Tensor:
        """Logits of a batch when the layers from `index` on run as they are now, at each `every`-th position.

        Of rows with images, positions count that a token of text follows.
        """
        hidden, chosen = self.outputs(index, number), self.positions(number, every)
        return self.head(hidden[:, chosen], self.batches[number][:, chosen])

    def positions(self, number: int, every: int) -> slice | torch.Tensor:
        """Each `every`-th position of a batch; of rows with images, of those that a token of text follows."""
        if self.rows is None or every == 1:
            return slice(None, None, every)
        return (self.targets(number)[0] >= 0).nonzero().flatten()[::every]

    def targets(self, number: int) -> torch.Tensor:
        """The tokens of a batch that are predicted, shape (sequences, length - 1); -100 for what is no text."""
        return self.batches[number][:, 1:] if self.rows is None else self.rows[number].targets


@contextmanager
def read_in_turn(model: PreTrainedModel, structure: ModelStructure, store: Store) -> Iterator[None]:
    """What is outside of the layers is in memory, and each layer while it is run, as long as this is open."""
    layers = [layer for _, layer in decoder_layers(model, structure.family)]
    handles = [layer.register_forward_pre_hook(lambda *_, n=n: store.load(n)) for n, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(lambda *_, n=n: store.free(n)) for n, layer in enumerate(layers)]
    with store.holding(OUTSIDE), hooked(handles):
        yield


@contextmanager
def without_layers(
    model: PreTrainedModel, structure: ModelStructure, ids: torch.Tensor, store: Store
) -> Iterator[None]:
    """What is outside of the layers is in memory, and the layers pass on what they get, as long as this is open.

    A few token ids, shape (1, length), show in what form the first layer returns it.
    """
    layers, forms = [layer for _, layer in decoder_layers(model, structure.family)], []

    def stop(_, __, output):
        forms.append(others_of(output))
        raise _Stop

    with store.holding_ends():
        with store.holding(0), layers[0].register_forward_hook(stop), suppress(_Stop):
            model.base_model(input_ids=ids, use_cache=False)
        form = forms[0]
        with replaced_forwards((layer, lambda *a, **k: as_output(_hidden(a, k), form)) for layer in layers):
            yield


@contextmanager
def layer_by_layer(
    model: PreTrainedModel, structure: ModelStructure, ids: torch.Tensor, batch_size: int, store: Store
) -> Iterator[Iterator[AbstractContextManager[None]]]:
    """Takes all sequences through one layer after the other, and then has a turn for each batch, in order.

    In its turn the model can be run on the batch, and gives what it gives when all of it is in memory.

    Args:
        ids: Token ids, shape (sequences, length).
        batch_size: Sequences of a batch.
        store: Where the weights are.
    """
    stream = LayerStream(model, structure, ids, batch_size, store)
    for index in tqdm(range(len(stream.layers)), desc="Layers"):
        with store.holding(index):
            stream.advance(index)
    with store.holding_ends():
        yield map(stream.passed, stream.hidden)


def _outermost(groups: Iterable[Group]) -> dict[tuple[str, str], None]:
    """What reads the units of each group, and the module whose output that is; blocks of experts as a whole."""
    blocks = tuple(dict.fromkeys(f"{group.parent}." for group in groups if group.reader is None))
    pairs = [(block[:-1], block[:-1]) for block in blocks]
    pairs += [(g.reader.module, g.parent) for g in groups if g.reader and not g.parent.startswith(blocks)]
    return dict.fromkeys(pairs)


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
