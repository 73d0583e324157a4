"""Choices of levels: the cheapest by what each costs alone, and models with a few levels exchanged.

Parameters are counted exactly, also where a whole layer or sublayer goes and takes its groups along.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import RatioError


OFFSPRING = 8  # models of a generation
_FEW, _MORE = 1, 4  # batches of text that all of them are measured on, and that the best ones are
_BEST = 2
_BUCKETS = 4000  # that parameters are counted in at most
_TRIES = 200  # to find a model that was not looked at yet
_FAR = 3  # times the slack: beyond it levels are put right by their prices, and not by chance

Choice = list[int]  # the level of each ladder


@dataclass
class Bundle:
    """The ladders of one layer, where some of them are a whole layer or sublayer, with or without it.

    Attributes:
        numbers: Their numbers.
        whole: Those of them that are a layer or a sublayer.
        gone: Parameters that go with each combination of their levels.
        nats: What each combination costs, added up; what has gone along costs nothing more.
        distinct: Combinations that are different models: what has gone along is at its first level.
        emptied: Combinations by which the whole layer goes.
    """

    numbers: list[int]
    whole: list[int]
    gone: dict[tuple[int, ...], int]
    nats: dict[tuple[int, ...], float]
    distinct: list[tuple[int, ...]]
    emptied: Collection[tuple[int, ...]]

    def levels(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Those of its ladders in a choice."""
        return tuple(choice[number] for number in self.numbers)


@dataclass
class Options:
    """Everything that can be chosen.

    Attributes:
        costs, gone: Of each ladder, cost and parameters gone at each level, none or fewest first.
        bundles: Ladders that do not count alone.
        layers: How many the model has, of which one has to stay.
    """

    costs: list[list[float]]
    gone: list[list[int]]
    bundles: Sequence[Bundle] = ()
    layers: int = 0

    @cached_property
    def bundle_of(self) -> dict[int, Bundle]:
        return {number: bundle for bundle in self.bundles for number in bundle.numbers}

    @cached_property
    def whole(self) -> set[int]:
        """Numbers of the ladders that are a layer or a sublayer."""
        return {number for bundle in self.bundles for number in bundle.whole}

    def total(self, choice: Choice) -> int:
        """Parameters that go."""
        alone = (row[level] for n, (row, level) in enumerate(zip(self.gone, choice, strict=True)) if self.alone(n))
        return sum(alone) + sum(bundle.gone[bundle.levels(choice)] for bundle in self.bundles)

    def alone(self, number: int) -> bool:
        return number not in self.bundle_of

    def leaves_layers(self, choice: Choice) -> bool:
        """Whether a layer stays."""
        emptied = sum(bundle.levels(choice) in bundle.emptied for bundle in self.bundles)
        return not emptied or emptied < self.layers

    def change(self, choice: Choice, number: int, move: int) -> tuple[int, float]:
        """Parameters and cost that come on top if one ladder moves by so many levels."""
        level = choice[number]
        if self.alone(number):
            rows = self.gone[number], self.costs[number]
            return tuple(row[level + move] - row[level] for row in rows)
        bundle, moved = self.bundle_of[number], list(choice)
        moved[number] += move
        before, after = bundle.levels(choice), bundle.levels(moved)
        return bundle.gone[after] - bundle.gone[before], bundle.nats[after] - bundle.nats[before]

    def rows(self) -> list[tuple[list[int], list[tuple[int, ...]], list[float], list[int]]]:
        """What is chosen independently: numbers of ladders, combinations of levels, what each costs and takes."""
        found = [
            ([n], [(level,) for level in range(len(row))], self.costs[n], row)
            for n, row in enumerate(self.gone)
            if self.alone(n)
        ]
        for bundle in self.bundles:
            nats, gone = ([table[levels] for levels in bundle.distinct] for table in (bundle.nats, bundle.gone))
            found.append((bundle.numbers, bundle.distinct, nats, gone))
        return found

    @cached_property
    def most(self) -> int:
        """The most parameters that can go while a layer stays."""
        rows = [row[-1] for n, row in enumerate(self.gone) if self.alone(n)]
        gone = [max(bundle.gone.values()) for bundle in self.bundles]
        if self.bundles and all(bundle.emptied for bundle in self.bundles) and len(self.bundles) == self.layers:
            # One keeps what it can, the one by which that is least.
            least = (max(n for levels, n in b.gone.items() if levels not in b.emptied) for b in self.bundles)
            gone.append(-min(g - n for g, n in zip(gone, least, strict=True)))
        return sum(rows) + sum(gone)


def cheapest(options: Options, most: int, slack: int) -> Choice:
    """The level of each ladder with the least sum of costs, when `most - slack` to `most` parameters go.

    Dynamic programming over the ladders, parameters counted in at most 4,000 steps (rounded to the nearest).

    Raises:
        RatioError: No choice of levels takes so much.
    """
    rows = options.rows()
    step = max(1, math.gcd(*(number for *_, row in rows for number in row)), most // _BUCKETS)
    size = most // step + 1
    best, taken = np.full(size, np.inf), []
    best[0] = 0.0
    for _, _, costs, sizes in rows:
        tables = []
        for cost, number in zip(costs, sizes, strict=True):
            shift = round(number / step)
            shifted = np.full(size, np.inf)
            if shift < size:
                shifted[shift:] = best[: size - shift] + cost
            tables.append(shifted)
        table = np.stack(tables)
        taken.append(table.argmin(0))
        best = table.min(0)
    first = max(0, -(-(most - slack) // step))  # rounded up: no less than that goes
    place = first + int(best[first:].argmin()) if first < size else size - 1
    if first == size or best[place] == np.inf:
        raise RatioError(f"No choice of levels takes {most - slack:,} to {most:,} parameters. Ask for less.")
    choice: Choice = [0] * len(options.gone)
    for (numbers, combinations, _, sizes), row in zip(reversed(rows), reversed(taken), strict=True):
        number = int(row[place])
        for ladder, level in zip(numbers, combinations[number], strict=True):
            choice[ladder] = level
        place -= round(sizes[number] / step)
    return choice


class Exchange:
    """Makes models with other levels and as many parameters.

    Args:
        options: What can be chosen.
        most, slack: From `most - slack` to `most` parameters go.
    """

    def __init__(self, options: Options, most: int, slack: int) -> None:
        self.options, self.most, self.slack = options, most, slack

    def fits(self, choice: Choice) -> bool:
        """Whether as much goes as is to go, and a layer stays."""
        return 0 <= self.most - self.options.total(choice) <= self.slack and self.options.leaves_layers(choice)

    def settled(self, choice: Choice, chance: random.Random) -> Choice | None:
        """The choice with single levels moved until as much goes as is to go; `None` if that did not succeed."""
        choice = list(choice)
        for _ in range(4 * len(choice)):
            over = self.options.total(choice) - self.most
            if -self.slack <= over <= 0:
                return choice if self.options.leaves_layers(choice) else None
            move = -1 if over > 0 else 1
            able = self._able(choice, move)
            if not able:
                return None
            choice[self._next(choice, able, move, over, chance)] += move
        return None

    def _able(self, choice: Choice, move: int) -> list[int]:
        """Ladders that can move so that more goes, or less; not those that have gone along with a layer."""
        options = self.options
        able = [n for n, level in enumerate(choice) if 0 <= level + move < len(options.gone[n])]
        return [n for n in able if options.alone(n) or move * options.change(choice, n, move)[0] > 0]

    def _next(self, choice: Choice, able: list[int], move: int, over: int, chance: random.Random) -> int:
        """Which ladder moves: any, but no whole layer to make up for a little; the cheapest to make up for one."""
        whole, options = self.options.whole, self.options
        if not whole:
            return chance.choice(able)
        changes = {n: options.change(choice, n, move) for n in able}
        able = [n for n in able if n not in whole or abs(changes[n][0]) <= abs(over) + self.slack] or able
        if abs(over) <= _FAR * self.slack:
            return chance.choice(able)
        return min(able, key=lambda n: changes[n][1] / abs(changes[n][0]))

    def other(self, choice: Choice, chance: random.Random) -> Choice | None:
        """One to three pairs of groups change levels, one up and one down."""
        changed, whole = list(choice), self.options.whole
        for _ in range(chance.randint(1, 3)):
            more, less = self._able(changed, 1), self._able(changed, -1)
            if not more or not less:
                return None
            up = chance.choice(more)
            down = [n for n in less if n != up]
            if not down:
                return None
            if up in whole and chance.random() < 0.5:  # a layer for a layer
                down = [n for n in down if n in whole] or down
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
