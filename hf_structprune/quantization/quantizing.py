"""`quantize`: a model in fewer bits, by a library of the field, as a checkpoint that Transformers loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import set_seed
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError
from ..files.folders import check_folder
from ..files.places import check_room
from ..hardware import free_memory
from ..hub.own_files import check_card, check_own_files
from ..model.loading import load_tokenizer
from .backend import Backend, device_of
from .backends import BACKENDS
from .configuration import QuantizationConfig
from .save import save_quantised
from .source import Source


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class QuantizationResult:
    """What `quantize` did.

    Attributes:
        folder: The quantised checkpoint.
        report: What `quantization.json` in it says: the method, the settings, bytes before and after.
    """

    folder: Path
    report: dict[str, Any]


def quantize(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    config: QuantizationConfig | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> QuantizationResult:
    """Quantises a checkpoint, pruned by this package or not, and saves it as its library does.

    `AutoModelForCausalLM.from_pretrained` loads the result where the library is installed; checkpoints whose layers
    differ in width need `import hf_structprune` or `trust_remote_code=True` as before.

    Args:
        model: Folder or Hub id.
        output_dir: Folder of the quantised checkpoint.
        config: How to quantise. Default: bitsandbytes, nf4.
        overwrite: Replace what is in `output_dir`.
        trust_remote_code: Run modelling code that comes with the model.

    Raises:
        ConfigurationError: The settings, the model and the device do not fit each other, or there is something in
            `output_dir`.
        CheckpointError: The model or a file beside it cannot be read, it is quantised already, or there is too little
            memory or disk.
        StructPruneError: A package is missing.
    """
    check_folder(output_dir)
    config, folder = config or QuantizationConfig(), Path(output_dir)
    _check_folder(folder, overwrite)
    backend, source = BACKENDS[config.method], Source.read(model, trust_remote_code)
    backend.check(source, config)
    if source.folder is not None:
        check_own_files(source.folder)
    check_card(folder)
    _check_room(source, backend, config, folder)
    for note in backend.notes(source, config):
        logger.warning(note)
    set_seed(config.seed)
    tokenizer = load_tokenizer(source.name, trust_remote_code=trust_remote_code)
    save = backend.run(source, config, tokenizer)
    return QuantizationResult(folder, save_quantised(save, folder, source, backend, config, tokenizer))


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigurationError(f"{folder} is not empty; choose another `output_dir` or say `overwrite`.")


def _check_room(source: Source, backend: Backend, config: QuantizationConfig, folder: Path) -> None:
    """Refuses a model that does not fit on the disk, or in memory while it is quantised.

    Raises:
        CheckpointError: There is too little memory or disk.
    """
    check_room(folder, backend.estimate(source, config))
    device = torch.device(device_of(config))
    where, free = f"of {device}", free_memory(device) if backend.on_device else None
    if free is None:
        where, free = "of this machine", psutil.virtual_memory().available
    needed = backend.memory(source, config)
    if needed > free:
        raise CheckpointError(
            f"{source.name} needs about {needed / 1e9:.2f} GB to be quantised by {config.method}, but "
            f"{free / 1e9:.2f} GB of the memory {where} are free: quantise it on a larger one."
        )
