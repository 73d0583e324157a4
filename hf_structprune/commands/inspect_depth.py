"""`hf-structprune inspect MODEL --depth`: how much every layer does, and which block of each size does least."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..config import CalibrationConfig, PruningConfig
from .common import ModelArguments, check_output_dir, load_pruner, results_only_on_stdout, show


if TYPE_CHECKING:
    from ..stats.similarities import LayerSimilarities

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
