"""The guarantee: a model whose units are zeroed and one whose units are cut give the same logits."""

import copy

import families
import pytest
import torch
from transformers.models.olmo2 import modeling_olmo2

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units


def cases(layout):
    for name in families.FAMILIES:
        kinds = families.kinds_of(name)
        for chosen in [*((kind,) for kind in kinds), kinds][: len(kinds) + (len(kinds) > 1)]:
            heads = set(chosen) - {"mlp_neurons"}
            if layout == "per_layer" or not (heads and name in families.DERIVED_HEAD_DIM):
                yield pytest.param(name, chosen, id=f"{name}-{'+'.join(chosen)}")


def rms_norm_in_float64(self, hidden_states):
    mean = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean + self.variance_epsilon)


def scale_norms_over_all_heads(model, structure, kept):
    """The norms of OLMo 2 span all heads: over the zeros of a masked model their mean square is too small by
    kept/all. With an epsilon of (nearly) 0, scaling their weights by its root makes the reference exact.
    """
    for layer in structure.layers:
        attention = model.get_submodule(f"{layer.name}.self_attn")
        for norm in (attention.q_norm, attention.k_norm):
            gone = (norm.weight == 0).double().mean()
            norm.weight.data *= (1 - gone).sqrt()


def check(name, kinds, layout):
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    kept, counts = families.random_units(structure, kinds, uniform=layout == "uniform")
    masked = copy.deepcopy(model)
    mask_units(masked, structure, kept)
    if name == "olmo2":
        scale_norms_over_all_heads(masked, structure, kept)
    tokens = families.make_tokens(2, 20)
    expected, dense = families.logits(masked, tokens), families.logits(model, tokens)
    small = families.cut(model, kept, counts, layout)
    got = families.logits(small, tokens)
    assert got.dtype == torch.float64
    assert (expected - dense).abs().max() > 1e-3  # something did go
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    prompt = tokens[:1, :10]
    assert torch.equal(families.greedy(small, prompt, True), families.greedy(small, prompt, False))


@pytest.fixture(autouse=True)
def olmo2_norms_in_float64(monkeypatch):
    """Transformers computes them in float32, where sums over all and over the kept heads are rounded differently."""
    monkeypatch.setattr(modeling_olmo2.Olmo2RMSNorm, "forward", rms_norm_in_float64)


@pytest.mark.parametrize("name, kinds", cases("uniform"))
def test_zeroed_and_cut_give_the_same_logits_with_equal_counts(name, kinds):
    check(name, kinds, "uniform")


@pytest.mark.parametrize("name, kinds", cases("per_layer"))
def test_zeroed_and_cut_give_the_same_logits_with_counts_of_each_layer(name, kinds):
    check(name, kinds, "per_layer")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_kind_of_unit_is_found(name):
    model = families.make_model(name)
    found = {group.kind for group in ModelStructure.of(model).groups if group.size // group.blocks > 1 or
             group.kind == "kv_groups" and group.size > 1}  # fmt: skip
    assert found == set(families.kinds_of(name))


@pytest.mark.parametrize("name", families.DERIVED_HEAD_DIM)
def test_heads_of_a_derived_size_cannot_be_cut_in_the_uniform_layout(name):
    kind = families.kinds_of(name)[1]
    pruner = StructuredPruner(families.make_model(name), PruningConfig(units=(kind,)))
    with pytest.raises(UnsupportedModelError, match="derives the size of a head.*layout='per_layer'"):
        pruner.plan(0.05)
