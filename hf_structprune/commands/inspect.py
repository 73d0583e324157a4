"""`hf-structprune inspect MODEL`: what can be cut from a model and what is left alone.

With `--depth` the weights are loaded, and layers are measured on calibration text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..config import CalibrationConfig
from ..errors import ConfigurationError
from .arguments import parse
from .common import ModelArguments, load_shapes, results_only_on_stdout, show
from .inspect_depth import inspect_depth


if TYPE_CHECKING:
    from ..model.structure import CoupledGroup, ModelStructure


@dataclass
class InspectArguments:
    """Options of `inspect`.

    Args:
        depth (`bool`): Measure how much each layer, attention and MLP does, and which block of each size does least.
        output_dir (`str`, *optional*): With `--depth`: folder for `layer_distances.csv` and a heat map.
        overwrite (`bool`): Write to the folder even if it is not empty.
    """

    depth: bool = False
    output_dir: str | None = None
    overwrite: bool = False


def run(argv: Sequence[str]) -> None:
    """Reads the structure and prints it; or measures the layers."""
    description = "Show what can be cut from MODEL: coupled groups, their units and sizes, and what is left alone."
    model, command, calibration = parse(
        argv, "inspect", description, ModelArguments, InspectArguments, CalibrationConfig
    )
    if command.depth:
        inspect_depth(model, calibration, command.output_dir, command.overwrite)
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
    notes = [f"left alone: {note}" for note in structure.notes]
    show(model.json, data, _table(model.model, structure), *notes)


def _group_data(group: CoupledGroup) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "num_units": group.num_units,
        "unit_parameters": group.unit_parameters,
        "producers": [part.module for part in group.producers],
        "consumer": group.consumer.module,
    }


def _table(name: str, structure: ModelStructure) -> Table:
    total = structure.total_parameters
    table = Table(title=f"{name}: {total:,} parameters, {len(structure.layers)} layers")
    for column in ("layers", "unit", "units", "parameters each", "of the model", "producers -> consumer"):
        table.add_column(column, justify="right" if column in ("units", "parameters each", "of the model") else "left")
    for layers, group in _runs(structure):
        size = len(layers) * group.num_units * group.unit_parameters
        first, last = layers[0], layers[-1]
        producers = dict.fromkeys(_short(part.module) for part in group.producers)  # fused ones stand there twice
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            group.kind,
            f"{group.num_units:,}",
            f"{group.unit_parameters:,}",
            f"{size / total:.1%}",
            f"{', '.join(producers)} -> {_short(group.consumer.module)}",
        )
    return table


def _runs(structure: ModelStructure) -> Iterable[tuple[list[int], CoupledGroup]]:
    """Neighbouring layers with groups of the same kind and size, and one of these groups."""
    kinds = dict.fromkeys(group.kind for layer in structure.layers for group in layer.groups)
    for kind in kinds:
        runs: list[tuple[list[int], CoupledGroup]] = []
        for layer in structure.layers:
            for group in (g for g in layer.groups if g.kind == kind):
                if runs and _alike(runs[-1], layer.index, group):
                    runs[-1][0].append(layer.index)
                else:
                    runs.append(([layer.index], group))
        yield from runs


def _alike(run: tuple[list[int], CoupledGroup], index: int, group: CoupledGroup) -> bool:
    layers, first = run
    same_size = (first.num_units, first.unit_parameters) == (group.num_units, group.unit_parameters)
    return same_size and layers[-1] == index - 1


def _short(module: str) -> str:
    return module.rpartition(".")[2]
