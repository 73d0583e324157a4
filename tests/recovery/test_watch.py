"""Measuring gives the perplexity of the evaluation and leaves no trace."""

import math
import random

import numpy as np
import pytest
import torch
from training_setup import TEXT, make_lora, make_tiny, tokenizer

from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.perplexity import measure_perplexity
from hf_structprune.recovery.watch import Watch
from hf_structprune.recovery.wrappers import as_before_training, check_trainable


def make_watch(**options):
    return Watch(tokenizer(), TEXT, **{"window": 32, "max_windows": 5, **options})


def test_value_is_that_of_the_evaluation():
    model, watch = make_tiny(), make_watch()
    expected = measure_perplexity(model, tokenizer(), TEXT, window=32, max_windows=5)
    assert watch.measure(model) == pytest.approx(expected.nll, abs=1e-6)
    assert watch.protocol == expected.protocol
    assert watch.describe()["tokens"] == expected.tokens == 5 * 31


def test_adapters_count():
    model, watch = make_lora(), make_watch()
    before = watch.measure(model)
    assert before == watch.measure(model.get_base_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    trained = watch.measure(model)
    assert abs(trained - before) > 1e-3
    flags = [p.requires_grad for p in model.parameters()]
    with as_before_training(model):
        assert watch.measure(model) == before
    assert watch.measure(model) == trained
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
    model, watch = make_lora(init_lora_weights="pissa"), make_watch()
    with as_before_training(model):
        inside = watch.measure(model)
    assert inside == pytest.approx(watch.measure(make_tiny()), abs=1e-4)
    with model.disable_adapter():
        assert abs(watch.measure(model) - inside) > 1e-4


def test_randomness_and_modes_are_as_before():
    model, watch = make_lora(dropout=0.5), make_watch()
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    class Draws(torch.nn.Module):
        def forward(self, *args):
            return random.random(), np.random.rand(), torch.rand(1)

    model.get_base_model().model.embed_tokens.register_forward_hook(lambda *args: Draws()() and None)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    watch.measure(model)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes


def test_compiled_and_parallel_models_are_looked_through():
    model, watch = make_tiny(), make_watch()
    value = watch.measure(model)
    assert watch.measure(torch.nn.DataParallel(model)) == value
    assert watch.measure(torch.compile(model, backend="eager")) == value


def test_autocast_computes_in_another_dtype():
    model, watch = make_tiny(), make_watch()
    low = watch.measure(model, autocast=torch.bfloat16)
    assert low != watch.measure(model) and low == pytest.approx(watch.measure(model), abs=0.05)


def test_broken_model():
    model = make_tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert math.isnan(make_watch().measure(model))


def test_refuses():
    with pytest.raises(ConfigurationError, match="only 720 tokens"):
        make_watch(window=1000)
    with pytest.raises(ConfigurationError, match="context is 64"):
        make_watch(window=65).measure(make_tiny())
    with pytest.raises(ConfigurationError, match="`batch_size` is 0"):
        make_watch(batch_size=0)


def test_refuses_what_cannot_be_trained():
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(ConfigurationError, match="prompt"):
        check_trainable(get_peft_model(make_tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(ConfigurationError, match="nothing to train"):
        check_trainable(make_tiny().requires_grad_(False))
