"""Where the weights of a model are while it is worked on: in memory, on a device in turns, or on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import CheckpointError
from ..files.rooms import Spill, in_memory, on_disk
from ..hardware import trim_memory
from .measuring import check_finite
from .stored import StoredWeights
from .structure import ModelStructure, decoder_layers
from .surgery import name_after, skipped
from .target import Target


Tensors = dict[str, torch.Tensor]
OUTSIDE, HEAD = "outside", "head"


class Saved(NamedTuple):
    """The state of an interrupted run: values, and a function that reads its tensors by name."""

    values: dict[str, Any]
    tensor: Callable[[str], torch.Tensor]
    names: list[str]


class Progress(Protocol):
    """Keeps the state of a run."""

    def save(self, tensors: Tensors, values: dict[str, Any]) -> None: ...

    def load(self) -> Saved | None: ...

    def due(self) -> bool: ...


class Store:
    """A model in memory: every layer is there at any time, and stays where it is when it has been cut.

    `InTurns` and `OnDisk` are other kinds. What is done to one layer after the other is written once, for all.

    Attributes:
        cuts: Whether layers are to get smaller; else what goes of them is as good as zero.
        device: Where layers go for their turn, while hidden states stay in the machine's memory; `None`: nowhere.
        rooms: The folder whose disk has the hidden states; `None` if they are in memory.
        spill: When they are kept on disk.
    """

    cuts = True
    device: torch.device | None = None
    rooms: Path | None = None
    spill = Spill()

    def load(self, part: int | str) -> None:
        """Brings a layer, by its number, or what is `OUTSIDE` of the layers into memory."""

    def free(self, part: int | str) -> None:
        """The opposite of `load`."""

    @contextmanager
    def holding(self, part: int | str) -> Iterator[None]:
        """A layer, or a part outside of the layers, is in memory as long as this is open."""
        self.load(part)
        try:
            yield
        finally:
            self.free(part)

    @contextmanager
    def holding_ends(self) -> Iterator[None]:
        """What is outside of the layers, with the head, is in memory on one device as long as this is open."""
        with self.holding(OUTSIDE), self.holding(HEAD):
            yield

    def begin(
        self, model: PreTrainedModel, structure: ModelStructure, dropped: dict[str, list[int]], target: Target
    ) -> None:
        """Says what the model will be, before the first layer is cut; `dropped` are layers and sublayers that go."""

    def size(self, part: int | str) -> int:
        """Bytes of a layer, or of a part outside of the layers."""
        raise NotImplementedError

    def put(self, part: int | str) -> None:
        """A layer, or what is `OUTSIDE` of the layers, is in memory and as it will be."""

    def finish(self) -> None:
        """All layers that change were put."""

    def close(self) -> None:
        """The work is over, or has failed."""

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor for hidden states, with any content, where these are kept: see `device` and `rooms`."""
        if self.rooms is not None:
            return on_disk(shape, dtype, self.rooms)
        if self.device is not None:
            return in_memory(shape, dtype, self.device)
        return torch.empty(shape, dtype=dtype, device=device)

    def save(self, state: Callable[[], tuple[Tensors, dict[str, Any]]]) -> None:
        """The layers so far were put; `state` gives tensors and values (JSON) that are needed to go on from here."""

    def saved(self) -> Saved | None:
        """What `save` got last before an earlier run was ended; `None` to begin at the first layer."""
        return None


class InTurns(Store):
    """A model in the machine's memory whose layers go to a device for their turn, and come back.

    What is measured of them stays on the device, to which hidden states come a batch at a time. The LM head never
    goes there.

    Args:
        device: Where layers are worked on.
        spill: When hidden states are kept on disk.
    """

    def __init__(self, device: torch.device, spill: Spill | None = None) -> None:
        self.device, self.spill = device, spill or Spill()
        self._layers: list[nn.Module] = []
        self._outside: list[nn.Module] = []
        self._there: set[int | str] = set()  # what is on the device

    def begin(self, model, structure, dropped=None, target=None):
        self._layers = [layer for _, layer in decoder_layers(model, structure.family)]
        inside = {id(module) for layer in self._layers for module in layer.modules()}
        self._outside = [module for module in model.base_model.modules() if id(module) not in inside]

    def load(self, part):
        self._there.add(part)
        self._move(part, self.device)

    def free(self, part):
        self._move(part, torch.device("cpu"))
        self._there.discard(part)

    @contextmanager
    def holding_ends(self):
        yield  # in the machine's memory, where the head is

    def close(self):
        for part in list(self._there):
            self.free(part)

    def size(self, part):
        tensors = {id(one): one for module in self._parts(part) for one in _own(module).values()}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _parts(self, part: int | str) -> list[nn.Module]:
        return self._outside if part == OUTSIDE else [*self._layers[part].modules()]

    def _move(self, part: int | str, device: torch.device) -> None:
        for module in self._parts(part):
            for name, tensor in _own(module).items():
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(device)  # the same parameter: what is tied stays so
                else:
                    setattr(module, name, tensor.to(device))


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


class OnDisk(Store):
    """A model on the meta device whose weights are read from a checkpoint, and handed on when they have been cut.

    Args:
        model: As it was loaded inside `stored.taken()`.
        stored: Its weights.
        layers: Full names of its decoder layers.
        device: Where layers are worked on.
        spill: When hidden states are kept on disk.

    Attributes:
        count: Number of layers.
        write: Takes the tensors of one layer (or of what is outside of the layers) as they are stored.
        progress: Keeps the state of the run, where it may be resumed.
    """

    def __init__(
        self, model: PreTrainedModel, stored: StoredWeights, layers: list[str], device: torch.device | None = None,
        spill: Spill | None = None,
    ) -> None:  # fmt: skip
        self.model, self.weights, self.device, self.spill = model, stored, device, spill or Spill()
        self.write: Callable[[Tensors], None] | None = None
        self.progress: Progress | None = None
        self._names: dict[int | str, list[str]] = defaultdict(list)
        self._seen: set[int | str] = set()
        self._done: set[int] = set()
        path, base = layers[0].rpartition(".")[0], model.base_model
        inside = "" if base is model else f"{model.base_model_prefix}."
        tied: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied[id(parameter)].append(name)
        self._ties = [names for names in tied.values() if len(names) > 1]
        shared = {name for names in self._ties for name in names}
        for name in model.state_dict():
            number = name[len(path) + 1 :].partition(".")[0] if name.startswith(f"{path}.") else ""
            alone = not name.startswith(inside) and name not in shared
            self._names[int(number) if number else HEAD if alone else OUTSIDE].append(name)
        self.count = len(layers)

    def size(self, part):
        tensors, state = {}, self.model.state_dict(keep_vars=True)
        for name in self._names[part]:
            tensors[id(state[name])] = state[name].numel() * state[name].element_size()
        return sum(tensors.values())

    def load(self, part):
        names = self._names[part]
        if not names:
            return
        self.weights.read(self.model, [name for name in names if name in self.weights.targets])
        for tie in (tie for tie in self._ties if tie[0] in names):
            there = next((t for t in map(self._tensor, tie) if t.device.type != "meta"), None)
            for name in tie if there is not None else ():
                self._set(name, there)
        for name in names:
            if self._tensor(name).device.type == "meta":
                raise CheckpointError(f"The checkpoint lacks `{name}`, which would be random.")
        if part not in self._seen:
            self._seen.add(part)
            check_finite(self.model, set(names))
        self._move(names)

    def _move(self, names: list[str]) -> None:
        """Brings tensors that were read to the device; those that are one stay one."""
        moved: dict[int, torch.Tensor] = {}
        for name in names if self.device is not None else ():
            tensor = self._tensor(name)
            if id(tensor) not in moved:
                there = tensor.detach().to(self.device)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
            self._set(name, moved[id(tensor)])

    def free(self, part):
        gone: Tensors = {}
        for name in self._names[part]:
            tensor = self._tensor(name)
            if id(tensor) not in gone:
                empty = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                gone[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            self._set(name, gone[id(tensor)])
        trim_memory()

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """Reads tensors by their names in the model; the part that one is in stays until another part is needed."""
        parts = {name: part for part, names in self._names.items() for name in names}
        there: list[int | str] = []

        def free() -> None:
            while there:
                self.free(there.pop())

        def read(name: str) -> torch.Tensor:
            if parts[name] not in there:
                free()
                there.append(parts[name])
                self.load(parts[name])
            return self._tensor(name).detach()

        try:
            yield read
        finally:
            free()

    def merged_size(self, part: int | str) -> int:
        """Bytes of what is made of several stored tensors in it."""
        names = (name for name in self._names[part] if len(self.weights.targets.get(name, ())) > 1)
        return sum(t.numel() * t.element_size() for t in map(self._tensor, names))

    def widest(self, part: int | str) -> int:
        """Rows or columns that the largest matrix of a part has."""
        return max((size for name in self._names[part] for size in self._tensor(name).shape[-2:]), default=0)

    def _tensor(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(module), leaf)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(module), leaf, tensor)

    def begin(self, model, structure, dropped, target):
        self._result = target.skeleton()
        gone = tuple(f"{module}." for sublayer in skipped(structure, dropped) for module in sublayer.modules)
        names = (name for part in self._names.values() for name in part if not name.startswith(gone))
        self._new_names = {name: name_after(name, structure, dropped) for name in names}
        stored = remove_tied_weights_from_state_dict(self._result.state_dict(), self._result)
        self._stored = set(stored) - set(self._result._keys_to_ignore_on_save or ())

    def put(self, part):
        tensors = {
            self._new_names[name]: self._tensor(name).detach().cpu()
            for name in self._names[part]
            if self._new_names.get(name) in self._stored
        }
        self.write(revert_weight_conversion(self._result, tensors))
        self._done.add(part)

    def save(self, state):
        if self.progress is not None and self.progress.due():
            tensors, values = state()
            self.progress.save(tensors, {**values, "done": sorted(self._done)})

    def saved(self):
        found = None if self.progress is None else self.progress.load()
        self._done = set() if found is None else set(found.values["done"])
        return found

    def finish(self):
        for part in (OUTSIDE, *range(self.count), HEAD):
            stays = any(self._new_names.get(name) in self._stored for name in self._names[part])
            if part not in self._done and stays:
                with self.holding(part):
                    self.put(part)
