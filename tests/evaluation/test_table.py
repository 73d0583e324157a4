"""Joining results: differences, ratios, standard errors, missing figures, other conditions."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.evaluation.table import ResultTable, label_of, scale_of


def make(state="dense", model="m/dense", *figures, hardware=None):
    result = EvaluationResult(model, state, environment={} if hardware is None else {"hardware": hardware})
    result.add(*figures)
    return result


def acc(value, stderr=0.03, task="boolq", **details):
    return Figure(f"tasks/{task}/acc", value, "", stderr, True, "0-shot", {"version": 2, "samples": 500} | details)


def cell(table, name, number):
    return next(row for row in table.rows() if row.name == name).cells[number]


def test_difference_ratio_and_two_standard_errors():
    # 2 sqrt(0.03^2 + 0.04^2) is 0.1.
    table = ResultTable([make("dense", "d", acc(0.75, 0.03)), make("pruned", "p", acc(0.625, 0.04))])
    found = cell(table, "tasks/boolq/acc", 1)
    assert (found.value, found.stderr, found.difference, found.ratio) == (0.625, 0.04, -0.125, 0.625 / 0.75)
    assert found.significant is True
    near = ResultTable([make("dense", "d", acc(0.75, 0.03)), make("pruned", "p", acc(0.6875, 0.04))])
    assert cell(near, "tasks/boolq/acc", 1).significant is False
    base = cell(table, "tasks/boolq/acc", 0)
    assert (base.difference, base.ratio, base.significant, base.comparable) == (None, None, None, True)


@pytest.mark.parametrize("errors", [(None, 0.01), (0.01, None), (None, None)])
def test_without_a_standard_error_nothing_is_said_about_significance(errors):
    table = ResultTable([make("dense", "d", acc(0.9, errors[0])), make("pruned", "p", acc(0.1, errors[1]))])
    found = cell(table, "tasks/boolq/acc", 1)
    assert (found.difference, found.significant) == (0.1 - 0.9, None)


def test_figures_of_any_result_in_the_order_of_families():
    dense = make("dense", "d", Figure("efficiency/macs", 4.0, "MAC"), acc(0.5), Figure("perplexity/a", 9.0))
    pruned = make("pruned", "p", Figure("perplexity/b", 8.0), acc(0.5, task="piqa"))
    table = ResultTable([dense, pruned])
    names = ["perplexity/a", "perplexity/b", "tasks/boolq/acc", "tasks/piqa/acc", "efficiency/macs"]
    assert [row.name for row in table.rows()] == names
    assert [[c is not None for c in row.cells] for row in table.rows()] == [
        [True, False], [False, True], [True, False], [False, True], [True, False],
    ]  # fmt: skip
    assert cell(table, "perplexity/b", 1).difference is None
    assert "| perplexity, b |  | 8.00 |  |\n" in table.to_markdown()


@pytest.mark.parametrize(
    ("base", "value", "difference", "ratio"),
    [(math.inf, math.inf, None, None), (2.0, math.inf, math.inf, math.inf), (0.0, 3.0, 3.0, None)],
)
def test_infinity_and_zero(base, value, difference, ratio):
    figures = [Figure("perplexity/a", number, higher_is_better=False) for number in (base, value)]
    table = ResultTable([make("dense", "d", figures[0]), make("pruned", "p", figures[1])])
    found = cell(table, "perplexity/a", 1)
    assert (found.difference, found.ratio) == (difference, ratio)
    json.dumps(table.to_dict(), allow_nan=False)
    table.to_markdown(), table.to_csv(), table.to_rich()


@pytest.mark.parametrize(
    ("base", "other", "words"),
    [
        (acc(0.5, samples=200), acc(0.4, samples=500), "samples is 500 instead of 200"),
        (acc(0.5), acc(0.4, version=3), "version is 3 instead of 2"),
        (acc(0.5), acc(0.4, num_fewshot=5), "num_fewshot is 5 instead of unknown"),
        (
            Figure("tasks/boolq/acc", 0.5, protocol="4 windows"),
            Figure("tasks/boolq/acc", 0.5, protocol="6 windows"),
            "protocol is '6 windows' instead of '4 windows'",
        ),
    ],
)
def test_other_conditions_are_marked_and_not_compared(base, other, words):
    table = ResultTable([make("dense", "d", base), make("pruned", "p", other)])
    found = cell(table, "tasks/boolq/acc", 1)
    assert (found.comparable, found.difference, found.ratio, found.significant) == (False, None, None, None)
    assert len(table.notes) == 1 and table.notes[0].startswith("† pruned: tasks/boolq/acc ")
    assert words in table.notes[0] and table.notes[0] in table.to_markdown()
    assert " †" in table.to_markdown().splitlines()[2]
    assert table.to_dict()["notes"] == table.notes


def texts(tokens, value, windows):
    words = (
        f"{windows} non-overlapping windows of 64 tokens, 63 predictions in each, evenly spaced over {tokens // 64}"
    )
    details = {"source": "a", "window": 64, "text_tokens": tokens}
    return [
        Figure(f"{kind}/a", value, "", 0.1, False, words, dict(details))
        for kind in ("perplexity", "word_perplexity", "bits_per_byte")
    ]


def test_other_vocabularies_are_compared_by_words_and_bytes_alone():
    table = ResultTable([make("dense", "d", *texts(6400, 9.0, 12)), make("pruned", "p", *texts(7000, 8.0, 11))])
    assert [row.name for row in table.rows()] == ["word_perplexity/a", "bits_per_byte/a", "perplexity/a"]
    found = {row.name.partition("/")[0]: row.cells[1] for row in table.rows()}
    assert not found["perplexity"].comparable and found["perplexity"].difference is None
    for kind in ("word_perplexity", "bits_per_byte"):
        assert found[kind].comparable and found[kind].difference == -1 and found[kind].comparison.test == "unpaired"
    assert "makes 7,000 tokens of the text instead of 6,400: compare words or bytes" in " ".join(table.notes)
    same = ResultTable([make("dense", "d", *texts(6400, 9.0, 12)), make("pruned", "p", *texts(6400, 8.0, 12))])
    assert [row.name for row in same.rows()][0] == "perplexity/a" and not same.notes
    assert all(row.cells[1].difference == -1 for row in same.rows())
    other = texts(7000, 8.0, 11)
    other[1] = replace(other[1], protocol=other[1].protocol.replace("63 predictions", "62 predictions"))
    table = ResultTable([make("dense", "d", *texts(6400, 9.0, 12)), make("pruned", "p", *other)])
    assert not cell(table, "word_perplexity/a", 1).comparable


def test_one_note_for_all_figures_with_the_same_reason():
    tasks = ("boolq", "piqa", "winogrande")
    dense = make("dense", "d", *[acc(0.5, task=task) for task in tasks])
    pruned = make("pruned", "p", *[acc(0.5, task=task, samples=10) for task in tasks])
    assert [note.count("/acc") for note in ResultTable([dense, pruned]).notes] == [3]


def test_counts_and_spreads_are_no_conditions():
    table = ResultTable([make("dense", "d", acc(0.5, seconds=3)), make("pruned", "p", acc(0.4, seconds=4))])
    assert table.notes == [] and cell(table, "tasks/boolq/acc", 1).comparable


@pytest.mark.parametrize("unit", ["s", "tokens/s"])
def test_times_of_other_machines_are_not_compared(unit):
    figures = (Figure("efficiency/x", 2.0, unit), Figure("efficiency/weight_bytes", 4.0, "B"))
    here, there = {"device": "CPU A", "threads": 2}, {"device": "CPU A", "threads": 8}
    table = ResultTable([make("dense", "d", *figures, hardware=here), make("pruned", "p", *figures, hardware=there)])
    assert [cell(table, f"efficiency/{name}", 1).comparable for name in ("x", "weight_bytes")] == [False, True]
    assert "threads is 8 instead of 2" in table.notes[0]
    same = ResultTable([make("dense", "d", *figures, hardware=here), make("pruned", "p", *figures, hardware=here)])
    assert same.notes == []


def test_figure_that_the_baseline_lacks_is_still_checked_between_the_others():
    first, second = make("pruned", "p", acc(0.5, samples=1)), make("recovered", "r", acc(0.6, samples=2))
    table = ResultTable([make("dense", "d"), first, second])
    assert [c and c.comparable for c in table.rows()[0].cells] == [None, True, False]
    assert "than pruned" in table.notes[0]


def test_labels():
    def labels(*pairs):
        return ResultTable([make(state, model) for state, model in pairs]).labels

    assert labels(("dense", "a"), ("pruned", "b")) == ["dense", "pruned"]
    assert labels(("dense", "a"), ("pruned", "x/b/"), ("pruned", "me/c")) == ["dense", "pruned b", "pruned c"]
    assert labels(("pruned", "a"), ("pruned", "a")) == ["pruned a (1)", "pruned a (2)"]


@pytest.fixture
def table():
    dense = make(
        "dense", "m/dense",
        Figure("perplexity/wikitext2", 18.44, "", None, False, "paper"),
        acc(0.6, 0.01), acc(0.5, 0.02, task="a|b"),
        Figure("efficiency/weight_bytes", 270e6, "B", None, False),
    )  # fmt: skip
    pruned = make(
        "pruned", "m/pruned",
        Figure("perplexity/wikitext2", 36.88, "", None, False, "paper"),
        acc(0.5, 0.01), acc(0.49, 0.02, task="a|b"),
    )  # fmt: skip
    return ResultTable([dense, pruned])


def test_markdown(table):
    assert table.to_markdown() == (
        "|  | dense | pruned | pruned vs dense |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| perplexity, wikitext2 ↓ | 18.44 | 36.88 | +18.44 (2.00x) |\n"
        "| boolq, acc ↑ | 60.00 % ± 1.00 | 50.00 % ± 1.00 | -10.00 pp (0.83x) \\* ‡ |\n"
        "| a\\|b, acc ↑ | 50.00 % ± 2.00 | 49.00 % ± 2.00 | -1.00 pp (0.98x) ≈ ‡ |\n"
        "| weights ↓ | 270.0 MB |  |  |\n"
        "\n"
        "± standard error.\n"
        "\n"
        "‡ compared unpaired, because the results do not hold the single windows or documents of both sides: \\* "
        "differs by more than two standard errors of both together, ≈ by less, which may still be more than chance.\n"
    )


def test_csv_is_unrounded(table):
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["figure"] for row in rows] == [row.name for row in table.rows()]
    assert float(rows[1]["pruned ratio"]) == 0.5 / 0.6 and rows[1]["pruned significant"] == "True"
    assert (rows[3]["dense"], rows[3]["unit"], rows[3]["pruned"], rows[3]["pruned ratio"]) == (
        "270000000.0",
        "B",
        "",
        "",
    )
    assert "dense ratio" not in rows[0]


def test_dict_is_unrounded_json(table):
    content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert content["baseline"] == "dense"
    assert [result["model"] for result in content["results"]] == ["m/dense", "m/pruned"]
    row = content["rows"][1]
    assert (row["figure"], row["higher_is_better"]) == ("tasks/boolq/acc", True)
    assert row["cells"]["pruned"] == {
        "value": 0.5, "stderr": 0.01, "difference": 0.5 - 0.6, "ratio": 0.5 / 0.6, "significant": True,
        "comparable": True, "test": "unpaired", "low": None, "high": None, "p_value": None,
    }  # fmt: skip
    assert content["rows"][3]["cells"]["pruned"] is None


def test_rich(table):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table.to_rich())
    text = console.file.getvalue()
    assert "pruned: m/pruned" in text and "-10.00 pp (0.83x) * ‡" in text
    assert text.count("270.0 MB") == 1


def test_rich_in_few_columns(table):
    """Changes go under their values, in short, and no line is longer than the terminal."""
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    line = next(number for number, text in enumerate(lines) if "boolq" in text)
    assert "50.00 % ± 1.00" in lines[line] and "-10.00 pp * ‡" in lines[line + 1] and "0.83x" not in lines[line + 1]


def test_no_results():
    with pytest.raises(ConfigurationError, match="no results"):
        ResultTable([])


@pytest.mark.parametrize(
    ("name", "unit", "value", "text"),
    [
        ("efficiency/parameters", "", 107_986_752, "108.0 M"),
        ("efficiency/parameters", "", 1_100_048_384, "1,100.0 M"),
        ("efficiency/parameters", "", 4567, "4,567"),
        ("efficiency/weight_bytes", "B", 269_030_016, "269.0 MB"),
        ("efficiency/weight_bytes", "B", 2_200_096_768, "2.20 GB"),
        ("efficiency/kv_cache_bytes_per_token", "B", 23_040, "23.0 kB"),
        ("efficiency/kv_cache_bytes_per_token", "B", 512, "512 B"),
        ("efficiency/macs", "MAC", 66_211_000_000, "66.21 G"),
        ("efficiency/macs", "MAC", 123_456, "0.12 M"),
        ("efficiency/time_to_first_token", "s", 0.01234, "12.3 ms"),
        ("efficiency/load_time", "s", 2.5, "2.50 s"),
        ("efficiency/decode_throughput", "tokens/s", 1234.56, "1,234.6 tokens/s"),
        ("perplexity/wikitext2", "", 18.4449, "18.44"),
        ("word_perplexity/wikitext2", "", 41_230.5, "41,230.50"),
        ("perplexity/wikitext2", "", math.inf, "∞"),
        ("word_perplexity/wikitext2", "", 17_417_332_925.0, "1.74e+10"),
        ("tasks/wikitext/word_perplexity", "", 18.4449, "18.44"),
        ("bits_per_byte/wikitext2", "bit", 0.81234, "0.8123 bit"),
        ("tasks/boolq/acc", "", 0.6123, "61.23 %"),
        ("tasks/hellaswag/acc_norm", "", 0.4, "40.00 %"),
        ("tasks/sts/pearson", "", 0.61234, "0.6123"),
    ],
)
def test_values(name, unit, value, text):
    assert scale_of(Figure(name, value, unit), [value]).value(value) == text


def test_row_has_one_unit():
    scale = scale_of(Figure("efficiency/weight_bytes", 1.2e9, "B"), [1.2e9, 0.8e9])
    assert (scale.value(1.2e9), scale.value(0.8e9), scale.difference(-0.4e9)) == ("1.20 GB", "0.80 GB", "-0.40 GB")


def test_differences_have_a_sign():
    accuracy = scale_of(Figure("tasks/boolq/acc", 0.5), [0.5])
    assert (accuracy.difference(-0.041), accuracy.difference(0.0)) == ("-4.10 pp", "+0.00 pp")
    assert accuracy.value(0.5, 0.0153) == "50.00 % ± 1.53"
    perplexity = scale_of(Figure("perplexity/x", 5.0), [5.0])
    assert (perplexity.difference(3.25), perplexity.difference(math.inf)) == ("+3.25", "+∞")
    assert perplexity.difference(-math.inf) == "-∞"


@pytest.mark.parametrize(
    ("name", "better", "label"),
    [
        ("tasks/boolq/acc", True, "boolq, acc ↑"),
        ("perplexity/wikitext2", False, "perplexity, wikitext2 ↓"),
        ("word_perplexity/my_text", False, "word perplexity, my_text ↓"),
        ("efficiency/macs", False, "MACs ↓"),
        ("efficiency/macs_with_attention", False, "MACs with attention ↓"),
        ("efficiency/time_to_first_token", False, "time to first token ↓"),
        ("toxicity", None, "toxicity"),
    ],
)
def test_label_of(name, better, label):
    assert label_of(Figure(name, 1.0, higher_is_better=better)) == label
