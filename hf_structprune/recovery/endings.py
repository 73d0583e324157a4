"""Whether chats end with a token at which a model stops: else it would learn everything but to stop."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from .encoding import IGNORED, Encoded


class Endings:
    """Looks at encoded chats, as the chat template wrote them and before they are cut.

    Args:
        stops: Tokens at which a model stops.
    """

    def __init__(self, stops: Collection[int]) -> None:
        self.stops = frozenset(stops)
        self.chats, self.ended = 0, 0

    def look_at(self, encoded: Encoded) -> None:
        """Counts a chat, and whether what is learned of its last answer has a token at which a model stops."""
        if encoded.is_chat:
            self.chats += 1
            self.ended += not self.stops.isdisjoint(_last_learned(encoded.labels))

    def notes(self, tokenizer: Any) -> list[str]:
        """What there is to say; nothing if any chat ended so."""
        if not self.chats or self.ended:
            return []
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(self.stops))
        return [
            f"the chat template never writes {names} after an answer, so that the model will not learn to stop: add "
            f"the token to `tokenizer.chat_template`, or name the one that it writes as `tokenizer.eos_token` "
            f"({self.chats:,} chats)"
        ]


def stopping_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens at which a model stops when it generates."""
    given = getattr(model.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def _last_learned(labels: list[int]) -> list[int]:
    """The last run of tokens that are learned."""
    end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED), 0)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORED), 0)
    return labels[start:end]
