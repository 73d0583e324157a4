"""What a quantisation library has to be asked for: the contract that every file of a method fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from ..extras import need
from ..hardware import default_device
from .configuration import QuantizationConfig
from .source import Source


Save = Callable[[Path], None]
# Bytes that a group of weights costs besides them: a scale and a zero point.
_GROUP_BYTES = 4


class Backend(ABC):
    """A method of quantisation.

    Attributes:
        packages: What has to be installed, by the names that are imported.
        libraries: Distributions whose versions are reported.
        extra: The extra of this package that installs them.
        on_device: Whether the whole model is put on the device; else on the CPU, and the device gets parts of it.
    """

    packages: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    extra: str = ""
    on_device: bool = False

    def check(self, source: Source, config: QuantizationConfig) -> None:
        """Refuses everything that can be refused before a weight is read.

        Raises:
            StructPruneError: A package is missing, or the model, the settings and the device do not fit each other.
        """
        need(*self.packages, extra=self.extra)
        check_device(config.device)

    def group_size(self, config: QuantizationConfig) -> int | None:
        """Weights that share a scale; `None` where the method has no such choice."""
        return config.group_size

    def estimate(self, source: Source, config: QuantizationConfig) -> int:
        """About how many bytes will be written."""
        weights = sum(rows * columns for rows, columns in source.linears.values())
        rest = source.bytes - weights * source.shapes.dtype.itemsize
        group = self.group_size(config)
        groups = weights / group if group and group > 0 else sum(rows for rows, _ in source.linears.values())
        return int(rest + weights * config.bits / 8 + groups * _GROUP_BYTES)

    def memory(self, source: Source, config: QuantizationConfig) -> int:
        """About how many bytes the weights take at most, where the model is."""
        return source.bytes

    def notes(self, source: Source, config: QuantizationConfig) -> list[str]:
        """What a user of the result has to know."""
        return []

    @abstractmethod
    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        """Quantises the model; gives what writes it into a folder, as the library itself saves it."""


def device_of(config: QuantizationConfig) -> str:
    """The device that is computed on."""
    return config.device or default_device()


def check_device(name: str | None) -> None:
    """Refuses a device that does not exist here."""
    try:
        torch.empty(0, device=name or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"`device` is {name!r}, which cannot be used: {str(error).splitlines()[0]}"
        ) from error


def need_accelerator(config: QuantizationConfig, what: str, instead: str) -> None:
    """Refuses a CPU.

    Args:
        config: The settings.
        what: What needs an accelerator.
        instead: What works without one.
    """
    if torch.device(device_of(config)).type == "cpu":
        raise ConfigurationError(f"{what} needs an accelerator (CUDA or XPU), and the device is the CPU: {instead}.")
