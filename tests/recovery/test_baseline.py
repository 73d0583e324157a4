"""Where the value of the dense model comes from."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models
from training_setup import TEXT, make_lora, make_tiny, tokenizer
from transformers import PreTrainedTokenizerFast

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.evaluator import TEXTS
from hf_structprune.evaluation.perplexity import measure_perplexity
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.evaluation.text import EvaluationText
from hf_structprune.recovery.baseline import dense_log_perplexity
from hf_structprune.recovery.watch import Watch, text_fingerprint


@pytest.fixture
def watch():
    return Watch(tokenizer(), TEXT, window=32, max_windows=4)


def save_results(path, text=TEXT, state="dense", **options):
    measured = measure_perplexity(make_tiny(), tokenizer(), text, **{"window": 32, "max_windows": 4, **options})
    result = EvaluationResult("dense", state, settings={TEXTS: {text.name: text_fingerprint(text)}})
    result.add(*measured.figures(text.name))
    result.save(path)
    return measured.nll


def test_nothing_and_numbers(watch):
    assert dense_log_perplexity(None, watch) is None
    assert dense_log_perplexity(18, watch) == math.log(18)
    for wrong in (0.5, math.nan, math.inf, -3):
        with pytest.raises(ConfigurationError, match="no perplexity"):
            dense_log_perplexity(wrong, watch)
    for wrong in (True, [18.0]):
        with pytest.raises(ConfigurationError, match="give a perplexity"):
            dense_log_perplexity(wrong, watch)


def test_model(watch):
    assert dense_log_perplexity(make_tiny(), watch) == watch.measure(make_tiny())
    small = make_tiny()
    small.resize_token_embeddings(30)
    with pytest.raises(ConfigurationError, match="30 embeddings"):
        dense_log_perplexity(small, watch)
    broken = make_tiny()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ConfigurationError, match="broken"):
        dense_log_perplexity(broken, watch)


def test_folder(watch, tmp_path):
    make_tiny().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert dense_log_perplexity(tmp_path, watch) == pytest.approx(watch.measure(make_lora()), abs=1e-6)
    state = torch.get_rng_state()
    dense_log_perplexity(str(tmp_path), watch)
    assert torch.equal(torch.get_rng_state(), state)


def test_folder_without_a_model(watch, tmp_path):
    with pytest.raises(ConfigurationError, match="no model can be loaded"):
        dense_log_perplexity(tmp_path / "nothing", watch)


def test_other_tokenizer(watch, tmp_path):
    make_tiny().save_pretrained(tmp_path)
    other = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=other, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        dense_log_perplexity(tmp_path, watch)


def test_results(watch, tmp_path):
    value = save_results(tmp_path / "dense.json")
    assert dense_log_perplexity(tmp_path / "dense.json", watch) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"max_windows": 3}, {"window": 16}, {"bos": True}, {"text": EvaluationText("held-out", TEXT.text + "x", "")}],
)
def test_results_measured_otherwise(watch, tmp_path, options):
    save_results(tmp_path / "dense.json", **options)
    with pytest.raises(ConfigurationError, match="no perplexity of the text 'held-out' by the same windows"):
        dense_log_perplexity(tmp_path / "dense.json", watch)


def test_results_of_a_pruned_model(watch, tmp_path):
    save_results(tmp_path / "pruned.json", state="pruned")
    with pytest.raises(ConfigurationError, match="pruned model"):
        dense_log_perplexity(tmp_path / "pruned.json", watch)
