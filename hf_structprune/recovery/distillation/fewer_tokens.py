"""Batches of a student with fewer tokens, as the dense model reads them: the same text in its own tokens.

The dense model has learned to expect its own tokens, not what spells one that the student lacks. So it reads what its
own tokenizer makes of each example, and what it says at the end of one of its tokens is what the student follows at
the end of the same token, and while it spells the next one (see `vocabulary.relating`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...vocabulary.aligning import Reader, Reading
from .losses import Targets


@dataclass(frozen=True)
class DenseBatch:
    """A batch `(batch, sequence)` of a student as the dense model reads it.

    Attributes:
        inputs: What the dense model is given; without padding between examples if the student's batch has none.
        rows: At each position of the student, the place among all tokens of the dense model, padding left out, that
            tells what comes next.
        prefixes: What of the next dense token has been read there, see `TokenMap`.
        ends: Whether a dense token ends there.
    """

    inputs: dict[str, Any]
    rows: Tensor
    prefixes: Tensor
    ends: Tensor

    def at(self, output: Tensor, positions: Tensor) -> Tensor:
        """What an output `(batch, sequence, ...)` of the dense model has for positions of bool of the student."""
        mask = self.inputs.get("attention_mask")
        tokens = output.flatten(0, 1) if mask is None else output[mask.bool().to(output.device)]
        return tokens[self.rows[positions].to(output.device)]


def read_as_dense(reader: Reader, inputs: Mapping[str, Any]) -> DenseBatch:
    """What a dense model reads in place of a batch."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    shape, rows_of_examples, before = inputs["input_ids"].shape, [], 0
    rows, prefixes = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    ends = torch.zeros(shape, dtype=torch.bool)
    for row, places, reading in _readings(reader, inputs):
        rows[row, places] = torch.tensor(reading.rows) + before
        prefixes[row, places], ends[row, places] = torch.tensor(reading.prefixes), torch.tensor(reading.ends)
        before += len(reading.ids)
        rows_of_examples.append({"input_ids": reading.ids})
    # As the student's batch was made: with all that layers need to keep packed examples apart.
    packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
    made = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)(rows_of_examples)
    made.pop("labels")
    return DenseBatch(made, rows, prefixes, ends)


def known_targets(targets: Targets, reader: Reader, inputs: Mapping[str, Any]) -> Targets:
    """The targets without following the dense model where it does not say what comes next, see `Reading`."""
    known = torch.zeros(targets.followed.shape, dtype=torch.bool)
    for row, places, reading in _readings(reader, inputs):
        known[row, places] = torch.tensor(reading.known)
    return dataclasses.replace(targets, followed=targets.followed & known.to(targets.followed.device))


def _readings(reader: Reader, inputs: Mapping[str, Any]) -> Iterator[tuple[int, slice, Reading]]:
    """The examples of a batch: row, places in it, and how the dense model reads them."""
    for row, start, ids in split_batch(inputs):
        if len(ids):
            yield row, slice(start, start + len(ids)), reader.read(tuple(ids.tolist()))


def split_batch(inputs: Mapping[str, Tensor]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Sequences of a batch that is padded on the right or padding-free: row, first position and token ids."""
    ids = inputs["input_ids"].cpu().numpy()
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    for row, length in enumerate(lengths):
        starts = [0]
        if places is not None and mask is None:
            starts = np.flatnonzero(places[row].cpu().numpy() == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            yield row, start, ids[row, start:stop]
