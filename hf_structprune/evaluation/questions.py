"""Short closed questions with their answers, and open requests: made of the packaged facts, the same each time."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple


class Question(NamedTuple):
    """A question, any of whose answers is right, and what it is about."""

    text: str
    answers: tuple[str, ...]
    about: str


@cache
def closed_questions() -> tuple[Question, ...]:
    """100 questions with one short answer: capitals, opposites, days, months, sums, general facts."""
    facts = _facts()
    found = [
        Question(f"What is the capital of {land}?", (city,), "capitals") for land, city in facts["capitals"].items()
    ]
    found += [
        Question(f'What is the opposite of "{word}"?', _several(other), "opposites")
        for word, other in facts["opposites"].items()
    ]
    for kind in ("day", "month"):
        names = facts[f"{kind}s"]
        around = [*pairwise(names), (names[-1], names[0])]
        found += [Question(f"What {kind} comes after {one}?", (after,), f"{kind}s") for one, after in around]
    number = facts["numbers"]
    sums = [(f"{a} plus {b}", a + b) for a, b in facts["sums"]]
    sums += [(f"{a} minus {b}", a - b) for a, b in facts["differences"]]
    found += [Question(f"What is {text}?", (str(result), number[result]), "sums") for text, result in sums]
    for text, answer in facts["general"].items():
        words = (number[int(answer)],) if isinstance(answer, str) and answer.isdecimal() and int(answer) <= 20 else ()
        found.append(Question(text, (*_several(answer), *words), "general"))
    return tuple(found)


@cache
def open_requests() -> tuple[str, ...]:
    """100 requests that want a short answer of any content."""
    facts = _facts()
    return tuple(request.format(topic) for topic in facts["topics"] for request in facts["requests"])


def _facts() -> dict[str, Any]:
    return json.loads(files("hf_structprune.data").joinpath("facts.json").read_text(encoding="utf-8"))


def _several(answer: str | list[str]) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else tuple(answer)
