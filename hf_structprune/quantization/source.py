"""The model that is to be quantised: its shapes, read from its configuration alone, before any weight is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..model.loading import load_config, shapes_of


@dataclass(frozen=True)
class Source:
    """A model that is not quantised yet.

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
        """Reads the configuration.

        Raises:
            CheckpointError: There is no such model, or it is quantised already.
        """
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
    def measured(self) -> dict[str, Path]:
        """The results that lie in its folder, by the state of the model that they were measured on."""
        found = {}
        for path in [*sorted(self.folder.glob("evaluation_results*.json"))] if self.folder else []:
            state = EvaluationResult.load(path).state
            if path.name == RESULTS_NAME or path.name == f"evaluation_results_{state}.json":
                found.setdefault(state, path)
        return found
