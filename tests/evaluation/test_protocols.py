"""Every protocol against loops over windows, in float64."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation import (
    PROTOCOLS,
    EvaluationText,
    PerplexityProtocol,
    load_text,
    measure_perplexity,
    perplexity,
)
from hf_structprune.evaluation.comparison import ratio_and_stderr
from hf_structprune.evaluation.results import EvaluationResult


TEXT = EvaluationText("fox", "The quick brown fox jumps\n\nover  the lazy dog, and 0123456789 more. " * 9, "a test")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=None, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far from uniform
    return model


def row_losses(model, row):
    """Of every token of a window but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    return [-torch.log_softmax(logits[i - 1], -1)[row[i]].item() for i in range(1, len(row))]


def non_overlapping(model, ids, window, bos=None):
    """Losses by window; with `bos` one stands before every window and makes it full."""
    content = window - (bos is not None)
    result = []
    for start in range(0, len(ids) - content + 1, content):
        row = [*([] if bos is None else [bos]), *ids[start : start + content]]
        result.append(row_losses(model, row))
    return result


def sliding(model, ids, window, stride):
    """Losses by window: each token in the first window that holds it, the last window ends with the text."""
    result, done, end = [], 1, min(window, len(ids))
    while done < len(ids):
        result.append(row_losses(model, ids[end - min(window, len(ids)) : end])[done - end :])
        done, end = end, min(end + stride, len(ids))
    return result


def check(result, losses):
    """Against losses by window."""
    total, count, n = sum(map(sum, losses)), sum(map(len, losses)), len(losses)
    assert (result.tokens, result.windows) == (count, n)
    assert result.nll == pytest.approx(total / count, rel=2e-6)  # the likelihood is taken in float32
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    residuals = [sum(row) - total / count * len(row) for row in losses]
    error = math.exp(total / count) / count * math.sqrt(n / (n - 1) * sum(e * e for e in residuals))
    assert result.stderr == pytest.approx(error, rel=1e-4)


def test_names_and_defaults():
    assert PROTOCOLS["paper"] == PerplexityProtocol(2048, 2048, False, None, True)
    assert PROTOCOLS["llm-pruner"] == PerplexityProtocol(128, 128, False, None, True)
    assert PROTOCOLS["sliding"] == PerplexityProtocol(2048, 512, True, None, False)


@pytest.mark.parametrize("bos_by_default", [False, True])
def test_llm_pruner(model, make_tokenizer, bos_by_default):
    tokenizer = make_tokenizer(bos=bos_by_default)
    result = measure_perplexity(model, tokenizer, TEXT, "llm-pruner", batch_size=4)
    check(result, non_overlapping(model, tokenizer(TEXT.text)["input_ids"], 128))
    bos = "BOS once at the start of the text" if bos_by_default else "no BOS"
    words = f"{len(TEXT.text) // 128} non-overlapping windows of 128 tokens, 127 predictions in each, {bos}"
    assert (result.window, result.protocol, result.source) == (128, words, "a test")


def test_paper_with_a_shorter_window(model, tiny_tokenizer):
    result = measure_perplexity(model, tiny_tokenizer, TEXT, window=100, batch_size=3)
    check(result, non_overlapping(model, tiny_tokenizer(TEXT.text)["input_ids"], 100))
    same = perplexity(model, tiny_tokenizer, TEXT.text, window=100, batch_size=3)
    assert result == dataclasses.replace(same, source="a test")


@pytest.mark.parametrize("bos_by_default", [False, True])
def test_bos_in_every_window(model, make_tokenizer, bos_by_default):
    tokenizer = make_tokenizer(bos=bos_by_default)
    ids = make_tokenizer()(TEXT.text)["input_ids"]
    result = measure_perplexity(model, tokenizer, TEXT, "paper", window=65, bos=True, batch_size=2)
    check(result, non_overlapping(model, ids, 65, bos=1))
    assert result.bytes == result.tokens == len(ids) // 64 * 64  # ASCII, and every token of a window counts
    assert result.protocol.endswith("64 predictions in each, BOS in each")


def test_no_bos_although_the_tokenizer_adds_one(model, make_tokenizer):
    with_bos, without = (make_tokenizer(bos=bos) for bos in (True, False))
    result = measure_perplexity(model, with_bos, TEXT, window=64, bos=False)
    assert result == measure_perplexity(model, without, TEXT, window=64)
    assert result != measure_perplexity(model, with_bos, TEXT, window=64)


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (64, 63), (50, 50), (250, 33)])
def test_overlapping_windows_of_paper_drop_the_tail(model, tiny_tokenizer, window, stride):
    ids = tiny_tokenizer(TEXT.text)["input_ids"]
    result = measure_perplexity(model, tiny_tokenizer, TEXT, window=window, stride=stride, batch_size=5)
    if stride == window:
        expected = non_overlapping(model, ids, window)
    else:
        kept = window + (len(ids) - window) // stride * stride
        expected = sliding(model, ids[:kept], window, stride)
    check(result, expected)


@pytest.mark.parametrize(
    ("bos", "add", "batch_size"),
    [(None, False, 1), (None, True, 4), (True, False, 4), (True, True, 1), (False, True, 4)],
)
def test_sliding_scores_every_token_but_the_first(model, make_tokenizer, bos, add, batch_size):
    tokenizer, text = make_tokenizer(bos=add), TEXT.text[:500]
    plain = make_tokenizer()(text)["input_ids"]
    ids = [1, *plain] if bos or (bos is None and add) else plain
    result = measure_perplexity(
        model, tokenizer, EvaluationText("x", text, ""), "sliding", window=100, bos=bos, batch_size=batch_size
    )
    check(result, sliding(model, ids, 100, 25))  # a quarter of the window, as 512 of 2048
    assert result.tokens == len(ids) - 1
    assert result.words == len(re.split(r"\s+", text))
    assert result.bytes == len(text) - (ids == plain)  # without BOS, nothing predicts the first character
    assert "windows of 100 tokens, 25 apart up to the end of the text, every token predicted" in result.protocol


def test_sliding_with_a_head_that_caps_its_logits(make_tokenizer):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, final_logit_softcapping=2.0, pad_token_id=None,
    )  # fmt: skip
    capped, tokenizer = Gemma2ForCausalLM(config).eval().double(), make_tokenizer(bos=True)
    text = EvaluationText("x", TEXT.text[:200], "")
    result = measure_perplexity(capped, tokenizer, text, "sliding", window=60, batch_size=3)
    check(result, sliding(capped, tokenizer(text.text)["input_ids"], 60, 15))


def test_sliding_over_a_short_text(model, tiny_tokenizer):
    ids = tiny_tokenizer("Hello you")["input_ids"]
    text = EvaluationText("x", "Hello you", "")
    result = measure_perplexity(model, tiny_tokenizer, text, "sliding", window=256)
    (losses,) = sliding(model, ids, 256, 64)
    assert result.nll == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert (result.window, result.windows, result.tokens) == (9, 1, 8)
    assert result.stderr is result.bits_per_byte_stderr is None  # one window says nothing about the spread


def test_evenly_spaced_windows_count_what_they_count_among_all(model, tiny_tokenizer):
    ids = tiny_tokenizer(TEXT.text)["input_ids"]
    losses = sliding(model, ids, 100, 25)
    result = measure_perplexity(model, tiny_tokenizer, TEXT, "sliding", window=100, max_windows=4)
    check(result, [losses[i * len(losses) // 4] for i in range(4)])
    assert result.bytes == result.tokens == 99 + 3 * 25
    assert f"evenly spaced over {len(losses)}, no BOS" in result.protocol


def test_word_and_byte_figures(model, tiny_tokenizer):
    result = measure_perplexity(model, tiny_tokenizer, TEXT, window=70)
    windows = [TEXT.text[i : i + 70] for i in range(0, len(TEXT.text) // 70 * 70, 70)]
    losses = [sum(row) for row in non_overlapping(model, tiny_tokenizer(TEXT.text)["input_ids"], 70)]
    sizes = [69] * len(windows)
    # A word counts where its last letter does, so not if that is the first letter of a window.
    follows = [TEXT.text[i + 70 : i + 71] for i in range(0, len(TEXT.text) // 70 * 70, 70)]
    ends = [
        sum(not a.isspace() and b.isspace() for a, b in zip(w[1:], w[2:] + f, strict=True))
        for w, f in zip(windows, follows, strict=True)
    ]
    assert (result.words, result.bytes) == (sum(ends), sum(sizes))
    assert result.word_perplexity == pytest.approx(math.exp(sum(losses) / sum(ends)), rel=1e-4)
    assert result.byte_perplexity == pytest.approx(math.exp(sum(losses) / sum(sizes)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(result.byte_perplexity), rel=1e-12)
    n, mean = len(losses), sum(losses) / sum(ends)
    squares = sum((a - mean * b) ** 2 for a, b in zip(losses, ends, strict=True))
    error = result.word_perplexity * math.sqrt(n / (n - 1) * squares) / sum(ends)
    assert result.word_perplexity_stderr == pytest.approx(error, rel=1e-3)
    for figure in result.figures("text"):
        assert figure.parts.value() == pytest.approx(figure.value, rel=1e-6)
        assert len(figure.parts.sums) == result.windows
    assert result.byte_perplexity_stderr == pytest.approx(result.stderr, rel=1e-9)  # a token is a byte here
    assert result.bits_per_byte_stderr == pytest.approx(result.stderr / result.perplexity / math.log(2), rel=1e-9)


def test_only_the_same_windows_are_pairs(model, tiny_tokenizer):
    def parts(text=TEXT, **options):
        return measure_perplexity(model, tiny_tokenizer, text, **{"window": 70} | options).parts["perplexity"]

    turned = dataclasses.replace(TEXT, text=TEXT.text[::-1])
    assert parts().pairs_with(parts(batch_size=3))
    for other in (parts(turned), parts(bos=True), parts(stride=35), parts(window=71), parts(max_windows=5)):
        assert not parts().pairs_with(other)


def test_bytes_are_not_characters(model, make_tokenizer):
    text = EvaluationText("x", "é x 東 " * 40, "")
    result = measure_perplexity(model, make_tokenizer(bos=True), text, "sliding", window=64)
    assert (result.tokens, result.bytes, result.words) == (240, 40 * 9, 121)


def test_standard_error_of_a_ratio():
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 50, size=(4000, 30))
    sums = counts * 3.0 + generator.normal(size=counts.shape) * np.sqrt(counts)
    means, errors = zip(*(ratio_and_stderr(*pair) for pair in zip(sums, counts, strict=True)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.03)  # 4,000 repeats: 1.1 % of chance in the spread
    assert ratio_and_stderr(np.array([6.0, 9.0]), np.array([2, 3])) == (3.0, 0.0)


def test_figures(model, tiny_tokenizer, tmp_path):
    result = measure_perplexity(model, tiny_tokenizer, TEXT, window=64)
    figures = result.figures(TEXT.name)
    names = ["perplexity/fox", "word_perplexity/fox", "byte_perplexity/fox", "bits_per_byte/fox"]
    assert [figure.name for figure in figures] == names
    values = [result.perplexity, result.word_perplexity, result.byte_perplexity, result.bits_per_byte]
    assert [figure.value for figure in figures] == values
    assert all(figure.stderr > 0 and figure.higher_is_better is False for figure in figures)
    assert {figure.protocol for figure in figures} == {result.protocol}
    assert figures[0].details["source"] == "a test" and figures[0].details["tokens"] == result.tokens
    saved = EvaluationResult("m")
    saved.add(*figures)
    saved.save(tmp_path / "results.json")
    assert EvaluationResult.load(tmp_path / "results.json").figures == saved.figures


def test_figures_without_offsets_and_with_infinite_values(model, tiny_tokenizer, tmp_path):
    class Slow:
        bos_token_id, is_fast = 1, False

        def __call__(self, text, *, return_offsets_mapping, **options):
            return tiny_tokenizer(text, **options)

    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.mul_(1e5)
    (figure,) = measure_perplexity(broken, Slow(), TEXT, window=64).figures("fox")
    assert figure.value == math.inf and figure.stderr is None
    saved = EvaluationResult("m")
    saved.add(figure)
    saved.save(tmp_path / "results.json")  # JSON has no infinity
    assert json.loads((tmp_path / "results.json").read_text())["figures"][0]["value"] is None


def test_stride_keeps_its_ratio_to_the_window():
    sliding = PROTOCOLS["sliding"]
    assert sliding.change(window=1024) == PerplexityProtocol(1024, 256, True, None, False)
    assert sliding.change(window=3).stride == 1
    assert sliding.change(window=1024, stride=7).stride == 7
    assert PROTOCOLS["paper"].change(window=512).stride == 512


def test_window_for_a_model(model):
    assert PROTOCOLS["paper"].window_for(model) == PROTOCOLS["sliding"].window_for(model) == 256
    assert PROTOCOLS["llm-pruner"].window_for(model) == 128


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "`window` is 2048, but the model's context is 256 tokens"),
        ({"protocol": "sliding"}, "`window` is 2048, but the model's context"),
        ({"protocol": "papr"}, "`protocol` is 'papr'; allowed values are paper, llm-pruner, sliding"),
        ({"window": 64, "stride": 65}, "`stride` is 65; it must be 1 to 64"),
        ({"window": 64, "stride": 0}, "`stride` is 0; it must be 1 to 64"),
        ({"window": 1, "protocol": "sliding"}, "`window` is 1"),
        ({"window": 64, "max_windows": 0}, "`max_windows` is 0"),
        ({"window": 64, "batch_size": 0}, "`batch_size` is 0"),
        ({"window": 64, "text": EvaluationText("x", "x", "")}, "the text has only 1 tokens"),
        ({"window": 64, "protocol": "sliding", "text": EvaluationText("x", "x", "")}, "the text has only 1 tokens"),
    ],
)
def test_errors(model, tiny_tokenizer, options, match):
    with pytest.raises(ConfigurationError, match=match):
        measure_perplexity(model, tiny_tokenizer, **{"text": TEXT} | options)


def test_no_bos_token_to_add(model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ConfigurationError, match="no beginning-of-sequence token"):
        measure_perplexity(model, tokenizer, TEXT, window=64, bos=True)


@pytest.mark.parametrize("length", [64, 255])
def test_rolling_likelihood_of_lm_eval(model, tiny_tokenizer, length):
    """Windows that overlap by one token are lm-eval's: `length` predictions each, the last one moved back."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    text = load_text("sample").text[:2000].encode("ascii", "ignore").decode()
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    single = LlamaForCausalLM(model.config).eval()
    single.load_state_dict(model.state_dict())
    lm = huggingface.HFLM(pretrained=single, tokenizer=tiny_tokenizer, max_length=length, batch_size=4)
    (likelihood,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    result = measure_perplexity(
        single, tiny_tokenizer, EvaluationText("x", text, ""), "sliding", window=length + 1, stride=length, bos=True
    )
    assert result.tokens == len(tiny_tokenizer(text)["input_ids"])
    assert -result.nll * result.tokens == pytest.approx(likelihood, rel=1e-6)
    words, size = len(re.split(r"\s+", text)), len(text.encode())  # as its `wikitext` task counts them
    assert (result.words, result.bytes) == (words, size)
    assert result.word_perplexity == pytest.approx(weighted_perplexity([(likelihood, words)]), rel=1e-4)
    assert result.byte_perplexity == pytest.approx(weighted_perplexity([(likelihood, size)]), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(bits_per_byte([(likelihood, size)]), rel=1e-6)
