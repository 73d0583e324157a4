"""`hf-structprune shrink`: a smaller model within a time that is given, by one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..hardware import cpu_has_bf16, has_accelerator
from ..hub.words import RECOVERY_NAME
from ..model.loading import load_config
from ..recovery.configuration import RecoveryConfig
from ..recovery.recovering import newest_whole, training_folder
from .arguments import parse
from .cli import check_output
from .models import find_model
from .options import ShrinkArguments
from .recipe import Recipe
from .run import MAX_WINDOWS, run_recipe


def shrink_command(argv: Sequence[str]) -> None:
    """Prune MODEL, train it to predict what the dense model does, measure all and write the card, within a time."""
    (options,) = parse(argv, "shrink", shrink_command.__doc__, ShrinkArguments)
    folder = Path(options.output_dir)
    if not (folder / RECOVERY_NAME).is_file() and newest_whole(training_folder(folder))[0] is None:
        check_output(options.output_dir, options.overwrite)
    config = load_config(find_model(options.model).model).get_text_config()
    content = recipe_of(options, getattr(config, "max_position_embeddings", None))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if options.dry_run:
        print(text)
    run_recipe(Recipe.from_dict(content, text), again=options.overwrite, dry_run=options.dry_run)


def recipe_of(options: ShrinkArguments, context: int | None = None) -> dict[str, Any]:
    """The recipe that does it, as a file of `hf-structprune run` would say it, for a model of this context."""
    recover: dict[str, Any] = {"method": "distill", "output_dir": options.output_dir}
    if context is not None and context < RecoveryConfig().max_length:
        recover["max_length"] = context
    if options.dataset:
        recover["dataset"] = list(options.dataset)
    return {
        # In bfloat16 a CPU without instructions for it is five times slower.
        "model": {"model": options.model, "dtype": "auto" if has_accelerator() or cpu_has_bf16() else "fp32"},
        "output_dir": f"{options.output_dir.rstrip('/')}-pruned",
        "minutes": options.minutes,
        "prune": {"ratio": options.ratio},
        "recover": recover,
        "evaluate": {"max_windows": MAX_WINDOWS, "efficiency": False},
    }
