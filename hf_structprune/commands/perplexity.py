"""`hf-structprune perplexity MODEL`: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from ..errors import ConfigurationError
from .arguments import parse
from .common import ModelArguments, default_window, load_pruner, results_only_on_stdout, show


@dataclass
class PerplexityArguments:
    """Options of `perplexity`.

    Args:
        text (`str`, *optional*): A UTF-8 text file. Default: the WikiText-2 sample of the package.
        window (`int`, *optional*): Tokens in a window; windows do not overlap. Default: 2048, or the model's context
            where that is shorter.
        max_windows (`int`, *optional*): At most so many windows, evenly spaced over the text. Default: all.
    """

    text: str | None = None
    window: int | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise ConfigurationError(f"`window` is {self.window}; it must be at least 2.")
        if self.max_windows is not None and self.max_windows < 1:
            raise ConfigurationError(f"`max_windows` is {self.max_windows}; it must be at least 1.")


def run(argv: Sequence[str]) -> None:
    """Measures and prints."""
    description = "Perplexity of MODEL, dense or pruned, on a text (lower is better)."
    model, command = parse(argv, "perplexity", description, ModelArguments, PerplexityArguments)
    with results_only_on_stdout():
        from ..evaluation import perplexity, read_text

        text = None if command.text is None else read_text(command.text)
        pruner = load_pruner(model)
        window = command.window or default_window(pruner.model)
        result = perplexity(pruner.model, pruner.tokenizer, text, window=window, max_windows=command.max_windows)
    data = {"perplexity": result.perplexity, "tokens": result.tokens, "windows": result.windows}
    table = Table(title=f"Perplexity of {model.model}")
    for name in ("text", *data):
        table.add_column(name, justify="left" if name == "text" else "right")
    text_name = command.text or "WikiText-2 sample"
    table.add_row(text_name, f"{result.perplexity:,.2f}", f"{result.tokens:,}", f"{result.windows:,}")
    data["perplexity"] = result.perplexity if math.isfinite(result.perplexity) else None  # JSON has no infinity
    show(model.json, {"model": model.model, "text": text_name, "window": window, **data}, table)
