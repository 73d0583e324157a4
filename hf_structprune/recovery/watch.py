"""`Watch`: the log-perplexity of held-out text, measured in the middle of a training that does not notice."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checks import Count, Limits, checked
from ..errors import ConfigurationError
from ..evaluation.perplexity import encode, window_losses
from ..evaluation.protocols import PROTOCOLS, context_length, cut_windows, spread
from ..evaluation.text import EvaluationText, load_text
from ..hardware import cuda_devices
from .wrappers import is_sharded, underneath


class Watch:
    """Held-out text, encoded once, on which models are measured again and again.

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
        self.protocol = PROTOCOLS["paper"].change(window=window).in_words(
            windows=len(self.ids), found=len(found), window=window, starts_with_bos=encoded.bos is not None
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Number of tokens that are predicted."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def describe(self) -> dict[str, Any]:
        """What is measured on: two equal descriptions mean that values can be compared."""
        return {
            "name": self.text.name,
            "source": self.text.source,
            "fingerprint": text_fingerprint(self.text),
            "windows": len(self.ids),
            "window": self.window,
            "tokens": self.tokens,
        }

    def measure(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> float:
        """Log-perplexity of a model as it is now.

        The state of all random number generators and the mode of every module are afterwards what they were. The
        model underneath PEFT, DDP and `torch.compile` is run, and FSDP as a whole.

        Args:
            model: The model in training, on its device.
            autocast: Computation in this dtype, where training with mixed precision does so.

        Returns:
            Mean negative log-likelihood of a token, in nats; not finite if the model is broken.

        Raises:
            ConfigurationError: The window is longer than the model's context.
        """
        model = underneath(model)
        context = context_length(model)
        if context is not None and self.window > context:
            raise ConfigurationError(
                f"`window` is {self.window}, but the model's context is {context} tokens: lower `window`."
            )
        plain = _Whole(model) if is_sharded(model) else model
        with unchanged_randomness(), _without_bars():
            counts = [self.window - 1] * len(self.ids)
            losses = window_losses(plain, self.ids, counts, self.batch_size, autocast)
        return float(losses.sum() / self.tokens)


def text_fingerprint(text: EvaluationText) -> str:
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

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.device = model, next(model.parameters()).device

    def get_output_embeddings(self) -> None:
        """None: the head cannot be applied by itself."""

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)
