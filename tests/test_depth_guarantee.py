"""The promise of depth: a model whose sublayers are silenced and one that lacks them give the same logits."""

import copy

import families
import pytest
import torch
from transformers import DynamicCache
from transformers.models.olmo2 import modeling_olmo2

from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model import modeling_structprune
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_sublayers, mask_units


LAYERS = [{"layers": [0]}, {"layers": [1]}, {"layers": [0, 2]}]
SUBLAYERS = [{"attention": [0]}, {"attention": [0, 1]}, {"mlp": [1, 2]}, {"attention": [1], "mlp": [0]}]
MIXED = {"layers": [1], "attention": [0], "mlp": [2]}
TOKENS = families.make_tokens(2, 20)


def norm_in_float64(self, hidden_states):
    """Transformers computes it in float32, which rounds a sum of the same numbers differently now and then."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture(autouse=True)
def olmo2_in_float64(monkeypatch):
    monkeypatch.setattr(modeling_olmo2.Olmo2RMSNorm, "forward", norm_in_float64)


def step_by_step(model, tokens, prompt=10):
    """Logits from a cache that is filled token after token."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for index in range(prompt, tokens.shape[1]):
            parts.append(model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(parts, dim=1)


def check(name, dropped, layout, kinds=()):
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    kept, counts = families.random_units(structure, kinds, uniform=layout == "uniform")
    masked = copy.deepcopy(model)
    mask_units(masked, structure, kept)
    mask_sublayers(masked, structure, dropped)
    expected, dense = families.logits(masked, TOKENS), families.logits(model, TOKENS)
    small = families.cut(model, kept, counts, layout, dropped)
    got = families.logits(small, TOKENS)
    assert got.dtype == torch.float64
    assert (expected - dense).abs().max() > 1e-3  # something did go
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    # Norms and softmax of some families are computed in float32.
    torch.testing.assert_close(step_by_step(small, TOKENS), got, rtol=0, atol=1e-4)
    prompt = TOKENS[:1, :10]
    assert torch.equal(families.greedy(small, prompt, True), families.greedy(small, prompt, False))
    plan = families.plan_of(families.make_model(name), counts, layout, dropped)
    assert plan.parameters_after == families.count(small)
    assert plan.matrix_parameters_after == ModelStructure.of(small).matrix_parameters
    return small


@pytest.mark.parametrize("dropped", LAYERS, ids=str)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_silent_and_dropped_layers_give_the_same_logits(name, dropped):
    small = check(name, dropped, "uniform")
    assert type(small).__module__.startswith("transformers.models")
    assert small.config.num_hidden_layers == families.LAYERS - len(dropped["layers"])
    assert not small.config.is_heterogeneous


@pytest.mark.parametrize("dropped", SUBLAYERS, ids=str)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_silent_and_skipped_sublayers_give_the_same_logits(name, dropped):
    check(name, dropped, "per_layer")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_layers_go_together_with_equal_widths_of_the_others(name):
    kinds = [
        kind for kind in families.kinds_of(name) if kind == "mlp_neurons" or name not in families.DERIVED_HEAD_DIM
    ]
    check(name, {"layers": [1]}, "uniform", [kind for kind in kinds if name != "olmo2" or kind == "mlp_neurons"])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_layers_and_sublayers_go_together_with_widths_of_each_layer(name):
    kinds = [kind for kind in families.kinds_of(name) if name != "olmo2" or kind == "mlp_neurons"]
    check(name, MIXED, "per_layer", kinds)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_layer_has_both_sublayers_and_they_are_all_but_shared_norms(name):
    model = families.make_model(name)
    shared = {"cohere2": families.HIDDEN, "falcon_7b": 2 * families.HIDDEN}.get(name, 0)
    for layer in ModelStructure.of(model).layers:
        assert [sublayer.kind for sublayer in layer.sublayers] == ["attention", "mlp"]
        assert layer.parameters == families.count(model.get_submodule(layer.name))
        assert layer.parameters - sum(sublayer.parameters for sublayer in layer.sublayers) == shared
        assert layer.matrix_parameters == sum(sublayer.matrix_parameters for sublayer in layer.sublayers)


@pytest.mark.parametrize(
    "name, attention, mlp",
    [
        ("llama", ["input_layernorm"], ["post_attention_layernorm"]),
        ("gemma2", ["input_layernorm", "post_attention_layernorm"],
         ["pre_feedforward_layernorm", "post_feedforward_layernorm"]),
        ("olmo2", ["post_attention_layernorm"], ["post_feedforward_layernorm"]),
        ("cohere2", [], []),
        ("falcon", ["ln_attn"], ["ln_mlp"]),
        ("opt", ["self_attn_layer_norm"], ["final_layer_norm"]),
        ("gpt2", ["ln_1"], ["ln_2"]),
    ],
)  # fmt: skip
def test_norms_go_with_the_sublayer_that_alone_uses_them(name, attention, mlp):
    layer = ModelStructure.of(families.make_model(name)).layers[1]
    for kind, norms in (("attention", attention), ("mlp", mlp)):
        assert [norm.rpartition(".")[2] for norm in layer.sublayer(kind).norms] == norms


def test_projections_that_stand_in_the_layer_go_together():
    mlp = ModelStructure.of(families.make_model("opt")).layers[0].sublayer("mlp")
    assert (mlp.module, mlp.inner) == ("model.decoder.layers.0.fc2", ("model.decoder.layers.0.fc1",))


def test_experts_have_no_single_consumer():
    structure = ModelStructure.of(families.make_model("qwen3_moe"))
    consumers = [layer.sublayer("mlp").consumer for layer in structure.layers]
    assert consumers == ["model.layers.0.mlp.down_proj", "", ""]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: setattr(layer, "scale", torch.nn.Parameter(torch.ones(1))), "parameter `scale`"),
        (lambda layer: setattr(layer, "ln_mlp", torch.nn.LayerNorm(families.HIDDEN)), "norms of the layers"),
    ],
)
def test_a_layer_with_something_unknown_in_its_stream_is_left_alone_with_a_note(change, reason):
    model = families.make_model("llama")
    change(model.model.layers[1])
    structure = ModelStructure.of(model)
    assert [len(layer.sublayers) for layer in structure.layers] == [2, 0, 2]
    assert any(reason in note and "left alone" in note for note in structure.notes)
    for dropped in ({"layers": [1]}, {"mlp": [1]}):
        with pytest.raises(UnsupportedModelError, match=r"layers\.1"):
            mask_sublayers(model, structure, dropped)


def test_norms_after_the_sum_are_not_those_of_a_sublayer():
    structure = ModelStructure.of(families.make_model("opt", do_layer_norm_before=False))
    assert not any(layer.sublayers for layer in structure.layers)
    assert any("follow the sum" in note for note in structure.notes)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_without_counting_the_cache_generation_would_be_wrong(name, monkeypatch):
    model = families.make_model(name, torch.float64)
    small = families.cut(model, {}, {}, "per_layer", {"attention": [0, 1]})
    monkeypatch.setattr(modeling_structprune.NoAttn, "_count", lambda *args: None)
    full = families.logits(small, TOKENS)
    try:
        wrong = step_by_step(small, TOKENS)
    except (AssertionError, RuntimeError, AttributeError):
        return
    assert (wrong - full).abs().max() > 1e-3
