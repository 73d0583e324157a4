"""How frequent tokens are in text of which only a part was counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counting import Counted


_NEIGHBOURS = 512  # to either side, over which the tokenizer's own order is smoothed
_LEAST = 1e-9  # share of a token that is not there
_STRENGTHS = (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6)  # in what is counted


def frequencies(counted: Sequence[Counted], ids: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The share of each token in what is new in text like this, where every source has an equal part in it.

    A token counts once in each piece of text, however often it is there: a model copies what it has just read, also
    where several tokens spell it (tried by hand on SmolLM2 with 32,768 tokens: 8.7 nats more the first time in a
    window, 2.3 from then on), and a name that one text repeats says little of the next one. Counts of rare tokens are
    chance, and most tokens that a text lacks are in the next one. So each source is pulled towards all of them
    together, and these towards the tokenizer's own order (Dirichlet priors): with tokens in `c_s` pieces of source
    `s`, `N_s` for all tokens together, `c = sum_s c_s` and `N = sum_s N_s`,

        q = (c + k r) / (N + k),    p_s = (c_s + k q) / (N_s + k),    p = mean_s p_s,

    where `r` is the mean of `c` over the neighbours in that order. `k` is the one of some by which the held-out text
    of all sources is most likely.

    Args:
        counted: The sources.
        ids: Which tokens, shape (tokens,).
        order: Their place in the tokenizer's order, shape (tokens,).

    Returns:
        Shape (tokens,), float64.
    """
    places = np.argsort(order, kind="stable")
    counts = np.stack([one.pieces[ids] for one in counted]).astype(np.float64)
    held_out = np.stack([one.held_pieces[ids] for one in counted])
    total, around = counts.sum(0), np.empty(len(ids))
    around[places] = _smoothed(total[places] + 1e-3)
    around /= around.sum()

    def estimated(strength: float) -> np.ndarray:
        pooled = (total + strength * around) / (total.sum() + strength)
        return (counts + strength * pooled) / (counts.sum(1, keepdims=True) + strength)

    def likelihood(strength: float) -> float:
        return float((held_out / held_out.sum(1, keepdims=True).clip(1) * np.log(estimated(strength))).sum())

    return estimated(max(_STRENGTHS, key=likelihood)).mean(0)


def joined(shares: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Frequencies with a part for what the loss loses with the rows of a token: `p^0.6 s^0.4`, each of sum 1.

    How often a token is counted says nothing about what it costs each time to be spelled by others, nor how often the
    model expects it where the text has another one; its importance by gradients does, but of the little text that
    gradients are of. See docs/vocabulary.md for what the two come to, alone and together.

    Args:
        shares: How frequent each token is, shape (tokens,).
        importance: What the loss loses by first order without its rows, shape (tokens,).

    Returns:
        Shape (tokens,), float64, of sum 1; by the frequencies alone where the loss depends on no token.
    """
    importance = importance.astype(np.float64)
    pairs = (shares, 0.6), (importance, 0.4)
    parts = [(values / max(values.sum(), 1e-300) + _LEAST) ** power for values, power in pairs]
    product = parts[0] * parts[1]
    return product / product.sum()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the neighbours of each place; fewer of them at the ends, so that no mean is pulled to one side."""
    sums, places = np.insert(np.cumsum(values), 0, 0.0), np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), _NEIGHBOURS)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
