"""Weights that are written while they come, as a checkpoint of several safetensors files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


LEAST = 2**28  # bytes that are collected before a file is written


class Shards:
    """Files of weights that grow in one folder and get their names in another.

    Args:
        folder: Where the files are made; it is there.
        least: Bytes that a file has at least, but for the last one.
    """

    def __init__(self, folder: Path, least: int = LEAST) -> None:
        self.folder, self._least = folder, least
        self.written: list[list[tuple[str, int]]] = []  # names and bytes of the tensors of each file
        self._waiting: dict[str, torch.Tensor] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes tensors by the names they are stored under; they are in memory until a file is full of them."""
        self._waiting |= tensors
        if sum(map(_size, self._waiting.values())) >= self._least:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting to a file."""
        if self._waiting:
            tensors = {name: tensor.contiguous() for name, tensor in self._waiting.items()}
            save_file(tensors, self.path(len(self.written)), metadata={"format": "pt"})
            self.written.append([(name, _size(tensor)) for name, tensor in tensors.items()])
            self._waiting = {}

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def finish(self, folder: Path, parameters: int) -> None:
        """Gives all files, and an index if there are several, the names of a checkpoint in another folder.

        Args:
            folder: In the same file system; files have a second name there, or else are copied.
            parameters: Their number, for the index.
        """
        self.flush()
        count, names = len(self.written), {}
        stem, ending = SAFE_WEIGHTS_NAME.split(".")
        (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        for number, tensors in enumerate(self.written):
            name = SAFE_WEIGHTS_NAME if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.{ending}"
            names |= dict.fromkeys((tensor for tensor, _ in tensors), name)
            try:
                os.link(self.path(number), folder / name)
            except OSError:
                shutil.copyfile(self.path(number), folder / name)
        if count > 1:
            total = sum(size for tensors in self.written for _, size in tensors)
            index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": names}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
