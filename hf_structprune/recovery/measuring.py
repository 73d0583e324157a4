"""What a training is measured by: held-out text, the dense model's value on it, and the curve between the two."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..checks import Count, checked
from ..errors import CheckpointError, ConfigurationError
from ..evaluation.evaluator import TEXTS
from ..evaluation.perplexity import EvaluationText, load_text, prepare, window_losses
from ..evaluation.pictures import COLOURS, GREY, INK, make_panels, save, whole_numbers
from ..evaluation.results import EvaluationResult
from ..evaluation_config import PROTOCOLS
from ..hardware import cuda_devices, release_memory
from ..model.loading import load_model, load_tokenizer
from ..model.measuring import context_length
from ..progress import hidden
from .weights import as_before_training, is_sharded, underneath


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A loss smaller than this, in nats, is no loss that a share could be of: 0.1 % of a perplexity.
TINY = 1e-3
_PROBE = 4000  # characters of the text on which two tokenizers are compared


class HeldOutText:
    """Text, encoded once, on which models are measured again and again.

    Windows do not overlap, and all tokens of a window but the first count: the protocol `"paper"` of
    `measure_perplexity`, so that the value is the logarithm of its perplexity.

    Args:
        tokenizer: Tokenizer of the models.
        text: What `load_text` takes, or a text.
        window, max_windows, batch_size: As in `measure_perplexity`.
        bos: As there; of a model, `bos_for` gives it.

    Raises:
        ConfigurationError: The text has fewer tokens than a window, or a number is impossible.
        TextError: There is no such text.
    """

    def __init__(
        self, tokenizer: Any, text: str | EvaluationText = "sample", *, window: int = 512,
        max_windows: int | None = 32, batch_size: int = 4, bos: bool | None = None,
    ) -> None:  # fmt: skip
        protocol = PROTOCOLS["paper"].change(window=window, bos=bos)
        self.batch_size = checked("batch_size", batch_size, Count)
        self.text = load_text(text) if isinstance(text, str) else text
        self.tokenizer, self.window = tokenizer, protocol.window
        max_windows = checked("max_windows", max_windows, Count | None)
        encoded, _, self.ids, self.protocol = prepare(tokenizer, self.text, protocol, max_windows)
        self.text_tokens = len(encoded.ids)
        self._begun = {"bos": True} if protocol.adds_bos_everywhere else {}
        self.tokens = self.ids.shape[0] * (self.ids.shape[1] - 1)  # that are predicted
        self.fingerprint = hashlib.sha256(self.text.text.encode()).hexdigest()[:16]  # as in `EvaluationResult`

    def describe(self) -> dict[str, Any]:
        """What is measured on: two equal descriptions mean that values can be compared."""
        return {
            "name": self.text.name, "source": self.text.source, "fingerprint": self.fingerprint,
            "windows": len(self.ids), "window": self.window, "tokens": self.tokens, **self._begun,
        }  # fmt: skip

    def measure(self, model: nn.Module, *, autocast: torch.dtype | None = None, pruned: bool = False) -> float:
        """Log-perplexity of a model as it is now, in nats; not finite if the model is broken.

        The state of all random number generators and the mode of every module are afterwards what they were. The
        model underneath PEFT, DDP and `torch.compile` is run, and FSDP as a whole; with `autocast` in that dtype, and
        as `pruned` without its adapters: the model before training.

        Raises:
            ConfigurationError: The window is longer than the model's context.
        """
        plain = underneath(model)
        if (context := context_length(plain)) is not None and self.window > context:
            raise ConfigurationError(
                f"`window` is {self.window}, but the model's context is {context} tokens: lower `window`."
            )
        plain = _Whole(plain) if is_sharded(plain) else plain
        counts = [self.window - 1] * len(self.ids)
        with as_before_training(model) if pruned else contextlib.nullcontext(), without_trace():
            losses = window_losses(plain, self.ids, counts, self.batch_size, autocast)
        return float(losses.sum() / self.tokens)

    def seconds_of_a_window(self, model: nn.Module, autocast: torch.dtype | None = None) -> float:
        """How long a window takes to measure, by the first batch of them."""
        every, self.ids = self.ids, self.ids[: self.batch_size]
        try:
            start = time.perf_counter()
            self.measure(model, autocast=autocast)
            return (time.perf_counter() - start) / len(self.ids)
        finally:
            self.ids = every

    def shorten(self, windows: int) -> None:
        """Leaves so many of the windows, evenly spaced."""
        self.ids = self.ids[torch.linspace(0, len(self.ids) - 1, windows).round().long()]
        self.tokens = self.ids.shape[0] * (self.ids.shape[1] - 1)


@contextlib.contextmanager
def without_trace() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and torch (CUDA too) go on as if it had not been.

    No progress bars are shown: the training has one.
    """
    states = (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(cuda_devices()), hidden():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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
    dense: Any, held_out: HeldOutText, *, device: torch.device | str = "cpu", autocast: torch.dtype | None = None,
    vocab_size: int | None = None, **loading: Any,
) -> float | None:  # fmt: skip
    """What the dense model reaches on the held-out text, in nats: given, measured, or read from results.

    Args:
        dense: A perplexity, a model, the folder or Hub id of one, the JSON file of an evaluation, or `None`.
        device, autocast: Where a model that is loaded runs, and in what dtype.
        vocab_size: Of the pruned model, if the dense one must have it too: with fewer tokens a model splits text
            otherwise, so that the losses of tokens are of other things.
        loading: Given to `load_model`.

    Raises:
        ConfigurationError: The number is no perplexity, the file was measured on something else, the model cannot be
            loaded, or it has another tokenizer.
    """
    if dense is None:
        return None
    if isinstance(dense, nn.Module):
        return _measured(dense, held_out, autocast, vocab_size)
    if isinstance(dense, (str, os.PathLike)) and Path(dense).suffix == ".json":
        dense = _from_results(Path(dense), held_out)
    if isinstance(dense, (int, float)) and not isinstance(dense, bool):
        if not (math.isfinite(dense) and dense >= 1):
            raise ConfigurationError(f"`dense` is {dense}, which is no perplexity: they are 1 or more.")
        return math.log(dense)
    if not isinstance(dense, (str, os.PathLike)):
        raise ConfigurationError(
            f"`dense` is a {type(dense).__name__}; give a perplexity, a model, a folder, a Hub id or a results file."
        )
    with without_trace():
        try:
            model = load_model(dense, **loading)
        except (CheckpointError, ValueError) as error:
            raise ConfigurationError(f"`dense` is {str(dense)!r}, of which no model can be loaded: {error}") from error
        theirs, probe = load_tokenizer(dense, **loading), held_out.text.text[:_PROBE]
        if theirs is not None and theirs(probe)["input_ids"] != held_out.tokenizer(probe)["input_ids"]:
            raise ConfigurationError(
                f"`dense` is {str(dense)!r}, whose tokenizer is not that of the pruned model: their perplexities "
                "cannot be compared."
            )
        value = _measured(model.to(device), held_out, autocast, vocab_size)
    del model  # its memory is needed for training
    gc.collect()
    release_memory()
    return value


def _measured(model: Any, held_out: HeldOutText, autocast: torch.dtype | None, vocab_size: int | None) -> float:
    largest, size = int(held_out.ids.max()), model.get_input_embeddings().num_embeddings
    if vocab_size is not None and vocab_size != (theirs := model.config.get_text_config().vocab_size):
        raise ConfigurationError(
            f"`dense` has a vocabulary of {theirs} tokens and the pruned model one of {vocab_size}: they split text "
            "otherwise, so that losses of tokens cannot be compared. Leave `dense` out, and compare bits per byte "
            "afterwards (`evaluate`)."
        )
    if largest >= size:
        raise ConfigurationError(
            f"`dense` has {size} embeddings, but the pruned model's tokenizer gives ids up to {largest}: it must be "
            "the model that was pruned."
        )
    value = held_out.measure(model, autocast=autocast)
    if not math.isfinite(value):
        raise ConfigurationError(f"`dense` has a log-perplexity of {value} on {held_out.text.name!r}: it is broken.")
    return value


def _from_results(path: Path, held_out: HeldOutText) -> float:
    """The perplexity in a results file that was measured in the same windows of the same text."""
    result = EvaluationResult.load(path)
    if result.state != "dense":
        raise ConfigurationError(f"`dense` is {path}, which holds results of a {result.state} model.")
    mine = {"tokens": held_out.tokens, "windows": len(held_out.ids), "window": held_out.window}
    for name, fingerprint in result.settings.get(TEXTS, {}).items():
        figure = result.figures.get(f"perplexity/{name}")
        same = figure is not None and fingerprint == held_out.fingerprint and figure.protocol == held_out.protocol
        same = same and figure.details.get("text_tokens", held_out.text_tokens) == held_out.text_tokens
        if same and {key: figure.details.get(key) for key in mine} == mine:
            return figure.value
    held = [f"{name} ({figure.protocol})" for name, figure in result.figures.items() if "perplexity/" in name]
    raise ConfigurationError(
        f"`dense` is {path}, which has no perplexity of the text {held_out.text.name!r} by the same windows "
        f"({held_out.protocol}). It has {', '.join(held) or 'none at all'}: give the dense model instead, or "
        f"evaluate it with window {held_out.window} and max_windows {len(held_out.ids)} on that text."
    )


@dataclass(frozen=True)
class Point:
    """One measurement: the mean negative log-likelihood of a token, in nats, after so many optimiser steps.

    `seconds` are those of training up to here, measuring excluded.
    """

    step: int
    log_perplexity: float
    seconds: float = 0.0


@dataclass
class RecoveryCurve:
    """The measurements of one training, all on the same text.

    `pruned` and `dense` (if that is known) are log-perplexities in nats, before training and of the dense model.
    `points` are in the order of their steps and finite; step 0 is `pruned` and not among them.
    """

    pruned: float
    dense: float | None = None
    points: list[Point] = field(default_factory=list)

    def recovered(self, log_perplexity: float) -> float | None:
        """`(pruned - now) / (pruned - dense)`: 0 is no better than before training, 1 is as good as the dense model.

        Below 0 for a model that got worse; `None` without a dense model, or if pruning lost nothing.
        """
        if self.dense is None or self.pruned - self.dense <= TINY:
            return None
        return (self.pruned - log_perplexity) / (self.pruned - self.dense)

    @property
    def all_points(self) -> list[Point]:
        """The pruned model, at step 0, and the measurements."""
        return [Point(0, self.pruned), *self.points]

    @property
    def best(self) -> Point:
        """The first measurement with the lowest log-perplexity; the pruned model itself is one."""
        return min(self.all_points, key=lambda point: point.log_perplexity)

    @property
    def is_worse(self) -> bool:
        """Whether the last measurement is worse than the pruned model."""
        return bool(self.points) and self.points[-1].log_perplexity > self.pruned

    def verdict(self, *, target: float | None = None, patience: int | None = None) -> str | None:
        """Why training should stop after the last measurement: `"target"`, `"worse"`, or `None` to go on.

        The share `target` of the lost log-perplexity is enough; `patience` measurements in a row without a new best
        are too many, and `None` waits for ever.
        """
        if not self.points:
            return None
        share = self.recovered(self.points[-1].log_perplexity)
        if target is not None and share is not None and share >= target:
            return "target"
        since = len(self.points) - self.all_points.index(self.best)
        return "worse" if patience is not None and since >= patience else None


def measuring_steps(max_steps: int, evaluations: int | None) -> frozenset[int]:
    """Steps after which to measure: at most `evaluations`, evenly spaced, with the last step; `None` is that alone."""
    count = min(evaluations or 1, max_steps)
    return frozenset(math.ceil(max_steps * number / count) for number in range(1, count + 1))


def exp(log_perplexity: float) -> float:
    """The perplexity, infinite where the number is too large."""
    return math.exp(log_perplexity) if log_perplexity < 700 else math.inf


def curve_figure(curve: RecoveryCurve, best_step: int | None = None) -> Figure:
    """Log-perplexity against training steps, between the pruned and the dense model, and the share that is back.

    The step whose weights were kept is marked; by default it is the best.
    """
    figure, (axis,) = make_panels(1, 3.6, "Recovery: quality that comes back with training")
    points = curve.all_points
    axis.plot(
        [p.step for p in points], [p.log_perplexity for p in points],
        color=COLOURS[0], linewidth=2, marker="o", markersize=4, zorder=3,
    )  # fmt: skip
    _line(axis, curve.pruned, "pruned", COLOURS[5], above=not curve.is_worse)
    if curve.dense is not None:
        _line(axis, curve.dense, "dense", COLOURS[2])
    kept = next((p for p in points if p.step == best_step), curve.best)
    axis.plot([kept.step], [kept.log_perplexity], marker="*", markersize=14, color=COLOURS[0], zorder=4)
    if kept.step:  # the pruned model has its own line
        share = curve.recovered(kept.log_perplexity)
        back = "" if share is None else f", {100 * share:.0f} % back"
        axis.annotate(  # below it, where nothing is if it is the best
            f"perplexity {exp(kept.log_perplexity):.2f}{back}", (kept.step, kept.log_perplexity), (0, -9),
            textcoords="offset points", ha="right" if kept.step > points[-1].step / 2 else "left", va="top",
            fontsize=8, color=INK, zorder=5,
        )  # fmt: skip
    axis.margins(x=0.02, y=0.12)
    axis.set_ylabel("log-perplexity of held-out text (nats)")
    axis.set_xlabel("training steps")
    whole_numbers(axis.xaxis)
    if curve.recovered(curve.pruned) is not None:
        lost = curve.pruned - curve.dense
        scale = (lambda y: 100 * (curve.pruned - y) / lost, lambda share: curve.pruned - share * lost / 100)
        second = axis.secondary_yaxis("right", functions=scale)
        second.set_ylabel("% back", color=INK, fontsize=9)
        second.tick_params(colors=INK, labelsize=8)
        second.spines["right"].set_color(GREY)
    return figure


def draw_curve(curve: RecoveryCurve, path: str | os.PathLike, best_step: int | None = None) -> None:
    """Saves `curve_figure` as PNG."""
    save(curve_figure(curve, best_step), path)


def _line(axis: Axes, height: float, name: str, colour: str, above: bool = True) -> None:
    axis.axhline(height, color=colour, linewidth=1.2, linestyle="--", zorder=2)
    axis.annotate(
        f"{name}, perplexity {exp(height):.2f}", (0.5, height), (0, 3 if above else -4),
        xycoords=axis.get_yaxis_transform(), textcoords="offset points", ha="center",
        va="bottom" if above else "top", fontsize=8, color=colour,
    )  # fmt: skip
