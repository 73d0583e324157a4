"""Perplexity of a text: token, word and byte perplexity with their standard errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checks import Count, checked
from ..errors import ConfigurationError
from ..model.language_head import has_plain_head, positions_at_once
from ..model.measuring import measuring
from ..text.tokenising import tokenise
from .comparison import ratio_and_stderr
from .protocols import Window, context_length, cut_windows, find_protocol, spread
from .results import Figure, Parts, fingerprint
from .text import EvaluationText, load_text


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    With the summed negative log-likelihood `S` of the tokens that count, in nats, and their number `T`, words `W` and
    bytes `B`: perplexity `exp(S / T)`, word perplexity `exp(S / W)`, byte perplexity `exp(S / B)`, bits per byte
    `S / B / ln 2`, as lm-eval defines them for `wikitext`. Words and bytes are those of the same tokens, see
    `encode`; so the figures are right for a part of the text too, and without a BOS token the first token of
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

        Those that there are, for a text of that name; lower is better in all of them.
        """
        details = {key: getattr(self, key) for key in ("source", "tokens", "words", "bytes", "windows", "window")}
        figures = []
        for kind in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
            value, unit = getattr(self, kind), "bit/B" if kind == "bits_per_byte" else ""
            stderr = self.stderr if kind == "perplexity" else getattr(self, f"{kind}_stderr")
            how = (stderr, False, self.protocol, dict(details), self.parts.get(kind))
            figures += [] if value is None else [Figure(f"{kind}/{name}", value, unit, *how)]
        return figures


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
    context = context_length(model)
    if context is not None and chosen.window > context:
        raise ConfigurationError(
            f"`window` is {chosen.window}, but the model's context is {context} tokens: lower `window`."
        )
    encoded = encode(tokenizer, text.text, chosen.bos, chosen.bos_everywhere)
    found = cut_windows(
        len(encoded.ids), chosen.content, min(chosen.stride, chosen.content), keep_tail=chosen.keep_tail,
        score_first=chosen.adds_bos_everywhere,
    )  # fmt: skip
    if not found:
        raise ConfigurationError(
            f"`window` is {chosen.window}, but the text has only {len(encoded.ids)} tokens: give more text."
        )
    windows, ids = spread(found, max_windows), torch.tensor(encoded.ids)
    ids = torch.stack([ids[window.start : window.stop] for window in windows])
    if chosen.adds_bos_everywhere:
        ids = F.pad(ids, (1, 0), value=encoded.bos)
    counts = [window.stop - window.scored for window in windows]
    losses = window_losses(model, ids, counts, batch_size)
    words = chosen.in_words(
        windows=len(windows), found=len(found), window=ids.shape[1], starts_with_bos=encoded.bos is not None
    )
    key = fingerprint([ids.numpy().tobytes(), *map(str, counts)])
    return _result(key, losses, windows, encoded, window=ids.shape[1], protocol=words, source=text.source)


def _result(key: str, losses: np.ndarray, windows: list[Window], encoded: EncodedText, **how: Any) -> PerplexityResult:
    """The figures from the summed losses of the windows, and how they were measured."""
    starts, stops = ([getattr(window, end) for window in windows] for end in ("scored", "stop"))
    values: dict[str, Any] = {}
    parts = {}
    for prefix, upto in (("", np.arange(len(encoded.ids) + 1)), ("word_", encoded.words), ("byte_", encoded.bytes)):
        counts = None if upto is None else upto[stops] - upto[starts]
        if counts is None or not counts.any():
            continue
        mean, stderr = mean_and_stderr(losses, counts)
        values[f"{prefix.rstrip('_') or 'token'}s"] = int(counts.sum())
        values |= {f"{prefix}perplexity": _exp(mean), f"{prefix}perplexity_stderr": _finite(_exp(mean) * stderr)}
        parts[f"{prefix}perplexity"] = Parts.of(key, losses, counts, "exp")
        if not prefix:
            values |= {"nll": mean, "stderr": values.pop("perplexity_stderr")}
        if prefix == "byte_":
            values |= {"bits_per_byte": mean / math.log(2), "bits_per_byte_stderr": _finite(stderr / math.log(2))}
            parts["bits_per_byte"] = Parts.of(key, losses, counts, "bits")
    return PerplexityResult(windows=len(windows), parts=parts, **values, **how)


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


# Characters whose bytes are counted at once.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text.

    Args:
        ids: Token ids.
        words: Words up to and with each token, of shape `(len(ids) + 1,)`: `words[j] - words[i]` words belong to the
            tokens `i` to `j` (excluded). `None` if the tokenizer does not say which part of the text a token is.
        bytes: The same for UTF-8 bytes.
        bos: Id of the BOS token the text begins with, or that is to stand before every window; `None` without.
    """

    ids: list[int]
    words: np.ndarray | None
    bytes: np.ndarray | None
    bos: int | None


def encode(tokenizer: Any, text: str, bos: bool | None, everywhere: bool) -> EncodedText:
    """Tokenises a text once.

    Words and bytes are those of the text itself, and their total is that of lm-eval's `wikitext` task:
    `len(re.split(r"\\s+", text))` and `len(text.encode())`. Each belongs to one token: a character to the first token
    that reaches its end, one that no token covers to the token behind it (at the end of the text: before it), a word
    to the token with its last character.

    Args:
        tokenizer: A `transformers` tokenizer, or the folder or Hub id of one.
        text: The text.
        bos: `None`: special tokens as the tokenizer adds them; `True`: a BOS token and no others; `False`: none.
        everywhere: With `bos=True`: leave the BOS token to the caller, who puts it before every window.

    Raises:
        ConfigurationError: A BOS token is asked for and the tokenizer has none.
    """
    from ..model.loading import as_tokenizer

    tokenizer = as_tokenizer(tokenizer)
    known = tokenizer.bos_token_id
    if bos and known is None:
        raise ConfigurationError("`bos` is True, but the tokenizer has no beginning-of-sequence token: leave it out.")
    parts = list(tokenise(tokenizer, text, add_special_tokens=bos is None))
    ids, ends = np.concatenate([part.ids for part in parts]).tolist(), None
    if parts[0].ends is not None:
        ends = np.concatenate([part.ends for part in parts])
    if bos and not everywhere:
        ids, ends = [known, *ids], None if ends is None else np.insert(ends, 0, 0)
    starts_with_bos = bool(ids) and known is not None and ids[0] == known
    words, sizes = (None, None) if ends is None else _count(text, ends)
    return EncodedText(ids, words, sizes, known if bos or starts_with_bos else None)


def _count(text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words and bytes up to each token, from the characters at which the tokens end."""
    ends = np.maximum.accumulate(ends) if len(ends) else ends  # special tokens are nowhere: they end at 0
    if len(ends):
        ends[ends == ends[-1]] = len(text)
    where = np.insert(ends, 0, 0)
    breaks = np.fromiter((match.start() for match in re.finditer(r"\s+", text)), np.int64)
    # The character before a break is the last of a word.
    words = np.searchsorted(np.append(breaks, len(text)).clip(min(1, len(text))), where, side="right")
    return words, _bytes_before(text, where)


def _bytes_before(text: str, where: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of the text before each of its characters `where`, which ascend."""
    sizes, before = np.zeros(len(where), dtype=np.int64), 0
    for first in range(0, len(text), _BLOCK):
        block = text[first : first + _BLOCK]
        codes = np.frombuffer(block.encode("utf-32-le"), dtype=np.uint32)
        upto = np.insert((1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)).astype(np.int64), 0, before)
        upto = upto.cumsum()
        low, high = np.searchsorted(where, (first, first + len(block)), side="right")
        sizes[low:high] = upto[where[low:high] - first]
        before = upto[-1]
    return sizes


def window_losses(
    model: PreTrainedModel,
    ids: torch.LongTensor,
    counts: list[int],
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """Summed negative log-likelihood of the last tokens of each window, in nats.

    Args:
        model: The model, on the device it is to run on; it is in eval mode meanwhile and gets its modes back.
        ids: Token ids of shape `(windows, window)`.
        counts: How many tokens of each window count, at most `window - 1`.
        batch_size: Windows that go through the model at once.
        autocast: Compute in this dtype, see `measuring`.

    Returns:
        The sums, of shape `(windows,)`, in float64.
    """
    ids, sums = ids.to(model.device), []
    with measuring(model, autocast=autocast):
        score = _plain_losses if has_plain_head(model, ids[:1]) else _own_losses
        batches = list(zip(ids.split(batch_size), torch.tensor(counts).split(batch_size), strict=True))
        for rows, last in tqdm(batches, desc="Perplexity", disable=not logging.is_progress_bar_enabled()):
            sums += [part.sum().item() for part in score(model, rows, last).split(last.tolist())]
    return np.array(sums)


def _plain_losses(model: PreTrainedModel, ids: torch.LongTensor, counts: torch.LongTensor) -> torch.Tensor:
    """Losses of the tokens that count, one window after the other, with the head applied to chunks of them."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    scored = torch.arange(ids.shape[1]) >= ids.shape[1] - counts[:, None]
    rows, columns = (index.to(hidden.device) for index in scored.nonzero(as_tuple=True))
    head = model.get_output_embeddings()
    targets = ids.to(hidden.device)[rows, columns]
    return _token_losses(hidden[rows, columns - 1], targets, head, head.weight.shape[0])


def _own_losses(model: PreTrainedModel, ids: torch.LongTensor, counts: torch.LongTensor) -> torch.Tensor:
    """The same from the model's own logits, one window at a time."""
    losses = []
    for row, count in zip(ids, counts.tolist(), strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, -count - 1 : -1]
        losses.append(_token_losses(logits, row[-count:], lambda part: part, logits.shape[-1]))
    return torch.cat(losses)


def _token_losses(values: torch.Tensor, targets: torch.LongTensor, head: Callable, vocab: int) -> torch.Tensor:
    """Losses of the targets by the logits `head(values)`, a part of the positions at a time."""
    losses, chunk = [], positions_at_once(vocab)
    for part, target in zip(values.split(chunk), targets.split(chunk), strict=True):
        logits = head(part).float()
        loss = F.cross_entropy(logits, target.to(logits.device), reduction="none")
        losses.append(loss.cpu().double())  # not every accelerator knows float64
    return torch.cat(losses)
