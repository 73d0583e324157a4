"""Measuring sets its own state of model and torch, and gives the caller's back."""

import contextlib

import families
import pytest
import torch
from untouched import facts

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.criteria.depth import layer_similarities
from hf_structprune.evaluation import perplexity
from hf_structprune.evaluation.perplexity import window_losses
from hf_structprune.model.measuring import measuring
from hf_structprune.model.structure import ModelStructure
from hf_structprune.recovery.distillation.teacher import ModelTeacher


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default dtype": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


def state():
    kinds = (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
    return *kinds, torch.get_default_dtype(), torch.get_default_device()


def with_dropout(name, mode="train"):
    """A model with dropout everywhere, some of its modules in the other mode."""
    keys = {"gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"), "opt": ("dropout", "attention_dropout")}
    model = families.make_model(name, **dict.fromkeys(keys.get(name, ("attention_dropout",)), 0.5))
    model.train(mode == "train")
    model.get_input_embeddings().train(mode != "train")
    return model


def pruned(model, tokens, **options):
    options = {"round_to": 1, "calibration": CalibrationConfig(tokens=tokens, batch_size=4), **options}
    pruner = StructuredPruner(model, PruningConfig(**options))
    plan, small = pruner.plan(0.2), pruner.prune(0.2)
    return plan, pruner.last_plan, {name: p.detach().clone() for name, p in small.named_parameters()}


SETTINGS = {
    "taylor": dict(criterion="taylor"),
    "search": dict(allocation="search", layout="per_layer"),
    "greedy": dict(units=("layers",), depth_criterion="greedy"),
    "depth taylor": dict(units=("attention", "mlp"), depth_criterion="taylor", layout="per_layer"),
    "pca": dict(units=("hidden",), hidden_criterion="pca", round_to=None),
    "channels": dict(units=("hidden",), hidden_criterion="taylor", round_to=None),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_pruning_does_not_depend_on_the_state_of_the_caller(setting):
    options, tokens = SETTINGS[setting], families.make_tokens(8, 12)
    expected = pruned(families.make_model("llama"), tokens, **options)
    model = with_dropout("llama")
    with contextlib.ExitStack() as stack:
        for enter in STATES.values():
            stack.enter_context(enter())
        before = state()
        plan, done, weights = pruned(model, tokens, **options)
        assert state() == before
    assert plan == expected[0] and done == expected[1]
    assert all(torch.equal(weights[name], weight) for name, weight in expected[2].items())


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_is_off_while_measuring_and_comes_back(name):
    tokens = families.make_tokens(8, 12)
    expected = pruned(with_dropout(name, "eval"), tokens)
    model = with_dropout(name)
    before = facts(model)
    pruner = StructuredPruner(
        model, PruningConfig(units=("layers",), depth_criterion="greedy", calibration=families.calibration())
    )
    pruner.plan(0.2)
    assert facts(model) == before
    _, done, weights = pruned(model, tokens)
    assert done == expected[1] and all(torch.equal(weights[n], w) for n, w in expected[2].items())


@pytest.mark.parametrize("enter", STATES.values(), ids=STATES)
def test_evaluation_does_not_depend_on_it_either(enter):
    tokens = families.make_tokens(4, 12)
    expected = window_losses(with_dropout("gpt2", "eval"), tokens, [11] * 4, 2)
    lesson = ModelTeacher(with_dropout("gpt2", "eval")).lesson({"input_ids": tokens}, torch.ones_like(tokens).bool())
    model = with_dropout("gpt2")
    before = facts(model)
    with enter():
        assert (window_losses(model, tokens, [11] * 4, 2) == expected).all()
    if enter is not STATES["default device"]:
        with enter():
            again = ModelTeacher(model).lesson({"input_ids": tokens}, torch.ones_like(tokens).bool())
        assert torch.equal(again.predictions.hidden, lesson.predictions.hidden)
    assert facts(model) == before


def test_layers_are_compared_in_a_state_of_their_own():
    tokens, found = families.make_tokens(4, 12), []
    for mode, enter in (("eval", contextlib.nullcontext), ("train", STATES["autocast"])):
        model = with_dropout("gpt2", mode)
        structure = ModelStructure.of(model)
        with enter():
            found.append(layer_similarities(model, structure, tokens, sublayers=True))
    assert found[0].distances == found[1].distances and found[0].influences == found[1].influences


def test_mixed_precision_is_what_is_asked_for():
    tokens, model = families.make_tokens(4, 12), families.make_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = [families.logits(model, tokens).dtype, families.logits(model, tokens)]
    with measuring(model, autocast=torch.bfloat16):
        got = families.logits(model, tokens)
    assert got.dtype == expected[0] == torch.bfloat16 and torch.equal(got, expected[1])
    assert families.logits(model, tokens).dtype == torch.float32


def test_after_an_error_everything_is_as_it_was():
    model = with_dropout("gpt2")
    before, states = facts(model), state()
    with pytest.raises(ZeroDivisionError), measuring(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert facts(model) == before and state() == states


def test_public_perplexity_in_train_mode(make_tokenizer):
    model = with_dropout("gpt2")
    model.resize_token_embeddings(128)
    text = "a text with some words in it. " * 8
    values = {perplexity(model, make_tokenizer(), text, window=16).perplexity for _ in range(2)}
    assert len(values) == 1 and all(module.training for module in model.transformer.h.modules())
