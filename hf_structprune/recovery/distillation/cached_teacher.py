"""A teacher that ran once over the data: its most likely tokens come from disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import ConfigurationError
from ...evaluation.environment import model_fingerprint
from ...model.language_head import positions_at_once
from ..configuration import DistillationConfig
from .cache import CacheOrigin, PredictionCache, sequence_key
from .predictions import HiddenPredictions, LogitPredictions, TopPredictions, top_predictions, wide
from .teacher import Lesson, ModelTeacher


# Tokens that the teacher reads at once while the cache is made, padding included.
BATCH_TOKENS = 4096


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
        top_k = self.cache.origin.top_k
        ids, log_probs = [np.empty((0, top_k), np.int32)], [np.empty((0, top_k + 1), np.float32)]
        wanted = positions.cpu().numpy()
        for row, start, tokens in split_batch(inputs):
            here = np.flatnonzero(wanted[row, start : start + len(tokens)])
            if len(here):
                some_ids, some_log_probs = self.cache.read(sequence_key(tokens), here)
                ids.append(some_ids)
                log_probs.append(some_log_probs.astype(np.float32))
        device = positions.device
        values = torch.from_numpy(np.concatenate(log_probs)).to(device)
        # Rounding on disk: the classes shall add up to 1 again.
        return Lesson(
            TopPredictions(torch.log_softmax(values, -1), torch.from_numpy(np.concatenate(ids)).to(device).long())
        )


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
    vocab = teacher.model.config.get_text_config().vocab_size
    origin = CacheOrigin(model_fingerprint(teacher.model), min(config.top_k, vocab), float(config.temperature))
    cache = PredictionCache.open(folder, origin, {key: len(ids) - 1 for key, ids in ordered.items()})
    missing = [key for key in cache.missing if key in sequences]
    if len(missing) < len(cache.missing):
        raise ConfigurationError(
            f"The cache in {folder} is not finished, and the data it was begun with is not that of now: begin with "
            "all of it, or delete the cache."
        )
    with tqdm(total=len(missing), desc="Teacher", disable=not missing) as progress:
        for part in _batches([sequences[key] for key in missing], 1 if teacher.by_sequence else BATCH_TOKENS):
            cache.add(_predict(teacher, part, origin))
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


def _predict(teacher: ModelTeacher, part: list[np.ndarray], origin: CacheOrigin) -> Iterator[tuple[Any, Any]]:
    device, longest = teacher.model.device, max(map(len, part))
    ids = torch.zeros(len(part), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(part):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = 1
    positions = mask.bool()
    positions[:, :-1] &= mask[:, 1:].bool()
    positions[:, -1] = False
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    known = teacher.lesson(inputs, positions.to(device)).predictions
    top = _top(known, origin)
    lengths = [len(tokens) - 1 for tokens in part]
    yield from zip(
        (x.numpy() for x in top.ids.split(lengths)), (x.numpy() for x in top.log_probs.split(lengths)), strict=True
    )


@torch.no_grad()
def _top(predictions: HiddenPredictions | LogitPredictions, origin: CacheOrigin) -> TopPredictions:
    """The top of predictions, a few positions at a time, on the CPU."""
    hidden = isinstance(predictions, HiddenPredictions)
    count = (predictions.hidden if hidden else predictions.logits).shape[0]
    step = positions_at_once(predictions.weight.shape[0] if hidden else predictions.logits.shape[1])
    parts = []
    for start in range(0, count, step):
        products = predictions.products(slice(start, start + step), None)
        logits = predictions.transform.apply_(products.to(wide(products.dtype)))
        parts.append(top_predictions(logits, origin.top_k, origin.temperature))
    return TopPredictions(torch.cat([p.log_probs.cpu() for p in parts]), torch.cat([p.ids.cpu() for p in parts]))
