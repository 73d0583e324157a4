"""What the dense model reaches on the held-out text: given, measured, or read from results."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..evaluation.evaluator import TEXTS
from ..evaluation.results import EvaluationResult, Figure
from ..hardware import release_memory
from ..model.loading import load_model, load_tokenizer
from .watch import Watch, text_fingerprint, unchanged_randomness


_PROBE = 4000  # characters of the text on which two tokenizers are compared


def dense_log_perplexity(
    dense: Any,
    watch: Watch,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    **loading: Any,
) -> float | None:
    """Log-perplexity of the dense model on the text of a watch.

    Args:
        dense: A perplexity, a model, the folder or Hub id of one, the JSON file of an evaluation, or `None`.
        watch: What it is measured on.
        device: Where a model that is loaded runs. Default: the CPU.
        autocast: As in `Watch.measure`.
        loading: Given to `load_model`.

    Returns:
        The value in nats; `None` for `None`.

    Raises:
        ConfigurationError: The number is no perplexity, the file was measured on something else, the model cannot be
            loaded, or it has another tokenizer.
    """
    if dense is None:
        return None
    if isinstance(dense, (int, float)) and not isinstance(dense, bool):
        return _from_number(float(dense))
    if isinstance(dense, torch.nn.Module):
        return _measure(dense, watch, autocast)
    if not isinstance(dense, (str, os.PathLike)):
        raise ConfigurationError(
            f"`dense` is a {type(dense).__name__}; give a perplexity, a model, a folder, a Hub id or a results file."
        )
    if Path(dense).suffix == ".json":
        return _from_results(Path(dense), watch)
    return _from_checkpoint(dense, watch, device or "cpu", autocast, loading)


def _from_number(perplexity: float) -> float:
    if not (math.isfinite(perplexity) and perplexity >= 1):
        raise ConfigurationError(f"`dense` is {perplexity}, which is no perplexity: they are 1 or more.")
    return math.log(perplexity)


def _measure(model: Any, watch: Watch, autocast: torch.dtype | None) -> float:
    largest, size = int(watch.ids.max()), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise ConfigurationError(
            f"`dense` has {size} embeddings, but the pruned model's tokenizer gives ids up to {largest}: it must be "
            "the model that was pruned."
        )
    value = watch.measure(model, autocast=autocast)
    if not math.isfinite(value):
        raise ConfigurationError(f"`dense` has a log-perplexity of {value} on {watch.text.name!r}: it is broken.")
    return value


def _from_checkpoint(
    dense: str | os.PathLike, watch: Watch, device: torch.device | str, autocast: torch.dtype | None, loading: dict
) -> float:
    with unchanged_randomness():
        try:
            model: PreTrainedModel | None = load_model(dense, **loading)
        except (CheckpointError, ValueError) as error:
            raise ConfigurationError(f"`dense` is {str(dense)!r}, of which no model can be loaded: {error}") from error
        _compare_tokenizers(load_tokenizer(dense, **loading), watch, dense)
        value = _measure(model.to(device), watch, autocast)
    model = None  # noqa: F841  its memory is needed for training
    gc.collect()
    release_memory()
    return value


def _compare_tokenizers(theirs: Any, watch: Watch, dense: str | os.PathLike) -> None:
    probe = watch.text.text[:_PROBE]
    if theirs is not None and theirs(probe)["input_ids"] != watch.tokenizer(probe)["input_ids"]:
        raise ConfigurationError(
            f"`dense` is {str(dense)!r}, whose tokenizer is not that of the pruned model: their perplexities cannot "
            "be compared."
        )


def _from_results(path: Path, watch: Watch) -> float:
    result = EvaluationResult.load(path)
    if result.state != "dense":
        raise ConfigurationError(f"`dense` is {path}, which holds results of a {result.state} model.")
    figure = _matching(result, watch)
    if figure is None:
        held = [f"{name} ({figure.protocol})" for name, figure in result.figures.items() if "perplexity/" in name]
        raise ConfigurationError(
            f"`dense` is {path}, which has no perplexity of the text {watch.text.name!r} by the same windows "
            f"({watch.protocol}). It has {', '.join(held) or 'none at all'}: give the dense model instead, or "
            f"evaluate it with window {watch.window} and max_windows {len(watch.ids)} on that text."
        )
    return _from_number(figure.value)


def _matching(result: EvaluationResult, watch: Watch) -> Figure | None:
    mine = {"tokens": watch.tokens, "windows": len(watch.ids), "window": watch.window}
    for name, fingerprint in result.settings.get(TEXTS, {}).items():
        figure = result.figures.get(f"perplexity/{name}")
        if figure is None or fingerprint != text_fingerprint(watch.text) or figure.protocol != watch.protocol:
            continue
        if {key: figure.details.get(key) for key in mine} == mine:
            return figure
    return None
