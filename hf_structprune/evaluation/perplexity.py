"""Perplexity of a text: the texts papers use, how they are cut into windows, and the figures with their errors."""

from __future__ import annotations

import math
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..checks import Count, checked
from ..data import wikitext2_sample
from ..errors import ConfigurationError, TextError
from ..evaluation_config import PerplexityProtocol, find_protocol
from ..model.loading import as_tokenizer
from ..model.measuring import context_length, has_plain_head, measuring, positions_at_once
from ..model.store import OnDisk
from ..model.structure import ModelStructure
from ..model.writing import for_text
from ..progress import tqdm
from ..stats.stream import layer_by_layer, without_layers
from ..streaming import check_measuring
from ..text.reading import FILES, beginning_of, is_local, read_lines, read_rows, tokenise
from .comparison import FORMS, Parts, fingerprint, ratio_and_stderr
from .results import Figure


SAMPLE = "sample"


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure on; figures are called `perplexity/<name>`, and `source` says in words where it comes from."""

    name: str
    text: str
    source: str


class NamedText(NamedTuple):
    """A data set of the Hub that papers measure perplexity on, and how they make one text of it."""

    dataset: str
    splits: tuple[str, ...]  # that may be asked for; the first is the usual one
    config_name: str | None = None
    column: str = "text"
    documents: int | None = None  # from the first one; `None` takes all
    separator: str = "\n\n"
    loading: dict[str, Any] = {}


TEXTS = {
    # LLM-Pruner, SparseGPT, Wanda, ...: the whole split.
    "wikitext2": NamedText("Salesforce/wikitext", ("test", "validation", "train"), "wikitext-2-raw-v1"),
    # The repository holds a script, which `datasets` 4 no longer runs; the Hub's own conversion to Parquet is on this
    # branch. Most papers measure the test split, LLM-Pruner the validation split.
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only", ("test", "validation", "train"), column="sentence",
        loading={"revision": "refs/convert/parquet"},
    ),
    # As SparseGPT, Wanda and GPTQ's `c4-new`: the first 1,100 documents of the first of eight validation files (40 MB;
    # the whole of C4 is 300 GB), joined with a space.
    "c4": NamedText(
        "allenai/c4", ("validation",), documents=1100, separator=" ",
        loading={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
}  # fmt: skip


def load_text(
    spec: str, *, config_name: str | None = None, split: str | None = None, column: str | None = None
) -> EvaluationText:
    """Loads a text to evaluate on.

    | `spec` | what it is |
    | --- | --- |
    | `"sample"` | the leading articles of WikiText-2's test split, packaged: compares models with each other |
    | `"wikitext2"` | WikiText-2 raw, test split (`Salesforce/wikitext`) |
    | `"ptb"` | Penn Treebank, test split (`ptb-text-only/ptb_text_only`); LLM-Pruner uses `split="validation"` |
    | `"c4"` | the first 1,100 documents of C4's English validation split (`allenai/c4`), joined with a space |
    | a `.txt` file | rows as in WikiText-2, see `read_text` |
    | a `.jsonl` or `.json` file | the texts under the key `column` |
    | a folder | a data set made by `datasets.save_to_disk`, or a folder of data files; `"./ptb"` if named as above |
    | an id | a data set of the Hub |

    Rows are joined with two line breaks, none left out, unless the table says something else.

    Args:
        spec: As in the table.
        config_name: Configuration of a data set, for example `"wikitext-103-raw-v1"`.
        split: `"validation[:1000]"` takes the first 1,000 rows. Default: `"test"`, or the usual one of a named text.
        column: Column of a data set or key in a JSON file. Default: `"text"`.

    Raises:
        ConfigurationError: An option does not go with this kind of text.
        TextError: There is no such text, split or column, the Hub cannot be reached, or there is nothing in it.
    """
    options = {"config_name": config_name, "split": split, "column": column}
    named, path = TEXTS.get(spec), wikitext2_sample() if spec == SAMPLE else Path(spec)
    is_file, hint = not named and path.suffix in FILES, ""
    if named or is_file:
        allowed = "split" if named else "column" if path.suffix != ".txt" else None
        for option, value in options.items():
            if value is not None and option != allowed:
                raise ConfigurationError(f"`{option}` is {value!r}, but the text {spec!r} has none to choose.")
    if named and split not in (None, *named.splits):
        raise ConfigurationError(
            f"`split` is {split!r}, but the text {spec!r} is made of {', '.join(map(repr, named.splits))}; for other "
            f"parts give the data set's id, {named.dataset!r}."
        )
    if is_file:
        rows, separator = list(read_rows(path, column=column or "text")), "\n\n"
        name, source = path.stem, path.name
        if spec == SAMPLE:
            name, source = SAMPLE, "leading articles of WikiText-2 raw, test split"
    else:
        if named:
            name, source, hint = spec, named.dataset, f"The text {spec!r} needs a data set of the Hub: "
            chosen = [split] if split not in (None, named.splits[0]) else []
        else:
            named, local = NamedText(spec, ("test",), config_name, column or "text"), is_local(spec)
            source = path.expanduser().resolve().name if local else spec  # the whole path is nobody's business
            name, chosen = source.rpartition("/")[2], [value for value in options.values() if value is not None]
            if not local and "/" not in spec:
                hint = f"Texts that have a name here are {', '.join((SAMPLE, *TEXTS))}; "
        split, separator = split or named.splits[0], named.separator
        try:
            rows = read_rows(named.dataset, name=named.config_name, split=split, column=named.column, **named.loading)
        except TextError as error:
            raise TextError(f"{hint}{error}") from error
        rows, name = list(rows[: named.documents]), "-".join([name, *chosen]).replace("/", "-")
        taken = None if named.documents is None else f"first {named.documents:,} rows"
        source = ", ".join(part for part in (source, named.config_name, f"{split} split", taken) if part)
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise TextError(f"Row {number} of {spec} is a {type(row).__name__}, not a text: choose another column.")
    if not any(row.strip() for row in rows):
        raise TextError(f"There is no text in {spec}: it has no rows, or all of them are empty.")
    return EvaluationText(name, separator.join(rows), source)


def read_text(path: str | os.PathLike, column: str = "text") -> str:
    """Reads a text to evaluate on; raises a `TextError` if there is no such file or column, or it is not UTF-8.

    A `.jsonl` or `.json` file gives its texts (key `column`) joined with two line breaks. Any other file is read by
    the row protocol of WikiText-2: a blank line is an empty row, any other line a row with its line break, and rows
    are joined with two line breaks: the text that `"\\n\\n".join(dataset["text"])` gives for the dataset of the Hub.
    """
    rows = read_rows(path, column=column) if Path(path).suffix in FILES else read_lines(path)
    return "\n\n".join(rows)


def cut_windows(length: int, protocol: PerplexityProtocol) -> np.ndarray:
    """Cuts `length` tokens into windows of one size, at `0, stride, 2 stride, ...`; each token counts at most once.

    Gives rows `(start, scored, stop)`: tokens `start` to `stop` (excluded) go through the model, and those from
    `scored` on count. A token counts in the first window that holds it, unless it is the first token of that window
    without a BOS token before it: nothing says what it could be predicted from. So of non-overlapping windows all
    tokens but the first count; of overlapping ones those that were not in the window before, each with at least
    `window - stride` of context.

    With `keep_tail`, what is behind the last full window gets one that ends with the last token, of full size too (as
    in lm-eval's rolling windows) or as long as the text if that is shorter.
    """
    content, bos = protocol.content, protocol.adds_bos_everywhere
    starts = list(range(0, length - content + 1, min(protocol.stride, content)))
    if protocol.keep_tail and length > 0 and (not starts or starts[-1] + content < length):
        starts.append(max(0, length - content))
    starts = np.array(starts, dtype=int)
    stops = starts + min(content, length)
    scored = np.maximum(starts + (not bos), np.append(0, stops)[:-1])
    return np.stack([starts, scored, stops], axis=1)[scored < stops]


def prepare(
    tokenizer: Any, text: EvaluationText, protocol: PerplexityProtocol, max_windows: int | None
) -> tuple[EncodedText, np.ndarray, torch.LongTensor, str]:
    """Tokenises a text and cuts it into windows: of `n` those numbered `floor(i n / max_windows)`, or all.

    Gives all tokens of the text, the windows, the tokens that go through the model, of shape `(windows, window)`, and
    what was done, in words.
    """
    encoded = encode(tokenizer, text.text, protocol.bos, protocol.bos_everywhere)
    found = cut_windows(len(encoded.ids), protocol)
    if not len(found):
        raise ConfigurationError(
            f"`window` is {protocol.window}, but the text has only {len(encoded.ids)} tokens: give more, or lower it."
        )
    count, ids = min(max_windows or len(found), len(found)), torch.tensor(encoded.ids)
    windows = found[np.arange(count) * len(found) // count]
    ids = torch.stack([ids[start:stop] for start, _, stop in windows])
    ids = F.pad(ids, (1, 0), value=encoded.bos) if protocol.adds_bos_everywhere else ids
    words = protocol.in_words(
        windows=count, found=len(found), window=ids.shape[1], starts_with_bos=encoded.bos is not None
    )
    return encoded, windows, ids, words


# What the mean of each is over, and its form (`comparison.FORMS`).
_KINDS = {
    "perplexity": ("tokens", "exp"), "word_perplexity": ("words", "exp"), "byte_perplexity": ("bytes", "exp"),
    "bits_per_byte": ("bytes", "bits"),
}  # fmt: skip


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    With the summed negative log-likelihood `S` of the tokens that count, in nats, and their number `T`, words `W` and
    bytes `B` (see `encode`; `None` if the tokenizer does not tell where a token is): perplexity `exp(S / T)`, word
    perplexity `exp(S / W)`, byte perplexity `exp(S / B)`, bits per byte `S / B / ln 2`, as lm-eval defines them for
    `wikitext`. Without a BOS token the first token of the text is neither in `S` nor in `B`.

    Standard errors are those of a ratio of sums over windows, linearised (delta method; Cochran, Sampling Techniques,
    1977, section 6.4), with the windows taken as independent: for `m = S / T`, `e_k = S_k - m T_k` and `n` windows,
    `se(m) = sqrt(n / (n - 1) sum_k e_k^2) / T` and `se(exp m) = exp(m) se(m)`; `None` for one window.

    Args:
        perplexity, word_perplexity, byte_perplexity, bits_per_byte: The figures, each with its standard error.
        nll: Mean negative log-likelihood of a token, in nats.
        tokens, words, bytes: How many were predicted.
        windows, window: Number of windows that were run, and tokens in each.
        protocol, source: How was measured, and where the text comes from, in words.
        parts: The windows that each figure was added up from, by the first word of the figure's name.
        text_tokens: Tokens of the whole text. With another vocabulary there are others, and a token is another part
            of the text: the perplexities of tokens are then no more comparable, those of words and bytes are.
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
    text_tokens: int | None = None

    def figures(self, name: str) -> list[Figure]:
        """Those there are, less is better: `perplexity/<name>`, and with `word_`, `byte_`, `bits_per_byte/<name>`."""
        keys = ("source", "tokens", "words", "bytes", "windows", "window", "text_tokens")
        details = {key: getattr(self, key) for key in keys}
        return [
            Figure(
                f"{kind}/{name}", getattr(self, kind), "bit/B" if kind == "bits_per_byte" else "",
                self.stderr if kind == "perplexity" else getattr(self, f"{kind}_stderr"), False, self.protocol,
                dict(details), self.parts.get(kind),
            )
            for kind in _KINDS if getattr(self, kind) is not None
        ]  # fmt: skip


def perplexity(
    model: PreTrainedModel, tokenizer: Any, text: str | list[str] | None = None, *, window: int = 2048,
    max_windows: int | None = None, batch_size: int = 1,
) -> PerplexityResult:  # fmt: skip
    """Perplexity of a causal language model, as papers on compression report it for WikiText-2.

    The text is tokenised once, as the tokenizer does by default, and cut into non-overlapping windows; an incomplete
    one at the end is dropped. Every token of a window but the first is predicted from those before it in the window:
    `exp(-1 / (n (w - 1)) sum_windows sum_{t=2..w} log p(x_t | x_1 .. x_{t-1}))` for `n` windows of `w` tokens. This
    is the protocol `"paper"` of `measure_perplexity`, which explains the other arguments and the errors.

    The text is no path, see `load_text`; a list is joined with two line breaks. Default: a packaged sample, leading
    articles of the WikiText-2 test split, which compares models with each other; papers measure the whole split.
    """
    text = load_text("sample").text if text is None else text
    given = EvaluationText("text", text if isinstance(text, str) else "\n\n".join(text), "")
    return measure_perplexity(model, tokenizer, given, window=window, max_windows=max_windows, batch_size=batch_size)


def measure_perplexity(
    model: PreTrainedModel, tokenizer: Any, text: EvaluationText, protocol: str = "paper", *,
    window: int | None = None, stride: int | None = None, bos: bool | None = None, max_windows: int | None = None,
    batch_size: int = 1, store: OnDisk | None = None,
) -> PerplexityResult:  # fmt: skip
    """Perplexity by one of the `PROTOCOLS`.

    | protocol | window | stride | what counts | BOS if asked for |
    | --- | --- | --- | --- | --- |
    | `paper` | 2048 | 2048 | in each full window all tokens but the first | in every window |
    | `llm-pruner` | 128 | 128 | the same | in every window |
    | `sliding` | 2048 | 512 | every token but the first, in the first window that holds it | at the text's start |

    A BOS token is one of the window's tokens. Of `N` windows, `max_windows=n` takes those numbered `floor(i N / n)`
    for `i = 0 .. n - 1`, from 0; a token counts in the same window as it does without.

    Logits are computed in the model's dtype and the likelihood in float32, for a part of the positions at a time;
    where the model does more to its logits than apply the head, for one window at a time.

    Args:
        model, tokenizer: The model, on the device it is to run on, and its tokenizer.
        text: What to measure on, see `load_text`.
        protocol: One of the table.
        window: At most the model's context. Default: the protocol's, even if that is too long for the model;
            `PROTOCOLS[protocol].window_for(model)` is not.
        stride: Default: the protocol's; if `window` is given, the same share of it.
        bos: `None`: a BOS token where the tokenizer puts one by default, once at the start of the text, or where the
            table says for models that are lost without (`bos_for`); `True`: where the table says; `False`: none.
        max_windows: Number of windows to run, spread evenly over the text. Default: all.
        batch_size: Windows that go through the model at once; it does not change the result but for rounding.
        store: Where the weights are, of a model that is not in memory (`streaming.load_streamed`): all windows go
            through one layer after the other. The result is the same.

    Raises:
        ConfigurationError: The window is longer than the text or the model's context, the tokenizer has no BOS token,
            there is no such protocol, or a number is impossible.
    """
    bos = bos_for(model, tokenizer) if bos is None else bos
    chosen = find_protocol(protocol).change(window=window, stride=stride, bos=bos)
    max_windows = checked("max_windows", max_windows, Count | None)
    batch_size = checked("batch_size", batch_size, Count)
    context = context_length(model)
    if context is not None and chosen.window > context:
        raise ConfigurationError(
            f"`window` is {chosen.window}, but the model's context is {context} tokens: lower `window`."
        )
    encoded, windows, ids, words = prepare(tokenizer, text, chosen, max_windows)
    _, starts, stops = windows.T
    counts = (stops - starts).tolist()
    losses = window_losses(model, ids, counts, batch_size, store=store)
    key = fingerprint([ids.numpy().tobytes(), *map(str, counts)])
    values = {"windows": len(windows), "window": ids.shape[1], "protocol": words, "source": text.source, "parts": {}}
    values["text_tokens"] = len(encoded.ids)
    totals = {"tokens": np.arange(len(encoded.ids) + 1), "words": encoded.words, "bytes": encoded.bytes}
    for kind, (unit, form) in _KINDS.items():
        if totals[unit] is None or not (counts := totals[unit][stops] - totals[unit][starts]).any():
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # infinite losses have no error
            mean, stderr = ratio_and_stderr(losses, counts)
            value = FORMS[form](mean)
            stderr = float(stderr * value if form == "exp" else FORMS[form](stderr))
        values |= {unit: int(counts.sum()), kind: float(value)}
        values["stderr" if unit == "tokens" else f"{kind}_stderr"] = stderr if math.isfinite(stderr) else None
        values["parts"][kind] = Parts.of(key, losses, counts, form)
    return PerplexityResult(nll=float(losses.sum() / values["tokens"]), **values)


def bos_for(model: nn.Module, tokenizer: Any) -> bool | None:
    """`True` for a model that is lost in a window without a BOS token, else `None`: as the tokenizer does by default.

    Papers put none into windows, and most models do well; Gemma's do not (of 2048 tokens of C4 without it,
    Gemma-3-270M has 1.6 times the perplexity), for which lm-eval, too, makes this exception (`HFLM`).
    """
    needs = "gemma" in str(getattr(getattr(model, "config", None), "model_type", ""))
    bos = as_tokenizer(tokenizer).bos_token_id
    return True if needs and bos is not None and beginning_of(as_tokenizer(tokenizer))[:1] == [bos] else None


class EncodedText(NamedTuple):
    """Tokens of a text: ids, words and bytes up to and with each, and the id of the BOS token.

    `words` and `bytes` are of shape `(len(ids) + 1,)`: `words[j] - words[i]` words belong to the tokens `i` to `j`
    (excluded); they are `None` if the tokenizer does not say which part of the text a token is. `bos` is `None` if the
    text begins with none and none is to stand before every window.
    """

    ids: list[int]
    words: np.ndarray | None
    bytes: np.ndarray | None
    bos: int | None


def encode(tokenizer: Any, text: str, bos: bool | None, everywhere: bool) -> EncodedText:
    """Tokenises a text once, with special tokens as the tokenizer adds them (`bos` is `None`), or without.

    With `bos`, a BOS token comes first; if `everywhere`, that is left to the caller, who puts it before every window.

    Words and bytes are those of the text itself, and their total is that of lm-eval's `wikitext` task:
    `len(re.split(r"\\s+", text))` and `len(text.encode())`. Each belongs to one token: a character to the first token
    that reaches its end, one that no token covers to the token behind it (at the end of the text: before it), a word
    to the token with its last character.
    """
    tokenizer = as_tokenizer(tokenizer)
    known = tokenizer.bos_token_id
    if bos and known is None:
        raise ConfigurationError("`bos` is True, but the tokenizer has no beginning-of-sequence token: leave it out.")
    parts = list(tokenise(tokenizer, text, add_special_tokens=bos is None))
    ids = np.concatenate([part.ids for part in parts]).tolist()
    ends = None if parts[0].ends is None else np.concatenate([part.ends for part in parts])
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
    content = np.frombuffer(text.encode(), dtype=np.uint8)
    characters = np.flatnonzero((content & 0xC0) != 0x80)  # the bytes that begin one
    return words, np.append(characters, len(content))[where]


def window_losses(
    model: PreTrainedModel, ids: torch.LongTensor, counts: list[int], batch_size: int,
    autocast: torch.dtype | None = None, store: OnDisk | None = None,
) -> np.ndarray:  # fmt: skip
    """Summed negative log-likelihood of the last `counts` tokens of each window, in nats, of shape `(windows,)`.

    `ids` are of shape `(windows, window)`, and at most `window - 1` tokens of each count. Of `autocast` see
    `measuring`; of `store`, `measure_perplexity`.
    """
    model = model if store is not None else for_text(model)
    ids, sums = ids if store is not None else ids.to(model.device), []
    with measuring(model, autocast=autocast):
        structure = None if store is None else ModelStructure.of(model, whole=False)
        with nullcontext() if store is None else without_layers(model, structure, ids[:1, :2], store):
            plain = has_plain_head(model, ids[:1])
        size = batch_size if plain else 1  # all logits of a window exist at once
        batches = list(zip(ids.split(size), torch.tensor(counts).split(size), strict=True))
        if store is not None:
            check_measuring(store, ids, size, plain, "take fewer windows (`max_windows`) or a smaller `batch_size`")
        whole = nullcontext(repeat(nullcontext()))
        with whole if store is None else layer_by_layer(model, structure, ids, size, store) as turns:
            for (rows, last), turn in zip(tqdm(batches, desc="Perplexity"), turns, strict=False):
                with turn:
                    losses = _losses(model, rows, last, plain)
                sums += [part.sum().item() for part in losses.split(last.tolist())]
    return np.array(sums)


def _losses(model: PreTrainedModel, ids: torch.LongTensor, counts: torch.LongTensor, plain: bool) -> torch.Tensor:
    """Losses of the tokens that count, one window after the other; a plain head is applied to some at a time."""
    if plain:
        values = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
    else:
        values, head = model(input_ids=ids, use_cache=False).logits, nn.Identity()
    places = (torch.arange(ids.shape[1]) >= ids.shape[1] - counts[:, None]).nonzero().to(values.device)
    losses, ids = [], ids.to(values.device)
    for part in places.split(positions_at_once(head.weight.shape[0] if plain else values.shape[-1])):
        rows, columns = part.unbind(1)
        logits = head(values[rows, columns - 1]).float()
        loss = F.cross_entropy(logits, ids[rows, columns].to(logits.device), reduction="none")
        losses.append(loss.cpu().double())  # not every accelerator knows float64
    return torch.cat(losses)
