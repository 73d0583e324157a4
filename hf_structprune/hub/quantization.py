"""The report beside a quantised checkpoint: `quantization.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .reports import read_versioned


QUANTIZATION_NAME = "quantization.json"
SCHEMA_VERSION = 1


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """The `quantization.json` of a folder; `None` where there is none.

    Raises:
        CheckpointError: It cannot be read, or is of another version.
    """
    return read_versioned(folder / QUANTIZATION_NAME, SCHEMA_VERSION)
