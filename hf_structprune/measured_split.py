"""`split="measured"`: how a ratio is divided between kinds of units, by what each costs on the model at hand.

Each kind alone is cut from copies of the model, to the whole ratio and to less, re-fit included, and what that adds to
the loss of held-out text is its price, in nats for each token of the dense tokenizer: of tokens, hidden channels and
heads that all layers share just as of neurons. A power law through the prices says what other amounts cost. With
these added up as if they did not depend on each other, the division that looks cheapest is carried out on a copy as
well, and the cheapest of all that was measured is taken: the division, or one kind alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .choosing_kinds import Curve, in_words
from .config import PruningConfig
from .errors import RatioError, StructPruneError
from .held_out import LENGTH, HeldOut
from .model.measuring import context_length
from .model.structure import ModelStructure
from .plan import PruningPlan
from .planner import Planner
from .progress import hidden, tqdm
from .prune import Execution
from .stats.seen import Calibration
from .text.calibration import respelled
from .units import VOCABULARY
from .vocabulary.choosing import TokenChoice


_LEVELS = (1.0, 0.5)  # of the ratio, at which a kind is priced
_MORE_LEVELS = (1.0, 0.5, 0.25)  # where that takes no re-fit
_PARTS = 40  # of the ratio, that are divided
_REACH = 1.05  # times the largest amount that was priced
_HELD_OUT = 32  # sequences of the calibration text, at most


@dataclass
class Tried:
    """A way to use a budget that was carried out on a copy.

    Attributes:
        config: What says it.
        plan: What it makes of the model.
        nats: What it adds to the loss of a token.
    """

    config: PruningConfig
    plan: PruningPlan
    nats: float

    @property
    def gone(self) -> int:
        """Parameters."""
        return self.plan.parameters_before - self.plan.parameters_after

    def __str__(self) -> str:
        return f"{in_words(self.plan)}: {self.nats:+.3f} nats a token"


class _OnACopy:
    """A choice of tokens for a copy of the model, which gets a tokenizer of its own."""

    def __init__(self, choice: TokenChoice) -> None:
        self._choice, self.small = choice, choice.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._choice, name)

    def carry_out(self, kept: list[int]) -> None:
        self.small = self._choice.trimmed(kept)


class SplitChooser:
    """Decides for one model what `split="measured"` stands for.

    Args:
        model, structure: What is cut; it is left as it is.
        config: The configuration, with everything else that the user wants.
        tokens: Loads the calibration tokens, shape (sequences, length).
        choice: Chooses tokens, where the vocabulary is among the kinds.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, config: PruningConfig,
        tokens: Callable[[], Calibration], choice: TokenChoice | None = None,
    ) -> None:  # fmt: skip
        self.model, self.structure, self.config, self.choice = model, structure, config, choice
        self._fit = tokens()
        if choice is None:
            held_out = max(1, min(_HELD_OUT, len(self._fit) // 4))
            self._text, self._fit = HeldOut.of_sequences(self._fit[-held_out:]), self._fit[:-held_out]
        else:
            length = min(LENGTH, (context_length(model) or 2 * LENGTH) // 2)
            self._text = HeldOut.of_sources(choice.counted, choice.tokenizer, length)
        self._dense = self._text.loss(model, choice and choice.tokenizer)
        self.left_out: dict[str, str] = {}

    def choose(self, ratio: float) -> tuple[PruningConfig, list[str]]:
        """What takes the place of the configuration with `split="measured"`, and why, in words for the plan.

        Raises:
            RatioError: The kinds cannot reach the ratio together.
        """
        kinds, curves, alone = self.config.units, {}, []
        with tqdm(total=len(kinds) + 1, desc="Pricing kinds of units") as bar:
            for kind in kinds:
                tried = self._alone(kind, ratio)
                alone += tried
                curves[kind] = Curve([(one.gone, one.nats) for one in tried if one.gone])
                bar.update()
            wanted = ratio * self.structure.total_parameters
            near = max(0.01, 0.1 * ratio)
            found = [one for one in alone if abs(one.plan.ratio - ratio) <= near]
            division = divided(curves, wanted)
            if sum(map(bool, division.values())) > 1:
                parts = {kind: part for kind, part in division.items() if part}
                found += [one for one in [self._tried(self.config.cutting(*parts, split=parts), ratio)] if one]
            bar.update()
        if not found:
            most = {kind: max((gone for gone, _ in curve.points), default=0) for kind, curve in curves.items()}
            said = ", ".join(f"{kind} {gone / self.structure.total_parameters:.1%}" for kind, gone in most.items())
            raise RatioError(
                f"The ratio {ratio:.2%} cannot be reached by {', '.join(kinds)}: of those tried most went by {said}."
                f"{''.join(f' {kind}: {why}' for kind, why in self.left_out.items())} Ask for less, or more kinds."
            )
        best, *others = sorted(found, key=lambda one: one.nats)
        words = [f"split='measured' took the cheapest that was measured, {best}"]
        words += [f"instead of {one}" for one in others[:3]]
        words += [f"not tried: {', '.join(self.left_out)}"] if self.left_out else []
        steps = self.config.iterative_steps
        return dataclasses.replace(best.config, iterative_steps=steps), ["; ".join(words)]

    def _alone(self, kind: str, ratio: float) -> list[Tried]:
        """A kind alone, to the whole ratio or as much of it as goes, and to less."""
        levels = _MORE_LEVELS if kind == VOCABULARY else _LEVELS
        config, found, part = self.config.cutting(kind), [], 1.0
        for level in levels:
            tried = self._tried(config, level * part * ratio)
            while tried is None and not found and part > 0.2:
                part /= 2
                tried = self._tried(config, level * part * ratio)
            if tried is None or any(tried.gone == one.gone for one in found):
                continue
            found.append(tried)
        if found:
            self.left_out.pop(kind, None)
        return found

    def _tried(self, config: PruningConfig, ratio: float) -> Tried | None:
        """What it costs to reach a ratio in a way, on a copy; `None` if that cannot be."""
        config = dataclasses.replace(config, iterative_steps=1)
        choice = None if VOCABULARY not in config.units else _OnACopy(self.choice)
        choices = {} if choice is None else {VOCABULARY: choice}

        def tokens() -> Calibration:
            small = self.choice and choice and choice.small
            if not small or small is self.choice.tokenizer:
                return self._fit
            return respelled(self._fit, self.choice.tokenizer, small)

        with hidden():
            try:
                planner = Planner(self.model, self.structure, config, tokens, choices)
                plan = planner.plan(ratio)
            except StructPruneError as error:
                if len(config.units) == 1:
                    self.left_out[config.units[0]] = f"{error}"
                return None
            small = copy.deepcopy(self.model)
            run = Execution(small, ModelStructure.of(small), config, tokens, choices=choices)
            run.carry_out(copy.deepcopy(plan), planner.known)
            tokenizer = choice.small if choice is not None else self.choice and self.choice.tokenizer
            return Tried(config, plan, self._text.loss(run.model, tokenizer) - self._dense)


def divided(curves: dict[str, Curve], wanted: float) -> dict[str, float]:
    """The part of each kind in the division of an amount that costs least, by what the kinds cost alone.

    All divisions into `_PARTS` equal parts are compared, by dynamic programming over the kinds.

    Args:
        curves: What each kind costs.
        wanted: Parameters to go.

    Returns:
        Parts that add up to 1, with one of 0 for what stays whole; no parts where there is no such division.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for curve in curves.values():
        costs = [max(0.0, curve.at(part / _PARTS * wanted, _REACH)) for part in range(_PARTS + 1)]
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (cost, parts) in best.items():
            for part in range(_PARTS - taken + 1):
                option = cost + costs[part], (*parts, part)
                if option[0] < math.inf and option < longer.get(taken + part, (math.inf, ())):
                    longer[taken + part] = option
        best = longer
    parts = best.get(_PARTS, (math.inf, ()))[1]
    return {kind: part / _PARTS for kind, part in zip(curves, parts, strict=False)}
