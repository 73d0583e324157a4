"""What was asked for in other units than a ratio, and what came of it; plans keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reached:
    """What was asked for, and what a plan and the model that came of it make of it.

    Attributes:
        asked: As it was written.
        what: What is counted or measured.
        unit: `"B"` for bytes.
        limit: What may be reached at most; where higher is better, at least.
        dense: What the model had.
        predicted: What the plan says; `None` of what is measured alone.
        got: What the model has that came out; `None` before it is there.
        settings: The options of `SizeTarget` that were given, by which it is counted again.
        tried: Ratios that were tried, and what came out.
    """

    asked: str
    what: str
    unit: str
    limit: float
    dense: float
    predicted: float | None = None
    got: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tried: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        found = [("predicted", self.predicted), ("got", self.got), ("dense", self.dense)]
        words = [f"{name} {in_units(value, self.unit)}" for name, value in found if value is not None]
        return f"{self.what}: asked {self.asked} (limit {in_units(self.limit, self.unit)}), {', '.join(words)}"


def in_units(value: float, unit: str) -> str:
    """`5.981 GB`, `134.5 M`."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.4g} {letter}{unit}"
    return f"{value:.4g} {unit}".rstrip()
