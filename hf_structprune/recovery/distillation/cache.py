"""A teacher that ran once over the data: its most likely next tokens come from safetensors files.

A folder holds `cache.json`, what it was made of, and parts: `keys` of the sequences
(sequences, 16), their `lengths` (sequences), `ids` (tokens, k) and `log_probs` (tokens, k + 1), the rest last.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import CheckpointError, ConfigurationError, PlaceError
from ...evaluation.results import model_fingerprint
from ...files.reading import read_json_object
from ...files.writing import appearing, check_room, write_text
from ...model.measuring import positions_at_once
from ..configuration import DistillationConfig
from .losses import TopPredictions, top_predictions
from .teacher import Lesson, ModelTeacher


INDEX_NAME = "cache.json"
LOG_PROB_TYPE = torch.float16
BATCH_TOKENS = 2**12  # that the teacher reads at once while the cache is made, padding included
PART_TOKENS = 2**16  # in a file, at least; an interrupt loses no more


def sequence_key(ids: np.ndarray) -> bytes:
    """The name of a sequence: 16 bytes of a hash of its token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


class CachedTeacher:
    """A teacher without a model: predictions of sequences of token ids; of each, of all its tokens but the last one.

    Sequences are found by their token ids, so that shuffling, batching and padding do not matter; the examples in a
    padding-free batch count one by one.

    Args:
        folder: Where the predictions are, or will be.
        origin: What they must be made of: fingerprint of the `teacher`'s weights, `top_k` and `temperature`.

    Raises:
        ConfigurationError: There are those of something else, or something that is no cache.
        CheckpointError: A file cannot be read.
    """

    by_sequence, terms = False, None

    def __init__(self, folder: str | os.PathLike, origin: dict[str, Any]) -> None:
        self.folder, self.origin = Path(folder), {"schema_version": 2, **origin}
        inside = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if self.folder.is_file() or (inside and INDEX_NAME not in inside):
            raise ConfigurationError(f"`cache` is {folder}, which holds something else: give an empty or new folder.")
        if not inside:
            write_text(self.folder / INDEX_NAME, json.dumps(self.origin, indent=2) + "\n")
        found = read_json_object(self.folder / INDEX_NAME)
        for name, value in self.origin.items():
            if found.get(name) != value:
                raise ConfigurationError(
                    f"The cache in {folder} was made with {name} {found.get(name)}, and now it is {value}: give "
                    "another folder as `cache`, or delete this one."
                )
        self._places: dict[bytes, tuple[Any, int]] = {}  # file and first row of every sequence
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): delete it, so that it is made anew.") from error
        for key, start in zip(keys, (lengths.cumsum(0) - lengths).tolist(), strict=True):
            self._places[key.numpy().tobytes()] = file, start

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, predictions: dict[bytes, tuple[Tensor, Tensor]]) -> None:
        """Adds a part: ids `(n, k)` and log-probabilities `(n, k + 1)` of sequences, all at once or not at all."""
        ids, log_probs = zip(*predictions.values(), strict=True)
        content = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(predictions), np.uint8).reshape(-1, 16).copy()),
            "lengths": torch.tensor([len(one) for one in ids]),
            "ids": torch.cat(ids).int(), "log_probs": torch.cat(log_probs).to(LOG_PROB_TYPE),
        }  # fmt: skip
        path = self.folder / f"{len(self._places):09}.safetensors"
        with appearing(path) as temporary:
            save_file(content, temporary)
        self._open(path)

    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """What the teacher predicted at positions `(batch, sequence)` of bool; all sequences must be there."""
        top_k, wanted = self.origin["top_k"], positions.cpu()
        ids, log_probs = [torch.empty(0, top_k, dtype=torch.int32)], [torch.empty(0, top_k + 1)]
        for row, start, tokens in split_batch(inputs):
            here = wanted[row, start : start + len(tokens)].nonzero()[:, 0]
            if not len(here):
                continue
            file, first = self._places.get(sequence_key(tokens), (None, 0))
            if file is None:
                raise ConfigurationError(
                    f"A sequence is not in the cache {self.folder}: it holds the data that the trainer was made with, "
                    "so give data to evaluate on to the trainer at once."
                )
            rows = slice(first, first + len(tokens) - 1)
            ids.append(file.get_slice("ids")[rows][here])
            log_probs.append(file.get_slice("log_probs")[rows][here].float())
        known, values = torch.cat(ids).long(), torch.cat(log_probs).log_softmax(-1)  # rounded: adds up to 1 again
        return Lesson(TopPredictions(values.to(positions.device), known.to(positions.device)))


def split_batch(inputs: Mapping[str, Tensor]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Sequences of a batch that is padded on the right or padding-free: row, first position and token ids."""
    ids = inputs["input_ids"].cpu().numpy()
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    for row, length in enumerate(lengths):
        starts = [0]
        if places is not None and mask is None:
            starts = np.flatnonzero(places[row].cpu().numpy() == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            yield row, start, ids[row, start:stop]


def cached_teacher(
    teacher: ModelTeacher, datasets: Iterable[Any], config: DistillationConfig, folder: str | os.PathLike
) -> CachedTeacher:
    """Lets a teacher run over the data, or reads what it said before; only what is not there yet is asked for.

    Args:
        teacher: Asked once for every sequence that the cache lacks.
        datasets: Tokenised rows: `input_ids`, and `seq_lengths` where a row holds several examples.
        config: `top_k` and `temperature`.
        folder: Of the cache.

    Raises:
        ConfigurationError: There is a cache of another teacher or of other settings in the folder.
        CheckpointError: The disk has too little room.
    """
    top_k = min(config.top_k, teacher.model.config.get_text_config().vocab_size)
    origin = {"teacher": model_fingerprint(teacher.model), "top_k": top_k, "temperature": float(config.temperature)}
    sequences = {sequence_key(ids): ids for dataset in datasets for ids in _sequences_of(dataset) if len(ids) > 1}
    cache = CachedTeacher(folder, origin)
    missing = [key for key in sequences if key not in cache]
    missing.sort(key=lambda key: (len(sequences[key]), key))  # little padding
    try:
        check_room(folder, sum(len(sequences[key]) - 1 for key in missing) * (6 * top_k + 2))
    except PlaceError as error:
        raise PlaceError(f"The cache of the teacher: {error} `top_k` is {top_k}; less needs less.") from error
    part: dict[bytes, tuple[Tensor, Tensor]] = {}
    tokens = 1 if teacher.by_sequence else BATCH_TOKENS
    with tqdm(total=len(missing), desc="Teacher", disable=not missing) as progress:
        while missing:
            fits = sum(i == 0 or (i + 1) * len(sequences[key]) <= tokens for i, key in enumerate(missing[:tokens]))
            batch, missing = missing[:fits], missing[fits:]
            found = _predict(teacher, [sequences[key] for key in batch], top_k, config.temperature)
            part |= dict(zip(batch, found, strict=True))
            if not missing or sum(len(ids) for ids, _ in part.values()) >= PART_TOKENS:
                cache.add(part)
                part = {}
            progress.update(len(batch))
    return cache


def _sequences_of(dataset: Any) -> Iterator[np.ndarray]:
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__") or not columns or "input_ids" not in columns:
        raise ConfigurationError("`cache` needs a data set of known length with tokens in it; leave `cache` out.")
    packed = "seq_lengths" in columns
    for row in dataset.select_columns(["input_ids", "seq_lengths"] if packed else ["input_ids"]):
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        yield from np.split(ids, np.cumsum(row["seq_lengths"])[:-1]) if packed else [ids]


@torch.no_grad()
def _predict(
    teacher: ModelTeacher, part: list[np.ndarray], top_k: int, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Top predictions of each sequence of a batch, a few positions at a time."""
    lengths = torch.tensor([len(tokens) for tokens in part])
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(tokens).long() for tokens in part], batch_first=True)
    places = torch.arange(ids.shape[1])
    mask, positions = places < lengths[:, None], places < lengths[:, None] - 1
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    known = teacher.lesson(inputs, positions.to(teacher.model.device)).predictions
    rows = known.hidden.split(positions_at_once(known.head.vocab(known.hidden)))
    parts = [top_predictions(known.head.logits(hidden), top_k, temperature) for hidden in rows]
    columns = (torch.cat([getattr(one, name).cpu() for one in parts]) for name in ("ids", "log_probs"))
    return zip(*(column.split((lengths - 1).tolist()) for column in columns), strict=True)
