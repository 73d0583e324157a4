"""Files of a teacher's most likely next tokens: memory-mapped, found by the token ids of a sequence.

A folder holds `cache.json` (what the cache was made of, and how many sequences are done), `keys.npy` and `lengths.npy`
(the sequences), `ids.npy` (int32, `(tokens, k)`) and `log_probs.npy` (float16, `(tokens, k + 1)`, the rest last).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...errors import CheckpointError, ConfigurationError, PlaceError
from ...files.places import check_room
from ...files.writing import write_text


SCHEMA_VERSION = 1
INDEX_NAME = "cache.json"
LOG_PROB_TYPE = np.float16
_KEY_BYTES = 16


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache is made of; another one needs another cache.

    Attributes:
        teacher: Fingerprint of the teacher's weights.
        top_k: Predictions kept for a token.
        temperature: Of the teacher's softmax.
    """

    teacher: str
    top_k: int
    temperature: float


def sequence_key(ids: np.ndarray) -> bytes:
    """The name of a sequence: 16 bytes of a hash of its token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=_KEY_BYTES).digest()


class PredictionCache:
    """Predictions of sequences of token ids; of each, of all its tokens but the last one.

    Made with `PredictionCache.open`. Sequences are added in the order they were announced in; what was added before an
    interrupt (of the process, not of the power supply) is kept.
    """

    def __init__(self, folder: Path, origin: CacheOrigin, keys: list[bytes], lengths: np.ndarray, done: int) -> None:
        self.folder, self.origin, self.keys, self.lengths, self.done = folder, origin, keys, lengths, done
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._number = {key: number for number, key in enumerate(keys)}
        self._ids = np.load(folder / "ids.npy", mmap_mode="r+")
        self._log_probs = np.load(folder / "log_probs.npy", mmap_mode="r+")

    @classmethod
    def open(cls, folder: str | os.PathLike, origin: CacheOrigin, sequences: dict[bytes, int]) -> PredictionCache:
        """The cache in a folder, or a new one.

        Args:
            folder: Where it is, or will be.
            origin: What it must be made of.
            sequences: Tokens with a prediction of each sequence that is needed, by key; a new cache holds them in this
                order.

        Raises:
            ConfigurationError: There is a cache of something else, or something that is no cache.
            CheckpointError: The disk has too little room, or files are missing.
        """
        folder = Path(folder)
        if not (folder / INDEX_NAME).exists():
            _create(folder, origin, sequences)
        try:
            index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
            keys = [bytes(key) for key in np.load(folder / "keys.npy")]
            lengths = np.load(folder / "lengths.npy")
            _check(folder, index, origin, set(keys), sequences)
            return cls(folder, origin, keys, lengths, index["done"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise CheckpointError(
                f"The cache in {folder} cannot be read ({error}): delete it, so that it is made anew."
            ) from error

    @property
    def missing(self) -> list[bytes]:
        """Keys of the sequences that are still to be added, in order."""
        return self.keys[self.done :]

    def add(self, predictions: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds the next sequences: `(ids (n, k), log-probabilities (n, k + 1))` of each, and says so on disk."""
        done = self.done
        for ids, log_probs in predictions:
            rows = slice(self._starts[done], self._starts[done + 1])
            self._ids[rows], self._log_probs[rows] = ids, log_probs
            done += 1
        self._ids.flush()
        self._log_probs.flush()
        self.done = done
        _write_index(self.folder, self.origin, done, len(self.keys))

    def read(self, key: bytes, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids `(n, k)` and log-probabilities `(n, k + 1)` at some positions of a sequence.

        Raises:
            ConfigurationError: The sequence is not in the cache.
        """
        number = self._number.get(key)
        if number is None or number >= self.done:
            raise ConfigurationError(
                f"A sequence is not in the cache {self.folder}: it holds the data that the trainer was made with, so "
                "give data to evaluate on to the trainer at once."
            )
        rows = self._starts[number] + positions
        return self._ids[rows], self._log_probs[rows]


def _create(folder: Path, origin: CacheOrigin, sequences: dict[bytes, int]) -> None:
    """Files of the final size; the index comes last, so that a folder without one is no cache yet."""
    known = {"keys.npy", "lengths.npy", "ids.npy", "log_probs.npy"}
    if folder.is_file() or (folder.is_dir() and any(not _is_rest(path, known) for path in folder.iterdir())):
        raise ConfigurationError(f"`cache` is {folder}, which holds something else: give an empty or new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(sequences.values())
    item = np.dtype(LOG_PROB_TYPE).itemsize
    try:
        check_room(folder, tokens * (origin.top_k * (4 + item) + item))
    except PlaceError as error:
        raise PlaceError(f"The cache of the teacher: {error} `top_k` is {origin.top_k}; less needs less.") from error
    keys = np.frombuffer(b"".join(sequences), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    np.save(folder / "keys.npy", keys)
    np.save(folder / "lengths.npy", np.fromiter(sequences.values(), np.int64, len(sequences)))
    for name, dtype, width in (("ids", np.int32, origin.top_k), ("log_probs", LOG_PROB_TYPE, origin.top_k + 1)):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (tokens, width)).flush()
    _write_index(folder, origin, 0, len(sequences))


def _is_rest(path: Path, known: set[str]) -> bool:
    """Whether a file was left by a process that was killed while it made a cache."""
    return path.name in known or path.name.startswith(f".{INDEX_NAME}.")


def _write_index(folder: Path, origin: CacheOrigin, done: int, total: int) -> None:
    index = {"schema_version": SCHEMA_VERSION, **asdict(origin), "sequences": total, "done": done}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _check(folder: Path, index: dict, origin: CacheOrigin, keys: set[bytes], sequences: dict[bytes, int]) -> None:
    for name, value in {"schema_version": SCHEMA_VERSION, **asdict(origin)}.items():
        if index[name] != value:
            raise ConfigurationError(
                f"The cache in {folder} was made with {name} {index[name]}, and now it is {value}: give another "
                "folder as `cache`, or delete this one."
            )
    lacking = sum(key not in keys for key in sequences)
    if lacking:
        raise ConfigurationError(
            f"The cache in {folder} was made of other data: {lacking} of {len(sequences)} sequences are not in it. "
            "Give another folder as `cache`, or delete this one."
        )
