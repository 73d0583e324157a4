"""`hf-structprune evaluate`, `benchmark`, `perplexity` and `compare`: measures models and shows them side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ..config import CONFIG_NAME
from ..errors import ConfigurationError
from ..evaluation import load_text, measure_perplexity
from ..evaluation.efficiency import measure_efficiency, median_figure, time_loading
from ..evaluation.evaluator import evaluate, load_inputs
from ..evaluation.generation import question_protocol
from ..evaluation.pictures import draw_all
from ..evaluation.results import RESULTS_NAME, STATES, EvaluationResult, Figure, describe_environment
from ..evaluation.table import ResultTable
from ..evaluation.tasks import SUITES
from ..evaluation_config import EfficiencyConfig, EvaluationConfig, find_protocol
from ..files.writing import check_place, write_text
from ..model.store import OnDisk
from ..plan import PLAN_NAME, PruningPlan
from .arguments import command, parse
from .cli import check_output, console
from .models import Subject, find_subject, load_for_measuring, load_for_streaming
from .options import (
    TABLE_FORMATS,
    BenchmarkArguments,
    CompareArguments,
    EvaluateArguments,
    ModelArguments,
    PerplexityArguments,
    SidesArguments,
    StreamArguments,
)
from .quiet import is_quiet, start_quiet


@command
def evaluate_command(model: ModelArguments, options: EvaluateArguments, config: EvaluationConfig) -> tuple[Any, ...]:
    """Measure MODEL: perplexity, tasks, size, memory, speed and sample texts."""
    for name in options.suite or ():
        if name not in SUITES:
            raise ConfigurationError(f"`suite` is {name!r}; the suites are {', '.join(SUITES)}; tasks go to --tasks.")
    config = dataclasses.replace(config, tasks=[*(options.suite or ()), *config.tasks])
    folder = Path(model.model)
    output = folder / RESULTS_NAME if options.output is None and (folder / CONFIG_NAME).is_file() else options.output
    if output is not None:
        check_place(output, file=True)
        output = Path(output)
    elif options.pictures:
        raise ConfigurationError("--pictures needs --output: they are saved beside the results.")
    subject, baseline, beside = _sides(model, options, output)
    plan = PruningPlan.load(folder) if options.pictures and (folder / PLAN_NAME).is_file() else None
    load_inputs(config)  # what is wrong with texts and tasks shows before a model is loaded
    results = []
    if isinstance(baseline, Subject):
        results.append(_evaluate(baseline, config, beside, baseline.base_model, options))
    elif baseline is not None:
        results.append(baseline)
        _save_baseline(baseline, beside, options.overwrite)
    base = options.base_model or subject.base_model or (results[0].model if results else None)
    results.append(_evaluate(subject, config, output, base, options))
    if options.pictures:
        draw_all(results, output.parent / "pictures", plan)
    where = "Not saved: there was no --output." if output is None else f"Saved to {output}"
    return *_shown(results, output), where


def _shown(results: list[EvaluationResult], output: Path | None) -> tuple[dict[str, Any], ResultTable]:
    table = ResultTable(results)
    return {**table.to_dict(), "output": None if output is None else str(output)}, table


def _evaluate(
    subject: Subject, config: EvaluationConfig, output: Path | None, base_model: str | None, options: EvaluateArguments
) -> EvaluationResult:
    model, tokenizer, store = _load(subject.arguments, options)
    folder = Path(subject.arguments.model)
    name = folder.absolute().name if folder.is_dir() else subject.arguments.model  # results are published: no paths
    about = {"name": name, "state": subject.state, "base_model": base_model}
    return evaluate(model, tokenizer, config, **about, output=output, overwrite=options.overwrite, store=store)


def _load(arguments: ModelArguments, options: StreamArguments) -> tuple[PreTrainedModel, Any, OnDisk | None]:
    """A model, its tokenizer, and where its weights are if they are not in memory."""
    spill = options.spill
    return load_for_streaming(arguments, spill) if options.stream else (*load_for_measuring(arguments), None)


def _sides(
    model: ModelArguments, options: SidesArguments, output: Path | None
) -> tuple[Subject, Subject | EvaluationResult | None, Path | None]:
    """What is measured, what it is compared with, and where the results of that go: beside those of the model."""
    subject = find_subject(model, options.state)
    baseline = None if options.baseline is None else find_baseline(options.baseline, model)
    if baseline is None or output is None:
        return subject, baseline, None
    return subject, baseline, output.with_name(f"{output.stem}_{baseline.state}{output.suffix}")


def find_baseline(name: str, arguments: ModelArguments) -> Subject | EvaluationResult:
    """What `--baseline` means: the JSON of an earlier evaluation, or a model (id, folder or `.gguf` file).

    Dtype, device and remote code are those of the model that is compared with it.
    """
    path = Path(name)
    if path.suffix == ".json":
        return EvaluationResult.load(path)
    changes = {"model": name, "revision": None, "subfolder": None, "gguf_file": None}
    if path.suffix == ".gguf" and path.is_file():
        changes |= {"model": str(path.parent), "gguf_file": path.name}
    return find_subject(dataclasses.replace(arguments, **changes))


def _save_baseline(result: EvaluationResult, path: Path | None, overwrite: bool) -> None:
    """Puts results that were given as a file beside those of the model, where the card looks for them."""
    if path is None:
        return
    if path.exists() and not overwrite and EvaluationResult.load(path) != result:
        raise ConfigurationError(f"{path} holds other results than the baseline given: say --overwrite to replace it.")
    result.save(path)


@command
def benchmark_command(model: ModelArguments, options: BenchmarkArguments, config: EfficiencyConfig) -> tuple[Any, ...]:
    """Measure size, memory and speed of MODEL."""
    output = None if options.output is None else Path(options.output)
    if options.output is not None:
        check_output(options.output, options.overwrite, file=True)
    if options.questions is not None:
        check_place(options.questions)
    subject, baseline, beside = _sides(model, options, output)
    subjects = [baseline, subject] if isinstance(baseline, Subject) else [subject]
    if len(subjects) > 1 and beside is not None:
        check_output(str(beside), options.overwrite, file=True)
    results = take_turns(subjects, config, options.rounds)
    if options.questions is not None:
        for measured, result in zip(subjects, results, strict=True):
            asked = question_protocol(*load_for_measuring(measured.arguments))
            result.add(*asked.figures())
            name = "questions.csv" if measured is subject else "questions_baseline.csv"
            asked.write_csv(Path(options.questions) / name)
    if isinstance(baseline, EvaluationResult):
        results.insert(0, baseline)
    if output is not None:
        results[-1].save(output)
    if len(results) > 1:
        _save_baseline(results[0], beside, options.overwrite)
    return *_shown(results, output), *([] if output is None else [f"Saved to {output}"])


def take_turns_apart(
    subjects: list[Subject], config: EfficiencyConfig, rounds: int, loading: bool = True
) -> list[EvaluationResult]:
    """`take_turns` in a process of its own: what earlier work has left in memory is in no figure."""
    with ProcessPoolExecutor(1, get_context("spawn"), start_quiet, (is_quiet(),)) as pool:
        return pool.submit(take_turns, subjects, config, rounds, loading).result()


def take_turns(
    subjects: list[Subject], config: EfficiencyConfig, rounds: int, loading: bool = True
) -> list[EvaluationResult]:
    """Size, memory and speed of each model, timed in turns for so many rounds; one is in memory at a time.

    With `loading`, how long each takes to load as well, in a process for each.
    """
    figures: list[list[list[Figure]]] = [[] for _ in subjects]
    results = []
    for number in range(rounds if config.speed else 1):
        for subject, found in zip(subjects, figures, strict=True):
            model, _ = load_for_measuring(subject.arguments)
            found.append(measure_efficiency(model, config))
            if number == 0:
                settings = {**dataclasses.asdict(config), "rounds": rounds}
                about = {"environment": describe_environment(model.device), "settings": settings}
                results.append(EvaluationResult(subject.arguments.model, subject.state, subject.base_model, **about))
            del model
    for subject, result, found in zip(subjects, results, figures, strict=True):
        result.add(*_pool(found))
        if loading and config.speed and subject.arguments.device_map is None:
            options = subject.arguments.loading_options()
            result.add(time_loading(subject.arguments.model, device=subject.arguments.device or "cpu", **options))
    return results


def _pool(rounds: list[list[Figure]]) -> list[Figure]:
    """Timings of all rounds under one median; what is counted and not timed is the same in each."""
    pooled = []
    for figure in rounds[0]:
        if "values" in figure.details:
            alike = [next(f for f in found if f.name == figure.name) for found in rounds]
            values = [value for one in alike for value in one.details["values"]]
            turns = f"; {len(rounds)} such rounds, the model loaded anew for each" if len(rounds) > 1 else ""
            figure = median_figure(figure.name, values, figure.unit, figure.protocol + turns)
        pooled.append(figure)
    return pooled


@command
def perplexity_command(model: ModelArguments, options: PerplexityArguments) -> tuple[Any, ...]:
    """Perplexity of MODEL, dense, pruned or quantised, on a text (lower is better)."""
    place = {"config_name": options.text_config_name, "split": options.split, "column": options.column}
    text = load_text(options.text, **place)
    loaded, tokenizer, store = _load(model, options)
    window = options.window or find_protocol(options.protocol).window_for(loaded)
    chosen = {name: getattr(options, name) for name in ("stride", "bos", "max_windows", "batch_size")}
    result = measure_perplexity(loaded, tokenizer, text, options.protocol, window=window, store=store, **chosen)
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "parts"}
    # JSON has no infinity and no NaN.
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    data = {"model": model.model, "text": options.text, **values, "protocol": options.protocol}
    table = Table(title=Text(f"Perplexity of {model.model}\non {options.text}", overflow="ignore"), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("text", result.source)
    table.add_row("protocol", f"{options.protocol}: {result.protocol}")
    for figure in result.figures(""):
        places = 4 if figure.unit else 2
        error = "" if figure.stderr is None else f" ± {figure.stderr:,.{places}f}"
        table.add_row(figure.name.rstrip("/").replace("_", " "), f"{figure.value:,.{places}f}{error}")
    for name in ("tokens", "words", "bytes", "windows"):
        if getattr(result, name) is not None:
            table.add_row(name, f"{getattr(result, name):,}")
    return {**data, "protocol_in_words": result.protocol}, table


def compare_command(argv: Sequence[str]) -> None:
    """Show the results of several evaluations in one table; the first are what the others are compared with."""
    (options,) = parse(argv, "compare", compare_command.__doc__, CompareArguments)
    if options.pictures is not None:
        check_place(options.pictures)
    if options.output is not None:
        check_place(options.output, file=True)
    paths = [Path(name) for name in options.results]
    if len(paths) == 1:
        beside = [paths[0] / RESULTS_NAME.replace(".json", f"_{state}.json") for state in STATES[:-1]]
        paths = [*(path for path in beside if path.is_file()), *paths]
    results = [EvaluationResult.load(path) for path in paths]
    table, suffix = ResultTable(results), Path(options.output or "").suffix[1:]
    form = options.format or (suffix if suffix in TABLE_FORMATS else "table")
    if options.pictures is not None:
        with contextlib.redirect_stdout(sys.stderr):
            draw_all(results, Path(options.pictures))
    if form == "table":
        out = console() if options.output is None else Console(width=160, color_system=None, file=io.StringIO())
        out.print(table)
        text = "" if options.output is None else out.file.getvalue()
    elif form == "json":
        text = json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        text = table.to_markdown() if form == "md" else table.to_csv()
    if options.output is None:
        print(text, end="")
    else:
        write_text(options.output, text)
