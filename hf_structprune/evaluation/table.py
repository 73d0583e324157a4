"""`ResultTable`: joins several results, compares each with the first one, and shows them to people and programs."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .comparison import BOOTSTRAP, MCNEMAR, PAIRED, UNPAIRED, Comparison, compare_figures, other_conditions
from .results import EvaluationResult, Figure


if TYPE_CHECKING:
    from rich.table import Table

MARK, UNPAIRED_MARK = "†", "‡"
_JUDGED = {True: " *", False: " ≈", None: " ?"}
_TESTS = {
    MCNEMAR: "right and wrong answers by McNemar's exact test",
    PAIRED: "means by two standard errors of the paired differences",
    BOOTSTRAP: "means of fewer than 30 by a bootstrap interval of the paired differences",
}
_FAMILIES = ("tasks", "efficiency")  # in this order, behind perplexities

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
class Cell:
    """One figure of one model.

    Attributes:
        value: The number.
        stderr: Its standard error, where it has one.
        difference: The number minus that of the baseline; `None` for the baseline itself, where the baseline was not
            measured, and where both were measured under different conditions.
        ratio: The number divided by that of the baseline; `None` in the same cases, and where the baseline is 0.
        comparable: Whether it was measured under the conditions of the first result that has this figure.
        comparison: Whether the difference is more than chance, see `compare_figures`; `None` where there is no
            difference, or neither single windows or documents nor standard errors of both.
    """

    value: float
    stderr: float | None = None
    difference: float | None = None
    ratio: float | None = None
    comparable: bool = True
    comparison: Comparison | None = None

    @property
    def significant(self) -> bool | None:
        return None if self.comparison is None else self.comparison.differs

    def to_dict(self) -> dict[str, Any]:
        judged = self.comparison or Comparison("", None)
        return {
            "value": self.value, "stderr": self.stderr, "difference": self.difference, "ratio": self.ratio,
            "significant": self.significant, "comparable": self.comparable, "test": judged.test or None,
            "low": judged.low, "high": judged.high, "p_value": judged.p_value,
        }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure of all models.

    Attributes:
        name: Name of the figure.
        figure: The figure as the first result has it that measured it: unit, direction, protocol.
        cells: One for each result; `None` where it was not measured.
    """

    name: str
    figure: Figure
    cells: tuple[Cell | None, ...]


class ResultTable:
    """Several results side by side; the first is the baseline that the others are compared with.

    Args:
        results: The results: dense, pruned, recovered, quantised, those of other tools.

    Attributes:
        results: The same.
        labels: A heading for each: its state, with the name of the model where states repeat.
        notes: What was measured under different conditions, and is therefore not compared.

    Raises:
        ConfigurationError: There is no result.
    """

    def __init__(self, results: Sequence[EvaluationResult]) -> None:
        if not results:
            raise ConfigurationError("There are no results to put into a table; give at least one.")
        self.results = tuple(results)
        self.labels = _labels(self.results)
        self._rows, self.notes = self._join()

    def rows(self) -> list[Row]:
        """One row for each figure that any of the results has: perplexities, tasks, efficiency."""
        return list(self._rows)

    def _join(self) -> tuple[list[Row], list[str]]:
        names = list(dict.fromkeys(name for result in self.results for name in result.figures))
        rows, deviations = [], {}
        for name in sorted(names, key=_family):  # a stable sort: within a family as measured
            reference = next(result for result in self.results if name in result.figures)
            cells = []
            for label, result in zip(self.labels, self.results, strict=True):
                words = other_conditions(name, result, reference) if name in result.figures else None
                cells.append(_compare(name, result, self.results[0], words is None))
                if words is not None:
                    key = (label, self.labels[self.results.index(reference)], words)
                    deviations.setdefault(key, []).append(name)
            rows.append(Row(name, reference.figures[name], tuple(cells)))
        notes = [
            f"{MARK} {label}: {', '.join(found)} measured under other conditions than {other}, not compared: {words}."
            for (label, other, words), found in deviations.items()
        ]
        return rows, notes

    def to_rich(self) -> Table:
        """For the terminal."""
        from rich.table import Table

        names = [f"{label}: {result.model}" for label, result in zip(self.labels, self.results, strict=True)]
        table = Table(title="\n".join(names), caption="\n".join(self._legend()) or None, caption_justify="left")
        for number, column in enumerate(self._columns()):
            table.add_column(column, justify="right" if number else "left")
        for row, following in zip(self._rows, [*self._rows[1:], None], strict=True):
            table.add_row(
                *self._texts(row), end_section=following is not None and _family(row.name) != _family(following.name)
            )
        return table

    def to_markdown(self) -> str:
        """As GitHub and the Hub show it, with the notes below."""
        columns = self._columns()
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *map(self._texts, self._rows)]
        text = "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines) + "\n"
        return "\n".join([text, *(f"{_escape(note)}\n" for note in self._legend())])

    def to_csv(self) -> str:
        """One line for each figure, unrounded; empty cells for what was not measured or not compared."""
        lines = []
        for row in self._rows:
            line = {"figure": row.name, "unit": row.figure.unit}
            for number, (label, cell) in enumerate(zip(self.labels, row.cells, strict=True)):
                for column, value in (Cell(math.nan) if cell is None else cell).to_dict().items():
                    if number or column in ("value", "stderr"):
                        key = label if column == "value" else f"{label} {column}"
                        line[key] = None if cell is None else value
            lines.append(line)
        file = io.StringIO()
        writer = csv.DictWriter(file, lines[0] if lines else ["figure", "unit"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, unrounded; infinite values are `None`."""
        results = [
            {"label": label, "model": result.model, "state": result.state, "base_model": result.base_model}
            for label, result in zip(self.labels, self.results, strict=True)
        ]
        rows = []
        for row in self._rows:
            figure = {"figure": row.name, "unit": row.figure.unit, "higher_is_better": row.figure.higher_is_better}
            cells = [cell and {key: _finite(value) for key, value in cell.to_dict().items()} for cell in row.cells]
            rows.append({**figure, "cells": dict(zip(self.labels, cells, strict=True))})
        return {"baseline": self.labels[0], "results": results, "rows": rows, "notes": list(self.notes)}

    def _columns(self) -> list[str]:
        columns = ["", self.labels[0]]
        for label in self.labels[1:]:
            columns += [label, f"{label} vs {self.labels[0]}"]
        return columns

    def _texts(self, row: Row) -> list[str]:
        scale = scale_of(row.figure, [cell.value for cell in row.cells if cell is not None])
        texts = [label_of(row.figure)]
        for number, cell in enumerate(row.cells):
            mark = "" if cell is None or cell.comparable else f" {MARK}"
            texts.append("" if cell is None else scale.value(cell.value, cell.stderr) + mark)
            if number:
                texts.append("" if cell is None or cell.difference is None else _change(cell, scale))
        return texts

    def _legend(self) -> list[str]:
        """What the signs mean, how differences were judged, and what was not compared."""
        cells = [cell for row in self._rows for cell in row.cells if cell is not None]
        found = [cell.comparison for cell in cells if cell.comparison is not None]
        lines = ["± standard error."] if any(cell.stderr is not None for cell in cells) else []
        paired = [comparison for comparison in found if comparison.test != UNPAIRED]
        if paired:
            used = {comparison.test for comparison in paired}
            tests = "; ".join(words for test, words in _TESTS.items() if test in used)
            few = ", ? too few to tell" if any(comparison.differs is None for comparison in paired) else ""
            lines.append(
                "Differences are judged pair by pair on the same windows and documents, each at the 5 % level"
                f"{tests and f' ({tests})'}: * differs, ≈ may be chance{few}."
            )
        for why in dict.fromkeys(comparison.why for comparison in found if comparison.test == UNPAIRED):
            lines.append(
                f"{UNPAIRED_MARK} compared unpaired, because {why}: * differs by more than two standard errors of "
                "both together, ≈ by less, which may still be more than chance."
            )
        return [*lines, *self.notes]


def _labels(results: Sequence[EvaluationResult]) -> list[str]:
    """The states; with the last part of the model's name where several share a state, numbered where that repeats."""
    states = Counter(result.state for result in results)
    labels = []
    for result in results:
        short = Path(result.model).name or result.model
        labels.append(result.state if states[result.state] == 1 else f"{result.state} {short}")
    repeated = Counter(labels)
    return [
        label if repeated[label] == 1 else f"{label} ({labels[: number + 1].count(label)})"
        for number, label in enumerate(labels)
    ]


def _family(name: str) -> int:
    family = name.partition("/")[0]
    return _FAMILIES.index(family) + 1 if family in _FAMILIES else 0


def _compare(name: str, result: EvaluationResult, baseline: EvaluationResult, comparable: bool) -> Cell | None:
    figure, base = result.figures.get(name), baseline.figures.get(name)
    if figure is None:
        return None
    # Two infinite values have no difference.
    if result is baseline or base is None or not comparable or math.isnan(figure.value - base.value):
        return Cell(figure.value, figure.stderr, comparable=comparable)
    ratio = figure.value / base.value if base.value else None
    comparison = compare_figures(figure, base)
    return Cell(figure.value, figure.stderr, figure.value - base.value, ratio, comparable, comparison)


def _change(cell: Cell, scale: Scale) -> str:
    """`"-4.10 pp (0.93x) *"`."""
    ratio = "" if cell.ratio is None or not math.isfinite(cell.ratio) else f" ({cell.ratio:,.2f}x)"
    mark = "" if cell.comparison is None else _JUDGED[cell.significant]
    unpaired = f" {UNPAIRED_MARK}" if cell.comparison is not None and cell.comparison.test == UNPAIRED else ""
    return scale.difference(cell.difference) + ratio + mark + unpaired


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


# ------------------------------------------------------------------------------------------- names and numbers


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
    family, *rest = figure.name.split("/")
    if family == "efficiency":
        name = "/".join(rest)
        text = _LABELS.get(name, name.replace("_", " "))
    else:
        text = ", ".join(rest if family == "tasks" else [family.replace("_", " "), *rest])
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
        for factor, decimals, unit in ((1e9, 2, "GB"), (1e6, 1, "MB"), (1e3, 1, "kB"), (1.0, 0, "B")):
            if largest >= factor or unit == "B":
                return Scale(1 / factor, decimals, f" {unit}{figure.unit[1:]}")
    if figure.unit == "s":
        return Scale(1.0, 2, " s") if largest >= 1 else Scale(1e3, 1, " ms")
    if figure.unit == "tokens/s":
        return Scale(1.0, 1, " tokens/s")
    if "perplexity" in figure.name:
        return Scale(1.0, 2, scientific=largest >= 1e6)
    return Scale(1.0, 4, f" {figure.unit}" if figure.unit else "")
