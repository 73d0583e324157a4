"""Magnitude and Taylor scores, against plain autograd."""

import copy

import families
import pytest
import torch

from hf_structprune.criteria.depth import magnitude_scores, taylor_scores, unit_matrices
from hf_structprune.model.structure import ModelStructure, is_linear


TOKENS = families.make_tokens(6, 12)
KINDS = ("layers", "attention", "mlp")
UNITS = [(layer, kind) for layer in range(families.LAYERS) for kind in KINDS]


def members(model, structure, unit):
    """Names of the weights of a unit, found by module: linear maps, and the experts' stacked weights and router."""
    layer = structure.layers[unit[0]]
    modules = [layer.name] if unit[1] == "layers" else layer.sublayer(unit[1]).modules
    names = []
    for name, module in model.named_modules():
        inside = any(name == m or name.startswith(f"{m}.") for m in modules)
        experts = "experts" in type(module).__name__.lower() or "router" in type(module).__name__.lower()
        if inside and (is_linear(module) or experts):
            names += [f"{name}.{n}" for n, p in module.named_parameters(recurse=False) if not n.endswith("bias")]
    return sorted(names)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_magnitude_is_the_sum_of_absolute_weights(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    scores = magnitude_scores(model, structure, UNITS)
    parameters = dict(model.named_parameters())
    for unit in UNITS:
        names = members(model, structure, unit)
        assert sorted(unit_matrices(model, structure, unit)) == names and names
        expected = sum(float(parameters[name].detach().double().abs().sum()) for name in names)
        assert scores[unit] == pytest.approx(expected, rel=1e-9)
    for layer in range(families.LAYERS):
        parts = scores[layer, "attention"] + scores[layer, "mlp"]
        assert scores[layer, "layers"] == pytest.approx(parts)


def autograd(model, structure, batch_size):
    """`sum |w g|` with a full backward pass for each batch, averaged over the sequences."""
    totals = dict.fromkeys(UNITS, 0.0)
    for batch in TOKENS.split(batch_size):
        model.zero_grad(set_to_none=True)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        parameters = dict(model.named_parameters())
        for unit in UNITS:
            for name in members(model, structure, unit):
                change = (parameters[name].detach() * parameters[name].grad).double().abs().sum()
                totals[unit] += float(change) * len(batch) / len(TOKENS)
    return totals


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon", "phi3"])
def test_taylor_is_the_first_order_change_of_the_loss(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    expected = autograd(copy.deepcopy(model), structure, 4)
    found = taylor_scores(model, structure, UNITS, TOKENS, families.in_batches(batch_size=4))
    assert found == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_gives_the_same_scores():
    model = families.make_model("llama")
    structure = ModelStructure.of(model)
    plain = taylor_scores(model, structure, UNITS, TOKENS, families.in_batches())
    assert taylor_scores(
        model, structure, UNITS, TOKENS, families.in_batches(gradient_checkpointing=True)
    ) == pytest.approx(plain)


def test_bfloat16_scores_are_close_to_those_in_float32():
    model = families.make_model("llama", torch.bfloat16)
    structure = ModelStructure.of(model)
    found = taylor_scores(model, structure, UNITS, TOKENS, families.in_batches())
    expected = taylor_scores(model.float(), structure, UNITS, TOKENS, families.in_batches())
    assert found == pytest.approx(expected, rel=0.05)


def test_the_model_and_its_own_gradients_are_left_as_they_were():
    model = families.make_model("llama")
    structure = ModelStructure.of(model)
    weight, other = model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 3.0)
    other.requires_grad_(False)
    model.train()
    state = copy.deepcopy(model.state_dict())
    first = taylor_scores(model, structure, UNITS, TOKENS, families.in_batches())
    assert taylor_scores(model, structure, UNITS, TOKENS, families.in_batches()) == first
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0)) and weight.requires_grad
    assert not other.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_more_than_a_few_gradients_exist_at_once(monkeypatch):
    """Each is reduced and freed when the backward pass reaches the layer before."""
    model = families.make_model("llama", num_hidden_layers=6)
    structure, alive = ModelStructure.of(model), []
    units = [(layer, "layers") for layer in range(6)]
    handles = [
        layer.register_full_backward_hook(lambda *_: alive.append(sum(p.grad is not None for p in model.parameters())))
        for layer in model.model.layers
    ]
    taylor_scores(model, structure, units, TOKENS, families.in_batches(batch_size=3))
    for handle in handles:
        handle.remove()
    assert len(alive) == 12 and max(alive) <= 1
