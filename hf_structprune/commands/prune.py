"""`hf-structprune inspect`, `plan` and `prune`: what can go from a model, what would go, the model without it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from ..config import AUTO, PruningConfig
from ..criteria.depth import layer_similarities
from ..errors import ConfigurationError, UnsupportedModelError
from ..evaluation.pictures import distances_figure, save
from ..files.writing import check_place
from ..hardware import process_state
from ..installed import need
from ..model.shared_sizes import SIZED
from ..model.structure import Group
from ..plan import PruningPlan
from ..progress import hide
from ..pruner import StructuredPruner
from ..targets.quality import QualityTarget
from ..targets.reaching import check_alone
from ..targets.size import SizeTarget
from ..units import VOCABULARY
from .arguments import command
from .cli import check_output, make_table, why_left
from .curve import inspect_curve
from .models import check_amount, load_pruner, load_shapes, load_to_plan
from .options import InspectArguments, ModelArguments, PlanArguments, PruneArguments
from .vocabulary import inspect_vocabulary


CSV_NAME, PICTURE_NAME = "layer_distances.csv", "layer_distances.png"
_KINDS = ("layers", "attention", "mlp")
_ONLY_WITH = {
    "output_dir": ("--depth", "--vocabulary", "--curve"),
    "units": ("--curve",),
    "vocabulary_text": ("--vocabulary",),
    "vocabulary_tokens": ("--vocabulary",),
}
_SIZES = ("num_units", "unit_parameters", "least")


@command
def inspect_command(model: ModelArguments, options: InspectArguments) -> tuple[Any, ...]:
    """Show what can be cut from MODEL: coupled groups, their units and sizes, and what is left alone."""
    asked = [f"--{name}" for name in ("depth", "vocabulary", "curve") if getattr(options, name)]
    if len(asked) > 1:
        raise ConfigurationError(f"{' and '.join(asked)} are given; give one of them.")
    for name, wants in _ONLY_WITH.items():
        if getattr(options, name) is not None and not set(asked) & set(wants):
            raise ConfigurationError(f"--{name.replace('_', '-')} goes with {' or '.join(wants)}, which is not given.")
    if options.depth:
        return _inspect_depth(model, options)
    if options.vocabulary:
        counted = {} if options.vocabulary_tokens is None else {"vocabulary_tokens": options.vocabulary_tokens}
        config = PruningConfig(
            units=(VOCABULARY,), calibration=options.calibration, vocabulary_text=options.vocabulary_text, **counted
        )
        return inspect_vocabulary(model, config, options.output_dir, options.overwrite)
    if options.curve:
        config = PruningConfig(units=options.units or (AUTO,), calibration=options.calibration)
        return inspect_curve(model, config, options.output_dir, options.overwrite)
    pruner = load_shapes(model)
    structure = pruner.structure
    groups = [(layer.index, group) for layer in structure.layers for group in layer.groups]
    layers = [
        {"index": layer.index, "groups": [_group_data(group) for group in layer.groups]} for layer in structure.layers
    ]
    shared = _shared(pruner)
    data = {
        "model": model.model, "model_type": pruner.model.config.model_type, "parameters": structure.total_parameters,
        "layers": layers, "shared": shared, "notes": list(structure.notes),
    }  # fmt: skip
    title = f"{model.model}: {structure.total_parameters:,} parameters, {len(structure.layers)} layers"
    headers = ("layers", "unit", "units", "parameters each", "of the model", "producers -> consumer")
    rows = _rows(groups, structure.total_parameters)
    for one in (one for one in shared if one["left_alone"] is None):
        units, cost = one["num_units"], one["unit_parameters"]
        share = f"{units * cost / structure.total_parameters:.1%}"
        rows.append(["all", one["kind"], f"{units:,}", f"{cost:,}", share, "shared by all layers"])
    notes = [*structure.notes, *(f"{one['kind']}: {one['left_alone']}" for one in shared if one["left_alone"])]
    table = make_table(title, headers, rows, left=("layers", "unit", "producers -> consumer"))
    return data, table, *(f"left alone: {why_left(note)}" for note in notes)


def _shared(pruner: StructuredPruner) -> list[dict[str, Any]]:
    """Units that all layers share, and why they are left alone, if they are."""
    found, towers = [], pruner.structure.towers
    model = pruner.model if towers is None else towers.decoder()
    for kind in (kind for kind in SIZED if kind in pruner.structure.shared):
        try:
            group = SIZED[kind].group(model, pruner.structure)
            sizes, reason = (group.size, group.cost, group.least), None
        except UnsupportedModelError as error:
            sizes, reason = (None, None, None), f"{error}".rstrip(".")
        found.append({"kind": kind, **dict(zip(_SIZES, sizes, strict=True)), "left_alone": reason})
    return found


def _group_data(group: Group) -> dict[str, Any]:
    consumer = group.reader.module if group.reader else group.parent
    return {
        "kind": group.kind, "num_units": group.size, "unit_parameters": group.cost, "producers": group.producers,
        "consumer": consumer,
    }  # fmt: skip


def _rows(groups: list[tuple[int, Group]], total: int) -> list[list[str]]:
    """A row for groups of the same kind and size in neighbouring layers, whose numbers come with them."""
    rows = []
    for kind in dict.fromkeys(group.kind for _, group in groups):
        of_kind = enumerate((index, group) for index, group in groups if group.kind == kind)
        # Neighbours are those whose number in the model and number in the list are equally far apart.
        for _, run in groupby(of_kind, lambda one: (one[1][0] - one[0], one[1][1].size, one[1][1].cost)):
            layers, (group, *_) = zip(*(pair for _, pair in run), strict=True)
            data = _group_data(group)
            *producers, reader = [name.rpartition(".")[2] for name in (*data["producers"], data["consumer"])]
            rows.append([
                f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", kind, f"{group.size:,}",
                f"{group.cost:,}", f"{len(layers) * group.size * group.cost / total:.1%}",
                f"{', '.join(producers)} -> {reader}",
            ])  # fmt: skip
    return rows


def _inspect_depth(model: ModelArguments, options: InspectArguments) -> tuple[Any, ...]:
    """Measures the layers; writes a CSV (PruneMe's format, all block sizes) and a heat map if there is a folder."""
    files = [str(Path(options.output_dir or "", name)) for name in (CSV_NAME, PICTURE_NAME)]
    if options.output_dir is None:
        files = []
    else:
        need("matplotlib", extra="report")  # before anything is measured
        check_output(options.output_dir, options.overwrite)
    pruner = load_pruner(model, PruningConfig(calibration=options.calibration))
    towers = pruner.structure.towers
    found = layer_similarities(
        pruner.model if towers is None else towers.decoder(), pruner.structure, pruner.calibration_tokens(),
        batch_size=options.calibration.batch_size,
        sublayers=any(layer.sublayers for layer in pruner.structure.layers),
    )  # fmt: skip
    if files:
        found.to_csv(Path(files[0]))
        save(distances_figure(found), Path(files[1]))
    measures = {"angular_distance": found.distances, "block_influence": found.influences}
    layers = [
        {"layer": layer, **{m: {kind: scores.get((layer, kind)) for kind in _KINDS} for m, scores in measures.items()}}
        for layer in range(found.num_layers)
    ]
    best = [found.best_block(size) for size in range(1, found.num_layers)]
    blocks = [{"layers": list(range(start, end)), "distance": distance} for start, end, distance in best]
    headers = [f"{name} {kind}" for name in ("angular", "influence") for kind in ("layer", "attention", "mlp")]
    values = [[layer[name][kind] for name in measures for kind in _KINDS] for layer in layers]
    rows = [[str(i), *("" if v is None else f"{v:.4f}" for v in row)] for i, row in enumerate(values)]
    title = "How much each layer turns the hidden states: least can go first"
    tables = [make_table(title, ["no.", *headers], rows, left=())]  # 80 columns hold it
    shown = blocks[: max(1, found.num_layers // 2)]  # --json and the CSV hold all sizes
    rows = [[str(len(b["layers"])), f"{b['distance']:.4f}", " ".join(map(str, b["layers"]))] for b in shown]
    tables.append(make_table("Blocks that turn them least", ("number", "distance", "layers"), rows, left=("layers",)))
    data = {"model": model.model, "layers": layers, "blocks": blocks, "files": files}
    return data, *tables, *([f"Saved to {' and '.join(files)}"] if files else [])


@command
def plan_command(
    model: ModelArguments, options: PlanArguments, size: SizeTarget, config: PruningConfig
) -> tuple[Any, ...]:
    """Show what would go from MODEL at a ratio or for a size, and what it saves. Nothing is changed."""
    check_amount(options.ratio, size, config)
    if options.output is not None:
        check_place(options.output, file=True)
    if options.stream and options.estimate:
        raise ConfigurationError("--estimate tries the plan on the whole model in memory: leave --stream out.")
    spill, asked = options.spill, size.given()
    if options.stream:
        plan = load_pruner(model, config, True, spill=spill).plan(options.ratio, **asked)
    elif options.estimate:
        plan = load_pruner(model, config).plan(options.ratio, estimate=True, **asked)
    else:
        plan = load_to_plan(model, config, 0.5 if size else options.ratio).plan(options.ratio, **asked)
    if options.output is not None:
        plan.save(options.output)
    return {"model": model.model, **plan.to_dict()}, plan.table()


@command
def prune_command(
    model: ModelArguments, options: PruneArguments, size: SizeTarget, quality: QualityTarget, config: PruningConfig
) -> tuple[Any, ...] | None:
    """Prune MODEL and save a checkpoint that from_pretrained loads."""
    first = not options.data_parallel or _speaks()
    check_output(options.output_dir, options.overwrite)
    if quality:
        for name, other in (
            ("ratio", options.ratio),
            ("plan", options.plan),
            ("stream", options.stream),
            *size.given().items(),
        ):
            if other:
                raise ConfigurationError(f"--within and --{name.replace('_', '-')} are both given; give one of them.")
        check_alone("within", None, config)
    elif options.plan is None:
        check_amount(options.ratio, size, config)
    elif options.ratio is not None or size:
        other = f"--{size.name.replace('_', '-')}" if size else "--ratio"
        raise ConfigurationError(f"{other} and --plan are both given; the plan says how much goes.")
    started = time.monotonic()
    target = options.ratio if options.plan is None else PruningPlan.load(options.plan)
    if options.resume and not options.stream:
        raise ConfigurationError("--resume is for --stream.")
    pruner = load_pruner(model, config, options.stream, options.offload, options.spill, options.data_parallel)
    resume = (True if options.resume else False if options.overwrite else None) if options.stream else None
    pruner.prune(target, options.output_dir, resume, **size.given(), **quality.given())
    if not first:
        return None
    plan, seconds = pruner.last_plan, round(time.monotonic() - started, 1)
    names = ["ratio_requested", "ratio", "layout", "dropped", "removed", "warnings"]
    names += [f"{name}_{when}" for name in ("parameters", "bytes", "macs") for when in ("before", "after")]
    figures = {name: getattr(plan, name) for name in names}
    figures["target"] = plan.target and asdict(plan.target)
    data = {"model": model.model, "output_dir": options.output_dir, "seconds": seconds, **figures}
    return data, plan.table(), f"Saved to {options.output_dir} after {seconds} s."


def _speaks() -> bool:
    """Whether this is the first of several processes; the others show neither progress nor results."""
    first = process_state().process_index == 0
    if not first:
        hide()
        logging.getLogger("hf_structprune").setLevel(logging.ERROR)
    return first
