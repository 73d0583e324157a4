"""Reports beside a checkpoint: JSON files with a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.json_files import read_json_object


def read_versioned(path: Path, version: int) -> dict[str, Any] | None:
    """The content of a report; `None` where there is no such file.

    Args:
        path: The file.
        version: The `schema_version` that can be read.

    Raises:
        CheckpointError: It cannot be read, or is of another version.
    """
    if not path.is_file():
        return None
    report = read_json_object(path)
    if report.get("schema_version") != version:
        found = report.get("schema_version")
        raise CheckpointError(f"{path} is of version {found!r}; this package reads {version}.")
    return report
