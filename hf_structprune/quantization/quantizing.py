"""`quantize`: a model in fewer bits, by a library of the field, as a checkpoint that Transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import set_seed
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError
from ..files.places import check_room
from ..files.writing import check_folder, write_folder, write_text
from ..hardware import free_memory
from ..hub.card import CARD_NAME
from ..hub.checkpoint import STILL_TRUE, check_card, check_own_files, copy_files, is_pruned, read_text, write_card_from
from ..hub.origin import public_config
from ..hub.reports import PICTURE_NAME, QUANTIZATION_NAME, RECOVERY_NAME, SCHEMA_VERSION
from ..installed import versions
from ..model.loading import load_tokenizer
from .backend import Backend, Save, Source, device_of
from .configuration import QuantizationConfig
from .methods import BACKENDS


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
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigurationError(f"{folder} is not empty; choose another `output_dir` or say `overwrite`.")
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
    return QuantizationResult(folder, _save(save, folder, source, backend, config, tokenizer))


def _check_room(source: Source, backend: Backend, config: QuantizationConfig, folder: Path) -> None:
    """Refuses a model that does not fit on the disk, or in memory while it is quantised."""
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


def _save(
    save: Save, folder: Path, source: Source, backend: Backend, config: QuantizationConfig, tokenizer: Any
) -> dict[str, Any]:
    """Writes a quantised model as its library saves it (`save`), all at once or not at all; gives `quantization.json`.

    From the folder of the model before come how it was pruned and recovered, and what was measured on it, under the
    name of its state: `evaluation_results_pruned.json`. Nothing measured on other weights is passed off as measured on
    these. Other files in the folder stay, an earlier checkpoint in it goes.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "method": config.method,
        "bits": config.bits,
        "group_size": backend.group_size(config),
        "configuration": public_config(config).to_dict(),
        "model": source.public_name,
        "versions": {**versions(), **{library: version(library) for library in backend.libraries}},
        "weights": {"parameters": source.parameters, "bytes": None, "bytes_before": source.bytes},
        "notes": backend.notes(source, config),
    }
    previous = read_text(folder / CARD_NAME)

    def write(path: Path) -> None:
        save(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        report["weights"]["bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        write_text(path / QUANTIZATION_NAME, json.dumps(report, indent=1) + "\n")
        if source.folder is None:
            return
        for state, results in source.measured.items():
            shutil.copyfile(results, path / f"evaluation_results_{state}.json")
        if is_pruned(source.folder):  # quantising changes neither how it was pruned nor what training did before
            copy_files(source.folder, path, (*STILL_TRUE, RECOVERY_NAME, PICTURE_NAME))
            write_card_from(source.folder, path, folder, previous)

    write_folder(folder, write, size=backend.estimate(source, config))
    return report
