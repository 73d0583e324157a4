"""What a dense model writes batch after batch: how much at once, and kept so that the next training reads it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import cached_assets_path
from transformers import PreTrainedModel

from ..evaluation.results import model_fingerprint
from ..files.reading import read_text
from ..files.writing import write_text


FEWEST, MOST = 16, 64  # sequences that are written at once
CACHE = 2**30  # bytes of keys and values
SHORTEST = 30.0  # seconds that a batch gets at least, whatever time is left
CUT = '"cut"'  # the line behind a batch that time has ended


def batch_of(model: PreTrainedModel, length: int) -> int:
    """How many sequences of so many tokens a model writes at once.

    The more, the less each costs. As many as `CACHE` bytes hold the keys and values of: by the configuration and not
    by what is free, so that batches are the same anywhere.
    """
    config = model.config.get_text_config()
    layers, heads, hidden, kv_heads, head_dim = (
        value if isinstance(value := getattr(config, name, None), int) else 0  # lists, of layers that differ
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
    )
    width = (head_dim or hidden // max(1, heads)) * (kv_heads or heads or 1)
    each = 2 * layers * width * model.dtype.itemsize * length
    if not each:
        return FEWEST
    return max(FEWEST, min(MOST, CACHE // each))


def batch_seed(seed: int, number: int) -> int:
    """A seed of a batch alone: two seeds have no batch in common, also if they are neighbours."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


Write = Callable[[int, float | None], list[Any]]


def until_then(until: float | None) -> dict[str, float]:
    """The option of `generate` that ends it at a time, by `time.monotonic`: after one token where that is over."""
    return {} if until is None else {"max_time": max(until - time.monotonic(), 0.0)}


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
        self.cut = lines[-1:] == [CUT]
        self.batches: list[list[Any]] = [json.loads(line) for line in lines if line != CUT]

    def fill(self, write: Write, wanted: Callable[[], bool], seconds: float | None) -> None:
        """Writes further batches as long as they are `wanted`.

        Args:
            write: Makes the batch of a number until a time, by `time.monotonic`: what is not written by then is left
                out. Such a batch is written anew by the next training, unless that has 0 seconds: it goes on with one.
            wanted: Whether one more is, by `batches`.
            seconds: Begin none after so many, and end the one that is written then, unless it had less than `SHORTEST`
                seconds; one is always begun.
        """
        if self.cut and seconds != 0:
            self.batches.pop()
        end = None if seconds is None else time.monotonic() + seconds
        while wanted() and (end is None or not self.batches or time.monotonic() < end):
            until = None if end is None else max(end, time.monotonic() + SHORTEST)
            self.batches.append(write(len(self.batches), until))
            self.cut = until is not None and time.monotonic() > until
            lines = [*map(json.dumps, self.batches), *([CUT] if self.cut else [])]
            write_text(self.file, "".join(f"{line}\n" for line in lines))
