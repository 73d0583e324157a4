"""What a plan says about the tokens that go, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


_FEW = 1_000_000  # tokens of text: too few to tell which ones of a usual vocabulary are rare


def in_words(report: Mapping[str, Any] | None) -> list[str]:
    """One line for each source of text, and one about scripts, of `TokenChoice.report`."""
    if not report:
        return []
    lines = []
    for one in report["sources"]:
        longer = "" if one["longer"] is None else f"; text held out needs {one['longer']:.1%} more tokens"
        lines.append(f"{one['covered']:.2%} of {one['tokens']:,} tokens of {one['source']} stay{longer}")
    if report["scripts"]:
        parts = (f"{name} {before:,} -> {after:,}" for name, (before, after) in report["scripts"].items())
        lines.append(f"tokens by script: {', '.join(parts)}")
    if report["sources"] and sum(one["tokens"] for one in report["sources"]) < _FEW:
        lines.append(
            "so little text does not tell which tokens are rare, and says nothing of other languages: give "
            "`vocabulary_text`, some million tokens of all that the model is to write"
        )
    return lines
