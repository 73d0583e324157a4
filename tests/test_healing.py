"""Re-fit of the consumers around dropped layers and sublayers, against the closed form and the dense model."""

import copy

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import drop
from hf_structprune.plan import PruningPlan
from hf_structprune.refit.layer_by_layer import compress
from hf_structprune.stats.survey import Survey


ADDITIVE = ["llama", "qwen3", "phi3", "smollm3", "cohere2", "gpt_neox", "opt", "gpt2", "falcon_7b"]


def heal(model, dropped, tokens, **options):
    """The model with weights re-fitted for what is dropped, which is still there."""
    structure = ModelStructure.of(model)
    config = PruningConfig(**{"units": ("layers", "attention", "mlp"), "layout": "per_layer", **options})
    plan = PruningPlan.from_counts(structure, {}, model_type="any", layout="per_layer", dropped=dropped)
    compress(model, structure, plan, config, lambda: tokens, Survey(), [])
    return structure, plan


def inputs_and_states(model, tokens, module):
    """Inputs of a module and all hidden states, flattened over tokens."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return seen[0].flatten(0, -2), [state.flatten(0, -2) for state in states]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_layer_before_takes_over_what_the_dropped_one_added(share):
    """`W' = W + share E[t x^T] (E[x x^T] + lam I)^-1` with `t` the output of the dropped layer minus its input."""
    model = families.make_model("llama", torch.float64)
    dense, tokens = copy.deepcopy(model), families.make_tokens(32, 16)
    heal(model, {"layers": [1]}, tokens, error_correction=share, damping=0.1, token_weighting=False)
    name = "model.layers.0.mlp.down_proj"
    x, states = inputs_and_states(dense, tokens, name)
    gram = x.T @ x / len(x)
    ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
    wanted = share * (states[2] - states[1])
    expected = dense.get_submodule(name).weight + torch.linalg.solve(gram + ridge, x.T @ wanted / len(x)).T
    torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    # Nothing lacks in front of it, so that nothing changes there.
    before, after = (one.model.layers[0].self_attn.o_proj.weight for one in (dense, model))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("dropped", [{"layers": [1]}, {"layers": [0]}, {"attention": [1]}, {"mlp": [1]}])
def test_healing_brings_the_hidden_states_closer_to_the_dense_ones(name, dropped):
    model = families.make_model(name)
    dense, tokens = copy.deepcopy(model), families.make_tokens(64, 16)
    structure = ModelStructure.of(model)
    if any(structure.layers[number].sublayer(kind) is None for kind in dropped for number in dropped[kind]
           if kind != "layers"):  # fmt: skip
        pytest.skip("this family has no such sublayer")
    bare = copy.deepcopy(model)
    heal(model, dropped, tokens)
    heal(bare, dropped, tokens, compensation=False)
    errors = []
    for cut in (model, bare):
        drop_layers_alone(cut, structure, dropped)
        with torch.no_grad():
            wanted = dense(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
            errors.append((cut(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1] - wanted).norm())
    assert errors[0] < 0.97 * errors[1]


def drop_layers_alone(model, structure, dropped):
    """Takes layers out; sublayers are masked by `compress` already."""
    drop(model, structure, {"layers": dropped.get("layers", [])})


@pytest.mark.parametrize("dropped", [{"layers": [2]}, {"attention": [0]}, {"layers": [0], "mlp": [2]}])
def test_what_adds_nothing_is_not_missed(dropped):
    """Without what they write, dropped parts change nothing, and so nothing is re-fitted."""
    model = families.make_model("llama", torch.float64)
    for kind, parts in (("layers", ("self_attn.o_proj", "mlp.down_proj")), ("attention", ("self_attn.o_proj",)),
                        ("mlp", ("mlp.down_proj",))):  # fmt: skip
        for number in dropped.get(kind, ()):
            for part in parts:
                model.model.layers[number].get_submodule(part).weight.data.zero_()
    dense, tokens = copy.deepcopy(model), families.make_tokens(16, 16)
    structure, _ = heal(model, dropped, tokens)
    drop_layers_alone(model, structure, dropped)
    torch.testing.assert_close(families.logits(model, tokens), families.logits(dense, tokens), rtol=0, atol=1e-5)


def test_without_compensation_weights_stay_and_no_text_is_read():
    model = families.make_model("llama")
    dense = copy.deepcopy(model)
    heal(model, {"layers": [1]}, None, compensation=False)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)


def test_layers_and_widths_in_one_pass():
    """What stays of the neurons is re-fitted with the dropped layer in mind."""
    model = families.make_model("llama")
    dense, tokens = copy.deepcopy(model), families.make_tokens(64, 16)
    structure = ModelStructure.of(model)
    counts = {(0, "mlp_neurons"): 36, (2, "mlp_neurons"): 36}
    plan = PruningPlan.from_counts(structure, counts, model_type="llama", layout="uniform", dropped={"layers": [1]})
    config = PruningConfig(units=("layers", "mlp_neurons"))
    kept = compress(model, structure, plan, config, lambda: tokens, Survey(), [])
    assert {key: len(units) for key, units in kept.items()} == counts
    for number in (0, 2):
        assert model.model.layers[number].mlp.down_proj.weight.shape[1] == 36
    for one, other in zip(model.model.layers[1].parameters(), dense.model.layers[1].parameters(), strict=True):
        assert torch.equal(one, other)  # the dropped layer was only passed by
