"""Perplexity of a text: token, word and byte perplexity with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..checks import Count, checked
from ..errors import ConfigurationError
from .encoding import EncodedText, encode
from .likelihood import window_losses
from .paired import ratio_and_stderr
from .parts import Parts, fingerprint
from .protocol import PerplexityProtocol, context_length, find_protocol
from .results import Figure
from .text import EvaluationText, load_text
from .windows import Window, cut_windows, spread


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    With the summed negative log-likelihood `S` of the tokens that count, in nats, and their number `T`, words `W` and
    bytes `B`: perplexity `exp(S / T)`, word perplexity `exp(S / W)`, byte perplexity `exp(S / B)`, bits per byte
    `S / B / ln 2`, as lm-eval defines them for `wikitext`. Words and bytes are those of the same tokens, see
    `encoding.encode`; so the figures are right for a part of the text too, and without a BOS token the first token of
    the text is neither in `S` nor in `B`. They are missing (`None`) if the tokenizer does not tell the parts of the
    text.

    Standard errors are those of a ratio of sums over windows, linearised (delta method; Cochran, Sampling Techniques,
    1977, section 6.4), with the windows taken as independent: for `m = S / T`, `e_k = S_k - m T_k` and `n` windows,
    `se(m) = sqrt(n / (n - 1) sum_k e_k^2) / T` and `se(exp m) = exp(m) se(m)`; `None` for one window.

    Args:
        perplexity: `exp(nll)`.
        nll: Mean negative log-likelihood of a token, in nats.
        tokens: Number of tokens that were predicted.
        windows: Number of windows that were run.
        window: Tokens in a window.
        protocol: The same in words, for tables and cards.
        stderr: Standard error of `perplexity`.
        word_perplexity: Perplexity of a word.
        word_perplexity_stderr: Its standard error.
        byte_perplexity: Perplexity of a byte.
        byte_perplexity_stderr: Its standard error.
        bits_per_byte: Mean negative log-likelihood of a byte, in bits.
        bits_per_byte_stderr: Its standard error.
        words: Words that the predicted tokens stand for.
        bytes: UTF-8 bytes that they stand for.
        source: Where the text comes from, in words.
        parts: The windows that each figure was added up from, by the first word of the figure's name.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    protocol: str
    stderr: float | None = None
    word_perplexity: float | None = None
    word_perplexity_stderr: float | None = None
    byte_perplexity: float | None = None
    byte_perplexity_stderr: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    words: int | None = None
    bytes: int | None = None
    source: str = ""
    parts: dict[str, Parts | None] = field(default_factory=dict)

    def figures(self, name: str) -> list[Figure]:
        """The figures `perplexity/<name>`, `word_perplexity/<name>`, `byte_perplexity/<name>`, `bits_per_byte/<name>`.

        Args:
            name: What the text is called.

        Returns:
            The figures that there are; lower is better in all of them.
        """
        details = {key: getattr(self, key) for key in ("source", "tokens", "words", "bytes", "windows", "window")}
        measured = (
            ("perplexity", self.perplexity, "", self.stderr),
            ("word_perplexity", self.word_perplexity, "", self.word_perplexity_stderr),
            ("byte_perplexity", self.byte_perplexity, "", self.byte_perplexity_stderr),
            ("bits_per_byte", self.bits_per_byte, "bit/B", self.bits_per_byte_stderr),
        )
        return [
            Figure(f"{kind}/{name}", value, unit, stderr, False, self.protocol, dict(details), self.parts.get(kind))
            for kind, value, unit, stderr in measured
            if value is not None
        ]


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
    `exp(-1 / (n (w - 1)) sum_windows sum_{t=2..w} log p(x_t | x_1 .. x_{t-1}))` for `n` windows of `w` tokens. This
    is the protocol `"paper"` of `measure_perplexity`.

    Args:
        model: The model, on the device it is to run on.
        tokenizer: Its tokenizer.
        text: The text (not a path, see `load_text`); a list is joined with two line breaks. Default: a packaged
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
    text = load_text("sample").text if text is None else text
    given = EvaluationText("text", text if isinstance(text, str) else "\n\n".join(text), "")
    return measure_perplexity(model, tokenizer, given, window=window, max_windows=max_windows, batch_size=batch_size)


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: EvaluationText,
    protocol: str = "paper",
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity by one of the `PROTOCOLS`.

    | protocol | window | stride | what counts | BOS if asked for |
    | --- | --- | --- | --- | --- |
    | `paper` | 2048 | 2048 | in each full window all tokens but the first | in every window |
    | `llm-pruner` | 128 | 128 | the same | in every window |
    | `sliding` | 2048 | 512 | every token but the first, in the first window that holds it | at the text's start |

    A BOS token is one of the window's tokens. Of `N` windows, `max_windows=n` takes those numbered `floor(i N / n)`
    for `i = 0 .. n - 1`, from 0; a token counts in the same window as it does without.

    Logits are computed in the model's dtype and the likelihood in float32, for a part of the positions at a time;
    where the model does more to its logits than apply the head, for one window at a time. The model is in eval mode
    meanwhile and gets its modes back.

    Args:
        model: The model, on the device it is to run on.
        tokenizer: Its tokenizer.
        text: What to measure on, see `load_text`.
        protocol: `"paper"`, `"llm-pruner"` or `"sliding"`.
        window: Tokens in a window, at most the model's context. Default: the protocol's, even if that is too long for
            the model; `PROTOCOLS[protocol].window_for(model)` is not.
        stride: Tokens from the start of a window to the start of the next. Default: the protocol's; if `window` is
            given, the same share of it.
        bos: `None`: a BOS token where the tokenizer puts one by default; `True`: where the table says; `False`: none.
        max_windows: Number of windows to run, spread evenly over the text. Default: all.
        batch_size: Windows that go through the model at once; it does not change the result but for rounding.

    Raises:
        ConfigurationError: The window is longer than the text or the model's context, the tokenizer has no BOS token,
            there is no such protocol, or a number is impossible.
    """
    chosen = find_protocol(protocol).change(window=window, stride=stride, bos=bos)
    max_windows = checked("max_windows", max_windows, Count | None)
    batch_size = checked("batch_size", batch_size, Count)
    _check_context(model, chosen.window)
    encoded = encode(tokenizer, text.text, chosen.bos, chosen.bos_everywhere)
    found = _find_windows(encoded, chosen)
    windows = spread(found, max_windows)
    ids = _window_ids(encoded, windows, chosen)
    losses = window_losses(model, ids, [window.stop - window.scored for window in windows], batch_size)
    words = chosen.in_words(
        windows=len(windows),
        found=len(found),
        window=ids.shape[1],
        starts_with_bos=encoded.bos is not None,
    )
    key = fingerprint([ids.numpy().tobytes(), *(f"{window.stop - window.scored}" for window in windows)])
    return _result(key, losses, windows, encoded, window=ids.shape[1], protocol=words, source=text.source)


def _check_context(model: PreTrainedModel, window: int) -> None:
    context = context_length(model)
    if context is not None and window > context:
        raise ConfigurationError(f"`window` is {window}, but the model's context is {context} tokens: lower `window`.")


def _find_windows(encoded: EncodedText, protocol: PerplexityProtocol) -> list[Window]:
    windows = cut_windows(
        len(encoded.ids),
        protocol.content,
        min(protocol.stride, protocol.content),
        keep_tail=protocol.keep_tail,
        score_first=protocol.adds_bos_everywhere,
    )
    if not windows:
        raise ConfigurationError(
            f"`window` is {protocol.window}, but the text has only {len(encoded.ids)} tokens: give more text."
        )
    return windows


def _window_ids(encoded: EncodedText, windows: list[Window], protocol: PerplexityProtocol) -> torch.LongTensor:
    """Token ids of shape `(windows, window)`."""
    ids = torch.tensor(encoded.ids)
    rows = torch.stack([ids[window.start : window.stop] for window in windows])
    return F.pad(rows, (1, 0), value=encoded.bos) if protocol.adds_bos_everywhere else rows


def _result(key: str, losses: np.ndarray, windows: list[Window], encoded: EncodedText, **how: Any) -> PerplexityResult:
    """The figures from the summed losses of the windows, and how they were measured."""
    counts = np.array([window.stop - window.scored for window in windows])
    nll, stderr = mean_and_stderr(losses, counts)
    values: dict[str, Any] = {"perplexity": _exp(nll), "nll": nll, "stderr": _finite(_exp(nll) * stderr)}
    parts = {"perplexity": Parts.of(key, losses, counts, "exp")}
    for unit, upto in (("word", encoded.words), ("byte", encoded.bytes)):
        units = None if upto is None else upto[[w.stop for w in windows]] - upto[[w.scored for w in windows]]
        if units is None or not units.any():
            continue
        mean, stderr = mean_and_stderr(losses, units)
        values |= {f"{unit}s": int(units.sum()), f"{unit}_perplexity": _exp(mean)}
        values[f"{unit}_perplexity_stderr"] = _finite(_exp(mean) * stderr)
        parts[f"{unit}_perplexity"] = Parts.of(key, losses, units, "exp")
        if unit == "byte":
            values |= {"bits_per_byte": mean / math.log(2), "bits_per_byte_stderr": _finite(stderr / math.log(2))}
            parts["bits_per_byte"] = Parts.of(key, losses, units, "bits")
    return PerplexityResult(tokens=int(counts.sum()), windows=len(windows), parts=parts, **values, **how)


def mean_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """`sum(sums) / sum(counts)` and its standard error over windows, NaN for one window; see `PerplexityResult`."""
    if len(sums) == 1:
        return float(sums.sum() / counts.sum()), math.nan
    with np.errstate(invalid="ignore"):  # infinite losses have no error
        mean, stderr = ratio_and_stderr(sums, counts)
    return float(mean), float(stderr)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
