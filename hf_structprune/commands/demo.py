"""`hf-structprune demo`: prunes a small model end to end and shows size, perplexity and text before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import Ratio
from ..config import CONFIG_NAME, PruningConfig
from ..evaluation import EfficiencyConfig, EvaluationConfig, EvaluationResult, ResultTable, evaluate, generate_samples
from ..evaluation.pictures import save, widths_figure
from ..evaluation.results import RESULTS_NAME
from ..hub import write_card
from ..hub.contents import DENSE_RESULTS_NAME, WIDTHS_NAME
from ..hub.origin import Origin
from .arguments import parse
from .benchmark import take_turns_apart
from .cli import check_output_dir, console
from .models import DEMO_MODEL, ModelArguments, Subject, check_ratio, find_model, load_pruner


if TYPE_CHECKING:
    from ..pruner import StructuredPruner


MAX_WINDOWS = 6


@dataclass
class DemoArguments:
    """The demo.

    Args:
        model (`str`): Id of a model on the Hub, or a folder. Default: SmolLM2-135M-Instruct.
        ratio (`float`): Share of all parameters to remove: 0.3 removes 30 %.
        output_dir (`str`): Folder for the checkpoint; an earlier checkpoint of this package is replaced.
        prompt (`str`): What the model is asked, before and after.
    """

    model: str = DEMO_MODEL
    ratio: Ratio = 0.2
    output_dir: str = "out"
    prompt: str = "What is the capital of France?"


def demo_command(argv: Sequence[str]) -> None:
    """Runs the demo."""
    (arguments,) = parse(argv, "demo", "Prune MODEL and show what happened.", DemoArguments)
    check_ratio(arguments.ratio, PruningConfig())
    folder = Path(arguments.output_dir)
    check_output_dir(arguments.output_dir, overwrite=(folder / CONFIG_NAME).exists())
    out, started = console(), time.monotonic()
    source = find_model(arguments.model)
    pruner = load_pruner(source)
    if source.model != arguments.model:
        pruner.origin = Origin.of(arguments.model)
    out.print(f"1/4  Loaded {arguments.model}; measuring the dense model ...")
    dense = _measure(pruner, arguments.model, "dense", arguments.prompt)
    out.print(f"2/4  Pruning {arguments.ratio:.0%} of all parameters ...")
    pruner.prune(arguments.ratio)
    out.print(pruner.last_plan.table())
    out.print("3/4  Measuring the pruned model, then the speed of both ...")
    pruned = _measure(pruner, folder.name, "pruned", arguments.prompt)
    pruned.base_model = arguments.model
    pruner.save_pretrained(folder)
    subjects = [Subject(source, "dense", None), Subject(ModelArguments(str(folder)), "pruned", arguments.model)]
    for result, timed in zip((dense, pruned), take_turns_apart(subjects, EfficiencyConfig(), 1), strict=True):
        result.add(*timed.figures.values())
    dense.save(folder / DENSE_RESULTS_NAME)
    pruned.save(folder / RESULTS_NAME)
    save(widths_figure(pruner.last_plan, pruner.model.config.num_hidden_layers), folder / WIDTHS_NAME)
    write_card(folder)
    out.print(f"4/4  Saved to {folder}/; the model card is {folder / 'README.md'}")
    out.print(ResultTable([dense, pruned]).to_rich())
    texts = [" ".join(result.samples[0]["text"].split()) for result in (dense, pruned)]
    out.print(f"prompt: {arguments.prompt}\n dense: {texts[0]}\npruned: {texts[1]}\n")
    out.print(_how_to_load(arguments.output_dir, pruner.last_plan.layout))
    out.print(f"\nDone in {time.monotonic() - started:.0f} s.")


def _measure(pruner: StructuredPruner, name: str, state: str, prompt: str) -> EvaluationResult:
    """Perplexity on the packaged text, and the greedy answer to the prompt."""
    config = EvaluationConfig(max_windows=MAX_WINDOWS, efficiency=False, samples=False)
    result = evaluate(pruner.model, pruner.tokenizer, config, name=name, state=state)
    result.samples = generate_samples(pruner.model, pruner.tokenizer, prompt, max_new_tokens=40)
    return result


def _how_to_load(folder: str, layout: str) -> str:
    first = "import hf_structprune  # its layers differ in width\n    " if layout == "per_layer" else ""
    return (
        f"Load it like any other model:\n\n    {first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )
