"""`hf-structprune inspect MODEL`: what can be cut from a model and what is left alone.

With `--depth` the weights are loaded, and layers are measured on calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..config import CalibrationConfig, PruningConfig
from ..errors import ConfigurationError
from .arguments import parse
from .cli import check_output_dir, results_only_on_stdout, show
from .models import ModelArguments, load_pruner, load_shapes


if TYPE_CHECKING:
    from ..model.structure import Group, ModelStructure
    from ..stats.similarities import LayerSimilarities


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


def inspect_command(argv: Sequence[str]) -> None:
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


def _group_data(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "num_units": group.size,
        "unit_parameters": group.cost,
        "producers": group.producers,
        "consumer": group.reader.module,
    }


def _table(name: str, structure: ModelStructure) -> Table:
    total = structure.total_parameters
    table = Table(title=f"{name}: {total:,} parameters, {len(structure.layers)} layers")
    for column in ("layers", "unit", "units", "parameters each", "of the model", "producers -> consumer"):
        table.add_column(column, justify="right" if column in ("units", "parameters each", "of the model") else "left")
    for layers, group in _runs(structure):
        size = len(layers) * group.size * group.cost
        first, last = layers[0], layers[-1]
        producers = map(_short, group.producers)
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            group.kind,
            f"{group.size:,}",
            f"{group.cost:,}",
            f"{size / total:.1%}",
            f"{', '.join(producers)} -> {_short(group.reader.module)}",
        )
    return table


def _runs(structure: ModelStructure) -> Iterable[tuple[list[int], Group]]:
    """Neighbouring layers with groups of the same kind and size, and one of these groups."""
    kinds = dict.fromkeys(group.kind for layer in structure.layers for group in layer.groups)
    for kind in kinds:
        runs: list[tuple[list[int], Group]] = []
        for layer in structure.layers:
            for group in (g for g in layer.groups if g.kind == kind):
                if runs and _alike(runs[-1], layer.index, group):
                    runs[-1][0].append(layer.index)
                else:
                    runs.append(([layer.index], group))
        yield from runs


def _alike(run: tuple[list[int], Group], index: int, group: Group) -> bool:
    layers, first = run
    same_size = (first.size, first.cost) == (group.size, group.cost)
    return same_size and layers[-1] == index - 1


def _short(module: str) -> str:
    return module.rpartition(".")[2]


CSV_NAME, PICTURE_NAME = "layer_distances.csv", "layer_distances.png"
_KINDS = ("layers", "attention", "mlp")


def inspect_depth(
    model: ModelArguments, calibration: CalibrationConfig, output_dir: str | None, overwrite: bool
) -> None:
    """Measures and prints; writes the CSV and the heat map into a folder if there is one.

    Args:
        model: The model.
        calibration: The text to look at.
        output_dir: Folder for `layer_distances.csv` (PruneMe's format, all block sizes) and `layer_distances.png`.
        overwrite: Write to the folder even if it is not empty.
    """
    from ..allocation.depth_picture import draw_distances
    from ..criteria.distances import layer_similarities
    from ..evaluation.pictures import require_matplotlib

    if output_dir is not None:
        require_matplotlib()  # before anything is measured
        check_output_dir(output_dir, overwrite)
    with results_only_on_stdout():
        pruner = load_pruner(model, PruningConfig(calibration=calibration))
        sublayers = any(layer.sublayers for layer in pruner.structure.layers)
        found = layer_similarities(
            pruner.model, pruner.structure, pruner.calibration_tokens(), batch_size=calibration.batch_size,
            sublayers=sublayers,
        )  # fmt: skip
        files = []
        if output_dir is not None:
            folder = Path(output_dir)
            found.to_csv(folder / CSV_NAME)
            draw_distances(found, folder / PICTURE_NAME)
            files = [str(folder / name) for name in (CSV_NAME, PICTURE_NAME)]
    data = {"model": model.model, "layers": _layers(found), "blocks": _blocks(found), "files": files}
    saved = [f"Saved to {' and '.join(files)}"] if files else []
    show(model.json, data, _layer_table(found), _block_table(found), *saved)


def _layers(found: LayerSimilarities) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "angular_distance": {kind: found.distances.get((layer, kind)) for kind in _KINDS},
            "block_influence": {kind: found.influences.get((layer, kind)) for kind in _KINDS},
        }
        for layer in range(found.num_layers)
    ]


def _blocks(found: LayerSimilarities) -> list[dict[str, Any]]:
    """The block with the least distance, for each size."""
    best = [found.best_block(size) for size in range(1, found.num_layers)]
    return [{"layers": list(range(start, end)), "distance": distance} for start, end, distance in best]


def _layer_table(found: LayerSimilarities) -> Table:
    table = Table(title="How much each layer turns the hidden states: least can go first")
    headers = [f"{name} {kind}" for name in ("angular", "influence") for kind in ("layer", "attention", "mlp")]
    for header in ("layer", *headers):
        table.add_column(header, justify="right")
    for layer in range(found.num_layers):
        values = [scores.get((layer, kind)) for scores in (found.distances, found.influences) for kind in _KINDS]
        table.add_row(str(layer), *("" if value is None else f"{value:.4f}" for value in values))
    return table


def _block_table(found: LayerSimilarities) -> Table:
    table = Table(title="Blocks that turn them least")
    for header in ("number", "distance", "layers"):
        table.add_column(header, justify="left" if header == "layers" else "right")
    for block in _blocks(found)[: max(1, found.num_layers // 2)]:  # --json and the CSV hold all sizes
        layers = block["layers"]
        table.add_row(str(len(layers)), f"{block['distance']:.4f}", " ".join(map(str, layers)))
    return table
