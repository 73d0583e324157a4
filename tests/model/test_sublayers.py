"""Sublayers as they are read from a model, and the cache of one that lacks some."""

import families
import pytest
import torch
from transformers import DynamicCache

from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model import modeling_structprune
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_sublayers


TOKENS = families.make_tokens(2, 20)


def step_by_step(model, tokens, prompt=10):
    """Logits from a cache that is filled token after token."""
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for index in range(prompt, tokens.shape[1]):
            parts.append(model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(parts, dim=1)


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
def test_a_cache_is_counted_where_no_attention_fills_it(name, monkeypatch):
    small = families.cut(families.make_model(name, torch.float64), {}, {}, "per_layer", {"attention": [0, 1]})
    full = families.logits(small, TOKENS)
    # Norms and softmax of some families are computed in float32.
    torch.testing.assert_close(step_by_step(small, TOKENS), full, rtol=0, atol=1e-4)
    monkeypatch.setattr(modeling_structprune.NoAttn, "_count", lambda *args: None)
    try:
        wrong = step_by_step(small, TOKENS)
    except (AssertionError, RuntimeError, AttributeError):
        return
    assert (wrong - full).abs().max() > 1e-3
