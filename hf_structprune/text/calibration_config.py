"""`CalibrationConfig`: which text the statistics are computed on."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from ..checks import Count, Limits, Number, check_fields, check_keys
from ..errors import ConfigurationError


@dataclass
class CalibrationConfig:
    """Which text the statistics are computed on. The default is a small sample that travels with the package.

    Args:
        dataset (`str` or list of `str`, *optional*):
            A `.txt`, `.jsonl` or `.json` file, a folder made by `datasets.save_to_disk` or a dataset id of the Hub. A
            list mixes several sources in equal shares, interleaved. `None` is the packaged sample (half Wikipedia
            articles, half web pages; English).
        name (`str`, *optional*): Configuration name of a Hub dataset, for example `"wikitext-2-raw-v1"`.
        split (`str`): Split of a dataset.
        column (`str`): Column of a dataset or key of a JSONL row; a text, or chat messages with `chat_template`.
        texts (list of `str`, *optional*): Texts given in memory instead of a dataset.
        tokens (`torch.Tensor`, *optional*): Token ids of shape `(num_samples, length)` given in memory.
        num_samples (`int`): Number of sequences.
        length (`int`): Tokens in a sequence. Sequences are full: no padding is ever calibrated on.
        batch_size (`int`): Sequences that go through the model at once.
        seed (`int`): Seed of the draw of documents.
        chat_template (`bool`): Render rows that are lists of chat messages (or plain texts, as one user turn) with
            the tokenizer's chat template.
    """

    dataset: str | list[str] | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    texts: list[Any] | None = None
    tokens: Any = None
    num_samples: Count = 128
    length: Annotated[int, Limits(2)] = 256
    batch_size: Count = 8
    seed: Number = 0
    chat_template: bool = False
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise ConfigurationError("`texts` is one string; it must be a list of strings. Use `dataset` for a file.")
        check_fields(self)
        given = [n for n in ("dataset", "texts", "tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"`{given[0]}` and `{given[1]}` both give calibration data; give one of them.")
        if self.texts is not None:
            self.fingerprint = hashlib.sha256("\0".join(map(str, self.texts)).encode()).hexdigest()[:16]
        if self.tokens is not None:
            if getattr(self.tokens, "ndim", None) != 2 or self.tokens.dtype.is_floating_point:
                raise ConfigurationError("`tokens` must be an integer tensor of shape (num_samples, length).")
            self.num_samples, self.length = self.tokens.shape
            self.fingerprint = hashlib.sha256(self.tokens.cpu().numpy().tobytes()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Values that fit in JSON; data given in memory is represented by its `fingerprint` only."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "texts": None, "tokens": None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibrationConfig:
        check_keys(cls, values)
        return cls(**values)
