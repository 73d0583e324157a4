"""`KeptBatches`: what a dense model writes batch after batch, kept so that the next training reads it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from transformers import PreTrainedModel

from ..evaluation.results import model_fingerprint
from ..files.reading import read_text
from ..files.writing import write_text


class KeptBatches:
    """Batches in the cache of huggingface_hub (`HF_ASSETS_CACHE`), under what they depend on.

    A later call reads those that are there and goes on after them.

    Args:
        kind: Name of the folder.
        model: Who writes them.
        about: All else that they depend on, for JSON.
    """

    def __init__(self, kind: str, model: PreTrainedModel, about: Any) -> None:
        folder = cached_assets_path("hf_structprune", namespace=kind, subfolder=model_fingerprint(model))
        self.file = Path(folder) / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.jsonl"
        lines = read_text(self.file).splitlines() if self.file.is_file() else []
        self.batches: list[list[Any]] = [json.loads(line) for line in lines]

    def fill(self, write: Callable[[int], list[Any]], wanted: Callable[[], bool], seconds: float | None) -> None:
        """Writes further batches as long as they are `wanted`.

        Args:
            write: Makes the batch of a number.
            wanted: Whether one more is, by `batches`.
            seconds: Begin none after so many; one is always there.
        """
        started = time.monotonic()
        while wanted() and (seconds is None or not self.batches or time.monotonic() - started < seconds):
            self.batches.append(write(len(self.batches)))
            write_text(self.file, "".join(json.dumps(batch) + "\n" for batch in self.batches))
