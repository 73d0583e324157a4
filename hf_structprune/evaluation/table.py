"""`ResultTable`: joins several results, compares each with the first one, and shows them to people and programs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigurationError
from .answers import ANSWERS, agreement_with
from .comparison import Comparison, compare_parts
from .results import EvaluationResult, Figure, csv_text


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

MARK, UNPAIRED_MARK = "†", "‡"
_JUDGED = {True: " *", False: " ≈", None: " ?"}
_TESTS = {
    "mcnemar": "right and wrong answers by McNemar's exact test",
    "paired": "means by two standard errors of the paired differences",
    "bootstrap": "means of fewer than 30 by a bootstrap interval of the paired differences",
}
# Details of a figure that say how it was measured; others (counts, spreads) say what came out.
_CONDITIONS = (
    "version", "num_fewshot", "samples", "filter", "source", "window", "stride", "bos",
    "batch_size", "length", "new_tokens", "device",
)  # fmt: skip

_PER_TOKEN = "perplexity/"
# Of windows in the words of a protocol: "12 non-overlapping windows ..., evenly spaced over 137".
_NUMBERS = re.compile(r"^\d+ |, evenly spaced over \d+|(?<=window)s")

# Metrics of tasks that are shares of questions, shown in per cent.
_SHARES = ("acc", "exact_match", "f1", "em", "pass@")
_LABELS = {
    "macs": "MACs", "macs_with_attention": "MACs with attention", "weight_bytes": "weights",
    "kv_cache_bytes_per_token": "KV cache per token", "questions": "closed questions answered",
    "ended": "answers that end", "repetition": "repeated in answers", "length": "tokens of an answer",
    "agreement": "answer as the dense model's until", "same": "answers all the dense model's",
}  # fmt: skip
_ARROWS = {True: " ↑", False: " ↓", None: ""}


@dataclass(frozen=True)
class Cell:
    """One figure of one model.

    Attributes:
        value, stderr: The number, and its standard error where it has one.
        difference, ratio: To that of the baseline; `None` without one measured under the same conditions, and where a
            ratio would be to 0.
        comparable: Whether it was measured under the conditions of the first result that has this figure.
        comparison: Whether the difference is more than chance, see `compare_figures`.
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
        names = ("value", "stderr", "difference", "ratio", "significant", "comparable")
        judged = {key: getattr(self.comparison, key, None) for key in ("test", "low", "high", "p_value")}
        return {**{key: getattr(self, key) for key in names}, **judged}


@dataclass(frozen=True)
class Row:
    """One figure (as the first result has it that measured it) of all models; `None` where it was not measured."""

    name: str
    figure: Figure
    cells: tuple[Cell | None, ...]


class ResultTable:
    """Several results side by side; the first is the baseline that the others are compared with.

    Attributes:
        results: The results: dense, pruned, recovered, quantised, those of other tools; at least one.
        labels: A heading for each: its state, with the name of the model where states repeat.
        notes: What was measured under different conditions, and is therefore not compared.
    """

    def __init__(self, results: Sequence[EvaluationResult]) -> None:
        if not results:
            raise ConfigurationError("There are no results to put into a table; give at least one.")
        self.results, self.labels = tuple(results), _labels(results)
        self.results = results = _with_agreement(self.results)
        self._rows: list[Row] = []
        others = defaultdict(list)  # figures by whose they are, whom they are not compared with, and why
        names = dict.fromkeys(name for result in results for name in result.figures)
        last = {name for name in names if name.startswith(_PER_TOKEN) and len(_vocabularies(name, results)) > 1}
        for name in sorted(names, key=lambda name: (_family(name), name in last)):  # stable: else as measured
            first, cells = next(number for number, result in enumerate(results) if name in result.figures), []
            for number, result in enumerate(results):
                why = _other_conditions(name, result, results[first]) if name in result.figures else None
                base = results[0].figures.get(name) if number and why is None else None
                cells.append(_cell(result.figures.get(name), base, why is None))
                if why is not None:
                    others[self.labels[number], self.labels[first], why].append(name)
            self._rows.append(Row(name, results[first].figures[name], tuple(cells)))
        self.notes = [
            f"{MARK} {label}: {', '.join(found)} measured under other conditions than {first}, not compared: {why}."
            for (label, first, why), found in others.items()
        ]

    def rows(self) -> list[Row]:
        """One row for each figure that any of the results has: perplexities, tasks, generation, efficiency."""
        return list(self._rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.to_rich(options.max_width)

    def to_rich(self, width: int | None = None) -> Table:
        """For the terminal; in fewer columns of `width` than it wants, changes are short and under their values."""
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        names = [f"{label}: {result.model}" for label, result in zip(self.labels, self.results, strict=True)]
        columns, lines = self._columns(), [self._texts(row) for row in self._rows]
        wanted = sum(max(map(cell_len, column)) + 3 for column in zip(columns, *lines, strict=True)) + 1
        if width is not None and width < wanted:
            columns, lines = ["", *self.labels], [self._texts(row, stacked=True) for row in self._rows]
        title = Text("\n".join(names), overflow="ignore")
        table = Table(title=title, caption="\n".join(self._legend()) or None, caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        of_rows = zip(self._rows, lines, strict=True)
        for _, found in groupby(of_rows, key=lambda pair: _family(pair[0].name)):
            table.add_section()
            for _, line in found:
                table.add_row(*line)
        return table

    def to_markdown(self) -> str:
        """As GitHub and the Hub show it, with the notes below."""
        columns = self._columns()
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *map(self._texts, self._rows)]
        text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        notes = ["\n" + note.replace("|", "\\|") + "\n" for note in self._legend()]
        return (text + "".join(notes)).replace("*", "\\*")

    def to_csv(self) -> str:
        """One line for each figure, unrounded; empty cells for what was not measured or not compared."""
        lines = []
        for row in self._rows:
            line = {"figure": row.name, "unit": row.figure.unit}
            for label, cell in zip(self.labels, row.cells, strict=True):
                for column, value in (cell or Cell(math.nan)).to_dict().items():
                    if label != self.labels[0] or column in ("value", "stderr"):
                        line[label if column == "value" else f"{label} {column}"] = None if cell is None else value
            lines.append(line)
        return csv_text(lines or [{"figure": "", "unit": ""}])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, unrounded; infinite values are `None`."""
        results = [
            {"label": label, "model": result.model, "state": result.state, "base_model": result.base_model}
            for label, result in zip(self.labels, self.results, strict=True)
        ]
        rows = []
        for row in self._rows:
            cells = [
                cell
                and {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in cell.to_dict().items()}
                for cell in row.cells
            ]
            figure = {"figure": row.name, "unit": row.figure.unit, "higher_is_better": row.figure.higher_is_better}
            rows.append({**figure, "cells": dict(zip(self.labels, cells, strict=True))})
        return {"baseline": self.labels[0], "results": results, "rows": rows, "notes": list(self.notes)}

    def _columns(self) -> list[str]:
        columns = ["", self.labels[0]]
        for label in self.labels[1:]:
            columns += [label, f"{label} vs {self.labels[0]}"]
        return columns

    def _texts(self, row: Row, stacked: bool = False) -> list[str]:
        """The cells of a line: values and changes, or `stacked` in one cell each."""
        scale = scale_of(row.figure, [cell.value for cell in row.cells if cell is not None])
        texts = [label_of(row.figure)]
        for number, cell in enumerate(row.cells):
            mark = "" if cell is None or cell.comparable else f" {MARK}"
            value = "" if cell is None else scale.value(cell.value, cell.stderr) + mark
            change = "" if cell is None or cell.difference is None else _change(cell, scale, stacked)
            if stacked or not number:
                texts.append(f"{value}\n{change}" if number and change else value)
            else:
                texts += [value, change]
        return texts

    def _legend(self) -> list[str]:
        """What the signs mean, how differences were judged, and what was not compared."""
        cells = [cell for row in self._rows for cell in row.cells if cell is not None]
        found = [cell.comparison for cell in cells if cell.comparison is not None]
        lines = ["± standard error."] if any(cell.stderr is not None for cell in cells) else []
        paired = {comparison.test for comparison in found} - {"unpaired"}
        if paired:
            tests = "; ".join(words for test, words in _TESTS.items() if test in paired)
            few = ", ? too few to tell" if "too few" in paired else ""
            lines.append(
                "Differences are judged pair by pair on the same windows and documents, each at the 5 % level"
                f"{tests and f' ({tests})'}: * differs, ≈ may be chance{few}."
            )
        lines += [
            f"{UNPAIRED_MARK} compared unpaired, because {why}: * differs by more than two standard errors of both "
            "together, ≈ by less, which may still be more than chance."
            for why in dict.fromkeys(comparison.why for comparison in found if comparison.test == "unpaired")
        ]
        return [*lines, *self.notes]


def _with_agreement(results: Sequence[EvaluationResult]) -> tuple[EvaluationResult, ...]:
    """The results, each with how far its answers are those of the dense model, if there is one among them."""
    dense = next((one for one in results if one.state == "dense" and ANSWERS in one.figures), None)
    found = []
    for one in results:
        if dense is not None and one is not dense and ANSWERS in one.figures:
            more = {figure.name: figure for figure in agreement_with(one.figures[ANSWERS], dense.figures[ANSWERS])}
            one = dataclasses.replace(one, figures={**one.figures, **more})
        found.append(one)
    return tuple(found)


def _labels(results: Sequence[EvaluationResult]) -> list[str]:
    """The states; with the last part of the model's name where several share a state, numbered where that repeats."""
    states = Counter(result.state for result in results)
    labels = [r.state if states[r.state] == 1 else f"{r.state} {Path(r.model).name or r.model}" for r in results]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: number + 1].count(label)})"
        for number, label in enumerate(labels)
    ]


def _vocabularies(name: str, results: Sequence[EvaluationResult]) -> set[int]:
    """How many tokens a text has, where that is known: different ones are of different vocabularies."""
    found = (result.figures[name].details.get("text_tokens") for result in results if name in result.figures)
    return {tokens for tokens in found if tokens is not None}


def _family(name: str) -> int:
    """Perplexities, tasks, generation, efficiency: in this order."""
    return {"tasks": 1, "generation": 2, "efficiency": 3}.get(name.partition("/")[0], 0)


def _cell(figure: Figure | None, base: Figure | None, comparable: bool) -> Cell | None:
    if figure is None:
        return None
    if base is None or math.isnan(figure.value - base.value):  # two infinite values have no difference
        return Cell(figure.value, figure.stderr, comparable=comparable)
    ratio = figure.value / base.value if base.value else None
    return Cell(figure.value, figure.stderr, figure.value - base.value, ratio, True, compare_figures(figure, base))


def compare_figures(figure: Figure, base: Figure) -> Comparison | None:
    """Compares by pairs where both were measured on the same windows or documents, else by the standard errors.

    Unpaired, `|d| > 2 sqrt(s^2 + s_base^2)` is called a difference: right if each had been measured on a sample of its
    own, and blind to most differences if not.
    """
    parts = (base.parts, figure.parts)
    if None not in parts and parts[0].pairs_with(parts[1]):
        return compare_parts(*parts)
    if figure.stderr is None or base.stderr is None:
        return None
    missing = "the results do not hold the single windows or documents of both sides"
    why = missing if None in parts else "the windows or documents are not the same on both sides"
    return Comparison("unpaired", abs(figure.value - base.value) > 2 * math.hypot(figure.stderr, base.stderr), why=why)


def _other_conditions(name: str, result: EvaluationResult, reference: EvaluationResult) -> str | None:
    """`"limit is 100 instead of 200"`: why a figure is not compared with the reference's; `None` where it may be."""
    mine, other = _conditions_of(name, result), _conditions_of(name, reference)
    if len(_vocabularies(name, [result, reference])) > 1:
        if name.startswith(_PER_TOKEN):
            one, two = (f"{each.figures[name].details['text_tokens']:,}" for each in (result, reference))
            return f"its vocabulary makes {one} tokens of the text instead of {two}: compare words or bytes"
        for conditions in (mine, other):  # how many windows there are follows from the number of tokens
            conditions["protocol"] = _NUMBERS.sub("", conditions["protocol"])
    keys = [key for key in {**other, **mine} if mine.get(key) != other.get(key)]
    # The protocol repeats the numbers; it is quoted only where it is all there is.
    keys = [key for key in keys if key != "protocol"] or keys
    return ", ".join(f"{key} is {_said(mine, key)} instead of {_said(other, key)}" for key in keys) or None


def _conditions_of(name: str, result: EvaluationResult) -> dict[str, Any]:
    figure, conditions = result.figures[name], {}
    if figure.unit in ("s", "tokens/s"):  # which depend on the machine
        hardware = result.environment.get("hardware", {})
        conditions = {key: hardware.get(key) for key in ("device", "threads")}
    details = {key: figure.details[key] for key in _CONDITIONS if key in figure.details}
    return {"protocol": figure.protocol, **details, **conditions}


def _said(conditions: dict[str, Any], key: str) -> str:
    return repr(conditions[key]) if conditions.get(key, "") != "" else "unknown"


def _change(cell: Cell, scale: Scale, short: bool = False) -> str:
    """`"-4.10 pp (0.93x) *"`; in `short` `"0.93x *"`, or the difference of what is in per cent or has no ratio."""
    ratio = "" if cell.ratio is None or not isfinite(cell.ratio) else f"{cell.ratio:,.2f}x"
    mark = "" if cell.comparison is None else _JUDGED[cell.significant]
    unpaired = f" {UNPAIRED_MARK}" if getattr(cell.comparison, "test", None) == "unpaired" else ""
    told = scale.difference(cell.difference) + (ratio and f" ({ratio})")
    if short:
        told = ratio if ratio and scale.difference_unit is None else scale.difference(cell.difference)
    return told + mark + unpaired


class Scale(NamedTuple):
    """The factor, the format and the unit of one row, and the unit of differences, so that its cells read alike."""

    factor: float = 1.0
    form: str = ",.2f"
    unit: str = ""
    difference_unit: str | None = None

    def value(self, value: float, stderr: float | None = None) -> str:
        """`"61.20 % ± 1.53"`, `"108.0 M"`, `"∞"`."""
        error = "" if stderr is None else f" ± {self._number(stderr, '')}"
        return self._number(value, "") + self.unit + error

    def difference(self, difference: float) -> str:
        """`"-4.10 pp"`, `"+3.25"`."""
        return self._number(difference, "+") + (self.unit if self.difference_unit is None else self.difference_unit)

    def _number(self, value: float, sign: str) -> str:
        return format(value * self.factor, sign + self.form).replace("inf", "∞")


# By what a figure is: from which value on (of the largest in the row) which scale.
_SCALES = {
    "share": ((0, Scale(100.0, ",.2f", " %", " pp")),),
    "parameters": ((1e6, Scale(1e-6, ",.1f", " M")), (0, Scale(1.0, ",.0f"))),
    "perplexity": ((1e6, Scale(1.0, ".2e")), (0, Scale())),  # of models that are broken
    "MAC": ((1e8, Scale(1e-9, ",.2f", " G")), (0, Scale(1e-6, ",.2f", " M"))),
    "s": ((1, Scale(1.0, ",.2f", " s")), (0, Scale(1e3, ",.1f", " ms"))),
    "tokens": ((0, Scale(1.0, ",.1f")),),
    "tokens/s": ((0, Scale(1.0, ",.1f", " tokens/s")),),
    "B": (
        (1e9, Scale(1e-9, ",.2f", " GB")), (1e6, Scale(1e-6, ",.1f", " MB")), (1e3, Scale(1e-3, ",.1f", " kB")),
        (0, Scale(1.0, ",.0f", " B")),
    ),
}  # fmt: skip


def label_of(figure: Figure) -> str:
    """The name of a figure in a table: `"boolq, acc ↑"`, `"perplexity, wikitext2 ↓"`, `"time to first token ↓"`."""
    family, *rest = figure.name.split("/")
    if family in ("efficiency", "generation"):
        rest = [_LABELS.get("/".join(rest), "/".join(rest).replace("_", " "))]
    elif family != "tasks":
        rest = [family.replace("_", " "), *rest]
    return ", ".join(rest) + _ARROWS[figure.higher_is_better]


def scale_of(figure: Figure, values: Iterable[float]) -> Scale:
    """The scale that suits all values of one row, by what the figure is and by the largest of them."""
    largest = max((abs(value) for value in values if isfinite(value)), default=0.0)
    kind = figure.unit
    of_task = figure.name.startswith("tasks/") and figure.name.rpartition("/")[2].startswith(_SHARES)
    if of_task or (figure.name.startswith("generation/") and not figure.unit):
        kind = "share"
    elif figure.name == "efficiency/parameters":
        kind = "parameters"
    elif "perplexity" in figure.name:
        kind = "perplexity"
    steps = _SCALES.get(kind) or ((0, Scale(1.0, ",.4f", f" {figure.unit}" if figure.unit else "")),)
    return next(scale for least, scale in steps if largest >= least)
