"""A teacher that ran once over the data: its most likely next tokens come from memory-mapped files.

A folder holds `cache.json` (what the cache was made of, and how many sequences are done), `keys.npy` and `lengths.npy`
(the sequences), `ids.npy` (int32, `(tokens, k)`) and `log_probs.npy` (float16, `(tokens, k + 1)`, the rest last).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import CheckpointError, ConfigurationError, PlaceError
from ...evaluation.results import model_fingerprint
from ...files.places import check_room
from ...files.writing import write_text
from ...model.measuring import positions_at_once
from ..configuration import DistillationConfig
from .losses import TopPredictions, top_predictions
from .teacher import Lesson, ModelTeacher


INDEX_NAME = "cache.json"
LOG_PROB_TYPE = np.float16
# Tokens that the teacher reads at once while the cache is made, padding included.
BATCH_TOKENS = 4096
_KEY_BYTES = 16


def sequence_key(ids: np.ndarray) -> bytes:
    """The name of a sequence: 16 bytes of a hash of its token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=_KEY_BYTES).digest()


class PredictionCache:
    """Predictions of sequences of token ids; of each, of all its tokens but the last one.

    Sequences are added in the order they were announced in; what was added before an interrupt (of the process, not of
    the power supply) is kept.

    Args:
        folder: Where it is, or will be.
        origin: What it must be made of: fingerprint of the `teacher`'s weights, `top_k` and `temperature`.
        sequences: Tokens with a prediction of each sequence that is needed, by key; a new cache holds them in this
            order.

    Raises:
        ConfigurationError: There is a cache of something else, or something that is no cache.
        CheckpointError: The disk has too little room, or files are missing.
    """

    def __init__(self, folder: str | os.PathLike, origin: dict[str, Any], sequences: dict[bytes, int]) -> None:
        self.folder, self.origin = Path(folder), {"schema_version": 1, **origin}
        if not (self.folder / INDEX_NAME).exists():
            self._create(sequences)
        try:
            index = json.loads((self.folder / INDEX_NAME).read_text(encoding="utf-8"))
            self.keys = [bytes(key) for key in np.load(self.folder / "keys.npy")]
            lengths = np.load(self.folder / "lengths.npy")
            self.done = index["done"]
            theirs = {name: index[name] for name in self.origin}
            self._ids = np.load(self.folder / "ids.npy", mmap_mode="r+")
            self._log_probs = np.load(self.folder / "log_probs.npy", mmap_mode="r+")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"The cache in {folder} cannot be read ({error}): delete it, so that it is made anew."
            ) from error
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._number = {key: number for number, key in enumerate(self.keys)}
        self._check(theirs, sequences)

    def _create(self, sequences: dict[bytes, int]) -> None:
        """Files of the final size; the index comes last, so that a folder without one is no cache yet."""
        folder, known = self.folder, {"keys.npy", "lengths.npy", "ids.npy", "log_probs.npy"}
        inside = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        # A process that was killed while it made a cache leaves some of the files.
        if folder.is_file() or any(n not in known and not n.startswith(f".{INDEX_NAME}.") for n in inside):
            raise ConfigurationError(f"`cache` is {folder}, which holds something else: give an empty or new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        tokens, top_k, item = sum(sequences.values()), self.origin["top_k"], np.dtype(LOG_PROB_TYPE).itemsize
        try:
            check_room(folder, tokens * (top_k * (4 + item) + item))
        except PlaceError as error:
            raise PlaceError(f"The cache of the teacher: {error} `top_k` is {top_k}; less needs less.") from error
        keys = np.frombuffer(b"".join(sequences), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        np.save(folder / "keys.npy", keys)
        np.save(folder / "lengths.npy", np.fromiter(sequences.values(), np.int64, len(sequences)))
        for name, dtype, width in (("ids", np.int32, top_k), ("log_probs", LOG_PROB_TYPE, top_k + 1)):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (tokens, width)).flush()
        self._write_index(0, len(sequences))

    def _write_index(self, done: int, total: int) -> None:
        index = {**self.origin, "sequences": total, "done": done}
        write_text(self.folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def _check(self, theirs: dict[str, Any], sequences: dict[bytes, int]) -> None:
        for name, value in self.origin.items():
            if theirs[name] != value:
                raise ConfigurationError(
                    f"The cache in {self.folder} was made with {name} {theirs[name]}, and now it is {value}: give "
                    "another folder as `cache`, or delete this one."
                )
        lacking = sum(key not in self._number for key in sequences)
        if lacking:
            raise ConfigurationError(
                f"The cache in {self.folder} was made of other data: {lacking} of {len(sequences)} sequences are not "
                "in it. Give another folder as `cache`, or delete this one."
            )
        if any(key not in sequences for key in self.missing):
            raise ConfigurationError(
                f"The cache in {self.folder} is not finished, and the data it was begun with is not that of now: "
                "begin with all of it, or delete the cache."
            )

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
        self._write_index(done, len(self.keys))

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


class CachedTeacher:
    """A `Teacher` without a model.

    Sequences are found by their token ids, so that shuffling, batching and padding do not matter. Examples in a
    padding-free batch count one by one, as the model sees them.
    """

    by_sequence = False
    terms = None

    def __init__(self, cache: PredictionCache) -> None:
        self.cache = cache

    def to(self, device: torch.device) -> CachedTeacher:
        """Nothing to move."""
        return self

    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """See `Teacher`.

        Raises:
            ConfigurationError: A sequence is not in the cache.
        """
        top_k = self.cache.origin["top_k"]
        ids, log_probs = [np.empty((0, top_k), np.int32)], [np.empty((0, top_k + 1), np.float32)]
        wanted = positions.cpu().numpy()
        for row, start, tokens in split_batch(inputs):
            here = np.flatnonzero(wanted[row, start : start + len(tokens)])
            if len(here):
                some_ids, some_log_probs = self.cache.read(sequence_key(tokens), here)
                ids.append(some_ids)
                log_probs.append(some_log_probs.astype(np.float32))
        values = torch.from_numpy(np.concatenate(log_probs)).to(positions.device)
        known = torch.from_numpy(np.concatenate(ids)).to(positions.device).long()
        return Lesson(TopPredictions(torch.log_softmax(values, -1), known))  # rounded on disk: adds up to 1 again


def split_batch(inputs: Mapping[str, Tensor]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Sequences of a batch that is padded on the right or padding-free: row, first position and token ids."""
    ids = inputs["input_ids"].cpu().numpy()
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    for row, length in enumerate(lengths):
        if places is None or mask is not None:
            yield row, 0, ids[row, :length]
            continue
        starts = np.flatnonzero(places[row].cpu().numpy() == 0)
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            yield row, int(start), ids[row, start:stop]


def cached_teacher(
    teacher: ModelTeacher, datasets: Iterable[Any], config: DistillationConfig, folder: str | os.PathLike
) -> CachedTeacher:
    """Lets a teacher run over the data, or reads what it said before; goes on where an interrupted process stopped.

    Args:
        teacher: Asked once for every sequence that the cache lacks.
        datasets: Tokenised rows: `input_ids`, and `seq_lengths` where a row holds several examples.
        config: `top_k` and `temperature`.
        folder: Of the cache.

    Raises:
        ConfigurationError: There is a cache of another teacher, of other settings or other data in the folder.
        CheckpointError: The disk has too little room.
    """
    sequences = {sequence_key(ids): ids for dataset in datasets for ids in _sequences_of(dataset) if len(ids) > 1}
    ordered = dict(sorted(sequences.items(), key=lambda item: (len(item[1]), item[0])))  # little padding
    top_k = min(config.top_k, teacher.model.config.get_text_config().vocab_size)
    teacher_id = model_fingerprint(teacher.model)
    origin = {"teacher": teacher_id, "top_k": top_k, "temperature": float(config.temperature)}
    cache = PredictionCache(folder, origin, {key: len(ids) - 1 for key, ids in ordered.items()})
    missing = [sequences[key] for key in cache.missing]
    with tqdm(total=len(missing), desc="Teacher", disable=not missing) as progress:
        for part in _batches(missing, 1 if teacher.by_sequence else BATCH_TOKENS):
            cache.add(_predict(teacher, part, top_k, config.temperature))
            progress.update(len(part))
    return CachedTeacher(cache)


def _sequences_of(dataset: Any) -> Iterator[np.ndarray]:
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__") or not columns or "input_ids" not in columns:
        raise ConfigurationError("`cache` needs a data set of known length with tokens in it; leave `cache` out.")
    packed = "seq_lengths" in columns
    for row in dataset.select_columns(["input_ids", "seq_lengths"] if packed else ["input_ids"]):
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        yield from np.split(ids, np.cumsum(row["seq_lengths"])[:-1]) if packed else [ids]


def _batches(sequences: list[np.ndarray], tokens: int) -> Iterator[list[np.ndarray]]:
    """Neighbours whose padded batch has at most so many tokens, and at least one each; lengths only rise."""
    part: list[np.ndarray] = []
    for ids in sequences:
        if part and (len(part) + 1) * len(ids) > tokens:
            yield part
            part = []
        part.append(ids)
    if part:
        yield part


@torch.no_grad()
def _predict(
    teacher: ModelTeacher, part: list[np.ndarray], top_k: int, temperature: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Top predictions of each sequence of a batch, a few positions at a time."""
    lengths = torch.tensor([len(tokens) for tokens in part])
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(tokens).long() for tokens in part], batch_first=True)
    places = torch.arange(ids.shape[1])
    mask, positions = places < lengths[:, None], places < lengths[:, None] - 1
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    known = teacher.lesson(inputs, positions.to(teacher.model.device)).predictions
    rows = known.hidden.split(positions_at_once(known.vocab))
    parts = [top_predictions(known.head.logits(hidden), top_k, temperature) for hidden in rows]
    counts = (lengths - 1).tolist()
    columns = (torch.cat([getattr(p, name).cpu() for p in parts]).split(counts) for name in ("ids", "log_probs"))
    for some_ids, log_probs in zip(*columns, strict=True):
        yield some_ids.numpy(), log_probs.numpy()
