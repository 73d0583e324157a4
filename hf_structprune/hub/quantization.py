"""The report beside a quantised checkpoint: `quantization.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


QUANTIZATION_NAME = "quantization.json"
SCHEMA_VERSION = 1


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """The `quantization.json` of a folder; `None` where there is none.

    Raises:
        CheckpointError: It cannot be read, or is of another version.
    """
    path = folder / QUANTIZATION_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        version = report["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path} is of version {version}; this package reads {SCHEMA_VERSION}.")
    return report
