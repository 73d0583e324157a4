"""What an export gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Exported:
    """A model in another format.

    Args:
        path: The file or folder.
        size: Bytes on disk.
        details: What else is worth knowing, as JSON takes it.
        notes: Sentences for people: what came out otherwise than asked, and why.
    """

    path: Path
    size: int
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
