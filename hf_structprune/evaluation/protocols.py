"""The protocols of perplexity by their names, and where their windows lie on a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import Count, Limits, check_choice, check_fields, checked
from ..errors import ConfigurationError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PerplexityProtocol:
    """How a text is cut into windows for perplexity.

    Args:
        window: Tokens that go through the model at once, a BOS token in every window counted.
        stride: Tokens of the text from the start of a window to the start of the next; `window` means no overlap.
        keep_tail: Whether what is left behind the last full window is measured, or dropped.
        bos: The beginning-of-sequence token: `None` as the tokenizer does by default (once at the start of the text,
            if at all), `True` always, `False` never.
        bos_everywhere: `bos=True` means one at the start of every window rather than at the start of the text.
    """

    window: Annotated[int, Limits(2)] = 2048
    stride: int = 2048
    keep_tail: bool = False
    bos: bool | None = None
    bos_everywhere: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.stride <= self.window:
            raise ConfigurationError(
                f"`stride` is {self.stride}; it must be 1 to {self.window}, the `window`, or tokens would be left out."
            )

    def change(
        self, *, window: int | None = None, stride: int | None = None, bos: bool | None = None
    ) -> PerplexityProtocol:
        """The protocol with other values; a stride that is not given keeps its ratio to the window."""
        window = checked("window", self.window if window is None else window, Count)
        stride = max(1, self.stride * window // self.window) if stride is None else stride
        return replace(self, window=window, stride=stride, bos=self.bos if bos is None else bos)

    @property
    def adds_bos_everywhere(self) -> bool:
        """Whether every window begins with a BOS token of its own."""
        return self.bos is True and self.bos_everywhere

    @property
    def content(self) -> int:
        """Tokens of the text in a window: all but a BOS token of its own."""
        return self.window - self.adds_bos_everywhere

    def window_for(self, model: PreTrainedModel) -> int:
        """The protocol's window, or the model's context where that is shorter."""
        return min(self.window, context_length(model) or self.window)

    def in_words(self, *, windows: int, found: int, window: int, starts_with_bos: bool) -> str:
        """What was done, for tables and cards.

        Args:
            windows: Number of windows that were run.
            found: Number of windows there are in the text.
            window: Their true size, which is smaller than the protocol's if the text is.
            starts_with_bos: Whether the text's tokens begin with a BOS token.
        """
        apart = self.stride < self.content or self.keep_tail
        words = f"{windows} {'' if apart else 'non-overlapping '}window{'s' if windows > 1 else ''} of {window} tokens"
        if apart:
            words += f", {self.stride} apart{' up to the end of the text' if self.keep_tail else ''}"
            words += ", every token predicted in the first window that holds it"
        else:
            words += f", {window - 1} predictions in each"
        if windows < found:
            words += f", evenly spaced over {found}"
        if self.adds_bos_everywhere:
            return f"{words}, BOS in each"
        return f"{words}, {'BOS once at the start of the text' if starts_with_bos else 'no BOS'}"


PROTOCOLS = {
    # Of compression papers: GPTQ, SparseGPT, Wanda, SliceGPT, ...
    "paper": PerplexityProtocol(),
    # LLMPruner/evaluator/ppl.py of https://github.com/horseee/LLM-Pruner at its default length. It runs four windows
    # at once; that does not change the result, so the batch size is the caller's.
    "llm-pruner": PerplexityProtocol(window=128, stride=128),
    # Every token of the text but the first is predicted, with as much context as the window allows
    # (https://huggingface.co/docs/transformers/perplexity). A BOS token, if asked for, comes once, as in lm-eval's
    # rolling likelihood; the first token of the text is then predicted too.
    "sliding": PerplexityProtocol(window=2048, stride=512, keep_tail=True, bos_everywhere=False),
}


def find_protocol(name: str) -> PerplexityProtocol:
    """The protocol of a name; raises a `ConfigurationError` if there is none."""
    check_choice("protocol", name, tuple(PROTOCOLS))
    return PROTOCOLS[name]


def context_length(model: Any) -> int | None:
    """The longest sequence the model was made for, if its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` (excluded) go through the model; those from `scored` on count."""

    start: int
    scored: int
    stop: int


def cut_windows(
    length: int, window: int, stride: int, *, keep_tail: bool = False, score_first: bool = False
) -> list[Window]:
    """Cuts `length` tokens into windows of one size in which every token counts at most once.

    Windows begin at `0, stride, 2 stride, ...`. A token counts in the first window that holds it, unless it is the
    first token of that window: nothing says what it could be predicted from. So of non-overlapping windows
    (`stride = window`) all tokens but the first count; of overlapping ones the tokens that were not in the window
    before, each with at least `window - stride` tokens of context.

    Args:
        length: Number of tokens.
        window: Tokens in a window.
        stride: Tokens from the start of a window to the start of the next, 1 to `window`.
        keep_tail: Add a window that ends with the last token, if there are tokens behind the last full window; it is
            of full size too (as in lm-eval's rolling windows), or as long as the text if that is shorter. Without it
            the incomplete window is dropped.
        score_first: The first token of a window counts too: something will be put before it.

    Returns:
        The windows in order, all of one size; none if the text is too short.
    """
    starts = list(range(0, length - window + 1, stride))
    if keep_tail and length > 0 and (not starts or starts[-1] + window < length):
        starts.append(max(0, length - window))
    size = min(window, length)
    windows, done = [], 0
    for start in starts:
        scored = max(done, start + (0 if score_first else 1))
        done = start + size
        if scored < done:
            windows.append(Window(start, scored, done))
    return windows


def spread(windows: list[Window], count: int | None) -> list[Window]:
    """`count` of the windows, evenly spaced: those numbered `floor(i n / count)` of `n`. `None` keeps all."""
    if count is None or count >= len(windows):
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]
