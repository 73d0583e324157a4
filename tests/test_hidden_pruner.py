"""The hidden size through `StructuredPruner`, and pruning what has been pruned before."""

import copy

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_depth_pruner import check, make_pruner
from transformers import AutoModelForCausalLM
from untouched import untouched

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError


def test_a_ratio_that_is_nearest_to_none_is_refused():
    with pytest.raises(RatioError, match="nothing but the hidden size.*: 31 of 32 stay"):
        make_pruner(families.make_model("llama"), units="hidden").plan(0.001)
    options = dict(units=("hidden", "mlp_neurons"), split={"hidden": 0.01, "mlp_neurons": 0.99})
    plan = make_pruner(families.make_model("llama"), **options).plan(0.05)  # neurons take it all
    assert set(plan.removed) == {"mlp_neurons"}


@pytest.mark.parametrize("name", ["qwen2", "cohere2"])
def test_hidden_size_and_ratio(name, tmp_path):
    dense = families.make_model(name)
    planned = make_pruner(dense, units="hidden").plan(0.25)
    assert planned.ratio == pytest.approx(0.25, abs=0.04) and planned.hidden.keep == 24
    pruner = make_pruner(copy.deepcopy(dense), hidden_size=24)
    pruner.prune()
    plan = pruner.last_plan
    assert (plan.hidden.before, plan.hidden.keep, len(plan.hidden.kept)) == (families.HIDDEN, 24, 24)
    assert plan.parameters_after == planned.parameters_after and set(plan.removed) == {"hidden"}
    loaded = check(pruner, dense, tmp_path)
    assert loaded.config.hidden_size == 24 and not loaded.config.is_heterogeneous


def test_principal_components(tmp_path):
    dense = families.make_model("mistral", tie_word_embeddings=False)
    pruner = make_pruner(copy.deepcopy(dense), hidden_size=24, criterion="pca")
    pruner.prune()
    assert pruner.last_plan.hidden.kept is None
    check(pruner, dense, tmp_path)


def test_a_llama_that_its_heads_do_not_divide_is_a_mistral(tmp_path):
    dense = families.make_model("llama")
    pruner = make_pruner(copy.deepcopy(dense), hidden_size=26)
    pruner.prune()
    loaded = check(pruner, dense, tmp_path)
    assert loaded.config.model_type == "mistral" and type(loaded).__module__.startswith("transformers.models.mistral")
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads, loaded.config.head_dim) == (26, 4, 8)


def test_a_ratio_finds_a_hidden_size_that_the_class_takes():
    """Gemma 2 takes multiples of its four heads only."""
    plan = make_pruner(families.make_model("gemma2"), units="hidden").plan(0.2)
    assert plan.hidden.keep == 24 or plan.hidden.keep == 28
    assert make_pruner(families.make_model("mistral"), units="hidden").plan(0.2).hidden.keep == 26


def test_the_heads_that_a_checkpoint_can_have_are_those_of_the_smaller_hidden_size(tmp_path):
    dense = families.make_model("gemma2", intermediate_size=100)
    pruner = make_pruner(copy.deepcopy(dense), split={"hidden": 0.6, "kv_groups": 0.2, "mlp_neurons": 0.2})
    pruner.prune(0.4)
    assert set(pruner.last_plan.removed) == {"hidden", "kv_groups", "mlp_neurons"}
    check(pruner, dense, tmp_path)


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_widths_are_chosen_in_the_smaller_stream(criterion, tmp_path):
    dense = families.make_model("llama")
    pruner = make_pruner(copy.deepcopy(dense), split={"hidden": 0.5, "mlp_neurons": 0.5}, criterion=criterion)
    pruner.prune(0.3)
    assert set(pruner.last_plan.removed) == {"hidden", "mlp_neurons"}
    check(pruner, dense, tmp_path)


def test_gradients_that_cannot_be_had_are_missed_before_the_stream_gets_smaller(monkeypatch):
    def no_way(*_, **__):
        raise RuntimeError("no way back")

    monkeypatch.setattr("hf_structprune.stats.gradients._backward", no_way)
    pruner = make_pruner(families.make_model("llama"), split={"hidden": 0.5, "mlp_neurons": 0.5}, criterion="taylor")
    with untouched(pruner.model, "no way back", RuntimeError):
        pruner.prune(0.3)


def test_without_compensation_and_by_magnitude_no_text_is_needed():
    config = PruningConfig(hidden_size=24, criterion="magnitude", compensation=False)
    first, second = (StructuredPruner(families.make_model("llama"), config) for _ in range(2))
    first.prune()
    second.prune(first.last_plan)
    assert second.model.config.hidden_size == 24


AGAIN = {
    "layers, then widths": ([dict(num_layers=1)], [dict(units=("mlp_neurons", "kv_groups"), layout="per_layer"), 0.1]),
    "layers, then equal widths": ([dict(keep_first=3)], [dict(), 0.1]),
    "layers, then sublayers": (
        [dict(num_layers=1, criterion="angular")], [dict(units="attention", layout="per_layer"), 0.1],
    ),
    "sublayers, then layers": (
        [dict(units="mlp", layout="per_layer", layers=[1])],
        [dict(num_layers=1, layout="per_layer", criterion="taylor")],
    ),
    "sublayers, then widths": (
        [dict(units="attention", layout="per_layer", layers=[0])],
        [dict(units=("mlp_neurons", "kv_groups"), layout="per_layer"), 0.1],
    ),
    "both sublayers, one after the other": (
        [dict(units="attention", layout="per_layer", layers=[0, 2])], [dict(units="mlp", layout="per_layer"), 0.3],
    ),
    "widths of each layer, then layers": (
        [dict(layout="per_layer", layers=[0]), 0.05], [dict(num_layers=2, layout="per_layer")],
    ),
    "layers, then layers": ([dict(num_layers=1)], [dict(num_layers=1)]),
}  # fmt: skip
HIDDEN_AGAIN = {
    "hidden, then layers": ([dict(hidden_size=24)], [dict(num_layers=1)]),
    "layers, then hidden": ([dict(num_layers=1)], [dict(hidden_size=24)]),
    "hidden, then hidden": ([dict(hidden_size=28)], [dict(hidden_size=24)]),
    "hidden, then widths": ([dict(hidden_size=26)], [dict(units=("mlp_neurons", "kv_groups")), 0.1]),
    "sublayers, then hidden": (
        [dict(units="attention", layout="per_layer", layers=[1])], [dict(hidden_size=24, layout="per_layer")],
    ),
}  # fmt: skip
CASES = [("llama", *steps) for steps in (AGAIN | HIDDEN_AGAIN).items()]
OTHERS = {
    "gpt2": ("layers, then widths", "sublayers, then layers", "both sublayers, one after the other"),
    "mixtral": ("layers, then sublayers", "sublayers, then widths", "layers, then hidden", "hidden, then hidden"),
    "gemma2": ("layers, then sublayers",),
}
CASES += [(name, what, (AGAIN | HIDDEN_AGAIN)[what]) for name, those in OTHERS.items() for what in those]


def fitting(name, options, ratio=None):
    """Mixtral's experts are left alone and run with multiples of 8 channels, and its heads are few."""
    if name == "mixtral" and "hidden_size" in options:
        return {**options, "hidden_size": {28: 24, 26: 24, 24: 16}[options["hidden_size"]]}, ratio
    if name == "mixtral" and "mlp_neurons" in PruningConfig(**options).units:
        return {**options, "units": "kv_groups", "layout": "per_layer"}, 0.015
    return options, ratio


@pytest.mark.parametrize(("name", "what", "steps"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_was_pruned_is_pruned_again(name, what, steps, tmp_path):
    model = families.make_model(name, num_hidden_layers=4, **({"layer_types": None} if name == "gemma2" else {}))
    for step in steps:
        options, ratio = fitting(name, *step)
        dense = copy.deepcopy(model)
        pruner = make_pruner(model, **options)
        model = pruner.prune(ratio)
        assert pruner.last_plan.ratio > 0
    check(pruner, dense, tmp_path)


def test_a_layer_without_attention_that_loses_its_mlp_is_gone(tmp_path):
    """With the last empty layer gone the model is vanilla again."""
    dense = make_pruner(families.make_model("mixtral"), units="attention", layout="per_layer", layers=[1]).prune()
    pruner = make_pruner(copy.deepcopy(dense), units="mlp", layout="per_layer", layers=[1])
    pruner.prune()
    assert pruner.last_plan.dropped == {"layers": [1]}
    assert not check(pruner, dense, tmp_path).config.is_heterogeneous


def test_a_mixtral_without_any_attention_can_lose_layers(tmp_path):
    model = families.make_model("mixtral", num_hidden_layers=4)
    dense = make_pruner(model, units="attention", layout="per_layer", layers=[0, 1, 2, 3]).prune()
    pruner = make_pruner(copy.deepcopy(dense), num_layers=2, layout="per_layer")
    pruner.prune()
    check(pruner, dense, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"have \['expert_neurons', 'experts'\]"):
        make_pruner(dense, units="kv_groups", layout="per_layer").plan(0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_of_a_model_whose_layers_differ_ask_for_the_other_layout(name):
    model = make_pruner(families.make_model(name), units="attention", layout="per_layer", layers=[1]).prune()
    with pytest.raises(UnsupportedModelError, match="lack a sublayer are not alike. Use layout='per_layer'"):
        make_pruner(model, units="kv_groups").plan(0.05)


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"num_layers": 1}), ("gpt2", {"num_layers": 1}), ("llama", {"hidden_size": 26}),
     ("gemma2", {"hidden_size": 24}), ("mixtral", {"hidden_size": 24})],
    ids=str,
)  # fmt: skip
def test_adapters_train_and_merge(name, options, tmp_path):
    pruner = make_pruner(families.make_model(name), **options)
    pruner.prune()
    pruner.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = families.make_tokens(4, 12)
    before = families.logits(model, tokens)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    loss = adapted(tokens, labels=tokens).loss
    loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0).step()
    assert adapted(tokens, labels=tokens).loss < loss
    expected = families.logits(adapted.eval(), tokens)
    assert (expected - before).abs().max() > 1e-4
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(families.logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_plan_of_another_hidden_size_is_refused():
    pruner = make_pruner(families.make_model("llama"), hidden_size=24)
    plan = pruner.plan()
    pruner.prune()
    with pytest.raises(ConfigurationError, match="a hidden size of 32; this model has 24"):
        make_pruner(pruner.model, hidden_size=16).prune(plan)


@pytest.mark.parametrize("size", [families.HIDDEN, families.HIDDEN + 8])
def test_a_hidden_size_that_is_not_smaller_is_refused(size):
    pruner = StructuredPruner(families.make_model("llama"), PruningConfig(hidden_size=size))
    with pytest.raises(ConfigurationError, match=f"`hidden_size` is {size}; it must be less than the model's own, 32"):
        pruner.plan()
