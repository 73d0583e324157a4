"""Comparisons by pairs against hand-computed numbers, brute force and simulations."""

import json
import math
from itertools import product

import numpy as np
import pytest

from hf_structprune.evaluation import comparison as paired
from hf_structprune.evaluation.comparison import compare_parts, mcnemar
from hf_structprune.evaluation.results import EvaluationResult, Figure, Parts
from hf_structprune.evaluation.table import ResultTable, compare_figures


def windows(sums, count=2047, key="k"):
    return Parts.of(key, sums, [count] * len(sums), "exp")


def figure(parts, stderr=None, name="perplexity/wikitext2"):
    return Figure(name, parts.value(), "", stderr, False, parts=parts)


def table(*figures):
    results = []
    for number, one in enumerate(figures):
        results.append(EvaluationResult(f"m{number}", ("dense", "pruned", "recovered")[number]))
        results[-1].add(one)
    return ResultTable(results)


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    # 2 (1 + 6) / 2^6; 2 (1 + 8 + 28) / 2^8; 2 / 2^6; 2 (1 + 10) / 2^10
    [(5, 1, 14 / 64), (6, 2, 74 / 256), (6, 0, 1 / 32), (1, 9, 22 / 1024), (0, 0, 1.0), (3, 3, 1.0)],
)
def test_mcnemar_equals_hand_computed_values(lost, gained, p_value):
    base = (1,) * lost + (0,) * gained + (1, 0, 1)
    other = (0,) * lost + (1,) * gained + (1, 0, 1)
    assert mcnemar(base, other) == mcnemar(other, base) == pytest.approx(p_value, rel=1e-15)


def test_mcnemar_equals_all_ways_to_share_out_the_documents():
    for total, smaller in ((4, 1), (7, 2), (9, 4)):
        ways = [sum(way) for way in product((0, 1), repeat=total)]
        extreme = sum(min(ones, total - ones) <= smaller for ones in ways) / len(ways)
        assert mcnemar((1,) * smaller + (0,) * (total - smaller), (0,) * smaller + (1,) * (total - smaller)) == extreme


def test_mcnemar_of_thousands_of_documents():
    base, other = (1,) * 2600 + (0,) * 2400, (0,) * 2600 + (1,) * 2400
    z = 199 / math.sqrt(5000)  # with the correction for continuity
    assert mcnemar(base, other) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=2e-3)


def test_ratio_and_error_equal_hand_computed_values():
    # D = 12 / 10; the residuals are -0.4, 1.6, -1.2: their squares add up to 4.16.
    mean, error = paired.ratio_and_stderr(np.array([2.0, 4.0, 6.0]), np.array([2.0, 2.0, 6.0]))
    assert (mean, error) == (1.2, pytest.approx(math.sqrt(3 / 2 * 4.16) / 10))


def test_a_rise_of_55_per_cent_differs_though_the_errors_overlap():
    """Twelve windows of a text: some are hard, for both models, and each is 0.44 nats a token harder for one."""
    rng = np.random.default_rng(0)
    hard = rng.normal(3.0, 0.35, 12)
    dense, pruned = windows(2047 * hard), windows(2047 * (hard + math.log(1.55) + rng.normal(0, 0.03, 12)))
    errors = [p.value() * np.std(np.array(p.sums) / 2047, ddof=1) / math.sqrt(12) for p in (dense, pruned)]
    figures = [figure(p, e) for p, e in zip((dense, pruned), errors, strict=True)]
    assert pruned.value() / dense.value() == pytest.approx(1.55, rel=0.03)
    assert pruned.value() - dense.value() > 2 * math.hypot(*errors) * 0.9
    found = compare_figures(figures[1], figures[0])
    assert (found.test, found.differs) == ("bootstrap", True)
    assert 0.5 * dense.value() < found.low < pruned.value() - dense.value() < found.high < 0.62 * dense.value()
    alone = [
        Figure(f.name, f.value, "", 3 * f.stderr, False) for f in figures
    ]  # the same without windows, and less sure
    assert compare_figures(alone[1], alone[0]).differs is False
    text = table(*figures).to_markdown()
    assert "x) \\* |" in text and "≈ |" not in text and "‡" not in text
    assert "pair by pair on the same windows" in text and "bootstrap interval" in text and "5 % level" in text


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_few_windows_say_nothing(number):
    dense, pruned = (
        windows([5000.0 + 10 * i for i in range(number)]),
        windows([9000.0 + 11 * i for i in range(number)]),
    )
    found = compare_parts(dense, pruned)
    assert (found.test, found.differs, found.low) == ("too few", None, None)
    text = table(figure(dense), figure(pruned)).to_markdown()
    assert "x) ? |" in text and "? too few to tell." in text and "≈ |" not in text


def test_too_few_documents_say_nothing():
    assert compare_parts(Parts.of("k", [1] * 5), Parts.of("k", [0] * 5)).differs is None
    assert compare_parts(Parts.of("k", [1] * 6), Parts.of("k", [0] * 6)).differs is True  # 2 / 2^6


@pytest.mark.parametrize("number", [5, 29, 30, 200])
def test_equal_and_everywhere_shifted_windows(number):
    base = windows(np.linspace(4000, 7000, number))
    same, shifted = compare_parts(base, base), compare_parts(base, windows(np.array(base.sums) + 20.47))
    assert same.differs is False and same.low == same.high == 0
    assert shifted.differs is True and shifted.low == pytest.approx(base.value() * (math.exp(0.01) - 1), rel=1e-5)
    assert same.test == ("bootstrap" if number < 30 else "paired")


def test_two_standard_errors_where_there_are_many():
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=40), rng.normal(size=40)
    noise -= noise.mean()
    stderr = noise.std(ddof=1) / math.sqrt(40)
    for shift, differs in ((1.99, False), (2.01, True), (-1.99, False), (-2.01, True)):
        found = compare_parts(Parts.of("k", base), Parts.of("k", base + noise + shift * stderr))
        assert (found.test, found.differs) == ("paired", differs)
        assert (found.low, found.high) == pytest.approx(((shift - 2) * stderr, (shift + 2) * stderr), abs=1e-7)


def test_bits_are_told_in_bits():
    base = Parts.of("k", np.linspace(1, 2, 50), [10] * 50, "bits")
    found = compare_parts(base, Parts.of("k", np.linspace(2, 3, 50), [10] * 50, "bits"))
    assert found.low == pytest.approx(0.1 / math.log(2)) and found.differs


@pytest.mark.parametrize("number", [4, 6, 12])
def test_bootstrap_intervals_cover_what_they_promise(number):
    """Normal and skewed differences of windows that are not all of one size; an interval of 95 % holds the truth."""
    rng, draws = np.random.default_rng(number), 60
    covered, narrow = [], []
    for draw in range(2 * draws):
        counts = rng.integers(50, 80, number)
        noise = rng.normal(size=number) if draw % 2 else rng.exponential(size=number) - 1
        base = Parts.of("k", rng.normal(300, 50, number), counts)
        found = compare_parts(base, Parts.of("k", np.array(base.sums) + counts * 0.3 + 5 * noise, counts))
        covered.append(found.low <= 0.3 <= found.high)
        narrow.append(found.high < 3)
    assert np.mean(covered) >= 0.91 and np.mean(narrow) > 0.5


def test_one_window_that_differs_is_no_difference():
    """A third of the resamples do not hold it and say nothing about the spread: the interval has no end."""
    base = windows(np.linspace(4000, 7000, 12))
    found = compare_parts(base, windows([*base.sums[:11], base.sums[11] + 500]))
    assert (found.test, found.differs) == ("bootstrap", False)
    assert found.low == -base.value() and found.high == math.inf
    json.dumps(table(figure(base, 1.0), figure(base, 1.0)).to_dict(), allow_nan=False)


def test_the_same_parts_always_give_the_same_answer():
    base, other = windows([5000.0, 6000.0, 5500.0, 5800.0]), windows([5100.0, 6050.0, 5600.0, 5950.0])
    assert compare_parts(base, other) == compare_parts(base, other)


@pytest.mark.parametrize(
    ("mine", "why"),
    [(None, "do not hold the single windows"), (windows([1.0, 2.0], key="other"), "are not the same on both sides")],
)
def test_without_pairs_it_falls_back_and_says_so(mine, why):
    base, other = Figure("perplexity/a", 20.0, "", 1.0, False, parts=windows([1.0, 2.0])), 22.0
    figures = [base, Figure("perplexity/a", other, "", 1.0, False, parts=mine)]
    found = compare_figures(figures[1], figures[0])
    assert (found.test, found.differs) == ("unpaired", False) and why in found.why
    text = table(*figures).to_markdown()
    assert (
        "+2.00 (1.10x) ≈ ‡ |" in text
        and f"‡ compared unpaired, because the {'windows' if mine else 'results'}" in text
    )
    assert "pair by pair" not in text
    assert compare_figures(Figure("perplexity/a", other, parts=mine), base) is None


def test_tables_tell_both_kinds_apart():
    hits = [Parts.of("k", [1] * 30 + [0] * 10), Parts.of("k", [1] * 15 + [0] * 25)]
    paired_ones = [Figure("tasks/a/acc", p.value(), "", 0.05, True, parts=p) for p in hits]
    alone = Figure("tasks/a/acc", 0.7, "", 0.05, True)
    text = table(*paired_ones, alone).to_markdown()
    assert "(0.50x) \\* |" in text and "(0.93x) ≈ ‡ |" in text
    assert "right and wrong answers by McNemar's exact test)" in text and "bootstrap" not in text
    row = table(*paired_ones).to_dict()["rows"][0]["cells"]["pruned"]
    assert row["test"] == "mcnemar" and row["p_value"] == 2 / 2**15 and row["low"] is None
