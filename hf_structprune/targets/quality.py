"""The smallest model that is still as good as is asked: a metric within so much of the dense model's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import Described, Limits, check_fields
from ..errors import ConfigurationError, RatioError
from ..evaluation_config import EvaluationConfig
from .reached import Reached


if TYPE_CHECKING:  # options of the command line are made from this, without torch
    from transformers import PreTrainedModel

    from ..evaluation.results import Figure


TRIALS = 6
FIRST = 0.1  # the ratio that is tried first
FINEST = 0.01  # of the model
_LEAST = 0.02  # below this nothing is worth the work
_POWER = 1.5  # with which losses grow with the ratio
_OF_TEXTS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class QualityTarget:
    """A quality to keep, in the place of a ratio.

    Args:
        within (`float`, *optional*): Makes the smallest model whose `metric` is within so much of the dense one's:
            `0.05` is 5 % of it. Up to six copies are pruned and measured before the model is.
        metric (`str`, *optional*): What is measured: a text (`perplexity/wikitext2`, or a file), a task of lm-eval
            (`tasks/boolq/acc`), or `generation/questions`. In Python also a function of model and tokenizer that gives
            a number, of which less is better. Default: `perplexity/sample`, the packaged text.
    """

    within: Annotated[float, Limits(0, open="least"), Described("a positive number: 0.05 is 5 %")] | None = None
    metric: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.within is None and self.metric is not None:
            raise ConfigurationError("`metric` is given, but `within`, which says how much worse it may be, is not.")
        if self.metric is not None and not callable(self.metric) and not isinstance(self.metric, str):
            raise ConfigurationError(f"`metric` is {self.metric!r}; it must be a name or a function.")

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.within is not None

    def given(self) -> dict[str, Any]:
        """The options that are given, with their values."""
        return {} if self.within is None else {"within": self.within, "metric": self.metric}

    @property
    def name(self) -> str:
        """What is measured."""
        if callable(self.metric):
            return getattr(self.metric, "__name__", "metric")
        return self.metric or "perplexity/sample"

    def measure(self, model: PreTrainedModel, tokenizer: Any) -> Figure:
        """The metric of a model.

        Raises:
            ConfigurationError: There is no such metric.
        """
        from ..evaluation.evaluator import evaluate
        from ..evaluation.results import Figure

        if callable(self.metric):
            value = self.metric(model, tokenizer)
            return value if isinstance(value, Figure) else Figure(self.name, float(value), higher_is_better=False)
        family, _, rest = self.name.partition("/")
        nothing = {"texts": ["none"], "efficiency": False, "samples": False}
        if family in _OF_TEXTS:
            config = EvaluationConfig(**{**nothing, "texts": [rest or "sample"]})
        elif family == "tasks" and rest:
            config = EvaluationConfig(**nothing, tasks=[rest.partition("/")[0]])
        elif family == "generation":
            config = EvaluationConfig(**nothing, generation=True)
        else:
            raise ConfigurationError(
                f"`metric` is {self.name!r}; it must be {', '.join(f'{one}/TEXT' for one in _OF_TEXTS)}, "
                "tasks/TASK/METRIC or generation/questions."
            )
        figures = evaluate(model, tokenizer, config, name="model").figures
        if family in _OF_TEXTS:  # named by the file
            return next(figure for name, figure in figures.items() if name.partition("/")[0] == family)
        if self.name not in figures or figures[self.name].higher_is_better is None:
            can = [name for name, figure in figures.items() if figure.higher_is_better is not None]
            raise ConfigurationError(f"`metric` is {self.name!r}; what was measured is {', '.join(can)}.")
        return figures[self.name]

    def search(self, dense: Figure, value_at: Callable[[float], Figure]) -> tuple[float, Reached]:
        """The largest ratio that is tried and within, to 1 % of the model or after six tries.

        Args:
            dense: The metric of the dense model.
            value_at: Prunes a copy by a ratio, and gives the metric of it; a `RatioError` where that cannot be.

        Raises:
            RatioError: Not even the least ratio that was tried is within; says what it gives.
        """
        from ..progress import tqdm

        sign = -1 if dense.higher_is_better else 1
        limit = dense.value * (1 + sign * self.within) if dense.value > 0 else dense.value + sign * self.within
        low, high, ratio = 0.0, 1.0, FIRST
        tried: dict[float, float] = {}
        begun = time.monotonic()
        with tqdm(total=TRIALS, desc=f"{self.name} within {self.within:.0%}") as bar:
            for number in range(TRIALS):
                if number == 1:
                    _say_how_long((time.monotonic() - begun) / 60)
                try:
                    tried[ratio] = value_at(ratio).value
                    bar.set_postfix_str(f"{ratio:.1%}: {tried[ratio]:.4g}")
                except RatioError:
                    bar.set_postfix_str(f"{ratio:.1%} cannot be")
                bar.update()
                if ratio in tried and sign * tried[ratio] <= sign * limit:
                    low = ratio
                else:
                    high = ratio
                if high - low <= FINEST or high < _LEAST:
                    break
                losses = {one: sign * (value - dense.value) for one, value in tried.items()}
                ratio = _next(low, high, losses, sign * (limit - dense.value))
        if low == 0.0:
            at = "".join(f" At {one:.1%} of the parameters it is {tried[one]:.4g}." for one in sorted(tried)[:1])
            raise RatioError(
                f"`within` is {self.within:g}, and no ratio that was tried keeps {self.name} at {limit:.4g} (dense: "
                f"{dense.value:.4g}).{at} Allow more, or let units='auto' look for what costs least."
            )
        asked = f"within {self.within:.3g} of the dense model"
        return low, Reached(asked, self.name, "", limit, dense.value, got=tried[low], tried=list(tried.items()))


def _say_how_long(trial: float) -> None:
    """What a trial of so many minutes means for all of them."""
    from transformers.utils import logging

    logging.get_logger(__name__).info(
        f"A copy was pruned and measured in {trial:.1f} minutes: up to {TRIALS - 1} more, and pruning the model "
        f"itself, take up to {TRIALS * trial:.0f}."
    )


def _next(low: float, high: float, losses: dict[float, float], allowed: float) -> float:
    """The ratio to try next between one that is within and one that is not.

    Where a power law through the losses of both meets what is allowed; where one of them is not known, it has the
    power 1.5. Not too near to either end, nor more than four times the lower one while none is known to be too much.
    """
    known = [one for one in (low, high) if losses.get(one, 0) > 0]
    middle = (low + high) / 2
    if len(known) == 2 and losses[high] > losses[low]:
        power = math.log(losses[high] / losses[low]) / math.log(high / low)
        middle = low * (allowed / losses[low]) ** (1 / power)
    elif known:
        middle = known[0] * (allowed / losses[known[0]]) ** (1 / _POWER)
    edge = 0.15 * (high - low)
    least, most = (1.2 * low, min(4 * low, (1 + low) / 2)) if high == 1.0 else (low + edge, high - edge)
    return round(min(max(middle, least), most), 4)
