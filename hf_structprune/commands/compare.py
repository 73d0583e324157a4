"""`hf-structprune compare A.json B.json ...`: results of several evaluations in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ..checks import OneOf
from ..evaluation.results import RESULTS_NAME, STATES, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.places import check_place
from ..files.writing import write_text
from .arguments import parse
from .common import results_only_on_stdout, show


FORMATS = ("table", "md", "csv", "json")


@dataclass
class CompareArguments:
    """Options of `compare`.

    Args:
        results (list of `str`): JSON files made by `evaluate`, the baseline first; a folder stands for its
            `evaluation_results.json`, a single one also for the results of the dense model beside it, and of a
            recovered or quantised one also for those of the states before.
        format (`str`, *optional*): `table`, `md` (GitHub and the Hub), `csv` or `json`; the last two are not rounded.
            Default: by the name of the output, else `table`.
        output (`str`, *optional*): File to write instead of printing.
        pictures (`str`, *optional*): Folder to draw quality against size, and speed, into (PNG).
    """

    results: list[str]
    format: Annotated[str, OneOf(FORMATS)] | None = None
    output: str | None = None
    pictures: str | None = None

    def __post_init__(self) -> None:
        if self.format is None:
            suffix = Path(self.output or "").suffix[1:]
            self.format = suffix if suffix in FORMATS else "table"


def run(argv: Sequence[str]) -> None:
    """Joins and prints."""
    description = (
        "Show the results of several evaluations in one table; the first are what the others are compared with."
    )
    (command,) = parse(argv, "compare", description, CompareArguments)
    if command.pictures is not None:
        check_place(command.pictures)
    if command.output is not None:
        check_place(command.output, file=True)
    results = [EvaluationResult.load(path) for path in _paths(command.results)]
    table = ResultTable(results)
    if command.pictures is not None:
        from ..evaluation.pictures import draw_all

        with results_only_on_stdout():
            draw_all(results, Path(command.pictures))
    if command.output is not None:
        write_text(command.output, _text(table, command.format))
    elif command.format == "table":
        show(False, {}, table.to_rich())
    else:
        print(_text(table, command.format), end="")


def _paths(names: list[str]) -> list[Path]:
    paths = [Path(name) for name in names]
    if len(paths) > 1:
        return paths
    beside = [paths[0] / RESULTS_NAME.replace(".json", f"_{state}.json") for state in STATES[:-1]]
    return [*(path for path in beside if path.is_file()), *paths]


def _text(table: ResultTable, form: str) -> str:
    if form == "md":
        return table.to_markdown()
    if form == "csv":
        return table.to_csv()
    if form == "json":
        return json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table.to_rich())
    return capture.get()
