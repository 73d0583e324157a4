"""Room for tensors that may be larger than memory: files that are mapped into it, and that nobody has to remove."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from transformers.utils import logging

from ..checks import Limits, check_fields
from ..errors import ConfigurationError, PlaceError
from ..hardware import memory_left


logger = logging.get_logger(__name__)


def on_disk(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor with any content whose memory is a file without a name: it goes with the tensor, also after a kill.

    Args:
        folder: Its disk has the file.

    Raises:
        PlaceError: There is no room on the disk.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when a page is written
                os.posix_fallocate(file.fileno(), 0, size)
            block = np.memmap(file, np.uint8, "r+", shape=(size,))
    except OSError as error:
        raise PlaceError(f"Hidden states cannot be kept in {folder}: {error.strerror}.") from error
    return torch.from_numpy(block).view(dtype).view(shape)


def in_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor with any content in the machine's memory, which goes to a device and back again and again.

    For CUDA its pages are pinned, so that they are copied without a detour; where the system does not allow that, they
    are not, which is slower and no more.
    """
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            logger.warning("Hidden states are not pinned in memory: %s", str(error).splitlines()[0])
    return torch.empty(shape, dtype=dtype)


def room_needed(size: int, device: torch.device | None) -> int:
    """Bytes of memory that so many bytes of hidden states take: of what is pinned torch takes powers of two."""
    return 1 << max(0, size - 1).bit_length() if device is not None and device.type == "cuda" else size


@dataclass(frozen=True)
class Spill:
    """When the hidden states of text that goes through layers in turns are kept on disk, which changes no result.

    Args:
        above: MB that they may take in memory. Default: a quarter of what is free.
        folder: The place on disk. Default: that of the result, or else the system's for temporary files.
    """

    above: Annotated[float, Limits(0)] | None = None
    folder: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigurationError(f"`folder` for hidden states is {str(self.folder)!r}, which is not there.")

    def place(self, size: int, default: Path) -> Path | None:
        """Where so many bytes of hidden states are kept; `None` is memory."""
        limit = memory_left() / 4 if self.above is None else self.above * 1e6
        return None if size <= limit else Path(self.folder or default)
