"""Turns a model with cut tensors into one of the right class and configuration, and writes it as a checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .errors import CheckpointError
from .layout import Target


# Files of an earlier checkpoint that would be mistaken for part of a new one.
# What was measured on the earlier weights goes with them; the results of the dense model stay.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "modeling_structprune.py",
    "evaluation_results.json", "evaluation_results_pruned.json", "evaluation_results_recovered.json", ".eval_results",
    "pruned_widths.png", "recovery.json", "recovery.png", "quantization.json",
)  # fmt: skip


def rebuild(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """A model of the target's class with the tensors of another one; no tensor is copied.

    Args:
        model: A model whose tensors have been cut; not to be used afterwards.
        target: Class and configuration that build these shapes.

    Returns:
        The model in eval mode, on the devices of the old one.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result = assemble(target, model.state_dict(), dict(model.named_buffers()), model)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return result


def assemble(
    target: Target, state: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], like: PreTrainedModel
) -> PreTrainedModel:
    """A model of the target's class out of tensors; none is copied.

    Args:
        target: Class and configuration that build these shapes.
        state: Every parameter and saved buffer by name.
        buffers: Buffers by name, also those that are not saved.
        like: A model that lends its generation configuration, its name and its devices.

    Returns:
        The model in eval mode.
    """
    result = target.skeleton()
    result.load_state_dict(state, assign=True, strict=True)
    result.tie_weights()
    for name, buffer in list(result.named_buffers()):
        if buffer.device.type == "meta" and name in buffers:
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, buffers[name])
    result.generation_config = copy.deepcopy(like.generation_config)
    result.config.architectures = [type(result).__name__]
    result.config._name_or_path = like.config._name_or_path
    if getattr(like, "hf_device_map", None) and len(set(like.hf_device_map.values())) > 1:
        from accelerate import dispatch_model

        result = dispatch_model(result, device_map=like.hf_device_map)
    return result.eval()


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None], size: int = 0) -> None:
    """Fills a folder all at once: what is written appears only when everything has been.

    The files are made in a hidden folder beside it and moved by renaming; after an error or an interrupt the folder is
    as it was before.

    Args:
        folder: Where the files go. Other files in it stay, but an earlier checkpoint in it goes.
        write: Writes the files into the folder it is given.
        size: Bytes that will be written, to see before whether the disk has room for them.

    Raises:
        CheckpointError: There is too little room, or writing failed.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_room(folder, size)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(temporary)
        _move(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint could not be written, {folder} is unchanged: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_room(folder: Path, size: int) -> None:
    """Refuses to write more bytes than the disk of a folder has left; the folder need not exist yet.

    Raises:
        CheckpointError: There is too little room.
    """
    there = next(place for place in folder.absolute().parents if place.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise CheckpointError(f"{folder} needs {size / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left.")


def _move(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another one by renaming; other files of the old one are carried over."""
    temporary.chmod(0o777 & ~_umask())
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f"{temporary.name}.old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    new = {path.name for path in folder.iterdir()}
    for path in old.iterdir():
        if path.name not in new and not any(path.match(pattern) for pattern in _OURS):
            path.rename(folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def has_weights(model: PreTrainedModel) -> bool:
    """Whether all weights are in memory (and not on the meta device or offloaded)."""
    return all(parameter.device.type != "meta" for parameter in model.parameters())


def dense_copy(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A clean model with the weights of one that came out of a GGUF file, which Transformers would not save."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or next(model.parameters()).dtype
    config.dtype = dtype
    result = rebuild(model, Target(type(model), config))
    return result.to(dtype)
