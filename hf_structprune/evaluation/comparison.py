"""Whether two models differ, judged on the same windows and documents: pure maths over `Parts`.

What one model finds hard the other finds hard too. So the differences of single windows or documents spread far less
than the figures themselves, and two models differ for certain long before their standard errors stop overlapping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import EvaluationResult, Figure, Parts


LEVEL = 0.05
MANY = 30  # from here on the normal approximation is good enough: Student's factor is 2.05, and 1.96 at infinity
RESAMPLES = 10_000
# Of three windows, 1 of 9 resamples holds one three times and says nothing about the spread: no interval of 95 %.
FEWEST_PARTS = 4
# All five against one side have a probability of 2 / 2^5 = 6 % if both models are equally good.
FEWEST_ANSWERS = 6
_NO_SPREAD = 1e-9  # of the mean: what rounding leaves of a difference that is the same everywhere

# How it was judged, in words, in the order in which tables tell.
MCNEMAR, PAIRED, BOOTSTRAP, TOO_FEW, UNPAIRED = TESTS = ("mcnemar", "paired", "bootstrap", "too few", "unpaired")

# Details of a figure that say how it was measured; others (counts, spreads) say what came out.
_CONDITIONS = (
    "version", "num_fewshot", "samples", "filter", "source", "window", "stride", "bos",
    "batch_size", "length", "new_tokens", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Whether a figure differs from the baseline's.

    Attributes:
        test: One of `TESTS`.
        differs: Whether chance is ruled out at the 5 % level; `None` where there is too little to tell.
        low: Lower end of the 95 % interval of the difference, in the figure's unit, the baseline's value taken as it
            is; `None` where the test has none.
        high: Upper end.
        p_value: Of the test; `None` where it goes by an interval.
        why: Why it was not paired.
    """

    test: str
    differs: bool | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    why: str = ""


def compare_figures(figure: Figure, base: Figure) -> Comparison | None:
    """Compares by pairs where both were measured on the same windows or documents, else by the standard errors.

    Unpaired, `|d| > 2 sqrt(s^2 + s_base^2)` is called a difference: right if each had been measured on a sample of its
    own, and blind to most differences if not.

    Returns:
        `None` where they have no pairs and one has no standard error.
    """
    parts = (base.parts, figure.parts)
    if None not in parts and parts[0].pairs_with(parts[1]):
        return compare_parts(*parts)
    if figure.stderr is None or base.stderr is None:
        return None
    missing = "the results do not hold the single windows or documents of both sides"
    why = missing if None in parts else "the windows or documents are not the same on both sides"
    differs = abs(figure.value - base.value) > 2 * math.hypot(figure.stderr, base.stderr)
    return Comparison(UNPAIRED, differs, why=why)


def compare_parts(base: Parts, other: Parts) -> Comparison:
    """Compares two models by what they did on the same windows or documents.

    * Answers that are right or wrong: McNemar's exact test, two-sided.
    * All else: the mean difference `D = sum_k d_k / sum_k c_k` of the sums, `d_k = other_k - base_k`, and its standard
      error `s = sqrt(n / (n - 1) sum_k (d_k - D c_k)^2) / sum_k c_k`, that of a ratio of sums (Cochran, Sampling
      Techniques, 1977, section 6.4). The interval is `D - 2 s` to `D + 2 s`, with fewer than 30 parts the symmetric
      studentised bootstrap interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5).

    Args:
        base: The baseline's parts.
        other: Those of the other model; `base.pairs_with(other)`.
    """
    n = len(base.sums)
    if base.are_hits and other.are_hits:
        if n < FEWEST_ANSWERS:
            return Comparison(TOO_FEW, None)
        p_value = mcnemar(base.sums, other.sums)
        return Comparison(MCNEMAR, p_value < LEVEL, p_value=p_value)
    if n < FEWEST_PARTS:
        return Comparison(TOO_FEW, None)
    differences, counts = np.subtract(other.sums, base.sums), np.asarray(base.counts, dtype=float)
    mean, stderr = map(float, ratio_and_stderr(differences, counts))
    factor = 2.0 if n >= MANY else bootstrap_factor(differences, counts)
    margin = factor * stderr if stderr > _NO_SPREAD * abs(mean) else 0.0
    low, high = (base.value(base.mean + mean + sign * margin) - base.value() for sign in (-1, 1))
    return Comparison(PAIRED if n >= MANY else BOOTSTRAP, abs(mean) > margin, low, high)


def mcnemar(base: tuple[float, ...], other: tuple[float, ...]) -> float:
    """p-value of McNemar's exact test, two-sided (McNemar, Psychometrika 12, 1947).

    Of `m` documents that only one of the two models answers right, `k` are the smaller side: `p = min(1, 2 sum_{i<=k}
    C(m, i) / 2^m)`.

    Args:
        base: 1 for a right answer, 0 for a wrong one.
        other: The same of the other model, documents in the same order.
    """
    gained = sum(b < o for b, o in zip(base, other, strict=True))
    lost = sum(b > o for b, o in zip(base, other, strict=True))
    total, term, tail = gained + lost, 1, 0
    for i in range(min(gained, lost) + 1):
        tail += term  # C(m, i)
        term = term * (total - i) // (i + 1)
    return min(1.0, 2 * tail / 2**total)


def ratio_and_stderr(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`sum(sums) / sum(counts)` along the last axis and its standard error over the `n` parts (delta method).

    Args:
        sums: Of shape `(..., n)`, `n` at least 2.
        counts: Of the same shape.
    """
    n, total = sums.shape[-1], counts.sum(-1)
    mean = sums.sum(-1) / total
    squares = np.square(sums - mean[..., None] * counts).sum(-1)
    return mean, np.sqrt(n / (n - 1) * squares) / total


def bootstrap_factor(differences: np.ndarray, counts: np.ndarray, seed: int = 0) -> float:
    """How many standard errors the 95 % interval reaches to either side, by resampling the parts.

    The 95 % quantile of `|D* - D| / s*` over resamples. A resample without spread says nothing and counts as infinite.

    Args:
        differences: `d_k`, of shape `(n,)`.
        counts: `c_k`, of the same shape.
        seed: Of the resamples: the same parts always give the same answer.
    """
    n = len(differences)
    chosen = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    mean, _ = ratio_and_stderr(differences, counts)
    means, errors = ratio_and_stderr(differences[chosen], counts[chosen])
    distances = np.full(RESAMPLES, math.inf)
    np.divide(np.abs(means - mean), errors, out=distances, where=errors > _NO_SPREAD * np.abs(means))
    return float(np.quantile(distances, 1 - LEVEL, method="higher"))


def other_conditions(name: str, result: EvaluationResult, reference: EvaluationResult) -> str | None:
    """`"limit is 100 instead of 200"`: why a figure is not compared with the reference's; `None` where it may be."""
    mine, other = _conditions_of(name, result), _conditions_of(name, reference)
    keys = [key for key in {**other, **mine} if mine.get(key) != other.get(key)]
    # The protocol repeats the numbers; it is quoted only where it is all there is.
    keys = [key for key in keys if key != "protocol"] or keys
    return ", ".join(f"{key} is {_said(mine, key)} instead of {_said(other, key)}" for key in keys) or None


def _conditions_of(name: str, result: EvaluationResult) -> dict[str, Any]:
    figure = result.figures[name]
    conditions = {"protocol": figure.protocol}
    conditions |= {key: figure.details[key] for key in _CONDITIONS if key in figure.details}
    if figure.unit in ("s", "tokens/s"):  # which depend on the machine
        hardware = result.environment.get("hardware", {})
        conditions |= {key: hardware.get(key) for key in ("device", "threads")}
    return conditions


def _said(conditions: dict[str, Any], key: str) -> str:
    value = conditions.get(key, "")
    return "unknown" if value == "" else repr(value) if isinstance(value, str) else str(value)
