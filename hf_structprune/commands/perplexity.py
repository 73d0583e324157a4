"""`hf-structprune perplexity MODEL`: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from ..checks import Count, check_fields
from .arguments import parse
from .common import ModelArguments, default_window, load_for_measuring, results_only_on_stdout, show


if TYPE_CHECKING:
    from ..evaluation import PerplexityResult


@dataclass
class PerplexityArguments:
    """Options of `perplexity`.

    Args:
        text (`str`): `sample` (packaged), `wikitext2`, `ptb` or `c4` (from the Hub), a .txt, .jsonl or .json file, a
            dataset folder, or the id of a dataset on the Hub.
        text_config_name (`str`, *optional*): Configuration name of a dataset.
        split (`str`, *optional*): Split of a dataset. Default: `test`; `c4` has only `validation`.
        column (`str`, *optional*): Column of a dataset, or key in a JSON file. Default: `text`.
        protocol (`str`): `paper` (non-overlapping windows of 2048), `llm-pruner` (the same of 128) or `sliding`
            (windows of 2048, 512 apart; every token but the first counts).
        window (`int`, *optional*): Tokens in a window. Default: the protocol's, or the model's context where that is
            shorter.
        stride (`int`, *optional*): Tokens from window to window. Default: the protocol's, in proportion to the window.
        bos (`bool`, *optional*): With or without a beginning-of-sequence token: in every window, with `sliding` at the
            start of the text. Default: what the tokenizer does.
        max_windows (`int`, *optional*): At most so many windows, evenly spaced over the text. Default: all.
        batch_size (`int`): Windows that go through the model at once.
    """

    text: str = "sample"
    text_config_name: str | None = None
    split: str | None = None
    column: str | None = None
    protocol: str = "paper"
    window: int | None = None
    stride: int | None = None
    bos: bool | None = None
    max_windows: Count | None = None
    batch_size: Count = 1

    def __post_init__(self) -> None:
        from ..evaluation.protocols import find_protocol

        check_fields(self)
        find_protocol(self.protocol).change(window=self.window, stride=self.stride, bos=self.bos)


def run(argv: Sequence[str]) -> None:
    """Measures and prints."""
    description = "Perplexity of MODEL, dense, pruned or quantised, on a text (lower is better)."
    model, command = parse(argv, "perplexity", description, ModelArguments, PerplexityArguments)
    with results_only_on_stdout():
        from ..evaluation import load_text, measure_perplexity

        text = load_text(
            command.text, config_name=command.text_config_name, split=command.split, column=command.column
        )
        loaded, tokenizer = load_for_measuring(model)
        result = measure_perplexity(
            loaded,
            tokenizer,
            text,
            command.protocol,
            window=command.window or default_window(loaded, command.protocol),
            stride=command.stride,
            bos=command.bos,
            max_windows=command.max_windows,
            batch_size=command.batch_size,
        )
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "parts"}
    # JSON has no infinity and no NaN.
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    data = {"model": model.model, "text": command.text, **values, "protocol": command.protocol}
    show(model.json, {**data, "protocol_in_words": result.protocol}, _table(model.model, command, result))


def _table(model: str, command: PerplexityArguments, result: PerplexityResult) -> Table:
    table = Table(title=f"Perplexity of {model}", show_header=False)
    table.add_row("text", f"{command.text} ({result.source})")
    table.add_row("protocol", f"{command.protocol}: {result.protocol}")
    for figure in result.figures(""):
        places = 4 if figure.unit else 2
        error = "" if figure.stderr is None else f" ± {figure.stderr:,.{places}f}"
        table.add_row(figure.name.rstrip("/").replace("_", " "), f"{figure.value:,.{places}f}{error}")
    for name in ("tokens", "words", "bytes", "windows"):
        if getattr(result, name) is not None:
            table.add_row(name, f"{getattr(result, name):,}")
    return table
