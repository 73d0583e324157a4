"""Whether two models differ, judged on the same windows and documents.

What one model finds hard the other finds hard too. So the differences of single windows or documents spread far less
than the figures themselves, and two models differ for certain long before their standard errors stop overlapping.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import ConfigurationError


MAX_PARTS = 256  # more are merged with their neighbours, so that files of results stay small
_DIGITS = 9  # significant ones of each sum
# How a figure comes from the mean of its parts.
FORMS = {"mean": lambda mean: mean, "exp": np.exp, "bits": lambda mean: mean / math.log(2)}

LEVEL = 0.05
MANY = 30  # from here on the normal approximation is good enough: Student's factor is 2.05, and 1.96 at infinity
RESAMPLES = 10_000
# Of three windows, 1 of 9 resamples holds one three times and says nothing about the spread: no interval of 95 %.
FEWEST_PARTS = 4
# All five against one side have a probability of 2 / 2^5 = 6 % if both models are equally good.
FEWEST_ANSWERS = 6
_NO_SPREAD = 1e-9  # of the mean: what rounding leaves of a difference that is the same everywhere


@dataclass(frozen=True)
class Parts:
    """The parts of a figure `g(sum(sums) / sum(counts))`, by which it is compared with that of another model.

    Attributes:
        key: Fingerprint of what was measured, in order: two figures are pairs where it is the same.
        sums: One for each window or document: negative log-likelihood in nats, right (1) or wrong (0), a score.
        counts: What each sum is over: predicted tokens, words, bytes, or 1 document.
        form: `g`: `"mean"` is `x`, `"exp"` is `exp(x)`, `"bits"` is `x / ln 2`.
    """

    key: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    form: str = "mean"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigurationError(f"`form` is {self.form!r}; allowed values are {', '.join(FORMS)}.")
        whole = len(self.sums) == len(self.counts) and sum(self.counts) > 0
        if not whole or not all(map(math.isfinite, self.sums)):
            raise ConfigurationError("Finite sums, and for each a count, are what parts of a figure are.")

    @classmethod
    def of(cls, key: str, sums: Sequence, counts: Sequence[int] | None = None, form: str = "mean") -> Parts | None:
        """The parts as they are stored: rounded to nine digits, and merged with neighbours where there are many.

        Counts are 1 each if not given. `None` if there are no parts, or a sum is not finite.
        """
        sums = np.asarray(sums, dtype=float)
        counts = np.ones(len(sums), dtype=int) if counts is None else np.asarray(counts, dtype=int)
        if sums.ndim != 1 or not counts.sum() > 0 or not np.isfinite(sums).all():
            return None
        if len(sums) > MAX_PARTS and not cls(key, tuple(sums), tuple(counts), form).are_hits:
            starts = np.arange(MAX_PARTS) * len(sums) // MAX_PARTS
            sums, counts = np.add.reduceat(sums, starts), np.add.reduceat(counts, starts)
        return cls(key, tuple(float(f"{value:.{_DIGITS}g}") for value in sums), tuple(counts.tolist()), form)

    @property
    def are_hits(self) -> bool:
        """Whether every part is one answer, right or wrong."""
        return self.form == "mean" and {*self.counts} == {1} and {*self.sums} <= {0, 1}

    @property
    def mean(self) -> float:
        """`sum(sums) / sum(counts)`."""
        return math.fsum(self.sums) / sum(self.counts)

    def value(self, mean: float | None = None) -> float:
        """The figure, or what it would be at another `mean`."""
        with np.errstate(over="ignore"):
            return float(FORMS[self.form](self.mean if mean is None else mean))

    def pairs_with(self, other: Parts) -> bool:
        """Whether both are of the same windows or documents in the same order."""
        return (self.key, self.form, self.counts) == (other.key, other.form, other.counts)

    def to_json(self) -> dict[str, Any]:
        """Few bytes that people can still read: answers as hexadecimal digits (the first is the highest bit)."""
        if self.are_hits:
            bits = "".join(str(int(hit)) for hit in self.sums)
            return {"key": self.key, "hits": f"{int(bits, 2):0{-(-len(bits) // 4)}x}", "documents": len(bits)}
        sums = " ".join(f"{value:.{_DIGITS}g}" for value in self.sums)
        counts = self.counts[0] if len(set(self.counts)) == 1 else " ".join(map(str, self.counts))
        return {"key": self.key, "form": self.form, "sums": sums, "counts": counts}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Parts:
        """Reads what `to_json` made; raises a `ConfigurationError` if it is something else."""
        try:
            if "hits" in content:
                hits, documents = content["hits"], content["documents"]
                bits = f"{int(hits, 16):0{4 * len(hits)}b}"[-documents:]
                if -(-documents // 4) != len(hits) or int(bits, 2) != int(hits, 16):
                    raise ValueError(f"{hits!r} are no {documents} answers")
                return cls(content["key"], tuple(map(float, bits)), (1,) * len(bits))
            sums, counts = tuple(map(float, content["sums"].split())), content["counts"]
            counts = (counts,) * len(sums) if isinstance(counts, int) else tuple(map(int, counts.split()))
            return cls(content["key"], sums, counts, content["form"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"The parts of a figure are incomplete or of another kind: {error}.") from error


def fingerprint(pieces: Iterable[bytes | str]) -> str:
    """16 hexadecimal digits that say what was measured, in order."""
    digest = hashlib.sha256()
    for piece in pieces:
        piece = piece.encode() if isinstance(piece, str) else piece
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Comparison:
    """Whether a figure differs from the baseline's.

    Attributes:
        test: `"mcnemar"`, `"paired"`, `"bootstrap"`, `"too few"` or `"unpaired"`.
        differs: Whether chance is ruled out at the 5 % level; `None` where there is too little to tell.
        low, high: The 95 % interval of the difference, in the figure's unit, the baseline's value taken as it is.
        p_value: Of a test that does not go by an interval.
        why: Why it was not paired.
    """

    test: str
    differs: bool | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    why: str = ""


def compare_parts(base: Parts, other: Parts) -> Comparison:
    """Compares two models by what they did on the same windows or documents: `base.pairs_with(other)`.

    * Answers that are right or wrong: McNemar's exact test, two-sided.
    * All else: the mean difference `D = sum_k d_k / sum_k c_k` of the sums, `d_k = other_k - base_k`, and its standard
      error `s = sqrt(n / (n - 1) sum_k (d_k - D c_k)^2) / sum_k c_k`, that of a ratio of sums (Cochran, Sampling
      Techniques, 1977, section 6.4). The interval is `D - 2 s` to `D + 2 s`, with fewer than 30 parts the symmetric
      studentised bootstrap interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5).
    """
    n, hits = len(base.sums), base.are_hits and other.are_hits
    if n < (FEWEST_ANSWERS if hits else FEWEST_PARTS):
        return Comparison("too few", None)
    if hits:
        p_value = mcnemar(base.sums, other.sums)
        return Comparison("mcnemar", p_value < LEVEL, p_value=p_value)
    differences, counts = np.subtract(other.sums, base.sums), np.asarray(base.counts, dtype=float)
    mean, stderr = map(float, ratio_and_stderr(differences, counts))
    factor = 2.0 if n >= MANY else bootstrap_factor(differences, counts)
    margin = factor * stderr if stderr > _NO_SPREAD * abs(mean) else 0.0
    low, high = (base.value(base.mean + mean + sign * margin) - base.value() for sign in (-1, 1))
    return Comparison("paired" if n >= MANY else "bootstrap", abs(mean) > margin, low, high)


def mcnemar(base: Sequence[float], other: Sequence[float]) -> float:
    """p-value of McNemar's exact test, two-sided, of answers that are 1 (right) or 0 (Psychometrika 12, 1947).

    Of `m` documents that only one of the two models answers right, `k` are the smaller side: `p = min(1, 2 sum_{i<=k}
    C(m, i) / 2^m)`.
    """
    change = np.subtract(other, base)
    m, k = int(np.count_nonzero(change)), int(min((change > 0).sum(), (change < 0).sum()))
    ways = accumulate(range(k), lambda ways, i: ways * (m - i) // (i + 1), initial=1)  # C(m, 0), C(m, 1), ...
    return min(1.0, 2 * sum(ways) / 2**m)


def ratio_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sum(sums) / sum(counts)` and its standard error over the `n` parts (delta method), NaN where there is one.

    Both are of shape `(..., n)`.
    """
    n, total = sums.shape[-1], counts.sum(-1)
    mean = sums.sum(-1) / total
    squares = np.square(sums - mean[..., None] * counts).sum(-1)
    return mean, np.sqrt((n / (n - 1) if n > 1 else math.nan) * squares) / total


def bootstrap_factor(differences: np.ndarray, counts: np.ndarray) -> float:
    """How many standard errors the 95 % interval reaches to either side, by resampling the parts.

    The 95 % quantile of `|D* - D| / s*` over resamples. A resample without spread says nothing and counts as infinite.
    The same parts always give the same answer.
    """
    n = len(differences)
    chosen = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    mean, _ = ratio_and_stderr(differences, counts)
    means, errors = ratio_and_stderr(differences[chosen], counts[chosen])
    distances = np.full(RESAMPLES, math.inf)
    np.divide(np.abs(means - mean), errors, out=distances, where=errors > _NO_SPREAD * np.abs(means))
    return float(np.quantile(distances, 1 - LEVEL, method="higher"))
