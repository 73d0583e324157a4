"""What a quantisation library is given and asked for: the model before, and the contract that every method fulfils."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..evaluation.protocols import context_length
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..hardware import default_device
from ..installed import need
from ..model.loading import load_config, shapes_of
from ..text.calibration import check_token_ids, load_tokens
from .configuration import QuantizationConfig


Save = Callable[[Path], None]
# Bytes that a group of weights costs besides them: a scale and a zero point.
_GROUP_BYTES = 4
# The group sizes that kernels are written for.
_USUAL = (256, 128, 64, 32)


@dataclass(frozen=True)
class Source:
    """A model that is not quantised yet: its shapes, read from its configuration alone, before any weight is.

    Attributes:
        name: Folder or Hub id.
        shapes: The model on the meta device, in the dtype of its checkpoint.
        trust_remote_code: Whether code that comes with it may run.
    """

    name: str
    shapes: PreTrainedModel
    trust_remote_code: bool = False

    @classmethod
    def read(cls, name: str | os.PathLike, trust_remote_code: bool = False) -> Source:
        """Reads the configuration; raises a `CheckpointError` without such a model, or if it is quantised already."""
        name = str(name)
        config = load_config(name, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(f"{name} is quantised already: give the checkpoint as it was before.")
        dtype = config.dtype or torch.float32
        shapes = shapes_of(config, name, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(name, shapes, trust_remote_code)

    @property
    def folder(self) -> Path | None:
        """Where it is; `None` for one on the Hub."""
        return Path(self.name) if Path(self.name).is_dir() else None

    @property
    def public_name(self) -> str:
        """What reports call it: a Hub id or the name of a folder, never its path."""
        return self.name if self.folder is None else self.folder.absolute().name

    @property
    def per_layer(self) -> bool:
        """Whether its layers differ in width."""
        return bool(getattr(self.shapes.config, "is_heterogeneous", False))

    @property
    def parameters(self) -> int:
        """Distinct parameters."""
        return sum(p.numel() for p in self.shapes.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of all parameters in the dtype of the checkpoint."""
        return sum(p.numel() * p.element_size() for p in self.shapes.parameters())

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name and shape `(outputs, inputs)` of every linear map that is quantised: all but the head."""
        head = self.shapes.get_output_embeddings()
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.shapes.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }

    @property
    def weights(self) -> int:
        """Weights that are quantised."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def measured(self) -> dict[str, Path]:
        """The results that lie in its folder, by the state of the model that they were measured on."""
        found = {}
        for path in sorted(self.folder.glob("evaluation_results*.json")) if self.folder else []:
            state = EvaluationResult.load(path).state
            if path.name in (RESULTS_NAME, f"evaluation_results_{state}.json"):
                found.setdefault(state, path)
        return found


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
        try:
            torch.empty(0, device=config.device or "cpu")
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(
                f"`device` is {config.device!r}, which cannot be used: {str(error).splitlines()[0]}"
            ) from error

    def group_size(self, config: QuantizationConfig) -> int | None:
        """Weights that share a scale; `None` where the method has no such choice."""
        return config.group_size

    def estimate(self, source: Source, config: QuantizationConfig) -> int:
        """About how many bytes will be written."""
        rest = source.bytes - source.weights * source.shapes.dtype.itemsize
        group = self.group_size(config)
        groups = source.weights / group if group and group > 0 else sum(rows for rows, _ in source.linears.values())
        return int(rest + source.weights * config.bits / 8 + groups * _GROUP_BYTES)

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


def need_accelerator(config: QuantizationConfig, what: str, instead: str) -> None:
    """Refuses a CPU for what needs an accelerator, and says what works without one."""
    if torch.device(device_of(config)).type == "cpu":
        raise ConfigurationError(f"{what} needs an accelerator (CUDA or XPU), and the device is the CPU: {instead}.")


def check_groups(source: Source, size: int, *, whole_row: bool = True) -> None:
    """Refuses a group size that some layer's inputs are no multiple of.

    Args:
        source: The model.
        size: Weights of a row that share a scale; -1 for all of them.
        whole_row: Whether -1 is possible.

    Raises:
        ConfigurationError: Names the layer, its inputs and the sizes that divide all layers.
    """
    if size == -1 and whole_row:
        return
    for name, (_, columns) in source.linears.items():
        if size == -1 or columns % size:
            fitting = [str(n) for n in _USUAL if all(inputs % n == 0 for _, inputs in source.linears.values())]
            fitting += ["-1 (a whole row)"] if whole_row else []
            raise ConfigurationError(
                f"`group_size` is {size}, which does not divide the {columns} inputs of {name}. "
                + (f"Sizes that divide all layers: {', '.join(fitting)}." if fitting else "")
                + " `PruningConfig(align_to=...)` prunes to widths that group sizes divide."
            )


def calibration_rows(source: Source, config: QuantizationConfig, tokenizer: Any) -> torch.LongTensor:
    """Token ids of shape `(num_samples, length)` for the methods that look at activations.

    Raises:
        ConfigurationError: The sequences are longer than the model's context.
        CalibrationError: The data cannot be used.
    """
    context = context_length(source.shapes)
    if context is not None and config.calibration.length > context:
        raise ConfigurationError(
            f"`calibration.length` is {config.calibration.length}, but the model's context is {context} tokens."
        )
    tokens = load_tokens(config.calibration, tokenizer)
    check_token_ids(tokens, source.shapes.get_input_embeddings().weight.shape[0])
    return tokens
