"""`hf-structprune plan MODEL --ratio 0.3`: what would go and what it saves; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import Ratio
from ..config import PruningConfig
from ..files.places import check_place
from .arguments import parse
from .common import ModelArguments, check_ratio, load_to_plan, results_only_on_stdout, show


@dataclass
class PlanArguments:
    """Options of `plan`.

    Args:
        ratio (`float`, *optional*): Share of all parameters to remove: 0.3 removes 30 %.
        output (`str`, *optional*): File to save the plan in, as JSON.
    """

    ratio: Ratio | None = None
    output: str | None = None


def run(argv: Sequence[str]) -> None:
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
