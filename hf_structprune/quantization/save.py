"""Writes a quantised checkpoint, with what of the model before it is still true, all at once."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files.folders import write_folder
from ..files.writing import write_text
from ..hub.card import CARD_NAME
from ..hub.carrying import STILL_TRUE, copy_files, is_pruned, read, write_card_from
from ..hub.origin import public_config, versions
from ..hub.quantization import QUANTIZATION_NAME, SCHEMA_VERSION
from ..hub.recovery import PICTURE_NAME, RECOVERY_NAME
from .backend import Backend, Save
from .configuration import QuantizationConfig
from .source import Source


# Quantising changes neither what training did before it.
_TRAINING = (RECOVERY_NAME, PICTURE_NAME)


def save_quantised(
    save: Save, folder: Path, source: Source, backend: Backend, config: QuantizationConfig, tokenizer: Any
) -> dict[str, Any]:
    """Writes a quantised model as its library saves it, all at once or not at all.

    From the folder of the model before come how it was pruned and recovered, and what was measured on it, under the
    name of its state: `evaluation_results_pruned.json`. Nothing measured on other weights is passed off as measured on
    these.

    Args:
        save: Writes weights and configuration into the folder that it is given.
        folder: Where the files go; other files in it stay, an earlier checkpoint in it goes.
        source: The model before.
        backend: What quantised it.
        config: How.
        tokenizer: Its tokenizer; `None` if there is none.

    Returns:
        The content of `quantization.json`.

    Raises:
        CheckpointError: Writing failed.
    """
    report = _report(source, backend, config)
    previous = read(folder / CARD_NAME)

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
        if is_pruned(source.folder):
            copy_files(source.folder, path, (*STILL_TRUE, *_TRAINING))
            write_card_from(source.folder, path, folder, previous)

    write_folder(folder, write, size=backend.estimate(source, config))
    return report


def _report(source: Source, backend: Backend, config: QuantizationConfig) -> dict[str, Any]:
    return {
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
