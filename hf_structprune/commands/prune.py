"""`hf-structprune plan` and `prune`: what would go from a model and what it saves; and a checkpoint without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import Ratio
from ..config import PruningConfig
from ..errors import ConfigurationError
from ..files.places import check_place
from ..plan import PruningPlan
from .arguments import parse
from .cli import check_output_dir, results_only_on_stdout, show
from .models import ModelArguments, check_ratio, load_pruner, load_to_plan


@dataclass
class PruneArguments:
    """Options of `prune`.

    Args:
        output_dir (`str`): Folder for the checkpoint.
        ratio (`float`, *optional*): Share of all parameters to remove: 0.3 removes 30 %.
        plan (`str`, *optional*): Apply this plan, saved by `hf-structprune plan --output`, instead of a ratio.
        overwrite (`bool`): Write to the folder even if it is not empty.
    """

    output_dir: str | None = None
    ratio: Ratio | None = None
    plan: str | None = None
    overwrite: bool = False


def prune_command(argv: Sequence[str]) -> None:
    """Prunes, saves and says what came out."""
    description = "Prune MODEL and save a checkpoint that from_pretrained loads."
    model, command, config = parse(argv, "prune", description, ModelArguments, PruneArguments, PruningConfig)
    check_output_dir(command.output_dir, command.overwrite)
    if command.plan is None:
        check_ratio(command.ratio, config)
    elif command.ratio is not None:
        raise ConfigurationError("--ratio and --plan are both given; the plan says how much goes.")
    started = time.monotonic()
    with results_only_on_stdout():
        target = command.ratio if command.plan is None else PruningPlan.load(command.plan)
        pruner = load_pruner(model, config)
        pruner.prune(target)
        pruner.save_pretrained(command.output_dir)
    plan, seconds = pruner.last_plan, round(time.monotonic() - started, 1)
    names = ["ratio_requested", "ratio", "layout", "dropped", "removed", "warnings"]
    names += [f"{name}_{when}" for name in ("parameters", "bytes", "macs") for when in ("before", "after")]
    figures = {name: getattr(plan, name) for name in names}
    data = {"model": model.model, "output_dir": command.output_dir, "seconds": seconds, **figures}
    show(model.json, data, plan.table(), f"Saved to {command.output_dir} after {seconds} s.")


@dataclass
class PlanArguments:
    """Options of `plan`.

    Args:
        ratio (`float`, *optional*): Share of all parameters to remove: 0.3 removes 30 %.
        output (`str`, *optional*): File to save the plan in, as JSON.
    """

    ratio: Ratio | None = None
    output: str | None = None


def plan_command(argv: Sequence[str]) -> None:
    """Plans and prints."""
    description = "Show what would go from MODEL at a ratio, and what it saves. Nothing is changed."
    model, command, config = parse(argv, "plan", description, ModelArguments, PlanArguments, PruningConfig)
    check_ratio(command.ratio, config)
    if command.output is not None:
        check_place(command.output, file=True)
    with results_only_on_stdout():
        plan = load_to_plan(model, config, command.ratio).plan(command.ratio)
        if command.output is not None:
            plan.save(command.output)
    show(model.json, {"model": model.model, **plan.to_dict()}, plan.table())
