"""What is stored of windows and documents: small, readable, the same when it is read again."""

import json
import math

import numpy as np
import pytest

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.comparison import MAX_PARTS, Parts, fingerprint
from hf_structprune.evaluation.results import EvaluationResult, Figure


@pytest.mark.parametrize("number", [1, 4, 5, 8, 203])
def test_answers_take_one_bit_each(number):
    hits = np.random.default_rng(number).integers(0, 2, number)
    parts = Parts.of("k", hits)
    content = json.loads(json.dumps(parts.to_json()))
    assert parts.are_hits and Parts.from_json(content) == parts
    assert content == {"key": "k", "hits": content["hits"], "documents": number}
    assert len(content["hits"]) == math.ceil(number / 4)


def test_answers_are_in_order_from_the_highest_bit():
    assert Parts.of("k", [1, 0, 0, 1, 1, 1, 0, 0]).to_json()["hits"] == "9c"


@pytest.mark.parametrize("counts", [[2047] * 12, list(range(2000, 2012)), None])
@pytest.mark.parametrize("form", ["mean", "exp", "bits"])
def test_sums_are_read_as_they_are_stored(counts, form):
    sums = np.random.default_rng(0).normal(7000, 500, 12)
    parts = Parts.of("k", sums, counts, form)
    assert Parts.from_json(json.loads(json.dumps(parts.to_json()))) == parts
    assert parts.sums == pytest.approx(sums, rel=1e-8)
    assert len(json.dumps(parts.to_json())) < 12 * 17 + 60


def test_the_figure_is_that_of_its_parts():
    sums, counts = (3.0, 5.0), (2, 4)
    assert Parts("k", sums, counts).value() == 8 / 6
    assert Parts("k", sums, counts, "exp").value() == math.exp(8 / 6)
    assert Parts("k", sums, counts, "bits").value() == 8 / 6 / math.log(2)
    assert Parts("k", (3000.0,), (1,), "exp").value() == math.inf


def test_many_parts_are_merged_with_their_neighbours():
    sums, counts = np.arange(1000.0) + 0.25, [3] * 1000
    parts = Parts.of("k", sums, counts, "exp")
    assert len(parts.sums) == MAX_PARTS and set(parts.counts) == {9, 12}
    assert parts.sums[0] == sums[:3].sum() and parts.mean == pytest.approx(sums.sum() / 3000)
    assert len(json.dumps(parts.to_json())) < 5000
    assert len(Parts.of("k", [1.0, 0.0] * 5000).sums) == 10_000  # bits are small


@pytest.mark.parametrize("sums", [[], [1.0, math.inf], [math.nan]])
def test_without_finite_sums_there_are_no_parts(sums):
    assert Parts.of("k", sums) is None


def test_only_the_same_windows_in_the_same_order_are_pairs():
    parts = Parts("k", (1.0, 2.0), (3, 3), "exp")
    assert parts.pairs_with(Parts("k", (5.0, 6.0), (3, 3), "exp"))
    for other in (("l", (3, 3), "exp"), ("k", (3, 4), "exp"), ("k", (3, 3), "bits")):
        assert not parts.pairs_with(Parts(other[0], (1.0, 2.0), *other[1:]))
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"]) and fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["a", "b"]) == fingerprint([b"a", b"b"])


@pytest.mark.parametrize(
    "content",
    [
        {}, [], {"key": "k"}, {"key": "k", "hits": "9", "documents": 5}, {"key": "k", "hits": "9", "documents": 3},
        {"key": "k", "hits": "-1", "documents": 8}, {"key": "k", "hits": "zz", "documents": 8},
        {"key": "k", "hits": "9", "documents": 10**15}, {"key": "k", "hits": 9, "documents": 4},
        {"key": "k", "form": "exp", "sums": "1 2", "counts": "1"},
        {"key": "k", "form": "exp", "sums": "", "counts": 1},
        {"key": "k", "form": "exp", "sums": "1 nan", "counts": 1},
        {"key": "k", "form": "sin", "sums": "1", "counts": 1},
    ],
)  # fmt: skip
def test_damaged_parts_are_refused(content):
    with pytest.raises(ConfigurationError, match="parts of a figure|`form`"):
        Parts.from_json(content)


def test_results_hold_them_and_older_results_do_not(tmp_path):
    result = EvaluationResult("m")
    result.add(Figure("tasks/a/acc", 0.5, parts=Parts.of("k", [1, 0])), Figure("efficiency/macs", 4.0))
    result.save(tmp_path / "r.json")
    assert EvaluationResult.load(tmp_path / "r.json") == result
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert figures[0]["parts"] == {"key": "k", "hits": "2", "documents": 2} and "parts" not in figures[1]
