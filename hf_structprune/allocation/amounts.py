"""How much is asked for: ratios and the amounts that a configuration states itself."""

from __future__ import annotations

import math

from ..alignment import multiple_of, step_of
from ..checks import Ratio, checked
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError
from ..model.hidden_size import HiddenGroup


def check_ratio(ratio: float | None, config: PruningConfig) -> None:
    """Refuses a ratio that is missing, impossible, or given where the configuration says how much goes.

    Raises:
        ConfigurationError: It is missing, or not needed.
        RatioError: It is no number in [0, 1).
    """
    if ratio is None and config.needs_ratio:
        raise ConfigurationError(
            "A ratio is missing: 0.3 removes 30 %. Instead of it `attention_ratio` and `mlp_ratio` say how much of "
            "heads and neurons goes, `num_layers` or `keep_first` how many layers, `hidden_size` how wide "
            "the rest is, `keep` what "
            "is to be left of each kind."
        )
    if ratio is None:
        return
    if not config.takes_ratio:
        stated = [n for n in ("attention_ratio", "mlp_ratio", "num_layers", "keep_first", "hidden_size", "keep")
                  if getattr(config, n) is not None]  # fmt: skip
        raise ConfigurationError(
            f"The ratio {ratio!r} is given, and {', '.join(f'`{name}`' for name in stated)} in the configuration says "
            "how much goes: give one or the other."
        )
    checked("ratio", ratio, Ratio, RatioError)


def hidden_step(size: int, config: PruningConfig) -> int:
    """Hidden sizes are multiples of this: as configured, else a power of two, at most 1/16 of the size and 128."""
    return step_of(config.round_to, config.align_to, min(128, 2 ** int(math.log2(max(1, size // 16)))))


def hidden_sizes_for(group: HiddenGroup, parameters: float, config: PruningConfig) -> list[int]:
    """Hidden sizes, the one first that removes as near as possible to so many parameters.

    Raises:
        RatioError: Even the smallest size removes too few.
        ConfigurationError: No smaller size is aligned.
    """
    step = hidden_step(group.size, config)
    if config.align_to is not None and step >= group.size:
        raise ConfigurationError(
            f"`align_to` is {config.align_to!r}, but no hidden size below the model's own, {group.size}, is a "
            f"multiple of {step}."
        )
    if parameters > (group.size - step) * group.cost:
        raise RatioError(
            f"{parameters:,.0f} parameters are to go by the hidden size, which can take at most "
            f"{(group.size - step) * group.cost:,}. Ask for less."
        )
    wanted = group.size - parameters / group.cost
    whole = {group.size} if group.size % multiple_of(config.align_to) == 0 else set()
    return sorted({*range(step, group.size, step), *whole}, key=lambda size: (abs(size - wanted), -size))
