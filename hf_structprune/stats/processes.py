"""Calibration text that is divided among processes, each of which has the whole model."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import distributed, nn
from transformers.utils import logging

from ..errors import ConfigurationError
from ..hardware import process_state


logger = logging.get_logger(__name__)

_SEEN = 64  # entries of each parameter that are compared


class Processes:
    """The processes of a run and the part of the text that this one reads; by default one, which reads all.

    What is summed or handed out is the same on every process afterwards, bit for bit.

    Args:
        several: Whether the text is divided among the processes that `accelerate launch` (or torch's launcher) began.
    """

    def __init__(self, several: bool = False) -> None:
        self.rank, self.count, self._device = 0, 1, None
        if several:
            state = process_state()
            self.rank, self.count, self._device = state.process_index, state.num_processes, state.device
            if self.count != int(os.environ.get("WORLD_SIZE", 1)):
                raise ConfigurationError(
                    f"{os.environ['WORLD_SIZE']} processes were started, but this one knows of {self.count}: make the "
                    "pruner before anything else of accelerate (`PartialState(cpu=True)` on a CPU)."
                )
            if self.count == 1:
                logger.warning(
                    "`data_parallel` is given, but this is the only process. `accelerate launch --multi_gpu` begins "
                    "several; on a CPU it begins one, and `torchrun --nproc-per-node 2` as many as it is told."
                )

    def share(self, tokens: Any, batch_size: int) -> tuple[Any, int]:
        """The sequences that this process reads, whole batches that follow each other, and the number of the first.

        Raises:
            ConfigurationError: There are fewer batches than processes.
        """
        if self.count == 1:
            return tokens, 0
        batches = -(-len(tokens) // batch_size)
        if batches < self.count:
            raise ConfigurationError(
                f"{len(tokens)} calibration sequences in batches of {batch_size} are {batches} for {self.count} "
                "processes: lower `batch_size` of the calibration, or start fewer."
            )
        first, last = (batches * rank // self.count * batch_size for rank in (self.rank, self.rank + 1))
        return tokens[first:last], first

    def add(self, tensor: torch.Tensor) -> None:
        """Adds what the other processes have in this tensor, in place."""
        self._with(tensor, distributed.all_reduce)

    def first(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        """So many rows, the first among those of all processes; each gives those that it has, first of them first."""
        if self.count == 1:
            return rows[:number]
        counts = torch.zeros(self.count, dtype=torch.long)
        counts[self.rank] = len(rows)
        self.add(counts)
        start = int(counts[: self.rank].sum())
        found, mine = rows.new_zeros(number, *rows.shape[1:]), rows[: max(0, number - start)]
        found[start : start + len(mine)] = mine
        self.add(found)  # of zeros and one row each
        return found

    def take_first(self, tensor: torch.Tensor) -> None:
        """Replaces a tensor by that of the first process, in place."""
        self._with(tensor, lambda one: distributed.broadcast(one, 0))

    def _with(self, tensor: torch.Tensor, run: Any) -> None:
        if self.count > 1:
            here = tensor.detach()
            there = here.to(self._device).contiguous()
            run(there)
            if there is not here:
                here.copy_(there)

    def agree(self, value: bool | float) -> float:
        """What the first process says."""
        said = torch.tensor(float(value), dtype=torch.float64)
        self.take_first(said)
        return float(said)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def check_same(self, model: nn.Module, tokens: torch.Tensor, **about: Any) -> None:
        """Compares what the processes were given: models (the beginning of every tensor), text, and values as JSON.

        Raises:
            ConfigurationError: On every process, if one of them was given something else.
        """
        if self.count == 1:
            return
        found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for name, tensor in model.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.flatten()[:_SEEN].double().cpu().numpy().tobytes())
        found.update(tokens.cpu().numpy().tobytes())
        mine = torch.tensor(list(found.digest()[:6]), dtype=torch.float64)
        theirs = mine.clone()
        self.take_first(theirs)
        different = torch.tensor(float(not torch.equal(mine, theirs)))
        self.add(different)
        if different:
            raise ConfigurationError(
                f"{int(different)} of {self.count} processes were given another model, another text or other options "
                "than the first: all of them must load the same."
            )
