"""`hf-structprune inspect`, `plan` and `prune`: what can go from a model, what would go, and a checkpoint without it.

With `inspect --depth` the weights are loaded, and it says how much every layer does and which block of each size does
least.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Ratio
from ..config import CalibrationConfig, PruningConfig
from ..errors import ConfigurationError
from ..files.writing import check_place
from ..plan import PruningPlan
from .arguments import parse
from .cli import check_output, make_table, results_only_on_stdout, show
from .models import ModelArguments, check_ratio, load_pruner, load_shapes, load_to_plan


if TYPE_CHECKING:
    from ..model.structure import Group, ModelStructure

CSV_NAME, PICTURE_NAME = "layer_distances.csv", "layer_distances.png"
_KINDS = ("layers", "attention", "mlp")


@dataclass
class InspectArguments:
    """Options of `inspect`.

    Args:
        depth (`bool`): Measure how much each layer, attention and MLP does, and which block of each size does least.
        output_dir (`str`, *optional*): With `--depth`: folder for `layer_distances.csv` and a heat map.
        overwrite (`bool`): Write to the folder even if it is not empty.
        calibration (`CalibrationConfig`): The text.
    """

    depth: bool = False
    output_dir: str | None = None
    overwrite: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


def inspect_command(argv: Sequence[str]) -> None:
    """Reads the structure and prints it; or measures the layers."""
    description = "Show what can be cut from MODEL: coupled groups, their units and sizes, and what is left alone."
    model, command = parse(argv, "inspect", description, ModelArguments, InspectArguments)
    if command.depth:
        _inspect_depth(model, command)
        return
    if command.output_dir is not None:
        raise ConfigurationError("--output-dir is for the distances of layers: add --depth.")
    with results_only_on_stdout():
        pruner = load_shapes(model)
    structure = pruner.structure
    data = {
        "model": model.model,
        "model_type": pruner.model.config.model_type,
        "parameters": structure.total_parameters,
        "layers": [
            {"index": layer.index, "groups": [_group_data(group) for group in layer.groups]}
            for layer in structure.layers
        ],
        "notes": list(structure.notes),
    }
    rows = [_row(structure, run) for run in _runs(structure)]
    title = f"{model.model}: {structure.total_parameters:,} parameters, {len(structure.layers)} layers"
    headers = ("layers", "unit", "units", "parameters each", "of the model", "producers -> consumer")
    table = make_table(title, headers, rows, left=("layers", "unit", "producers -> consumer"))
    show(model.json, data, table, *(f"left alone: {note}" for note in structure.notes))


def _group_data(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "num_units": group.size,
        "unit_parameters": group.cost,
        "producers": group.producers,
        "consumer": group.reader.module if group.reader else group.parent,
    }


def _runs(structure: ModelStructure) -> list[list[tuple[int, Group]]]:
    """Groups of the same kind and size in neighbouring layers, with the layers' numbers."""
    groups = [(layer.index, group) for layer in structure.layers for group in layer.groups]
    runs = []
    for kind in dict.fromkeys(group.kind for _, group in groups):
        of_kind = enumerate((index, group) for index, group in groups if group.kind == kind)
        # Neighbours are those whose number in the model and number in the list are equally far apart.
        alike = groupby(of_kind, lambda one: (one[1][0] - one[0], one[1][1].size, one[1][1].cost))
        runs += [[pair for _, pair in run] for _, run in alike]
    return runs


def _row(structure: ModelStructure, run: list[tuple[int, Group]]) -> list[str]:
    (first, group), last = run[0], run[-1][0]
    size = len(run) * group.size * group.cost
    end = group.reader.module if group.reader else group.parent
    *producers, reader = [name.rpartition(".")[2] for name in (*group.producers, end)]
    return [
        str(first) if first == last else f"{first}-{last}",
        group.kind,
        f"{group.size:,}",
        f"{group.cost:,}",
        f"{size / structure.total_parameters:.1%}",
        f"{', '.join(producers)} -> {reader}",
    ]


def _inspect_depth(model: ModelArguments, command: InspectArguments) -> None:
    """Measures and prints; writes a CSV (PruneMe's format, all block sizes) and a heat map if there is a folder."""
    from ..criteria.depth import layer_similarities
    from ..evaluation.pictures import distances_figure, save
    from ..installed import need

    if command.output_dir is not None:
        need("matplotlib", extra="report")  # before anything is measured
        check_output(command.output_dir, command.overwrite)
    with results_only_on_stdout():
        pruner = load_pruner(model, PruningConfig(calibration=command.calibration))
        towers = pruner.structure.towers
        decoder = pruner.model if towers is None else towers.decoder()
        found = layer_similarities(
            decoder, pruner.structure, pruner.calibration_tokens(), batch_size=command.calibration.batch_size,
            sublayers=any(layer.sublayers for layer in pruner.structure.layers),
        )  # fmt: skip
        files = []
        if command.output_dir is not None:
            files = [str(Path(command.output_dir, name)) for name in (CSV_NAME, PICTURE_NAME)]
            found.to_csv(Path(files[0]))
            save(distances_figure(found), Path(files[1]))
    measures = {"angular": found.distances, "influence": found.influences}
    values = [
        [[scores.get((layer, kind)) for kind in _KINDS] for scores in measures.values()]
        for layer in range(found.num_layers)
    ]
    layers = [
        {"layer": layer, "angular_distance": dict(zip(_KINDS, one, strict=True)),
         "block_influence": dict(zip(_KINDS, other, strict=True))}
        for layer, (one, other) in enumerate(values)
    ]  # fmt: skip
    best = [found.best_block(size) for size in range(1, found.num_layers)]
    blocks = [{"layers": list(range(start, end)), "distance": distance} for start, end, distance in best]
    headers = [f"{name} {kind}" for name in measures for kind in ("layer", "attention", "mlp")]
    rows = [[str(i), *("" if v is None else f"{v:.4f}" for v in (*a, *b))] for i, (a, b) in enumerate(values)]
    title = "How much each layer turns the hidden states: least can go first"
    tables = [make_table(title, ["layer", *headers], rows, left=())]
    shown = blocks[: max(1, found.num_layers // 2)]  # --json and the CSV hold all sizes
    rows = [[str(len(b["layers"])), f"{b['distance']:.4f}", " ".join(map(str, b["layers"]))] for b in shown]
    tables.append(make_table("Blocks that turn them least", ("number", "distance", "layers"), rows, left=("layers",)))
    data = {"model": model.model, "layers": layers, "blocks": blocks, "files": files}
    show(model.json, data, *tables, *([f"Saved to {' and '.join(files)}"] if files else []))


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
    check_output(command.output_dir, command.overwrite)
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
