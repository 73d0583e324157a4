"""What licences of base models ask of whoever publishes a derived model."""

from __future__ import annotations

import re
from typing import Any


# By version: family, licence, words to show, and what the name of a derived model has to begin with.
_LLAMA = {
    "2": ("Llama 2", "LLAMA 2 Community License", None, None),
    "3": ("Meta Llama 3", "Meta Llama 3 Community License", "Built with Meta Llama 3", "Llama 3"),
    "3.1": ("Llama 3.1", "Llama 3.1 Community License", "Built with Llama", "Llama"),
    "3.2": ("Llama 3.2", "Llama 3.2 Community License", "Built with Llama", "Llama"),
    "3.3": ("Llama 3.3", "Llama 3.3 Community License", "Built with Llama", "Llama"),
    "4": ("Llama 4", "Llama 4 Community License", "Built with Llama", "Llama"),
}


def attribution(metadata: dict[str, Any], name: str) -> list[str]:
    """The sentences that a licence wants in the card; empty where none is known to us.

    Args:
        metadata: `license`, `license_name` and `license_link` of the base model.
        name: Hub id or name of the pruned model: Llama licences have a rule for it.
    """
    names = " ".join(str(metadata.get(key) or "").lower() for key in ("license", "license_name"))
    llama = re.search(r"\bllama-?(\d(?:\.\d)?)", names)
    if llama and llama[1] in _LLAMA:
        return _llama(*_LLAMA[llama[1]], name)
    if re.search(r"\bgemma", names):
        return [
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms. The files of this model are modified. Whoever passes it on passes "
            "on the terms and the restrictions of use in them."
        ]
    return []


def _llama(family: str, licence: str, words: str | None, prefix: str | None, name: str) -> list[str]:
    sentences = [f"**{words}**"] if words else []
    sentences.append(
        f"{family} is licensed under the {licence}, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )
    if prefix is None:
        return sentences
    rule = f'The licence asks that the name of a derived model begins with "{prefix}"'
    begins = name.rsplit("/", 1)[-1].replace("-", " ").lower().startswith(prefix.lower())
    return [*sentences, f"{rule}." if begins else f"{rule}: rename this one before you publish it."]
