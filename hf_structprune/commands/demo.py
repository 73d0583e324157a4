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
from .options import DEMO_MODEL, DemoArguments
from .recipe import Recipe
from .run import run_recipe
from .shrink import CALIBRATION, context_of, distilling, loading


MAX_WINDOWS = 4  # of the packaged text
# Minutes of the steps with SmolLM2-135M-Instruct on two cores: CPU seconds of one thread (37 to measure one, 242 to
# prune it, 31 to time one) over 1.7, which two threads are taken to gain; what is around a training is an estimate.
MEASURING, PRUNING, STARTING, TIMING = 0.4, 2.4, 0.5, 0.3


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
        "prune": {"ratio": options.ratio, "reconstruct": False, "calibration": dict(CALIBRATION)},
        "evaluate": {"max_windows": MAX_WINDOWS},
    }
    if minutes:  # all of which is for training: little is measured, and the dense model writes nothing
        few = {"batch_size": 1, "micro_batch_size": 1, "evaluations": 2, "max_windows": 8}  # many steps of few tokens
        own = {"distillation": {"generated_tokens": 0}}
        content["recover"] = {**distilling(context), "minutes": minutes, **few, **own}
    return content


def _what_happens(options: DemoArguments, minutes: float) -> str:
    """The steps, each with its minutes for the model that they were measured of."""
    known = options.model == DEMO_MODEL
    steps = [("it is measured", MEASURING), (f"pruned by {options.ratio:.0%}", PRUNING), ("measured again", MEASURING)]
    if minutes:
        trained = f"trained for {minutes:g} minutes to predict what the dense model does"
        steps += [(trained, minutes + STARTING), ("measured once more", MEASURING)]
    steps.append(("timed, all models in turn", (3 if minutes else 2) * TIMING))
    total, width = sum(took for _, took in steps), max(len(words) for words, _ in steps)
    about = f"about {total:.0f} minutes on two CPU cores that multiply in bfloat16" if known else "minutes or more"
    lines = [f"What happens to {options.model}, {about}:"]
    for number, (words, took) in enumerate(steps, 1):
        lines.append(f"  {number}. {words:<{width}}" + (f"  {took:.1f} min" if known else ""))
    folders = f"{options.output_dir}/ and {options.output_dir}-recovered/" if minutes else f"{options.output_dir}/"
    return "\n".join([*(line.rstrip() for line in lines), f"The results go to {folders}."])


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
