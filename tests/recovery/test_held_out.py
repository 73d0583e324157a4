"""Measuring gives the perplexity of the evaluation and leaves no trace; where the dense value comes from."""

import hashlib
import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from training_setup import HELD_OUT, TEXT, make_lora, make_tiny, tokenizer
from transformers import PreTrainedTokenizerFast

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.evaluator import TEXTS
from hf_structprune.evaluation.perplexity import EvaluationText, measure_perplexity
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.recovery.measuring import HeldOutText, dense_log_perplexity
from hf_structprune.recovery.weights import as_before_training, check_trainable


def make_text(**options):
    return HeldOutText(tokenizer(), TEXT, **{"window": 32, "max_windows": 5, **options})


def test_value_is_that_of_the_evaluation():
    model, held_out = make_tiny(), make_text()
    expected = measure_perplexity(model, tokenizer(), TEXT, window=32, max_windows=5)
    assert held_out.measure(model) == pytest.approx(expected.nll, abs=1e-6)
    assert held_out.protocol == expected.protocol
    assert held_out.describe()["tokens"] == expected.tokens == 5 * 31


def test_a_window_longer_than_the_context_is_refused():
    model, held_out = make_tiny(), make_text()
    model.config.max_position_embeddings = 31
    with pytest.raises(ConfigurationError, match="`window` is 32, but the model's context is 31 tokens: lower"):
        held_out.measure(model)


def test_adapters_count():
    model, held_out = make_lora(), make_text()
    before = held_out.measure(model)
    assert before == held_out.measure(model.get_base_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    trained = held_out.measure(model)
    assert abs(trained - before) > 1e-3
    flags = [p.requires_grad for p in model.parameters()]
    with as_before_training(model):
        assert held_out.measure(model) == before
    assert held_out.measure(model) == trained
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_frozen_adapter_stays_frozen():
    model = make_lora()
    frozen = [name for name, p in model.named_parameters() if "lora_A" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with as_before_training(model):
        pass
    assert not any(dict(model.named_parameters())[name].requires_grad for name in frozen)


def test_adapters_that_take_from_the_base_are_part_of_the_pruned_model():
    model, held_out = make_lora(init_lora_weights="pissa"), make_text()
    with as_before_training(model):
        inside = held_out.measure(model)
    assert inside == pytest.approx(held_out.measure(make_tiny()), abs=1e-4)
    with model.disable_adapter():
        assert abs(held_out.measure(model) - inside) > 1e-4


def test_randomness_and_modes_are_as_before():
    model, held_out = make_lora(dropout=0.5), make_text()
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    class Draws(torch.nn.Module):
        def forward(self, *args):
            return random.random(), np.random.rand(), torch.rand(1)

    model.get_base_model().model.embed_tokens.register_forward_hook(lambda *args: Draws()() and None)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    held_out.measure(model)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes


def test_compiled_and_parallel_models_are_looked_through():
    model, held_out = make_tiny(), make_text()
    value = held_out.measure(model)
    assert held_out.measure(torch.nn.DataParallel(model)) == value
    assert held_out.measure(torch.compile(model, backend="eager")) == value


def test_autocast_computes_in_another_dtype():
    model, held_out = make_tiny(), make_text()
    low = held_out.measure(model, autocast=torch.bfloat16)
    assert low != held_out.measure(model) and low == pytest.approx(held_out.measure(model), abs=0.05)


def test_broken_model():
    model = make_tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert math.isnan(make_text().measure(model))


def test_refuses():
    with pytest.raises(ConfigurationError, match="only 720 tokens"):
        make_text(window=1000)
    with pytest.raises(ConfigurationError, match="`batch_size` is 0"):
        make_text(batch_size=0)


def test_refuses_what_cannot_be_trained():
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(ConfigurationError, match="prompt"):
        check_trainable(get_peft_model(make_tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(ConfigurationError, match="nothing to train"):
        check_trainable(make_tiny().requires_grad_(False))


def save_results(path, text=TEXT, state="dense", **options):
    measured = measure_perplexity(make_tiny(), tokenizer(), text, **{"window": 32, "max_windows": 4, **options})
    result = EvaluationResult(
        "dense", state, settings={TEXTS: {text.name: hashlib.sha256(text.text.encode()).hexdigest()[:16]}}
    )
    result.add(*measured.figures(text.name))
    result.save(path)
    return measured.nll


def test_nothing_and_numbers():
    assert dense_log_perplexity(None, HELD_OUT) is None
    assert dense_log_perplexity(18, HELD_OUT) == math.log(18)
    for wrong in (0.5, math.nan, math.inf, -3):
        with pytest.raises(ConfigurationError, match="no perplexity"):
            dense_log_perplexity(wrong, HELD_OUT)
    for wrong in (True, [18.0]):
        with pytest.raises(ConfigurationError, match="give a perplexity"):
            dense_log_perplexity(wrong, HELD_OUT)


def test_model():
    assert dense_log_perplexity(make_tiny(), HELD_OUT) == HELD_OUT.measure(make_tiny())
    small = make_tiny()
    small.resize_token_embeddings(30)
    with pytest.raises(ConfigurationError, match="30 embeddings"):
        dense_log_perplexity(small, HELD_OUT)
    broken = make_tiny()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ConfigurationError, match="broken"):
        dense_log_perplexity(broken, HELD_OUT)


def test_folder(tmp_path):
    make_tiny().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert dense_log_perplexity(tmp_path, HELD_OUT) == pytest.approx(HELD_OUT.measure(make_lora()), abs=1e-6)
    state = torch.get_rng_state()
    dense_log_perplexity(str(tmp_path), HELD_OUT)
    assert torch.equal(torch.get_rng_state(), state)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigurationError, match="no model can be loaded"):
        dense_log_perplexity(tmp_path / "nothing", HELD_OUT)


def test_other_tokenizer(tmp_path):
    make_tiny().save_pretrained(tmp_path)
    other = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=other, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        dense_log_perplexity(tmp_path, HELD_OUT)


def test_results(tmp_path):
    value = save_results(tmp_path / "dense.json")
    assert dense_log_perplexity(tmp_path / "dense.json", HELD_OUT) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"max_windows": 3}, {"window": 16}, {"bos": True}, {"text": EvaluationText("held-out", TEXT.text + "x", "")}],
)
def test_results_measured_otherwise(tmp_path, options):
    save_results(tmp_path / "dense.json", **options)
    with pytest.raises(ConfigurationError, match="no perplexity of the text 'held-out' by the same windows"):
        dense_log_perplexity(tmp_path / "dense.json", HELD_OUT)


def test_results_of_a_pruned_model(tmp_path):
    save_results(tmp_path / "pruned.json", state="pruned")
    with pytest.raises(ConfigurationError, match="pruned model"):
        dense_log_perplexity(tmp_path / "pruned.json", HELD_OUT)
