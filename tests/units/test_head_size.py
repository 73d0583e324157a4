"""Heads of fewer dimensions: a plain checkpoint that computes what the dense model computes without them."""

import dataclasses

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.model.head_size import head_group, smaller_heads
from hf_structprune.model.rotation import factors, rotation_of
from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof.guarantee import apart, logits
from hf_structprune.refit.head_size import cut_head_size
from hf_structprune.refit.shared import CUTS
from tests import families
from tests.families import make_model


NO_REFIT = PruningConfig(keep={"head_dim": 4}, compensation=False)
_SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 1.0], "factor": 4.0,
    "long_factor": [3.0, 2.0, 4.0, 5.0], "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    **{name: (name, {}) for name in (
        "llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3",
        "cohere2", "starcoder2", "mixtral", "qwen3_moe",
    )},
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}),
    "llama-longrope": ("llama", {"rope_parameters": _LONG}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5, "head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "olmo": ("OlmoConfig", {}),
}  # fmt: skip


def build(name):
    family, options = MODELS[name]
    if not family.endswith("Config"):
        return make_model(family, torch.float64, **options)
    torch.manual_seed(0)
    config = getattr(transformers, family)(**_SIZE, **options)
    return families.randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float64)).eval()


def pairs_of(model, numbers, others=()):
    """Dimensions of some pairs and of some dimensions that are not rotated, ascending."""
    rotation, size = rotation_of(model), ModelStructure.of(model).layers[0].attention.head_dim
    units = rotation.units(size)
    chosen = [*numbers, *(rotation.size // 2 + other for other in others)]
    return torch.cat([units[number] for number in chosen]).sort().values


def kept_of(model):
    rotation = rotation_of(model)
    return pairs_of(model, [1, 3]) if rotation.size == 8 else pairs_of(model, [1], [0, 2])


def reference(model, structure, small, kept):
    """The dense model with the kept pairs and the kept subspace of the values, by hooks: nothing is cut.

    The subspace is read from the small model: what its values are of the dense one's.
    """
    gone = torch.tensor(sorted(set(range(8)) - set(kept.tolist())))
    handles, names = [], structure.family.attention
    for layer in structure.layers:
        dense, cut = model.get_submodule(layer.name), small.get_submodule(layer.name)
        q, k, v = (dense.get_submodule(name) for name in names.inputs)

        def zero(_, __, output):
            output = output.unflatten(-1, (-1, 8)).clone()
            output[..., gone] = 0
            return output.flatten(-2)

        handles += [module.register_forward_hook(zero) for module in (q, k)]
        mine = cut.get_submodule(names.inputs[2]).weight.view(layer.attention.kv_heads, len(kept), -1)
        theirs = v.weight.view(layer.attention.kv_heads, 8, -1)
        bases = [torch.linalg.lstsq(whole.T, part.T).solution for whole, part in zip(theirs, mine, strict=True)]

        def project(_, __, output, bases=bases):
            heads = output.unflatten(-1, (-1, 8)).unbind(-2)
            return torch.cat([x @ b @ torch.linalg.pinv(b) for x, b in zip(heads, bases, strict=True)], -1)

        handles.append(v.register_forward_hook(project))
    rotation = rotation_of(model)
    numbers = [
        n for n, unit in enumerate(rotation.units(8)[: rotation.size // 2]) if set(unit.tolist()) <= set(kept.tolist())
    ]
    theirs = dict(small.get_submodule(rotation.module).named_buffers())
    for leaf, buffer in model.get_submodule(rotation.module).named_buffers():
        assert torch.allclose(buffer[numbers], theirs[leaf].to(buffer), rtol=2e-7, atol=0)  # of float32
        buffer[numbers] = theirs[leaf].to(buffer)
    return handles


@pytest.mark.parametrize("name", MODELS)
def test_cut_is_the_dense_model_without_the_other_dimensions(name, tmp_path):
    model = build(name)
    structure, kept, tokens = ModelStructure.of(model), kept_of(model), families.make_tokens(2, 14)
    dense = build(name)
    with apart():
        small, found = cut_head_size(model, structure, 4, NO_REFIT, None, kept)
        assert torch.equal(found, kept) and small.config.head_dim == 4
        before = logits(dense, tokens)
        reference(dense, structure, small, kept)
        expected = logits(dense, tokens)
        assert (expected - before).abs().max() > 1e-3
        assert torch.allclose(logits(small, tokens), expected, rtol=1e-9, atol=1e-9)
    small.save_pretrained(tmp_path)
    options = {"experts_implementation": "eager"} if MODELS[name][0] in families.MIXTURES else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **options).eval()
    assert type(again) is type(small) and again.config.head_dim == 4
    assert torch.equal(families.logits(again, tokens), families.logits(small, tokens))


def test_long_texts_have_the_long_list():
    """Beyond `original_max_position_embeddings`, where the dense model has two lists."""
    model, dense, tokens = build("llama-longrope"), build("llama-longrope"), families.make_tokens(1, 40)
    structure, kept = ModelStructure.of(model), pairs_of(model, [1, 3])
    with apart():
        small, _ = cut_head_size(model, structure, 4, NO_REFIT, None, kept)
        reference(dense, structure, small, kept)
        assert torch.allclose(logits(small, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-5)  # float32 lists
    assert small.config.rope_parameters["long_factor"] != small.config.rope_parameters["short_factor"]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama-llama3"])
def test_far_positions_and_the_cache(name):
    """Hundreds of tokens, past windows; a float32 model, with and without a cache."""
    family, options = MODELS[name]
    model = make_model(family, **{**options, "max_position_embeddings": 1024})
    small = StructuredPruner(model, dataclasses.replace(NO_REFIT, head_dim_criterion="magnitude")).prune()
    tokens = families.make_tokens(1, 600)
    with torch.no_grad():
        whole = small(tokens, use_cache=False).logits[:, -1]
        past = small(tokens[:, :-1], use_cache=True).past_key_values
        assert past.layers[1].keys.shape[-1] == past.layers[1].values.shape[-1] == 4
        last = small(tokens[:, -1:], past_key_values=past).logits[:, -1]
    assert torch.allclose(whole, last, atol=2e-4)
    with_cache, without = (families.greedy(small, tokens[:, :20], cache) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_frequencies_stay_to_the_last_place_or_so():
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 128, 2).float() / 128))
    kept = frequencies[torch.tensor([0, 3, 10, 30, 40, 50, 62, 63])]
    size = 2 * len(kept)
    powers = 10000.0 ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    got = 1.0 / (torch.tensor(factors(kept, 10000.0, size)) * powers)
    assert ((got - kept) / kept).abs().max() <= 2**-23
    assert (got == kept).sum() >= len(kept) - 2


REFUSED = {
    "gpt2": "computes it from hidden", "opt": "computes it from hidden", "gpt_neox": "computes it from hidden",
    "falcon": "computes it from hidden", "stablelm": "computes it from hidden", "phi3": "another size of heads",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(name):
    model = make_model(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        StructuredPruner(model, NO_REFIT).plan()


def test_frequencies_that_follow_the_text_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="rope type of this model is 'dynamic'"):
        StructuredPruner(make_model("llama", rope_parameters=rope), NO_REFIT).plan()


def test_layouts_that_look_like_others_are_refused():
    """GLM's cosines are in halves, its pairs are neighbours: nothing but the proof can tell."""
    config = transformers.GlmConfig(**_SIZE, head_dim=8, partial_rotary_factor=0.5)
    model = families.randomise(AutoModelForCausalLM.from_config(config))
    try:
        StructuredPruner(model, NO_REFIT).plan()
    except UnsupportedModelError as error:
        assert "give different logits" in str(error)
    else:
        raise AssertionError("not refused")


@pytest.mark.parametrize(
    "keep, kept, match",
    [
        (3, None, "even number"),
        (8, None, "must be less"),
        (4, [0, 1, 2, 3], "whole pairs"),
        (4, [0, 4], "must name 4|whole pairs"),
    ],
)
def test_sizes_and_dimensions_that_do_not_fit(keep, kept, match):
    model = make_model("llama")
    pruner = StructuredPruner(model, dataclasses.replace(NO_REFIT, keep={"head_dim": keep}))
    with pytest.raises(ConfigurationError, match=match):
        if kept is None:
            pruner.plan()
        else:
            CUTS["head_dim"](model, pruner.structure, keep, NO_REFIT, None, torch.tensor(kept))
    assert torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, make_model("llama").model.layers[0].self_attn.q_proj.weight
    )


def wide(**options):
    return make_model("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=128, **options)


def test_a_ratio_gives_the_nearest_size_with_kernels():
    model = wide()
    cost = head_group(model, ModelStructure.of(model)).cost
    pruner = StructuredPruner(model, PruningConfig(units=("head_dim",)))
    total = families.count(model)
    for size in (96, 64, 32):
        plan = pruner.plan(0.99 * (128 - size) * cost / total)
        assert plan.of_model("head_dim").keep == size and plan.parameters_after == total - (128 - size) * cost
        assert not plan.warnings
    with pytest.raises(RatioError, match="can take at most"):
        pruner.plan(0.95)
    with pytest.raises(RatioError, match=f"removes {32 * cost / total:.2%}: 96 of 128"):
        pruner.plan(0.4 * 32 * cost / total)  # nearest to none
    assert not pruner.plan(0).shared
    with pytest.raises(ConfigurationError, match="keep="):
        StructuredPruner(make_model("llama"), PruningConfig(units=("head_dim",))).plan(0.1)
    plan = StructuredPruner(model, PruningConfig(keep={"head_dim": 80})).plan()
    assert any("80 dimensions" in line for line in plan.warnings)


def test_with_other_kinds_in_one_call_and_again_by_its_plan(tmp_path):
    keep = {"head_dim": 4, "kv_groups": 1, "mlp_neurons": 24, "hidden": 24}
    options = dict(keep=keep, hidden_criterion="magnitude", calibration=families.calibration())
    pruner = StructuredPruner(make_model("mistral"), PruningConfig(**options))
    small = pruner.prune()
    sizes = small.config
    assert (sizes.head_dim, sizes.num_key_value_heads, sizes.intermediate_size, sizes.hidden_size) == (4, 1, 24, 24)
    plan = pruner.last_plan
    assert families.count(small) == plan.parameters_after and set(plan.removed) == set(keep)
    assert (plan.kv_values_before, plan.kv_values_after) == (3 * 2 * 2 * 8, 3 * 2 * 1 * 4)
    assert "KV cache, bytes a token" in str(plan) and plan.to_dict()["kv_bytes_after"] == 4 * 24
    pruner.save_pretrained(tmp_path)
    again = StructuredPruner(make_model("mistral"), PruningConfig(**options)).prune(PruningPlan.load(tmp_path))
    tokens = families.make_tokens(2, 20)
    assert torch.allclose(families.logits(again, tokens), families.logits(small, tokens), atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(families.logits(loaded, tokens), families.logits(small, tokens), atol=1e-6)


def test_a_pruned_model_is_pruned_again():
    options = dict(head_dim_criterion="magnitude", compensation=False)
    pruner = StructuredPruner(make_model("llama", torch.float64), PruningConfig(keep={"head_dim": 6}, **options))
    small = pruner.prune()
    first = rotation_of(small).lists[0].short
    again = StructuredPruner(small, PruningConfig(keep={"head_dim": 4}, **options))
    smallest = again.prune()
    left = [number for number in range(3) if number in again.last_plan.of_model("head_dim").kept]
    assert torch.allclose(rotation_of(smallest).lists[0].short, first[left], rtol=1e-6)


def test_the_planned_shapes_are_those_of_the_class():
    model = make_model("qwen3")
    structure = ModelStructure.of(model)
    small = smaller_heads(model, structure, 4).skeleton()
    group = head_group(model, structure)
    assert families.count(model) - families.count(small) == 4 * group.cost and group.size == 8
