"""What is measured of a model and how: configurations and protocols, which need neither torch nor a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from .checks import Count, Limit, Limits, Number, check_choice, check_fields, checked
from .errors import ConfigurationError


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
        return self.bos is True and self.bos_everywhere

    @property
    def content(self) -> int:
        """Tokens of the text in a window: all but a BOS token of its own."""
        return self.window - self.adds_bos_everywhere

    def window_for(self, model: PreTrainedModel) -> int:
        """The protocol's window, or the model's context where that is shorter."""
        from .model.measuring import context_length  # which needs torch

        return min(self.window, context_length(model) or self.window)

    def in_words(self, *, windows: int, found: int, window: int, starts_with_bos: bool) -> str:
        """What was done, for tables and cards: in `windows` of the `found` windows of the text."""
        s, to_the_end = "s" if windows > 1 else "", " up to the end of the text" if self.keep_tail else ""
        words = f"{windows} non-overlapping window{s} of {window} tokens, {window - 1} predictions in each"
        if self.stride < self.content or self.keep_tail:
            words = f"{windows} window{s} of {window} tokens, {self.stride} apart{to_the_end}"
            words += ", every token predicted in the first window that holds it"
        spaced = f", evenly spaced over {found}" if windows < found else ""
        bos = "BOS once at the start of the text" if starts_with_bos else "no BOS"
        return f"{words}{spaced}, {'BOS in each' if self.adds_bos_everywhere else bos}"


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


@dataclass(frozen=True)
class EfficiencyConfig:
    """What is run to measure size and speed.

    Args:
        batch_size: Sequences at once.
        length: Tokens of a prompt; multiply-accumulates are counted for `batch_size` x `length`.
        new_tokens: Tokens that are generated after it: exactly so many.
        warmup: Runs before those that count.
        repeats: Runs that count; figures are their medians.
        speed: Whether time and peak memory are measured, and not only size.
        seed: Seed of the random token ids.
    """

    batch_size: Count = 1
    length: Count = 64
    new_tokens: Annotated[int, Limits(2)] = 32
    warmup: Number = 2
    repeats: Count = 5
    speed: bool = True
    seed: Number = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class EvaluationConfig:
    """What is measured.

    Args:
        texts (list of `str`, *optional*): Texts for perplexity: `sample` (packaged), `wikitext2`, `ptb`, `c4`, a file,
            a data set folder or a data set id of the Hub. Default: `sample`; `none`, or an empty list, measures none.
        protocol (`str`): How a text is cut into windows: `paper`, `llm-pruner` or `sliding`.
        window (`int`, *optional*): Tokens in a window. Default: the protocol's, or the model's context where that is
            shorter.
        stride (`int`, *optional*): Tokens from one window to the next. Default: the protocol's.
        bos (`bool`, *optional*): With or without a beginning-of-sequence token. Default: what the tokenizer does.
        max_windows (`int`, *optional*): At most so many windows of each text, evenly spaced. Default: all.
        tasks (list of `str`, *optional*): lm-eval tasks, groups, or suites (`llm-pruner`, `study-a`, `leaderboard`).
        num_fewshot (`int`, *optional*): Examples in the prompt of a task. Default: as the task says.
        limit (`float`, *optional*): Documents of each task, or their share if below 1. Default: all.
        include_path (`str`, *optional*): Folder with YAML files of further tasks.
        efficiency (`bool`): Measure size, memory and speed.
        samples (`bool`): Generate sample texts.
        generation (`bool`): Let the model answer 100 short closed questions and 100 open requests: how many are right,
            whether answers end and repeat themselves, and how far they are the dense model's. A minute or two for a
            model of 135 M parameters on one core.
        batch_size (`int`): Windows and documents that go through the model at once.
        seed (`int`): Seed of everything random.

    Raises:
        ConfigurationError: A value is impossible, or there is nothing to measure.
    """

    texts: Sequence[str] | None = field(default=None, metadata={"aliases": ["--text"]})
    protocol: str = "paper"
    window: int | None = None
    stride: int | None = None
    bos: bool | None = None
    max_windows: Count | None = None
    tasks: Sequence[str] | None = None
    num_fewshot: Number | None = None
    limit: Limit | None = None
    include_path: str | None = None
    efficiency: bool = True
    samples: bool = True
    generation: bool = False
    batch_size: Count = 8
    seed: Number = 42

    def __post_init__(self) -> None:
        check_fields(self)
        self.texts = tuple(dict.fromkeys(("sample",) if self.texts is None else self.texts))
        self.texts = () if self.texts == ("none",) else self.texts
        self.tasks = tuple(dict.fromkeys(self.tasks or ()))
        find_protocol(self.protocol).change(window=self.window, stride=self.stride, bos=self.bos)
        if not (self.texts or self.tasks or self.efficiency or self.samples or self.generation):
            raise ConfigurationError("There is nothing to measure: name texts or tasks, or set `efficiency`.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load(self) -> tuple[list[Any], list[str]]:
        """The texts, and the names of the tasks with suites taken apart; raises if one of them cannot be used."""
        return import_module(".evaluation.evaluator", __package__).load_inputs(self)  # which needs torch
