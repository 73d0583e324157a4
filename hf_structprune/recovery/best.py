"""`BestWeights`: the trained weights of the best measurement, on disk, and back into the model."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError
from .wrappers import without_parallel


BEST_FOLDER = "recovery_best"
WEIGHTS_NAME = "weights.safetensors"


class BestWeights:
    """One safetensors file with the parameters that are trained, replaced whenever there is something better.

    Args:
        folder: Where the file is.
        writes: Whether this process writes; the others only take part in collecting what is spread over all.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS_NAME

    @property
    def step(self) -> int | None:
        """The step the file is of, `None` without one."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, "pt") as file:
            return int(file.metadata()["step"])

    def keep(self, model: nn.Module, step: int) -> None:
        """Writes the weights, all at once: an interrupt leaves the earlier ones.

        Args:
            model: The model in training.
            step: Steps done; it goes into the file.

        Raises:
            CheckpointError: The file cannot be written.
        """
        weights = _collect(without_parallel(model))
        if self.writes:
            _replace(self.path, lambda path: save_file(weights, path, {"format": "pt", "step": str(step)}))

    def restore(self, model: nn.Module) -> None:
        """Puts the weights of the file back into the model, on all processes.

        Raises:
            CheckpointError: There is no such file, or it is of another model.
        """
        model, weights = without_parallel(model), {}
        if self.writes:
            try:
                with safe_open(self.path, "pt") as file:
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"The best weights cannot be read from {self.path}: {error}") from error
        _put_back(model, weights, self.writes)

    def copy_to(self, path: Path) -> None:
        """A copy of the file, which later writing leaves alone; takes no room where the disk knows links."""
        if self.writes:
            _link(self.path, path)

    def take_from(self, path: Path) -> None:
        """Puts a copy made by `copy_to` in the place of the file."""
        if self.writes:
            _link(path, self.path)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _collect(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters in main memory, whole ones of those that are sharded."""
    weights = {}
    for name, parameter in _trained(model).items():
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        weights[name] = whole.to("cpu", copy=True).contiguous()
    return weights


@torch.no_grad()
def _put_back(model: nn.Module, weights: dict[str, torch.Tensor], has_weights: bool) -> None:
    """Writes the tensors of the first process into the parameters of all."""
    trained = _trained(model)
    if has_weights and trained.keys() != weights.keys():
        odd = sorted(trained.keys() ^ weights.keys())
        raise CheckpointError(f"The best weights are of another model: {', '.join(odd[:5])} are in one of the two.")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, parameter in trained.items():
        if isinstance(parameter, DTensor):
            whole = weights[name] if has_weights else torch.empty(parameter.shape, dtype=parameter.dtype)
            whole = whole.to(parameter.device_mesh.device_type)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
            continue
        if has_weights:
            parameter.copy_(weights[name])
        if several:
            torch.distributed.broadcast(parameter.data, 0)


def _link(source: Path, path: Path) -> None:
    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, temporary)

    _replace(path, write)


def _replace(path: Path, write) -> None:
    """Writes a file beside the one it then replaces; what an earlier interrupt left there is overwritten."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The best weights cannot be written to {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
