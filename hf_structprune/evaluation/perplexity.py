"""Perplexity over non-overlapping windows, the protocol of language-model compression papers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import read_jsonl, read_lines
from ..data import wikitext2_sample
from ..errors import ConfigurationError
from ..language_head import has_plain_head, positions_at_once
from .modes import eval_mode


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    Args:
        perplexity: `exp(nll)`.
        nll: Mean negative log-likelihood of a token, in nats.
        tokens: Number of tokens that were predicted: `windows * (window - 1)`.
        windows: Number of windows that were run.
        window: Tokens in a window.
        protocol: The same in words, for tables and cards.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    protocol: str


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | list[str] | None = None,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity of a causal language model, as papers on compression report it for WikiText-2.

    The text is tokenised once, as the tokenizer does by default, and cut into non-overlapping windows; an incomplete
    one at the end is dropped. Every token of a window but the first is predicted from those before it in the window:
    `exp(-1 / (n (w - 1)) sum_windows sum_{t=2..w} log p(x_t | x_1 .. x_{t-1}))` for `n` windows of `w` tokens. Of
    `N` windows, `max_windows=n` takes those numbered `floor(i N / n)` for `i = 0 .. n - 1`, from 0.

    Logits are computed in the model's dtype and the likelihood in float32, for a part of the positions at a time;
    where the model does more to its logits than apply the head, for one window at a time. The model is in eval mode
    meanwhile and gets its modes back.

    Args:
        model: The model, on the device it is to run on.
        tokenizer: Its tokenizer.
        text: The text (not a path, see `read_text`); a list is joined with two line breaks. Default: a packaged
            sample, the leading articles of the WikiText-2 test split. It compares models with each other; numbers
            of papers are on the whole split.
        window: Tokens in a window, at most the model's context.
        max_windows: Number of windows to run, spread evenly over the text. Default: all.
        batch_size: Windows that go through the model at once.

    Returns:
        The perplexity, and what it was measured on.

    Raises:
        ConfigurationError: The window is longer than the text or the model's context, or a number is impossible.
    """
    _check_numbers(model, window, max_windows, batch_size)
    windows = _cut_windows(tokenizer, _join(text), window, max_windows).to(model.device)
    total = torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        plain = has_plain_head(model, windows[:1])
        batches = windows.split(batch_size)
        for ids in tqdm(batches, desc="Perplexity", disable=not logging.is_progress_bar_enabled()):
            total += _plain_nll(model, ids) if plain else _own_nll(model, ids)
    predicted = len(windows) * (window - 1)
    nll = total / predicted
    protocol = f"{len(windows)} non-overlapping windows of {window} tokens, {window - 1} predictions in each"
    return PerplexityResult(nll.exp().item(), nll.item(), predicted, len(windows), window, protocol)


def read_text(path: str | os.PathLike, column: str = "text") -> str:
    """Reads a text to evaluate on.

    A `.jsonl` file gives its texts (key `column`) joined with two line breaks. Any other file is read by the row
    protocol of WikiText-2: a blank line is an empty row, any other line a row with its line break, and rows are
    joined with two line breaks: the text that `"\\n\\n".join(dataset["text"])` gives for the dataset of the Hub.

    Raises:
        CalibrationError: There is no such file or no such column, or the file is not UTF-8 text.
    """
    rows = read_jsonl(path, column) if Path(path).suffix == ".jsonl" else read_lines(path)
    return "\n\n".join(rows)


def _join(text: str | list[str] | None) -> str:
    if text is None:
        return read_text(wikitext2_sample())
    return text if isinstance(text, str) else "\n\n".join(text)


def _check_numbers(model: PreTrainedModel, window: int, max_windows: int | None, batch_size: int) -> None:
    for name, value, minimum in (
        ("window", window, 2),
        ("max_windows", max_windows, 1),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < minimum:
            raise ConfigurationError(f"`{name}` is {value}; it must be at least {minimum}.")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise ConfigurationError(f"`window` is {window}, but the model's context is {context} tokens: lower `window`.")


def _cut_windows(tokenizer: Any, text: str, window: int, max_windows: int | None) -> torch.LongTensor:
    """Token ids of shape `(windows, window)`."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    full = len(ids) // window
    if full == 0:
        raise ConfigurationError(f"`window` is {window}, but the text has only {len(ids)} tokens: give more text.")
    windows = torch.tensor(ids[: full * window]).view(full, window)
    count = min(full, max_windows or full)
    return windows[[i * full // count for i in range(count)]]


def _plain_nll(model: PreTrainedModel, ids: torch.LongTensor) -> torch.Tensor:
    """Summed negative log-likelihood of `ids` of shape `(batch, window)`, with the head applied to chunks."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), ids[:, 1:].flatten()
    chunk = positions_at_once(head.weight.shape[0])
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return sum(_summed_loss(head(part), target) for part, target in pairs)


def _own_nll(model: PreTrainedModel, ids: torch.LongTensor) -> torch.Tensor:
    """The same from the model's own logits, one window at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        chunk = positions_at_once(logits.shape[-1])
        pairs = zip(logits.split(chunk), row[1:].split(chunk), strict=True)
        total += sum(_summed_loss(part, target) for part, target in pairs)
    return total


def _summed_loss(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    loss = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return loss.cpu().double().sum()  # not every accelerator knows float64
