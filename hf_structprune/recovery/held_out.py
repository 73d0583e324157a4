"""Held-out text on which a model is measured in the middle of a training that does not notice, and the dense one."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..checks import Count, Limits, checked
from ..errors import CheckpointError, ConfigurationError
from ..evaluation.evaluator import TEXTS
from ..evaluation.perplexity import PROTOCOLS, EvaluationText, cut_windows, encode, load_text, spread, window_losses
from ..evaluation.results import EvaluationResult
from ..hardware import cuda_devices, release_memory
from ..model.loading import load_model, load_tokenizer
from ..model.measuring import context_length
from .weights import as_before_training, is_sharded, underneath


_PROBE = 4000  # characters of the text on which two tokenizers are compared


class HeldOutText:
    """Text, encoded once, on which models are measured again and again.

    Windows do not overlap, and all tokens of a window but the first count: the protocol `"paper"` of
    `measure_perplexity`, so that the value is the logarithm of its perplexity.

    Args:
        tokenizer: Tokenizer of the models.
        text: What `load_text` takes, or a text.
        window: Tokens in a window.
        max_windows: At most so many windows, spread evenly over the text; `None` takes all.
        batch_size: Windows that go through the model at once.

    Raises:
        ConfigurationError: The text has fewer tokens than a window, or a number is impossible.
        TextError: There is no such text.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | EvaluationText = "sample",
        *,
        window: int = 512,
        max_windows: int | None = 32,
        batch_size: int = 4,
    ) -> None:
        window = checked("window", window, Annotated[int, Limits(2)])
        batch_size = checked("batch_size", batch_size, Count)
        max_windows = checked("max_windows", max_windows, Count | None)
        self.text = load_text(text) if isinstance(text, str) else text
        self.tokenizer, self.window, self.batch_size = tokenizer, window, batch_size
        encoded = encode(tokenizer, self.text.text, None, True)
        found = cut_windows(len(encoded.ids), window, window)
        if not found:
            raise ConfigurationError(
                f"`window` is {window}, but the text {self.text.name!r} has only {len(encoded.ids)} tokens: give more "
                "text or a smaller `window`."
            )
        ids = torch.tensor(encoded.ids)
        self.ids = torch.stack([ids[window.start : window.stop] for window in spread(found, max_windows)])
        self.tokens = self.ids.shape[0] * (self.ids.shape[1] - 1)  # that are predicted
        self.protocol = PROTOCOLS["paper"].change(window=window).in_words(
            windows=len(self.ids), found=len(found), window=window, starts_with_bos=encoded.bos is not None
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What is measured on: two equal descriptions mean that values can be compared."""
        return {
            "name": self.text.name,
            "source": self.text.source,
            "fingerprint": _fingerprint(self.text),
            "windows": len(self.ids),
            "window": self.window,
            "tokens": self.tokens,
        }

    def measure(self, model: nn.Module, *, autocast: torch.dtype | None = None, pruned: bool = False) -> float:
        """Log-perplexity of a model as it is now, or of the pruned one that it was.

        The state of all random number generators and the mode of every module are afterwards what they were. The
        model underneath PEFT, DDP and `torch.compile` is run, and FSDP as a whole.

        Args:
            model: The model in training, on its device.
            autocast: Computation in this dtype, where training with mixed precision does so.
            pruned: Whether to switch its adapters off.

        Returns:
            Mean negative log-likelihood of a token, in nats; not finite if the model is broken.

        Raises:
            ConfigurationError: The window is longer than the model's context.
        """
        plain = underneath(model)
        context = context_length(plain)
        if context is not None and self.window > context:
            raise ConfigurationError(
                f"`window` is {self.window}, but the model's context is {context} tokens: lower `window`."
            )
        plain = _Whole(plain) if is_sharded(plain) else plain
        counts = [self.window - 1] * len(self.ids)
        before = as_before_training(model) if pruned else contextlib.nullcontext()
        with before, unchanged_randomness(), _without_bars():
            losses = window_losses(plain, self.ids, counts, self.batch_size, autocast)
        return float(losses.sum() / self.tokens)


def _fingerprint(text: EvaluationText) -> str:
    """16 hexadecimal digits of a text, as in `EvaluationResult.settings`."""
    return hashlib.sha256(text.text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and torch (CUDA too) go on as if it had not been."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(cuda_devices()):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars: the training has one."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Whole(nn.Module):
    """A sharded model that is only run as a whole: its parts have no weights of their own outside its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.device = model, next(model.parameters()).device

    def get_output_embeddings(self) -> None:
        """None: the head cannot be applied by itself."""

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def dense_log_perplexity(
    dense: Any,
    held_out: HeldOutText,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    **loading: Any,
) -> float | None:
    """What the dense model reaches on the held-out text: given, measured, or read from results.

    Args:
        dense: A perplexity, a model, the folder or Hub id of one, the JSON file of an evaluation, or `None`.
        held_out: What it is measured on.
        device: Where a model that is loaded runs. Default: the CPU.
        autocast: As in `HeldOutText.measure`.
        loading: Given to `load_model`.

    Returns:
        The log-perplexity in nats; `None` for `None`.

    Raises:
        ConfigurationError: The number is no perplexity, the file was measured on something else, the model cannot be
            loaded, or it has another tokenizer.
    """
    if dense is None:
        return None
    if isinstance(dense, (int, float)) and not isinstance(dense, bool):
        return _log(float(dense))
    if isinstance(dense, nn.Module):
        return _measured(dense, held_out, autocast)
    if not isinstance(dense, (str, os.PathLike)):
        raise ConfigurationError(
            f"`dense` is a {type(dense).__name__}; give a perplexity, a model, a folder, a Hub id or a results file."
        )
    if Path(dense).suffix == ".json":
        return _log(_from_results(Path(dense), held_out))
    with unchanged_randomness():
        try:
            model = load_model(dense, **loading)
        except (CheckpointError, ValueError) as error:
            raise ConfigurationError(f"`dense` is {str(dense)!r}, of which no model can be loaded: {error}") from error
        _compare_tokenizers(load_tokenizer(dense, **loading), held_out, dense)
        value = _measured(model.to(device or "cpu"), held_out, autocast)
    del model  # its memory is needed for training
    gc.collect()
    release_memory()
    return value


def _log(perplexity: float) -> float:
    if not (math.isfinite(perplexity) and perplexity >= 1):
        raise ConfigurationError(f"`dense` is {perplexity}, which is no perplexity: they are 1 or more.")
    return math.log(perplexity)


def _measured(model: Any, held_out: HeldOutText, autocast: torch.dtype | None) -> float:
    largest, size = int(held_out.ids.max()), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise ConfigurationError(
            f"`dense` has {size} embeddings, but the pruned model's tokenizer gives ids up to {largest}: it must be "
            "the model that was pruned."
        )
    value = held_out.measure(model, autocast=autocast)
    if not math.isfinite(value):
        raise ConfigurationError(f"`dense` has a log-perplexity of {value} on {held_out.text.name!r}: it is broken.")
    return value


def _compare_tokenizers(theirs: Any, held_out: HeldOutText, dense: str | os.PathLike) -> None:
    probe = held_out.text.text[:_PROBE]
    if theirs is not None and theirs(probe)["input_ids"] != held_out.tokenizer(probe)["input_ids"]:
        raise ConfigurationError(
            f"`dense` is {str(dense)!r}, whose tokenizer is not that of the pruned model: their perplexities cannot "
            "be compared."
        )


def _from_results(path: Path, held_out: HeldOutText) -> float:
    """The perplexity in a results file that was measured in the same windows of the same text."""
    result = EvaluationResult.load(path)
    if result.state != "dense":
        raise ConfigurationError(f"`dense` is {path}, which holds results of a {result.state} model.")
    mine = {"tokens": held_out.tokens, "windows": len(held_out.ids), "window": held_out.window}
    for name, fingerprint in result.settings.get(TEXTS, {}).items():
        figure = result.figures.get(f"perplexity/{name}")
        if figure is None or fingerprint != _fingerprint(held_out.text) or figure.protocol != held_out.protocol:
            continue
        if {key: figure.details.get(key) for key in mine} == mine:
            return figure.value
    held = [f"{name} ({figure.protocol})" for name, figure in result.figures.items() if "perplexity/" in name]
    raise ConfigurationError(
        f"`dense` is {path}, which has no perplexity of the text {held_out.text.name!r} by the same windows "
        f"({held_out.protocol}). It has {', '.join(held) or 'none at all'}: give the dense model instead, or "
        f"evaluate it with window {held_out.window} and max_windows {len(held_out.ids)} on that text."
    )
