"""Numbers as people read them."""

import math

import pytest

from hf_structprune.evaluation.results import Figure
from hf_structprune.evaluation.table import label_of, scale_of


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
def test_labels(name, better, label):
    assert label_of(Figure(name, 1.0, higher_is_better=better)) == label
