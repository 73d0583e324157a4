"""Models put together of levels, and by how much their predictions are not the dense model's."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hooks import Silencer
from ..model.experts import Experts, without_experts
from ..model.groups import Kept
from ..model.structure import ModelStructure
from ..refit.reader import write_columns
from ..stats.seen import Calibration, few_tokens
from ..stats.stream import LayerStream
from ..stats.survey import kl_divergence
from ..units import LAYERS
from .levels import Levels


_EVERY = 4  # predictions are compared at each so many-th token


class Divergence:
    """`KL(dense || model as it is)` in nats a token, on batches of text.

    Args:
        model, structure: The dense model, whose predictions are kept.
        tokens: The text.
        batch_size: Sequences in a batch.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, batch_size: int
    ) -> None:
        self._stream = LayerStream(model, structure, tokens, batch_size)
        self.batches = len(self._stream.batches)
        self._places = [self._stream.positions(number, _EVERY) for number in range(self.batches)]
        self._dense = [self._last(number) for number in range(self.batches)]

    def _last(self, number: int, skip: Collection[int] = ()) -> torch.Tensor:
        return self._stream.outputs(0, number, skip=skip)[:, self._places[number]].clone()

    def __call__(self, numbers: list[int], skip: Collection[int] = ()) -> float:
        """On some of the batches, with layers skipped."""
        total, count = 0.0, 0
        for number in numbers:
            ids = self._stream.batches[number][:, self._places[number]]
            dense, cut = (self._stream.head(last, ids) for last in (self._dense[number], self._last(number, skip)))
            total += kl_divergence(dense, cut)
            count += ids.numel()
        return total / count


class Assembly:
    """A model whose groups are at levels: readers have the re-fitted columns and zeros; nothing else is changed.

    Args:
        model, structure: The model.
        levels: What it is put together of.
        tokens: Some text, that shows in what form sublayers return their output.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, levels: Levels, tokens: Calibration
    ) -> None:  # fmt: skip
        self._model, self._structure, self._levels = model, structure, levels
        ladders = list(enumerate(levels.ladders))
        read = {n: ladder.group.reader for n, ladder in ladders if ladder.group}
        self._readers = {n: model.get_submodule(reader.module) for n, reader in read.items() if reader is not None}
        self._experts = {n: Experts(model, levels.ladders[n].group) for n, reader in read.items() if reader is None}
        self._depth = {n: ladder for n, ladder in ladders if ladder.group is None}
        self._dense = {n: reader.weight for n, reader in self._readers.items()}
        self._dense |= {n: experts.matrices for n, experts in self._experts.items()}
        self._now = dict.fromkeys(self._dense, -1)
        self._kept: Kept = {}
        self._silencer = Silencer(model, structure, few_tokens(tokens)) if self._depth else None

    @contextmanager
    def at(self, choice: list[int]) -> Iterator[set[int]]:
        """Everything is at a level as long as this is open; gives the layers to be skipped."""
        for number in self._readers:
            self._read(number, choice[number])
        for number in self._experts:
            self._choose(number, choice[number])
        gone = [ladder for number, ladder in self._depth.items() if choice[number]]
        skip = {ladder.layer for ladder in gone if ladder.kind == LAYERS}
        halves = [ladder for ladder in gone if ladder.kind != LAYERS and ladder.layer not in skip]
        with ExitStack() as stack:
            if self._kept:
                groups = [self._levels.ladders[number].group for number in self._experts]
                stack.enter_context(without_experts(self._model, groups, self._kept))
            if halves:
                layers = self._structure.layers
                stack.enter_context(self._silencer.silenced(layers[one.layer].sublayer(one.kind) for one in halves))
            yield skip

    def _read(self, number: int, level: int) -> None:
        if level == self._now[number]:
            return
        reader, ladder = self._readers[number], self._levels.ladders[number]
        reader.weight = self._dense[number]
        if ladder.counts[level] < ladder.group.size:
            columns, weight = self._levels.read(number, level)
            reader.weight = nn.Parameter(self._dense[number].detach().clone(), requires_grad=False)
            write_columns(reader, weight.to(reader.weight.device), columns)
        self._now[number] = level

    @torch.no_grad()
    def _choose(self, number: int, level: int) -> None:
        if level == self._now[number]:
            return
        experts, ladder = self._experts[number], self._levels.ladders[number]
        experts.matrices = self._dense[number]
        self._kept.pop(ladder.group.key, None)
        if ladder.counts[level] < ladder.group.size:
            kept, matrices = self._levels.read(number, level)
            self._kept[ladder.group.key] = kept
            if matrices is not None:
                experts.matrices = nn.Parameter(self._dense[number].detach().clone(), requires_grad=False)
                experts.matrices[kept.to(experts.device)] = matrices.to(experts.device)
        self._now[number] = level

    def restore(self) -> None:
        """Puts the dense weights back."""
        for number, reader in self._readers.items():
            reader.weight = self._dense[number]
        for number, experts in self._experts.items():
            experts.matrices = self._dense[number]


@contextmanager
def assembled(
    model: PreTrainedModel, structure: ModelStructure, levels: Levels, tokens: Calibration
) -> Iterator[Assembly]:
    """The model, which other levels can be put into as long as this is open."""
    assembly = Assembly(model, structure, levels, tokens)
    try:
        yield assembly
    finally:
        assembly.restore()
