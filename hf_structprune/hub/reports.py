"""Reports beside a checkpoint: JSON files with a version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


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
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema_version"] == version:
            return report
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    raise CheckpointError(f"{path} is of version {report['schema_version']}; this package reads {version}.")
