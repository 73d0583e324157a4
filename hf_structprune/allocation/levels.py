"""Groups at several widths, each re-fitted once and kept in a folder: what models of other widths are put together of.

A level of a group is a number of units that stay, which ones, and the columns of the linear map that reads them,
re-fitted. What it costs to cut one group to a level is measured, too (as in EvoPress,
https://huggingface.co/papers/2410.14649, and Týr-the-Pruner, https://huggingface.co/papers/2503.09657).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
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
from ..model.groups import Group, matrix
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..refit.reader import damping_for, kept_columns, refitted, write_columns
from ..stats.moments import is_held_out
from ..stats.seen import Calibration
from ..stats.stream import LayerStream
from ..stats.survey import kl_divergence, statistics_of
from ..units import KINDS
from .widths import Budget


INDEX_NAME = "levels.json"
_SHARES = tuple(tenth / 10 for tenth in range(1, 10))  # of a group that go
_PROBED = 3  # levels of a group whose cost is measured; between them it follows a power law
_EVERY = 4  # predictions are compared at each so many-th token
_HELD_OUT = 8  # sequences that one level after the other is priced on
_SAMPLES = 64  # numbers of each tensor by which weights are told apart


@dataclass
class Ladder:
    """The levels of one group.

    Attributes:
        group: The group.
        counts: Units that stay at each level, the most first: where it may stay whole, all of them.
        nats: What each level costs alone, `KL(dense || cut)` a token on held-out text.
    """

    group: Group
    counts: list[int]
    nats: list[float]

    def gone(self, level: int) -> int:
        """Parameters that a level takes from the model."""
        return (self.group.size - self.counts[level]) * self.group.cost

    @property
    def steepness(self) -> float:
        """`a` of the cost `a * share^2`, the geometric mean over the levels."""
        shares = [1 - count / self.group.size for count in self.counts]
        logs = [math.log(max(n, 1e-12) / s**2) for n, s in zip(self.nats, shares, strict=True) if s > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 0.0


class Divergence:
    """`KL(dense || model as it is)` in nats a token, on batches of text.

    Args:
        model, structure: The dense model, whose predictions are kept.
        tokens: The text.
        batch_size: Sequences in a batch.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, batch_size: int
    ) -> None:
        self._stream = LayerStream(model, structure, tokens, batch_size)
        self.batches = len(self._stream.batches)
        self._places = [self._stream.positions(number, _EVERY) for number in range(self.batches)]
        self._dense = [self._last(number) for number in range(self.batches)]

    def _last(self, number: int) -> torch.Tensor:
        return self._stream.outputs(0, number)[:, self._places[number]].clone()

    def __call__(self, numbers: list[int]) -> float:
        total, count = 0.0, 0
        for number in numbers:
            ids = self._stream.batches[number][:, self._places[number]]
            dense, cut = (self._stream.head(last, ids) for last in (self._dense[number], self._last(number)))
            total += kl_divergence(dense, cut)
            count += ids.numel()
        return total / count


class Levels:
    """The levels of all groups that are cut, in a folder.

    Args:
        folder: Holds `levels.json` and a file for each layer.
        ladders: What is in it.
    """

    def __init__(self, folder: Path, ladders: list[Ladder]) -> None:
        self.folder, self.ladders = folder, ladders

    def read(self, number: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which columns of its reader stay at a level of a group, and what they are re-fitted to."""
        group, count = self.ladders[number].group, self.ladders[number].counts[level]
        with safe_open(_file(self.folder, group.layer), "pt") as file:
            name = f"{group.kind}.{count}"
            return file.get_tensor(f"{name}.columns").long(), file.get_tensor(f"{name}.weight")

    @contextmanager
    def assembled(self, model: PreTrainedModel) -> Iterator[Assembly]:
        """The model, which other levels can be put into as long as this is open."""
        assembly = Assembly(model, self)
        try:
            yield assembly
        finally:
            assembly.restore()


class Assembly:
    """A model whose groups are at levels: readers have the re-fitted columns and zeros; nothing else is changed."""

    def __init__(self, model: PreTrainedModel, levels: Levels) -> None:
        self._levels = levels
        self._readers = [model.get_submodule(ladder.group.reader.module) for ladder in levels.ladders]
        self._dense = [reader.weight for reader in self._readers]
        self._now = [-1] * len(self._readers)

    def take(self, choice: list[int]) -> None:
        """Puts every group at a level."""
        for number, level in enumerate(choice):
            if level == self._now[number]:
                continue
            reader, ladder = self._readers[number], self._levels.ladders[number]
            reader.weight = self._dense[number]
            if ladder.counts[level] < ladder.group.size:
                columns, weight = self._levels.read(number, level)
                reader.weight = nn.Parameter(self._dense[number].detach().clone(), requires_grad=False)
                write_columns(reader, weight.to(reader.weight.device), columns)
            self._now[number] = level

    def restore(self) -> None:
        """Puts the dense weights back."""
        for reader, weight in zip(self._readers, self._dense, strict=True):
            reader.weight = weight


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


def size_of_levels(model: PreTrainedModel, group: Group, counts: list[int]) -> int:
    """Bytes of the levels of a group on disk: at each the columns of its reader that stay, and their numbers."""
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
    groups = budget.ranked
    for group in groups:
        if group.reader is None or group.coupled:
            raise UnsupportedModelError(
                f"allocation='evolution' puts re-fitted readers of units together, and there is none of {group.kind} "
                f"in layer {group.layer} that could be exchanged alone: use allocation='search'."
            )
    counts = {group.key: counts_of_levels(budget, group) for group in groups}
    check_room(folder, 0)
    index = _Index(folder, _digest(model, config, tokens, counts))
    if todo := [layer for layer in {group.layer for group in groups} if f"{layer}" not in index.nats]:
        check_room(folder, sum(size_of_levels(model, g, counts[g.key]) for g in groups if g.layer in todo))
        folder.mkdir(parents=True, exist_ok=True)
        _compute(model, structure, criterion, config, tokens, salience, groups, counts, set(todo), index)
    ladders = [Ladder(group, counts[group.key], index.nats[f"{group.layer}"][group.kind]) for group in groups]
    return Levels(folder, ladders)


def _compute(model, structure, criterion, config, tokens, salience, groups, counts, todo, index: _Index) -> None:
    held_out = is_held_out(torch.arange(len(tokens)))
    if not held_out.any():
        held_out[-1] = True
    size = config.calibration.batch_size
    fit = LayerStream(model, structure, tokens[~held_out] if not held_out.all() else tokens, size)
    test = LayerStream(model, structure, tokens[held_out][:_HELD_OUT], size)
    dense = [test.finish(0, number, _EVERY) for number in range(len(test.batches))]
    positions = sum(logits.shape[0] * logits.shape[1] for logits in dense)

    def price(layer: int) -> float:
        return sum(kl_divergence(d, test.finish(layer, n, _EVERY)) for n, d in enumerate(dense)) / positions

    for layer in tqdm(structure.layers, desc="Levels"):
        tensors, nats = {}, {}
        for group in (g for g in groups if g.layer == layer.index and g.layer in todo):
            module = model.get_submodule(group.reader.module)
            statistics, original = statistics_of(fit, group, criterion, gram=True), module.weight
            levels = counts[group.key]
            score = criterion.score(Scoring(group, model, statistics, salience, group.size - levels[-1]))
            cut = [level for level, count in enumerate(levels) if count < group.size]
            settings = _with_damping(module, statistics, group, score, [levels[level] for level in cut], config)
            probed, known = {cut[round(i * (len(cut) - 1) / (_PROBED - 1))] for i in range(_PROBED)} if cut else (), {}
            for level in cut:
                kept = {group.key: best_units(score, group, levels[level])}
                columns = kept_columns([group], kept, matrix(module).shape[1])
                weight = refitted(module, statistics, columns, settings).cpu()
                name = f"{group.kind}.{levels[level]}"
                tensors |= {f"{name}.columns": columns.int(), f"{name}.weight": weight.contiguous()}
                if level not in probed:
                    continue
                try:
                    module.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
                    write_columns(module, weight.to(original.device), columns)
                    known[level] = price(layer.index)
                finally:
                    module.weight = original
            nats[group.kind] = on_power_law([1 - count / group.size for count in levels], known)
        if tensors:
            index.add(layer.index, tensors, nats)
        fit.advance(layer.index)
        test.advance(layer.index)


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


def _digest(model: PreTrainedModel, config: PruningConfig, tokens: Calibration, counts: dict) -> str:
    """What levels depend on, as one short text."""
    names = ("criterion", "taylor", "aggregation", "compensation", "damping", "units", "seed")
    about: dict[str, Any] = {name: getattr(config, name) for name in names}
    about |= {"counts": [[*key, *values] for key, values in sorted(counts.items())], "type": model.config.model_type}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        about[name] = float(flat[:: max(1, flat.numel() // _SAMPLES)].double().sum())
    digest = hashlib.sha256(json.dumps(about).encode())
    for part in tokens if isinstance(tokens, torch.Tensor) else (row.ids for row in tokens.rows):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
