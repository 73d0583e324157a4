"""How figures are shown to people: names, scales and units; programs get the plain numbers instead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .results import Figure


# Metrics of tasks that are shares of questions, shown in per cent.
_SHARES = ("acc", "exact_match", "f1", "em", "pass@")
_LABELS = {
    "macs": "MACs",
    "macs_with_attention": "MACs with attention",
    "weight_bytes": "weights",
    "kv_cache_bytes_per_token": "KV cache per token",
}
_ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True)
class Scale:
    """The unit and the digits of one row, so that its cells read alike.

    Attributes:
        factor: What a value is multiplied with before it is shown.
        decimals: Digits after the point.
        unit: Shown after the number, its space included.
        difference_unit: The same after a difference: percentage points where values are per cent.
        scientific: `1.74e+10`, for perplexities of models that are broken.
    """

    factor: float = 1.0
    decimals: int = 2
    unit: str = ""
    difference_unit: str | None = None
    scientific: bool = False

    def value(self, value: float, stderr: float | None = None) -> str:
        """`"61.20 % ± 1.53"`, `"108.0 M"`, `"∞"`."""
        error = "" if stderr is None else f" ± {self._number(stderr, '')}"
        return self._number(value, "") + self.unit + error

    def difference(self, difference: float) -> str:
        """`"-4.10 pp"`, `"+3.25"`."""
        return self._number(difference, "+") + (self.unit if self.difference_unit is None else self.difference_unit)

    def _number(self, value: float, sign: str) -> str:
        if not math.isfinite(value):
            return f"{'-' if value < 0 else sign}∞" if math.isinf(value) else "nan"
        form = f".{self.decimals}e" if self.scientific else f",.{self.decimals}f"
        return format(value * self.factor, sign + form)


def label_of(figure: Figure) -> str:
    """The name of a figure in a table: `"boolq, acc ↑"`, `"perplexity, wikitext2 ↓"`, `"time to first token ↓"`."""
    family, _, rest = figure.name.partition("/")
    if family == "efficiency":
        text = _LABELS.get(rest, rest.replace("_", " "))
    elif family == "tasks":
        text = ", ".join(rest.split("/"))
    else:
        text = ", ".join([family.replace("_", " "), *([rest] if rest else [])])
    return text + _ARROWS[figure.higher_is_better]


def scale_of(figure: Figure, values: Iterable[float]) -> Scale:
    """The scale that suits all values of one row, by what the figure is and by the largest of them."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    metric = figure.name.rpartition("/")[2]
    if figure.name.startswith("tasks/") and metric.startswith(_SHARES):
        return Scale(100.0, 2, " %", " pp")
    if figure.name == "efficiency/parameters":
        return Scale(1e-6, 1, " M") if largest >= 1e6 else Scale(decimals=0)
    if figure.unit == "MAC":
        return Scale(1e-9, 2, " G") if largest >= 1e8 else Scale(1e-6, 2, " M")
    if figure.unit == "B" or figure.unit.startswith("B/"):
        return _bytes(largest, figure.unit[1:])
    if figure.unit == "s":
        return Scale(1.0, 2, " s") if largest >= 1 else Scale(1e3, 1, " ms")
    if figure.unit == "tokens/s":
        return Scale(1.0, 1, " tokens/s")
    if "perplexity" in figure.name:
        return Scale(1.0, 2, scientific=largest >= 1e6)
    return Scale(1.0, 4, f" {figure.unit}" if figure.unit else "")


def _bytes(largest: float, per: str) -> Scale:
    for factor, decimals, unit in ((1e9, 2, "GB"), (1e6, 1, "MB"), (1e3, 1, "kB")):
        if largest >= factor:
            return Scale(1 / factor, decimals, f" {unit}{per}")
    return Scale(1.0, 0, f" B{per}")
