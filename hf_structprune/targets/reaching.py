"""From a size that is asked for to what is cut: a ratio that reaches it, or a number of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..checks import check_options
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError, StructPruneError
from ..model.shared_sizes import SIZED
from ..model.structure import ModelStructure
from ..plan import PruningPlan
from ..planner import Planner, describe
from ..units import KINDS, SharedKind, kinds_of
from .latency import measure_latency
from .reached import Reached, in_units
from .size import SizeTarget


_HALVINGS = 12
_TRIES = 4  # where each plan measures the model anew
_FINEST = 1e-4  # of the model


def check_alone(option: str, ratio: float | PruningPlan | None, config: PruningConfig) -> None:
    """Refuses a target beside something else that says how much goes.

    Raises:
        ConfigurationError: Names both.
    """
    if ratio is not None:
        other = "a plan" if isinstance(ratio, PruningPlan) else f"a ratio ({ratio})"
        raise ConfigurationError(f"`{option}` and {other} are both given; give one of them.")
    if not config.takes_ratio:
        stated = ", ".join(f"`{name}`" for name in config.stated_options)
        raise ConfigurationError(
            f"`{option}` is given, and {stated} in the configuration says how much goes: give one or the other."
        )


def asked_for(
    ratio: float | PruningPlan | None, target: dict[str, Any], config: PruningConfig
) -> tuple[float | PruningPlan | None, SizeTarget]:
    """What `plan` and `prune` are asked for, once it is shown that it is one thing: a ratio, a plan or a size."""
    check_options("plan and prune", target, [field.name for field in dataclasses.fields(SizeTarget)])
    size = SizeTarget(**target)
    if size:
        check_alone(size.name, ratio, config)
    elif not isinstance(ratio, PruningPlan):
        ratio = config.check_ratio(ratio)
    return ratio, size


def counted(reached: Reached, plan: PruningPlan, model: Callable[[], PreTrainedModel]) -> Reached:
    """What was asked for with what came out, see `SizeTarget.of`; what is timed or measured stays as it is."""
    if not reached.settings or "speedup" in reached.settings:
        return reached
    return dataclasses.replace(reached, got=SizeTarget(**reached.settings).of(plan, model))


class Search:
    """Finds the ratio at which a target is reached.

    Args:
        target: What is asked for.
        model, structure: What is cut; without weights will do where plans do not look at them.
        config: How.
    """

    def __init__(
        self, target: SizeTarget, model: PreTrainedModel, structure: ModelStructure, config: PruningConfig
    ) -> None:
        self.target = target
        self._model, self._table = model, None
        nothing = describe(model, structure, {}, config, layout=config.layout)
        if target.speedup is not None:  # times, over that of the dense model
            self.limit, self.dense = 1 / target.speedup, 1.0
        else:
            self.limit, self.dense = target.limit(nothing), target.of(nothing, lambda: model)
        if self.dense <= self.limit:
            raise ConfigurationError(
                f"`{target.name}` is {target.asked}, and the model has {in_units(self.dense, target.unit)} as it is "
                f"({target.measured_as()}): there is nothing to remove."
            )
        self._values: dict[float, float | None] = {}
        self._refused: StructPruneError | None = None

    @property
    def guess(self) -> float:
        """About the ratio that it takes, the target being in proportion to the parameters."""
        return _rounded(1 - self.limit / self.dense)

    def ratio(self, planner: Planner) -> float:
        """The least ratio at which the model is within the target, to 0.01 % of its parameters.

        Where each plan measures the model anew: the first that is, of a few from the `guess` on.

        Raises:
            RatioError: It cannot be reached; names what can.
        """
        cheap = not planner.looks_first and not planner.config.chooses_depth(self.guess)
        ratio, step = self.guess, _FINEST
        for _ in range(_HALVINGS if cheap else _TRIES):
            value = self._value(ratio, planner)
            if value is None or value <= self.limit:
                break
            step = max((value - self.limit) / self.dense, 2 * step)
            ratio = _rounded(min(ratio + step, (1 + ratio) / 2))
        if cheap and self._value(ratio, planner) is None:
            ratio = self._largest(ratio, planner)
        if not self._fits(ratio, planner):
            raise self._unreached(self._values)
        return self._least(ratio, planner) if cheap else ratio

    def reached(self, ratio: float, planner: Planner) -> Reached:
        """What is asked for, and what a ratio gives."""
        values = self.limit, self.dense, self._value(ratio, planner)
        if self.target.speedup is not None:
            values = tuple(1 / value for value in values)
        return self._reached(*values)

    def _value(self, ratio: float, planner: Planner) -> float | None:
        """What comes out at a ratio; `None` if it cannot be reached."""
        if ratio not in self._values:
            try:
                self._values[ratio] = self._of(planner.plan(ratio), planner)
            except RatioError as error:
                self._values[ratio], self._refused = None, error
        return self._values[ratio]

    def _reached(self, *values: float) -> Reached:
        target = self.target
        return Reached(target.asked, target.measured_as(), target.unit, *values, settings=target.given())

    def _of(self, plan: PruningPlan, planner: Planner) -> float:
        """What a plan gives of what is asked for."""
        if self.target.speedup is None:
            return self.target.of(plan, planner.shapes)
        if self._table is None:
            self._table = measure_latency(self._model, planner, self.target.batch or 1)
        return self._table.at(plan.ratio)

    def _fits(self, ratio: float, planner: Planner) -> bool:
        value = self._value(ratio, planner)
        return value is not None and value <= self.limit

    def _largest(self, ratio: float, planner: Planner) -> float:
        """The largest ratio that can be reached, below one that cannot."""
        low, high = max((one for one, value in self._values.items() if value is not None), default=0.0), ratio
        while high - low > _FINEST:
            middle = _rounded((low + high) / 2)
            low, high = (low, middle) if self._value(middle, planner) is None else (middle, high)
        if low == 0.0:
            raise self._refused
        return low

    def _least(self, ratio: float, planner: Planner) -> float:
        """The least ratio that is within the target, below one that is."""
        beyond = [one for one, value in self._values.items() if value is not None and value > self.limit]
        low, high, step = max(beyond, default=0.0), ratio, 0.005
        while not beyond and high > 0:  # down, in steps that grow
            low, step = _rounded(ratio - step), 2 * step
            if low == 0.0 or not self._fits(low, planner):
                break
            high = low
        while high - low > _FINEST:
            middle = _rounded((low + high) / 2)
            low, high = (low, middle) if self._fits(middle, planner) else (middle, high)
        return high

    def smaller_cache(
        self, config: PruningConfig, planner_of: Callable[[PruningConfig], Planner]
    ) -> tuple[PruningConfig, str, Reached]:
        """The configuration that makes the cache as small as is asked for, why in words, and what that gives.

        Units that are cached go: those that the configuration names, or else the first kind that can: KV heads, the
        size of heads, the ranks of latents.

        Raises:
            RatioError: None of them reaches it; names what can.
        """
        cached = [kind for kind in KINDS if KINDS[kind].cached]
        values: dict[str, float] = {}
        for kind in [kind for kind in config.units if kind in cached] or cached:
            try:
                size = self._size(kind, planner_of(config))
            except StructPruneError as error:
                self._refused = self._refused or error
                continue
            for keep in range(min(max(1, int(size * self.limit / self.dense)), size - 1), 0, -1):
                exact = dataclasses.replace(config, units=(kind,), keep={kind: keep})
                try:
                    planner = planner_of(exact)
                    value = self.target.of(planner.plan(None), planner.shapes)
                except (ConfigurationError, RatioError) as error:  # not this number: sizes of heads are even
                    self._refused = self._refused or error
                    continue
                except StructPruneError as error:
                    self._refused = self._refused or error
                    break
                values[f"{keep} {KINDS[kind].label}"] = value
                if value <= self.limit:
                    words = f"kv_cache={self.target.asked} was reached by {KINDS[kind].label}: {keep} of {size} stay"
                    return exact, words, self._reached(self.limit, self.dense, value)
        raise self._unreached(values)

    @staticmethod
    def _size(kind: str, planner: Planner) -> int:
        """Units of a kind in a layer, or in the model; 0 where it has none."""
        structure = planner.structure
        if kind not in kinds_of(SharedKind):
            return min((group.size for group in structure.groups if group.kind == kind), default=0)
        return SIZED[kind].group(planner.model, structure).size if kind in structure.shared else 0

    def _unreached(self, values: dict) -> RatioError:
        target, found = self.target, {one: value for one, value in values.items() if value is not None}
        how = min(found, key=found.__getitem__, default=None)
        nearest = ""
        if how is not None:
            at = how if isinstance(how, str) else f"a ratio of {how}"
            value = found[how] if target.speedup is None else 1 / found[how]
            nearest = f" The nearest that can is {in_units(value, target.unit)}, at {at}."
        why = f" ({self._refused})" if self._refused else ""
        return RatioError(
            f"`{target.name}` is {target.asked} ({target.measured_as()}), which cannot be reached.{nearest} "
            f"{'Ask for that, or let' if nearest else 'Let'} other `units` go.{why}"
        )


def _rounded(ratio: float) -> float:
    return round(min(max(ratio, 0.0), 0.9999), 5)
