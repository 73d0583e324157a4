"""`hf-structprune evaluate`, `perplexity` and `compare`: measures models and shows them side by side."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from ..checks import Count, OneOf, check_fields
from ..config import CONFIG_NAME
from ..errors import ConfigurationError
from ..evaluation.evaluator import EvaluationConfig, evaluate
from ..evaluation.results import RESULTS_NAME, STATES, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.places import check_place
from ..files.writing import write_text
from ..plan import PLAN_NAME, PruningPlan
from .arguments import parse
from .cli import results_only_on_stdout, show
from .models import (
    ModelArguments,
    Subject,
    baseline_output,
    find_baseline,
    find_subject,
    load_for_measuring,
    save_baseline,
)


if TYPE_CHECKING:
    from ..evaluation import PerplexityResult


@dataclass
class EvaluateArguments:
    """Options of `evaluate`.

    Args:
        baseline (`str`, *optional*): What MODEL is compared with, usually the dense model: a model to measure in the
            same way (id, folder or .gguf file), or the JSON of an earlier evaluation.
        suite (list of `str`, *optional*): Tasks that studies report together, besides `tasks`: `llm-pruner`,
            `study-a`, `leaderboard`.
        output (`str`, *optional*): JSON file for the results, saved after each step; an interrupted evaluation goes on
            from it. The baseline's go beside it, with `_dense` in the name. Default: `evaluation_results.json` in
            MODEL if that is a folder made by `prune`; else they are only printed.
        state (`str`, *optional*): `dense`, `pruned`, `recovered` or `quantised`. Default: what the files of MODEL say.
        base_model (`str`, *optional*): What MODEL was made from. Default: what its files say, or the baseline.
        pictures (`bool`): Draw pictures (PNG) into a folder `pictures` beside the results.
        overwrite (`bool`): Measure anew what other settings or another model have left in the output.
    """

    baseline: str | None = None
    suite: list[str] | None = None
    output: str | None = None
    state: str | None = None
    base_model: str | None = None
    pictures: bool = False
    overwrite: bool = False


def evaluate_command(argv: Sequence[str]) -> None:
    """Measures, saves and prints."""
    from ..evaluation.pictures import draw_all
    from ..evaluation.tasks import SUITES

    description = "Measure MODEL: perplexity, tasks, size, memory, speed and sample texts."
    model, command, config = parse(argv, "evaluate", description, ModelArguments, EvaluateArguments, EvaluationConfig)
    for name in command.suite or ():
        if name not in SUITES:
            raise ConfigurationError(f"`suite` is {name!r}; the suites are {', '.join(SUITES)}; tasks go to --tasks.")
    config = dataclasses.replace(config, tasks=[*(command.suite or ()), *config.tasks])
    folder = Path(model.model)
    output = folder / RESULTS_NAME if command.output is None and (folder / CONFIG_NAME).is_file() else command.output
    if output is not None:
        check_place(output, file=True)
        output = Path(output)
    elif command.pictures:
        raise ConfigurationError("--pictures needs --output: they are saved beside the results.")
    with results_only_on_stdout():
        subject = find_subject(model, command.state)
        baseline = None if command.baseline is None else find_baseline(command.baseline, model)
        plan = PruningPlan.load(folder) if command.pictures and (folder / PLAN_NAME).is_file() else None
        config.load()  # what is wrong with texts and tasks shows before a model is loaded
        results = _measure(subject, baseline, config, command, output)
        if command.pictures:
            draw_all(results, output.parent / "pictures", plan)
    table = ResultTable(results)
    where = "Not saved: there was no --output." if output is None else f"Saved to {output}"
    show(model.json, {**table.to_dict(), "output": None if output is None else str(output)}, table.to_rich(), where)


def _measure(
    subject: Subject,
    baseline: Subject | EvaluationResult | None,
    config: EvaluationConfig,
    command: EvaluateArguments,
    output: Path | None,
) -> list[EvaluationResult]:
    """The results, those of the baseline first; only one model is in memory at a time."""
    beside = None if output is None or baseline is None else baseline_output(output, baseline)
    first = [baseline] if isinstance(baseline, EvaluationResult) else []
    if first and beside is not None:
        save_baseline(baseline, beside, command.overwrite)
    elif isinstance(baseline, Subject):
        first = [_evaluate(baseline, config, beside, baseline.base_model, command.overwrite)]
    base = command.base_model or subject.base_model or (first[0].model if first else None)
    return [*first, _evaluate(subject, config, output, base, command.overwrite)]


def _evaluate(
    subject: Subject, config: EvaluationConfig, output: Path | None, base_model: str | None, overwrite: bool
) -> EvaluationResult:
    model, tokenizer = load_for_measuring(subject.arguments)
    folder = Path(subject.arguments.model)
    name = folder.absolute().name if folder.is_dir() else subject.arguments.model  # results are published: no paths
    about = {"name": name, "state": subject.state, "base_model": base_model}
    return evaluate(model, tokenizer, config, **about, output=output, overwrite=overwrite)


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
        from ..evaluation.perplexity import find_protocol

        check_fields(self)
        find_protocol(self.protocol).change(window=self.window, stride=self.stride, bos=self.bos)


def perplexity_command(argv: Sequence[str]) -> None:
    """Measures and prints."""
    description = "Perplexity of MODEL, dense, pruned or quantised, on a text (lower is better)."
    model, command = parse(argv, "perplexity", description, ModelArguments, PerplexityArguments)
    with results_only_on_stdout():
        from ..evaluation import load_text, measure_perplexity
        from ..evaluation.perplexity import find_protocol

        dataset = {"config_name": command.text_config_name, "split": command.split, "column": command.column}
        text = load_text(command.text, **dataset)
        loaded, tokenizer = load_for_measuring(model)
        window = command.window or find_protocol(command.protocol).window_for(loaded)
        options = {name: getattr(command, name) for name in ("stride", "bos", "max_windows", "batch_size")}
        result = measure_perplexity(loaded, tokenizer, text, command.protocol, window=window, **options)
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "parts"}
    # JSON has no infinity and no NaN.
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    data = {"model": model.model, "text": command.text, **values, "protocol": command.protocol}
    show(model.json, {**data, "protocol_in_words": result.protocol}, _perplexity_table(model.model, command, result))


def _perplexity_table(model: str, command: PerplexityArguments, result: PerplexityResult) -> Table:
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


def compare_command(argv: Sequence[str]) -> None:
    """Joins and prints."""
    description = (
        "Show the results of several evaluations in one table; the first are what the others are compared with."
    )
    (command,) = parse(argv, "compare", description, CompareArguments)
    from ..evaluation.pictures import draw_all

    if command.pictures is not None:
        check_place(command.pictures)
    if command.output is not None:
        check_place(command.output, file=True)
    results = [EvaluationResult.load(path) for path in _paths(command.results)]
    table = ResultTable(results)
    if command.pictures is not None:
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
    if form == "json":
        return json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    if form in ("md", "csv"):
        return table.to_markdown() if form == "md" else table.to_csv()
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(table.to_rich())
    return capture.get()
