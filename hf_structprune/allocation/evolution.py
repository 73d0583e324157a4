"""Widths of all layers, and layers that go, by what they cost together: levels are exchanged while that falls.

It begins with the levels that cost least if what each costs alone is added up, by dynamic programming, and goes on as
EvoPress does (Sieberling et al., 2024, https://huggingface.co/papers/2410.14649): of several models with a few levels
exchanged the best are kept, by a little text first and then by more, and parameters stay what they are.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import make_criterion
from ..errors import CheckpointError, RatioError
from ..files.reading import read_json_object
from ..files.writing import write_text
from ..model.groups import LayerStructure
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..plan import Dropped, emptied, is_dropped, removed_by
from ..progress import tqdm
from ..stats.seen import Calibration
from ..units import LAYERS
from .assembly import Divergence, assembled
from .exchange import Bundle, Choice, Evolution, Exchange, Options, cheapest
from .levels import Ladder, Levels, build_levels, ladders_of
from .removal import as_dropped
from .widths import Budget, Counts, rounded


SEARCH_NAME = "search.json"
_FINAL = 8  # batches that the end is compared with the beginning on


@dataclass
class Found:
    """What came out.

    Attributes:
        choice: The level of each ladder.
        evaluations: Models that were measured on the way.
        begun, ended: `KL(dense || cut)` in nats a token of the first and the last model, on the same text.
    """

    choice: Choice
    evaluations: int
    begun: float
    ended: float


@measures
def evolve(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, budget: Callable[[Dropped], Budget],
    ratio: float, tokens: Callable[[], Calibration], salience: Any = None,
) -> tuple[Counts, Dropped, str]:  # fmt: skip
    """Units to keep of every group, and what goes as a whole, so that predictions change least; changes nothing.

    Args:
        budget: Which groups may be cut, and to which numbers of units, once some layers and sublayers are gone.
        ratio: Share of all parameters that is to go.
        tokens: Loads the calibration tokens.
        salience: Reduced gradients, for gradient criteria.

    Returns:
        `{(layer, kind): units to keep}`, layers and sublayers that go, and what was done, in words for the plan.

    Raises:
        RatioError: More than can go.
    """
    target = _target(structure, config, budget({}), ratio)
    if not target:
        return {}, {}, ""
    tokens = tokens()
    with tempfile.TemporaryDirectory(prefix="levels-") as temporary:
        folder = Path(config.levels or temporary)
        criterion = make_criterion(config)
        levels = build_levels(model, structure, criterion, config, budget({}), tokens, folder, salience)
        divergence = Divergence(model, structure, tokens, config.calibration.batch_size)
        options = options_of(levels.ladders, structure)
        with assembled(model, structure, levels, tokens) as assembly:

            def measure(choice: Choice, batches: list[int]) -> float:
                with assembly.at(choice) as skip:
                    return divergence(batches, skip)

            found = search(options, measure, divergence.batches, config, target, levels)
    chosen = list(zip(levels.ladders, found.choice, strict=True))
    gone = [(ladder.layer, ladder.kind) for ladder, level in chosen if ladder.group is None and level]
    dropped = as_dropped(gone, structure)
    left = budget(dropped)
    there = {group.key for group in left.ranked}
    counts = {ladder.group.key: ladder.counts[level] for ladder, level in chosen if ladder.group}
    counts = {key: count for key, count in counts.items() if key in there}
    steepness = {ladder.group.key: ladder.steepness for ladder in levels.ladders if ladder.group}
    counts = rounded(left, counts, target - removed_by(dropped, structure), steepness)
    how = (
        f"allocation 'evolution': {found.evaluations} models were measured, and what the cut costs on calibration "
        f"text fell from {found.begun:.3f} to {found.ended:.3f} nats a token (levels as they are, before readers are "
        f"re-fitted one after the other); search_evaluations={found.evaluations} and seed={config.seed} repeat it"
    )
    return counts, dropped, how


def _target(structure: ModelStructure, config: PruningConfig, budget: Budget, ratio: float) -> int:
    """Parameters that are to go; checks that so many can."""
    ladders = ladders_of(structure, config, budget)
    if all(ladder.group is not None for ladder in ladders):
        return budget.target(ratio)
    total, most = structure.total_parameters, options_of(ladders, structure).most
    target = round(ratio * total)
    if target > most:
        raise RatioError(
            f"{target:,} parameters ({target / total:.2%} of the model) are to go, but at most {most:,} "
            f"({most / total:.2%}) of units {', '.join(config.units)} can while a layer stays. Ask for less."
        )
    return target


def options_of(ladders: list[Ladder], structure: ModelStructure) -> Options:
    """What can be chosen: ladders of their own, and those of layers that go, or lose a sublayer, as a whole."""
    bundles = []
    for layer in structure.layers:
        numbers = [number for number, ladder in enumerate(ladders) if ladder.layer == layer.index]
        if any(ladders[number].group is None for number in numbers):
            bundles.append(_bundle(numbers, ladders, layer, structure))
    costs, gone = [ladder.nats for ladder in ladders], [ladder.gone for ladder in ladders]
    return Options(costs, gone, bundles, len(structure.layers))


def _bundle(numbers: list[int], ladders: list[Ladder], layer: LayerStructure, structure: ModelStructure) -> Bundle:
    """The ladders of a layer of which some are the layer or its sublayers."""
    groups, whole = ([n for n in numbers if (ladders[n].group is None) == is_whole] for is_whole in (False, True))
    found = Bundle([*groups, *whole], whole, {}, {}, [], set())
    price = {ladders[n].kind: ladders[n].nats[1] for n in whole}
    for goes in product((0, 1), repeat=len(whole)):
        kinds = {ladders[n].kind: [layer.index] for n, level in zip(whole, goes, strict=True) if level}
        empty = LAYERS in kinds or layer.index in emptied(kinds, structure)
        parameters = layer.parameters if empty else removed_by(kinds, structure)
        own = [LAYERS] if empty and LAYERS in price else kinds
        there = [not empty and not is_dropped(kinds, layer.index, ladders[n].kind) for n in groups]
        # The one way to say it: a layer that goes says it itself, where it can.
        distinct = not (empty and LAYERS in price) or kinds.keys() == {LAYERS}
        for levels in product(*(range(len(ladders[n].gone)) for n in groups)):
            rest = [(ladders[n], level) for n, level, is_there in zip(groups, levels, there, strict=True) if is_there]
            key = (*levels, *goes)
            found.gone[key] = parameters + sum(ladder.gone[level] for ladder, level in rest)
            found.nats[key] = sum(price[kind] for kind in own) + sum(ladder.nats[level] for ladder, level in rest)
            if distinct and not any(level for level, is_there in zip(levels, there, strict=True) if not is_there):
                found.distinct.append(key)
            if empty:
                found.emptied.add(key)
    return found


def search(
    options: Options, measure: Callable[[Choice, list[int]], float], batches: int, config: PruningConfig, target: int,
    levels: Levels,
) -> Found:  # fmt: skip
    """The search itself.

    Args:
        options: What can be chosen.
        measure: What a choice costs on some batches of text, of which there are so many `batches`.
        target: Parameters that are to go.
        levels: Where it is kept how far the search has come.
    """
    slack = _finest(levels.ladders)
    exchange, first = Exchange(options, target, slack), random.Random(f"{config.seed}")
    start = cheapest(options, target, slack)
    start = exchange.settled(start, first) or start
    if not options.leaves_layers(start):
        raise RatioError(f"{target:,} parameters go only if no layer stays. Ask for less.")
    evolution = Evolution(exchange, measure, batches, config.seed, start)
    state = levels.folder / SEARCH_NAME
    _go_on(evolution, state, target, config)
    _run(evolution, config, lambda: _keep(evolution, state, target, config))
    some = list(range(0, batches, max(1, batches // _FINAL)))
    begun = measure(start, some)
    ended = begun if evolution.parent == start else measure(evolution.parent, some)
    if ended > begun:
        return Found(start, evolution.evaluations, begun, begun)
    return Found(evolution.parent, evolution.evaluations, begun, ended)


def _finest(ladders: list[Ladder]) -> int:
    """Parameters of the largest step between levels, of the ladders where that is smallest."""
    steps = [max(b - a for a, b in pairwise(ladder.gone)) for ladder in ladders if len(ladder.gone) > 1]
    return min(steps, default=0)


def _run(evolution: Evolution, config: PruningConfig, keep: Callable[[], None]) -> None:
    """Generations, as long as there is time, or until so many models were measured."""
    wanted, seconds = config.search_evaluations, 60 * config.search_minutes
    started, total = time.monotonic(), round(seconds) if wanted is None else wanted
    unit = "s" if wanted is None else "models"
    form = f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}{{postfix}}]"
    with tqdm(total=total, desc="Evolution", bar_format=form) as bar:
        while True:
            done = time.monotonic() - started if wanted is None else evolution.evaluations
            bar.n = min(done, total)
            bar.refresh()
            if done >= total:
                return
            before = evolution.evaluations
            evolution.step()
            keep()
            if evolution.evaluations == before:  # there is nothing to exchange
                return


def _about(target: int, config: PruningConfig) -> dict[str, Any]:
    return {"target": target, "seed": config.seed}


def _keep(evolution: Evolution, state: Path, target: int, config: PruningConfig) -> None:
    values = {name: getattr(evolution, name) for name in ("generation", "evaluations", "parent")}
    write_text(state, json.dumps(_about(target, config) | values) + "\n")


def _go_on(evolution: Evolution, state: Path, target: int, config: PruningConfig) -> None:
    """Puts an interrupted search for the same back where it was, if it has not gone too far."""
    if not state.exists():
        return
    found = read_json_object(state, CheckpointError)
    beyond = config.search_evaluations is not None and found.get("evaluations", 0) > config.search_evaluations
    same = all(found.get(name) == value for name, value in _about(target, config).items())
    if same and not beyond and evolution.exchange.fits(found["parent"]):
        evolution.parent, evolution.generation = found["parent"], found["generation"]
        evolution.evaluations = found["evaluations"]
