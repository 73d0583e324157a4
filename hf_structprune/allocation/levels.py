"""Groups at several widths, each re-fitted once and kept in a folder: what models of other widths are put together of.

A level of a group is a number of units that stay, which ones, and the columns of the linear map that reads them,
re-fitted; of a block of experts those that stay, with their last matrices. Whole layers and sublayers have two levels:
there, and gone. What it costs to bring one of them alone to a level is measured, too (as in EvoPress,
https://huggingface.co/papers/2410.14649, and Týr-the-Pruner, https://huggingface.co/papers/2503.09657).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import Criterion, Scoring
from ..criteria.base import best_units
from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..files.reading import read_json_object
from ..files.writing import appearing, check_room, write_text
from ..hooks import Silencer
from ..model.experts import Experts, without_experts
from ..model.groups import Group, LayerStructure, matrix
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..refit.experts import refit_experts
from ..refit.reader import damping_for, kept_columns, refitted, write_columns
from ..stats.moments import InputStatistics, is_held_out
from ..stats.routing import RoutingStatistics, routing_statistics
from ..stats.seen import Calibration, few_tokens
from ..stats.stream import LayerStream
from ..stats.survey import kl_divergence, statistics_of
from ..units import KINDS, LAYERS, DepthKind, RoutedKind, kinds_of
from .removal import Unit, depth_candidates
from .widths import Budget


INDEX_NAME = "levels.json"
_SHARES = tuple(tenth / 10 for tenth in range(1, 10))  # of a group that go
_PROBED = 3  # levels of a group whose cost is measured; between them it follows a power law
_EVERY = 4  # predictions are compared at each so many-th token
_HELD_OUT = 8  # sequences that one level after the other is priced on
_SAMPLES = 64  # numbers of each tensor by which weights are told apart


@dataclass
class Ladder:
    """The levels of one group, or of a layer or a sublayer that stays or goes as a whole.

    Attributes:
        layer, kind: Number of the layer, and kind of unit or of depth.
        counts: Units that stay at each level, the most first: where it may stay whole, all of them. Of a layer 1, 0.
        gone: Parameters that each level takes from the model.
        nats: What each level costs alone, `KL(dense || cut)` a token on held-out text.
        group: The group, if it is one.
    """

    layer: int
    kind: str
    counts: list[int]
    gone: list[int]
    nats: list[float]
    group: Group | None = None

    @property
    def steepness(self) -> float:
        """`a` of the cost `a * share^2` of a group, the geometric mean over the levels."""
        shares = [1 - count / self.group.size for count in self.counts]
        logs = [math.log(max(n, 1e-12) / s**2) for n, s in zip(self.nats, shares, strict=True) if s > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 0.0


class Levels:
    """The levels of everything that is cut, in a folder.

    Args:
        folder: Holds `levels.json` and a file for each layer.
        ladders: What is in it.
    """

    def __init__(self, folder: Path, ladders: list[Ladder]) -> None:
        self.folder, self.ladders = folder, ladders

    def read(self, number: int, level: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What stays at a level of a group, and its re-fitted weights.

        Columns of its reader and the reader's weight on them; of experts their numbers and their last matrices, as the
        model stores them, or `None` where nothing is re-fitted.
        """
        ladder = self.ladders[number]
        name = f"{ladder.kind}.{ladder.counts[level]}"
        with safe_open(_file(self.folder, ladder.layer), "pt") as file:
            there = f"{name}.weight" in file.keys()  # noqa: SIM118
            return file.get_tensor(f"{name}.columns").long(), file.get_tensor(f"{name}.weight") if there else None


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.safetensors"


def counts_of_levels(budget: Budget, group: Group) -> list[int]:
    """Units that stay of a group at each of its levels: about ten, evenly; of heads every number there can be."""
    most = budget.next_count(group, group.size + 1)
    if not KINDS[group.kind].of_heads:
        counts = {budget.nearest_width(group, (1 - share) * group.size) for share in _SHARES}
        return [most, *sorted((n for n in counts | {budget.least(group)} if n < most), reverse=True)]
    counts = [most]
    while (smaller := budget.next_count(group, counts[-1])) is not None:
        counts.append(smaller)
    return counts


def size_of_levels(model: PreTrainedModel, group: Group, counts: list[int], compensation: bool = True) -> int:
    """Bytes of the levels of a group on disk: at each the columns of its reader that stay, and their numbers.

    Of experts their last matrices, with `compensation`, and their numbers.
    """
    if group.reader is None:
        matrices = Experts(model, group).matrices
        each = matrices[0].numel() * matrices.element_size() if compensation else 0
        return sum(count for count in counts if count < group.size) * (each + torch.int32.itemsize)
    weight = matrix(model.get_submodule(group.reader.module))
    rows, columns = weight.shape
    left = sum(count * columns // group.size for count in counts if count < group.size)
    return left * (rows * weight.element_size() + torch.int32.itemsize)


def on_power_law(shares: list[float], known: dict[int, float]) -> list[float]:
    """Costs at all shares of a group that go, of which some are known: powers of the share between neighbours.

    Below the first the power is 2; nothing gone costs nothing.
    """
    places, found = sorted(known), []
    for share in shares:
        if share <= 0:
            found.append(0.0)
            continue
        later = next((place for place in places if shares[place] >= share), places[-1])
        at = places.index(later)
        power, value = 2.0, max(known[later], 1e-12)
        if at:
            earlier = places[at - 1]
            power = math.log(value / max(known[earlier], 1e-12)) / math.log(shares[later] / shares[earlier])
        found.append(value * (share / shares[later]) ** max(power, 0.0))
    return found


@measures
def build_levels(
    model: PreTrainedModel, structure: ModelStructure, criterion: Criterion, config: PruningConfig, budget: Budget,
    tokens: Calibration, folder: Path, salience: Any = None,
) -> Levels:  # fmt: skip
    """Re-fits every group at every level, and measures what some of them cost; the model is left as it was.

    Layers that are in the folder already, of an interrupted run or another ratio, are not computed again.

    Args:
        budget: Which groups may be cut, and to which numbers of units.
        tokens: Calibration tokens; one sequence in eight is held out, the others are fitted on.
        folder: Gets the files.
        salience: Reduced gradients, for gradient criteria.

    Raises:
        UnsupportedModelError: Units of a group have no linear map that reads them, or depend on each other.
        ConfigurationError: The folder has levels of another model, text or configuration.
        PlaceError: The disk has no room for the levels.
    """
    ladders = ladders_of(structure, config, budget)
    groups = [ladder.group for ladder in ladders if ladder.group is not None]
    counts = {ladder.group.key: ladder.counts for ladder in ladders if ladder.group is not None}
    units = [(ladder.layer, ladder.kind) for ladder in ladders if ladder.group is None]
    check_room(folder, 0)
    index = _Index(folder, _digest(model, config, tokens, counts, units))
    if todo := {layer for layer, _ in (*counts, *units) if f"{layer}" not in index.nats}:
        sizes = [size_of_levels(model, g, counts[g.key], config.compensation) for g in groups if g.layer in todo]
        check_room(folder, sum(sizes))
        folder.mkdir(parents=True, exist_ok=True)
        making = _Making(model, structure, criterion, config, tokens, salience, counts, units)
        making.run(groups, todo, index)
    for ladder in ladders:
        ladder.nats = index.nats[f"{ladder.layer}"][ladder.kind]
    return Levels(folder, ladders)


def ladders_of(structure: ModelStructure, config: PruningConfig, budget: Budget) -> list[Ladder]:
    """Everything that may be cut and its levels, before what they cost is known.

    Raises:
        UnsupportedModelError: Units of a group have no linear map that reads them, or depend on each other.
    """
    ladders = []
    for group in budget.ranked:
        if group.coupled or (group.reader is None and group.in_experts):
            raise UnsupportedModelError(
                f"allocation='evolution' puts re-fitted readers of units together, and there is none of {group.kind} "
                f"in layer {group.layer} that could be exchanged alone: use allocation='search'."
            )
        counts = counts_of_levels(budget, group)
        gone = [(group.size - count) * group.cost for count in counts]
        ladders.append(Ladder(*group.key, counts, gone, [0.0] * len(counts), group))
    for number, kind in depth_units(structure, config):
        layer = structure.layers[number]
        part = layer if kind == LAYERS else layer.sublayer(kind)
        ladders.append(Ladder(number, kind, [1, 0], [0, part.parameters], [0.0, 0.0]))
    return ladders


def depth_units(structure: ModelStructure, config: PruningConfig) -> list[Unit]:
    """Layers and sublayers that may go."""
    kinds = config.kinds(kinds_of(DepthKind))
    return depth_candidates(structure, config, kinds) if kinds else []


class _Making:
    """Re-fits and prices levels, one layer after the other."""

    def __init__(self, model, structure, criterion, config, tokens, salience, counts, units) -> None:
        self.model, self.structure, self.criterion, self.config = model, structure, criterion, config
        self.salience, self.counts, self.units = salience, counts, units
        held_out = is_held_out(torch.arange(len(tokens)))
        if not held_out.any():
            held_out[-1] = True
        size = config.calibration.batch_size
        self.fit = LayerStream(model, structure, tokens[~held_out] if not held_out.all() else tokens, size)
        self.test = LayerStream(model, structure, tokens[held_out][:_HELD_OUT], size)
        self._dense = [self.test.finish(0, number, _EVERY) for number in range(len(self.test.batches))]
        self._positions = sum(logits.shape[0] * logits.shape[1] for logits in self._dense)
        self._silencer = Silencer(model, structure, few_tokens(tokens)) if units else None

    def price(self, layer: int) -> float:
        """What has been changed from a layer on costs, in nats a token."""
        test, dense = self.test, self._dense
        return sum(kl_divergence(d, test.finish(layer, n, _EVERY)) for n, d in enumerate(dense)) / self._positions

    def run(self, groups: list[Group], todo: Collection[int], index: _Index) -> None:
        """Makes the levels of the layers that are to do."""
        for layer in tqdm(self.structure.layers, desc="Levels"):
            if layer.index in todo:
                tensors, nats = {}, {}
                for group in (g for g in groups if g.layer == layer.index):
                    make = self._experts if group.reader is None else self._widths
                    nats[group.kind] = make(group, tensors)
                for _, kind in (unit for unit in self.units if unit[0] == layer.index):
                    nats[kind] = [0.0, self._without(layer, kind)]
                index.add(layer.index, tensors, nats)
            self.fit.advance(layer.index)
            self.test.advance(layer.index)

    def _without(self, layer: LayerStructure, kind: str) -> float:
        """The price of a layer, or of a sublayer."""
        if kind == LAYERS:
            return self.price(layer.index + 1)
        with self._silencer.silenced([layer.sublayer(kind)]):
            return self.price(layer.index)

    def _widths(self, group: Group, tensors: dict[str, torch.Tensor]) -> list[float]:
        """Adds the levels of units that a linear map reads, and gives their prices."""
        module, config = self.model.get_submodule(group.reader.module), self.config
        statistics, original = statistics_of(self.fit, group, self.criterion, gram=True), module.weight
        levels, score = self.counts[group.key], self._score(group, statistics)
        cut, known = self._cut(group), {}
        settings = _with_damping(module, statistics, group, score, [levels[level] for level in cut], config)
        for level in cut:
            kept = {group.key: best_units(score, group, levels[level])}
            columns = kept_columns([group], kept, matrix(module).shape[1])
            weight = refitted(module, statistics, columns, settings).cpu()
            name = f"{group.kind}.{levels[level]}"
            tensors |= {f"{name}.columns": columns.int(), f"{name}.weight": weight.contiguous()}
            if level not in _probed(cut):
                continue
            try:
                module.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
                write_columns(module, weight.to(original.device), columns)
                known[level] = self.price(group.layer)
            finally:
                module.weight = original
        return on_power_law([1 - count / group.size for count in levels], known)

    @torch.no_grad()
    def _experts(self, group: Group, tensors: dict[str, torch.Tensor]) -> list[float]:
        """Adds the levels of a block of experts, and gives their prices."""
        inputs, experts = self.fit.capture(group.layer, group.parent), Experts(self.model, group)
        statistics = routing_statistics(self.model, group, self.criterion, inputs)
        levels, score = self.counts[group.key], self._score(group, statistics)
        outputs = [experts.run(x)[0].float() for x in inputs]
        cut, known, dense = self._cut(group), {}, experts.matrices
        for level in cut:
            kept = best_units(score, group, levels[level])
            name = f"{group.kind}.{levels[level]}"
            tensors[f"{name}.columns"] = kept.int().cpu()
            try:
                experts.matrices = nn.Parameter(dense.detach().clone(), requires_grad=False)
                with without_experts(self.model, [group], {group.key: kept}):
                    if self.config.compensation:
                        targets = [output.clone() for output in outputs]
                        refit_experts(self.model, group, inputs, targets, None, self.config)
                        tensors[f"{name}.weight"] = experts.matrices[kept.to(dense.device)].cpu().contiguous()
                    if level in _probed(cut):
                        known[level] = self.price(group.layer)
            finally:
                experts.matrices = dense
        return on_power_law([1 - count / group.size for count in levels], known)

    def _cut(self, group: Group) -> list[int]:
        """Levels at which something goes."""
        return [level for level, count in enumerate(self.counts[group.key]) if count < group.size]

    def _score(self, group: Group, statistics: InputStatistics | RoutingStatistics) -> torch.Tensor:
        drop = group.size - self.counts[group.key][-1]
        return self.criterion.score(Scoring(group, self.model, statistics, self.salience, drop))


def _probed(cut: list[int]) -> set[int]:
    """Levels whose cost is measured."""
    return {cut[round(i * (len(cut) - 1) / (_PROBED - 1))] for i in range(_PROBED)}


def _with_damping(module, statistics, group, score, counts, config: PruningConfig) -> PruningConfig:
    """The configuration with the damping that suits the level in the middle, which serves for all of a group."""
    if not counts or not config.compensation or config.damping is not None:
        return config
    kept = {group.key: best_units(score, group, counts[len(counts) // 2])}
    weight = matrix(module)
    columns = kept_columns([group], kept, weight.shape[1]).to(weight.device)
    damping = damping_for(weight, statistics.fit, statistics.held_out, columns, config)
    return dataclasses.replace(config, damping=damping)


class _Index:
    """`levels.json`: what the levels in a folder are of, and what they cost, by layer and kind."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder, self._digest, path = folder, digest, folder / INDEX_NAME
        self.nats: dict[str, dict[str, list[float]]] = {}
        if path.exists():
            found = read_json_object(path, CheckpointError)
            if found.get("digest") != digest:
                raise ConfigurationError(
                    f"The levels in {folder} are of another model, other text or another configuration: give "
                    "another folder as `levels`, or remove this one."
                )
            self.nats = {n: nats for n, nats in found["layers"].items() if _file(folder, int(n)).exists()}

    def add(self, layer: int, tensors: dict[str, torch.Tensor], nats: dict[str, list[float]]) -> None:
        with appearing(_file(self.folder, layer)) as path:
            save_file(tensors, path)
        self.nats[f"{layer}"] = nats
        content = {"digest": self._digest, "layers": self.nats}
        write_text(self.folder / INDEX_NAME, json.dumps(content, indent=1) + "\n")


def _digest(model: PreTrainedModel, config: PruningConfig, tokens: Calibration, counts: dict, depth: list) -> str:
    """What levels depend on, as one short text."""
    names = ("criterion", "taylor", "aggregation", "compensation", "damping", "units", "seed")
    about: dict[str, Any] = {name: getattr(config, name) for name in names}
    about |= {"counts": [[*key, *values] for key, values in sorted(counts.items())], "type": model.config.model_type}
    about |= {"depth": depth} if depth else {}
    about |= {"experts": config.expert_criterion} if config.kinds(kinds_of(RoutedKind)) else {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        about[name] = float(flat[:: max(1, flat.numel() // _SAMPLES)].double().sum())
    digest = hashlib.sha256(json.dumps(about).encode())
    for part in tokens if isinstance(tokens, torch.Tensor) else (row.ids for row in tokens.rows):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
