"""`hf-structprune demo`: a recipe that prunes a small model, trains it for a few minutes and shows what happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import CONFIG_NAME, PruningConfig
from ..hub.contents import RECIPE_NAME
from ..installed import is_installed, need
from ..recovery.recovering import TRAINING_SUFFIX
from .arguments import parse
from .cli import check_output, console
from .models import check_ratio
from .options import DemoArguments
from .recipe import Recipe
from .run import run_recipe
from .shrink import MAX_WINDOWS, context_of, distilling, loading


def demo_command(argv: Sequence[str]) -> None:
    """Prune MODEL, train it for a few minutes and show what happened."""
    (options,) = parse(argv, "demo", demo_command.__doc__, DemoArguments)
    check_ratio(options.ratio, PruningConfig())
    missing = [name for name in ("trl", "peft") if options.minutes and not is_installed(name)]
    out, minutes = console(), 0.0 if missing else options.minutes
    for folder in [options.output_dir, f"{options.output_dir}-recovered"][: 2 if minutes else 1]:
        check_output(folder, overwrite=Path(folder, CONFIG_NAME).exists())
    need("matplotlib", extra="demo")
    out.print(_what_happens(options, minutes), end="\n\n")
    if missing:
        out.print(f'No training: {" and ".join(missing)} is missing, `pip install "hf-structprune[demo]"`.\n')
    content = recipe_of(options, minutes, context_of(options.model))
    recipe = Recipe.from_dict(content, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    run_recipe(recipe, again=True, turns=1)
    out.print(_what_next(recipe), soft_wrap=True)


def recipe_of(options: DemoArguments, minutes: float, context: int | None = None) -> dict[str, Any]:
    """What the demo does, as a file of `hf-structprune run` would say it; without `minutes` nothing is trained."""
    content: dict[str, Any] = {
        "model": loading(options.model),
        "output_dir": options.output_dir,
        "prune": {"ratio": options.ratio},
        "evaluate": {"max_windows": MAX_WINDOWS},
    }
    if minutes:  # most of which is for training, not for measuring it
        content["recover"] = {**distilling(context), "minutes": minutes, "evaluations": 2, "max_windows": 8}
    return content


def _what_happens(options: DemoArguments, minutes: float) -> str:
    training = f", trained for {minutes:g} minutes to predict what the dense model does" if minutes else ""
    folders = f"{options.output_dir}/ and {options.output_dir}-recovered/" if minutes else f"{options.output_dir}/"
    took = "Measuring and pruning take minutes on a CPU, more for larger models, and each step is named as it begins."
    if minutes:
        took = f"Beside the {minutes:g} minutes, m{took[1:]}"
    return (
        f"{options.model} is measured, pruned by {options.ratio:.0%}{training}, and measured again after each step. "
        f"{took} The results go to {folders}."
    )


def _what_next(recipe: Recipe) -> str:
    """What lies in the folders, and commands to go on with."""
    *_, folder = recipe.folders.values()
    left = [(f"{path}/", f"the {state} model, with its results and card") for state, path in recipe.folders.items()]
    if recipe.recovery is not None:
        left.append((f"{folder}{TRAINING_SUFFIX}/", "checkpoints of the training, which may go"))
    left += [(folder / RECIPE_NAME, "what was done: edit and `hf-structprune run` it")]
    width = max(len(str(path)) for path, _ in left)
    files = "\n".join(f"  {path!s:<{width}}  {what}" for path, what in left)
    return f"""
What there is now:
{files}

In Python, with nothing of this package:
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained("{folder}")

What to try next:
  hf-structprune demo --ratio 0.2 --minutes 30  # more goes, and needs more training
  hf-structprune inspect MODEL  # what can be cut from yours
  hf-structprune quantize {folder} --method bitsandbytes --output-dir quantised
  hf-structprune export {folder} --format gguf --output smaller.gguf"""
