"""The order in which tokens leave so that text gets the least longer."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from functools import cache

from .trimming import Vocabulary


def least_longer(vocabulary: Vocabulary, shares: Mapping[int, float], stay: Collection[int]) -> list[int]:
    """All ids, the ones to keep first: however many of them are kept, no token of others lengthens text less.

    From the whole vocabulary the token leaves that makes text the least longer, then the next one, and so on: the
    greedy order of SentencePiece's Unigram trainer (Kudo, 2018, https://huggingface.co/papers/1804.10959, sec. 3.2),
    with the length of the text in the place of its likelihood. A token of share `p` that `n` others spell makes it
    longer by `p (n - 1)`; from then on these are needed `p` more often, and stay the longer for it. A token that
    others are merged from leaves after them.

    Args:
        vocabulary: The tokens.
        shares: How frequent each id is, of the whole text.
        stay: Ids that stay whatever their share, with all that they are made from.

    Returns:
        Every id of the vocabulary: those that stay, then the others, the last to leave first.
    """
    needed, gone = dict(shares), {}
    children = dict.fromkeys(vocabulary.tokens, 0)
    for pair in vocabulary.parents.values():
        for number in set(pair):
            children[number] += 1

    def spelled(number: int) -> list[int]:
        """What writes a token, of those that are there."""
        if number not in gone:
            return [number]
        return [part for one in gone[number] for part in spelled(one)]

    @cache
    def whole(number: int) -> list[int]:
        return vocabulary.pieces(number)

    def pieces(number: int) -> list[int]:
        return [part for one in whole(number) for part in spelled(one)]

    def cost(number: int) -> tuple[float, float, int]:
        parts = pieces(number)
        longer = needed[number] * (len(parts) - 1) if parts else float("inf")
        return longer, -vocabulary.order(number), -number

    queue = [cost(number) for number in vocabulary.tokens if number not in stay and not children[number]]
    heapq.heapify(queue)
    left = []
    while queue:
        found = heapq.heappop(queue)
        number = -found[-1]
        if (now := cost(number)) > found:  # it is needed more often since
            heapq.heappush(queue, now)
            continue
        gone[number] = pieces(number)
        left.append(number)
        for part in gone[number]:
            needed[part] += needed[number]
        for one in set(vocabulary.parents.get(number, ())):
            children[one] -= 1
            if not children[one] and one not in stay:
                heapq.heappush(queue, cost(one))
    return [*(number for number in vocabulary.tokens if number not in gone), *reversed(left)]
