"""`hf-structprune demo`: prunes a small model end to end and shows size, perplexity and text before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..configuration import CONFIG_NAME, PruningConfig
from .arguments import parse
from .common import check_output_dir, check_ratio, console, default_window, load_pruner
from .demo_model import DEMO_MODEL, find_model


if TYPE_CHECKING:
    from ..plan import PruningPlan
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
    ratio: float = 0.2
    output_dir: str = "out"
    prompt: str = "What is the capital of France?"


def run(argv: Sequence[str]) -> None:
    """Runs the demo."""
    (arguments,) = parse(argv, "demo", "Prune MODEL and show what happened.", DemoArguments)
    check_ratio(arguments.ratio, PruningConfig())
    ours = (Path(arguments.output_dir) / CONFIG_NAME).exists()
    check_output_dir(arguments.output_dir, overwrite=ours)
    out, started = console(), time.monotonic()
    pruner = load_pruner(find_model(arguments.model))
    out.print(f"1/4  Loaded {arguments.model}; measuring the dense model ...")
    dense = _measure(pruner, arguments.prompt)
    out.print(f"2/4  Pruning {arguments.ratio:.0%} of all parameters ...")
    pruner.prune(arguments.ratio)
    out.print(pruner.last_plan.table())
    out.print("3/4  Measuring the pruned model ...")
    pruned = _measure(pruner, arguments.prompt)
    pruner.save_pretrained(arguments.output_dir)
    out.print(f"4/4  Saved to {arguments.output_dir}/")
    out.print(_comparison(pruner.last_plan, dense, pruned))
    out.print(f"prompt: {arguments.prompt}\n dense: {dense['text']}\npruned: {pruned['text']}\n")
    out.print(_how_to_load(arguments.output_dir, pruner.last_plan.layout))
    out.print(f"\nDone in {time.monotonic() - started:.0f} s.")


def _measure(pruner: StructuredPruner, prompt: str) -> dict[str, Any]:
    """Perplexity on the packaged text and the greedy answer to the prompt."""
    from ..evaluation import perplexity

    window = default_window(pruner.model)
    result = perplexity(pruner.model, pruner.tokenizer, window=window, max_windows=MAX_WINDOWS)
    return {"perplexity": result.perplexity, "text": _generate(pruner, prompt)}


def _generate(pruner: StructuredPruner, prompt: str) -> str:
    tokenizer, model = pruner.tokenizer, pruner.model
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def _comparison(plan: PruningPlan, dense: dict[str, Any], pruned: dict[str, Any]) -> Table:
    table = Table(title="Dense and pruned")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="right" if column else "left")
    rows = (
        ("parameters", plan.parameters_before, plan.parameters_after, "{:,.0f}"),
        ("weights, MB", plan.bytes_before / 1e6, plan.bytes_after / 1e6, "{:,.1f}"),
        ("GMACs, 1 x 64 tokens", plan.macs_before / 1e9, plan.macs_after / 1e9, "{:,.2f}"),
        ("perplexity, WikiText-2 sample", dense["perplexity"], pruned["perplexity"], "{:,.2f}"),
    )
    for name, before, after, form in rows:
        table.add_row(name, form.format(before), form.format(after), f"{after / before:.3f}")
    return table


def _how_to_load(folder: str, layout: str) -> str:
    first = "import hf_structprune  # its layers differ in width\n    " if layout == "per_layer" else ""
    return (
        f"Load it like any other model:\n\n    {first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    )
