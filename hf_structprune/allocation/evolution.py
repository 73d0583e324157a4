"""Widths of all layers by what they cost together: levels are exchanged as long as the whole model gets better.

It begins with the levels that cost least if what each costs alone is added up, by dynamic programming, and goes on as
EvoPress does (Sieberling et al., 2024, https://huggingface.co/papers/2410.14649): of several models with a few levels
exchanged the best are kept, by a little text first and then by more, and parameters stay what they are.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import make_criterion
from ..errors import CheckpointError, RatioError
from ..files.reading import read_json_object
from ..files.writing import write_text
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..stats.seen import Calibration
from .levels import Divergence, Ladder, Levels, build_levels
from .widths import Budget, Counts, rounded


SEARCH_NAME = "search.json"
OFFSPRING = 8  # models of a generation
_FEW, _MORE = 1, 4  # batches of text that all of them are measured on, and that the best ones are
_BEST = 2
_FINAL = 8  # batches that the end is compared with the beginning on
_BUCKETS = 4000  # that parameters are counted in at most
_TRIES = 200  # to find a model that was not looked at yet

Choice = list[int]  # the level of each group


@dataclass
class Found:
    """What came out.

    Attributes:
        choice: The level of each group.
        evaluations: Models that were measured on the way.
        begun, ended: `KL(dense || cut)` in nats a token of the first and the last model, on the same text.
    """

    choice: Choice
    evaluations: int
    begun: float
    ended: float


def cheapest(costs: list[list[float]], gone: list[list[int]], most: int, slack: int) -> Choice:
    """The level of each group with the least sum of costs, when `most - slack` to `most` parameters go.

    Dynamic programming over the groups, parameters counted in at most 4,000 steps (rounded to the nearest).

    Args:
        costs, gone: Of each group, cost and parameters gone at each level, none or fewest first.

    Raises:
        RatioError: No choice of levels takes so much.
    """
    step = max(1, math.gcd(*(number for row in gone for number in row)), most // _BUCKETS)
    size = most // step + 1
    best, taken = np.full(size, np.inf), []
    best[0] = 0.0
    for row, sizes in zip(costs, gone, strict=True):
        options = []
        for cost, number in zip(row, sizes, strict=True):
            shift = round(number / step)
            shifted = np.full(size, np.inf)
            if shift < size:
                shifted[shift:] = best[: size - shift] + cost
            options.append(shifted)
        table = np.stack(options)
        taken.append(table.argmin(0))
        best = table.min(0)
    first = max(0, -(-(most - slack) // step))  # rounded up: no less than that goes
    place = first + int(best[first:].argmin()) if first < size else size - 1
    if first == size or best[place] == np.inf:
        raise RatioError(f"No choice of levels takes {most - slack:,} to {most:,} parameters. Ask for less.")
    choice: Choice = []
    for row, sizes in zip(reversed(taken), reversed(gone), strict=True):
        level = int(row[place])
        choice.append(level)
        place -= round(sizes[level] / step)
    return choice[::-1]


class Exchange:
    """Makes models with other levels and as many parameters.

    Args:
        gone: Of each group, parameters gone at each level.
        most, slack: From `most - slack` to `most` parameters go.
    """

    def __init__(self, gone: list[list[int]], most: int, slack: int) -> None:
        self.gone, self.most, self.slack = gone, most, slack

    def fits(self, choice: Choice) -> bool:
        return 0 <= self.most - self._total(choice) <= self.slack

    def _total(self, choice: Choice) -> int:
        return sum(row[level] for row, level in zip(self.gone, choice, strict=True))

    def settled(self, choice: Choice, chance: random.Random) -> Choice | None:
        """The choice with single levels moved until as much goes as is to go; `None` if that did not succeed."""
        choice = list(choice)
        for _ in range(4 * len(choice)):
            over = self._total(choice) - self.most
            if -self.slack <= over <= 0:
                return choice
            move = -1 if over > 0 else 1
            able = [n for n, level in enumerate(choice) if 0 <= level + move < len(self.gone[n])]
            if not able:
                return None
            number = chance.choice(able)
            choice[number] += move
        return None

    def other(self, choice: Choice, chance: random.Random) -> Choice | None:
        """One to three pairs of groups change levels, one up and one down."""
        changed = list(choice)
        for _ in range(chance.randint(1, 3)):
            more = [n for n, level in enumerate(changed) if level + 1 < len(self.gone[n])]
            less = [n for n, level in enumerate(changed) if level > 0]
            if not more or not less:
                return None
            up = chance.choice(more)
            down = [n for n in less if n != up]
            if not down:
                return None
            changed[up] += 1
            changed[chance.choice(down)] -= 1
        changed = self.settled(changed, chance)
        return None if changed == choice else changed


class Evolution:
    """Exchanges levels, one generation after the other.

    Args:
        exchange: Makes models.
        measure: What a choice costs on some batches of text.
        batches: How many there are.
        seed: Of everything random; each generation has a seed of its own, so that one can go on anywhere.
        start: The first choice.
    """

    def __init__(
        self, exchange: Exchange, measure: Callable[[Choice, list[int]], float], batches: int, seed: int,
        start: Choice,
    ) -> None:  # fmt: skip
        self.exchange, self._measure, self._batches, self._seed = exchange, measure, batches, seed
        self.parent, self.generation, self.evaluations = start, 0, 0

    def step(self) -> None:
        """One generation: the parent stays unless one of its offspring is better on more text."""
        chance = random.Random(f"{self._seed} {self.generation}")
        few = chance.sample(range(self._batches), min(_FEW, self._batches))
        more = chance.sample(range(self._batches), min(_MORE, self._batches))
        offspring: list[Choice] = []
        for _ in range(_TRIES):
            other = self.exchange.other(self.parent, chance)
            if other is not None and other not in offspring and other != self.parent:
                offspring.append(other)
            if len(offspring) == OFFSPRING:
                break
        self.generation += 1
        if not offspring:
            return
        ranked = sorted(offspring, key=lambda choice: self._cost(choice, few))[:_BEST]
        self.parent = min([self.parent, *ranked], key=lambda choice: self._cost(choice, more))

    def _cost(self, choice: Choice, batches: list[int]) -> float:
        self.evaluations += 1
        return self._measure(choice, batches)


@measures
def evolve(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, budget: Budget, target: int,
    tokens: Calibration, salience: Any = None,
) -> tuple[Counts, str]:  # fmt: skip
    """Units to keep of every group, so that the whole model changes its predictions least; changes nothing.

    Args:
        budget: Which groups may be cut, and to which numbers of units.
        target: Parameters that are to go.
        tokens: Calibration tokens.
        salience: Reduced gradients, for gradient criteria.

    Returns:
        `{(layer, kind): units to keep}`, and what was done, in words for the plan.
    """
    with tempfile.TemporaryDirectory(prefix="levels-") as temporary:
        folder = Path(config.levels or temporary)
        criterion = make_criterion(config)
        levels = build_levels(model, structure, criterion, config, budget, tokens, folder, salience)
        divergence = Divergence(model, structure, tokens, config.calibration.batch_size)
        found = _search(model, levels, divergence, config, target)
    chosen = zip(levels.ladders, found.choice, strict=True)
    counts = {ladder.group.key: ladder.counts[level] for ladder, level in chosen}
    counts = rounded(budget, counts, target, {ladder.group.key: ladder.steepness for ladder in levels.ladders})
    return counts, (
        f"allocation 'evolution': {found.evaluations} models were measured, and what the cut costs on calibration "
        f"text fell from {found.begun:.3f} to {found.ended:.3f} nats a token (levels as they are, before readers are "
        f"re-fitted one after the other); search_evaluations={found.evaluations} and seed={config.seed} repeat it"
    )


def _search(
    model: PreTrainedModel, levels: Levels, divergence: Divergence, config: PruningConfig, target: int
) -> Found:
    gone = [[ladder.gone(level) for level in range(len(ladder.counts))] for ladder in levels.ladders]
    slack = _finest(levels.ladders)
    exchange, first = Exchange(gone, target, slack), random.Random(f"{config.seed}")
    start = cheapest([ladder.nats for ladder in levels.ladders], gone, target, slack)
    start = exchange.settled(start, first) or start
    with levels.assembled(model) as assembly:

        def measure(choice: Choice, batches: list[int]) -> float:
            assembly.take(choice)
            return divergence(batches)

        evolution = Evolution(exchange, measure, divergence.batches, config.seed, start)
        state = levels.folder / SEARCH_NAME
        _go_on(evolution, state, target, config)
        _run(evolution, config, lambda: _keep(evolution, state, target, config))
        some = list(range(0, divergence.batches, max(1, divergence.batches // _FINAL)))
        begun = measure(start, some)
        ended = begun if evolution.parent == start else measure(evolution.parent, some)
    if ended > begun:
        return Found(start, evolution.evaluations, begun, begun)
    return Found(evolution.parent, evolution.evaluations, begun, ended)


def _finest(ladders: list[Ladder]) -> int:
    """Parameters of the largest step between levels, of the groups where that is smallest."""
    steps = [
        max(ladder.gone(level + 1) - ladder.gone(level) for level in range(len(ladder.counts) - 1))
        for ladder in ladders
        if len(ladder.counts) > 1
    ]
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
