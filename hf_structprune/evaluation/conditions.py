"""Under which conditions a figure was measured: two numbers are compared only where these agree."""

from __future__ import annotations

from typing import Any

from .results import EvaluationResult


# Details of a figure that say how it was measured; others (counts, spreads) say what came out.
CONDITIONS = (
    "version", "num_fewshot", "samples", "filter", "source", "window", "stride", "bos",
    "batch_size", "length", "new_tokens", "device",
)  # fmt: skip
# Units of figures that depend on the machine.
_TIMED = ("s", "tokens/s")


def conditions_of(name: str, result: EvaluationResult) -> dict[str, Any]:
    """What has to agree before a figure may be compared with that of another model.

    Args:
        name: Name of the figure.
        result: A result that has it.
    """
    figure = result.figures[name]
    conditions: dict[str, Any] = {"protocol": figure.protocol}
    conditions |= {key: figure.details[key] for key in CONDITIONS if key in figure.details}
    if figure.unit in _TIMED:
        hardware = result.environment.get("hardware", {})
        conditions |= {key: hardware.get(key) for key in ("device", "threads")}
    return conditions


def difference_in_words(mine: dict[str, Any], other: dict[str, Any]) -> str | None:
    """`"limit is 100 instead of 200"`; `None` where all conditions agree."""
    keys = [key for key in {**other, **mine} if mine.get(key) != other.get(key)]
    # The protocol repeats the numbers; it is quoted only where it is all there is.
    keys = [key for key in keys if key != "protocol"] or keys
    return ", ".join(f"{key} is {_say(mine, key)} instead of {_say(other, key)}" for key in keys) or None


def _say(conditions: dict[str, Any], key: str) -> str:
    value = conditions.get(key, "")
    return "unknown" if value == "" else repr(value) if isinstance(value, str) else str(value)
