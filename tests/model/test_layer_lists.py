"""Configurations after layers went: lists follow the cut, rules that cannot are refused."""

import families
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from hf_structprune.errors import CheckpointError
from hf_structprune.model.describe import target_of
from hf_structprune.model.layer_values import check_layers, without_layers
from hf_structprune.model.rebuild import rebuild
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import drop
from hf_structprune.plan import PruningPlan


def cut(values, dropped=(1, 2), num_layers=6):
    return without_layers({"num_hidden_layers": num_layers, **values}, list(dropped), num_layers)


def test_lists_with_an_entry_for_each_layer_lose_those_of_the_dropped_ones():
    values = {"layer_types": list("abcdef"), "no_rope_layers": [1, 1, 1, 0, 1, 1], "mlp_layer_types": tuple("uvwxyz")}
    assert cut(values) == {
        "num_hidden_layers": 4, "layer_types": list("adef"), "no_rope_layers": [1, 0, 1, 1],
        "mlp_layer_types": list("uxyz"),
    }  # fmt: skip


def test_values_are_not_changed_and_other_lists_stay():
    values = {"num_hidden_layers": 3, "layer_types": list("abc"), "eos_token_id": [7, 8, 9], "sizes": [1, 2]}
    before = {key: list(value) if isinstance(value, list) else value for key, value in values.items()}
    after = without_layers(values, [0], 3)
    assert values == before
    assert after == {"num_hidden_layers": 2, "layer_types": ["b", "c"], "eos_token_id": [7, 8, 9], "sizes": [1, 2]}


def test_lists_of_layer_numbers_are_renumbered_even_if_they_name_all_layers():
    assert cut({"mlp_only_layers": [0, 2, 3]})["mlp_only_layers"] == [0, 1]
    assert cut({"moe_layers": [0, 1, 2, 3, 4, 5]})["moe_layers"] == [0, 1, 2, 3]
    assert cut({"moe_layers": None})["moe_layers"] is None


def test_counts_of_first_layers_are_those_that_stay():
    assert cut({"first_k_dense_replace": 3})["first_k_dense_replace"] == 1
    assert cut({"first_k_dense_replace": 0})["first_k_dense_replace"] == 0
    assert cut({"max_window_layers": 4})["max_window_layers"] == 2
    assert cut({"max_window_layers": 28})["max_window_layers"] == 28


def test_rules_that_a_list_replaces_are_dropped():
    values = {"sliding_window_pattern": 3, "_sliding_window_pattern": 3, "layer_types": list("abcdef")}
    assert cut(values) == {"num_hidden_layers": 4, "layer_types": list("adef")}
    values = {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1, 1]}
    assert "no_rope_layer_interval" not in cut(values)
    assert cut({"sliding_window_pattern": 3})["sliding_window_pattern"] == 3  # refused where it matters


def test_a_step_between_layers_with_experts_becomes_a_list():
    # Layers 1, 3 and 5 have experts, except for layer 3; then 1 and 2 go.
    after = cut({"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert (after["decoder_sparse_step"], after["mlp_only_layers"]) == (1, [0, 1, 2])


JAMBA = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1}


@pytest.mark.parametrize("dropped", [[0], [7], [0, 1, 2], [2, 3, 4, 5], [4, 5, 6, 7], [0, 6, 7], [0, 1, 2, 4, 6, 7]])
def test_periods_are_those_of_the_layers_that_stay(dropped):
    after = cut(JAMBA, dropped, 8)
    kept = [index for index in range(8) if index not in dropped]
    for kind in ("attn", "expert"):
        rules = [(values[f"{kind}_layer_period"], values[f"{kind}_layer_offset"]) for values in (JAMBA, after)]
        old, new = ([i % period == offset for i in places] for (period, offset), places in
                    zip(rules, (kept, range(len(kept))), strict=True))  # fmt: skip
        assert old == new and rules[1][1] < rules[1][0]


def test_layers_that_follow_no_period_are_refused():
    with pytest.raises(CheckpointError, match="`expert_layer_period` is 2.*Drop 2 layers that follow each other"):
        cut(JAMBA, [3], 8)


def test_runs_of_gpt_neo_follow_its_list():
    after = without_layers(
        {"num_layers": 4, "attention_types": [[["g", "l"], 2]], "attention_layers": list("glgl")}, [1], 4
    )
    assert after["attention_layers"] == list("ggl") and after["num_layers"] == 3
    assert [kind for kinds, times in after["attention_types"] for kind in kinds * times] == list("ggl")


def test_widths_of_single_layers_keep_their_layer():
    after = cut({"per_layer_config": {"0": {"a": 1}, "02": {"a": 2}, "5": {"a": 3}}})
    assert after["per_layer_config"] == {"0": {"a": 1}, "3": {"a": 3}}


def test_another_number_of_layers_than_the_model_has_is_refused():
    with pytest.raises(CheckpointError, match="`num_hidden_layers` is 5, but the model has 6"):
        without_layers({"num_hidden_layers": 5}, [0], 6)


MIXED = dict(num_hidden_layers=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere2"])
def test_windows_stay_with_their_layers(name):
    model = families.make_model(name, **MIXED)
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert len(set(windows)) == 2
    small = families.cut(model, {}, {}, "uniform", {"layers": [0, 4]})
    assert [layer.self_attn.sliding_window for layer in small.model.layers] == windows[1:4] + windows[5:]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2, 3]


def test_rotated_positions_stay_with_their_layers():
    small = families.cut(families.make_model("smollm3"), {}, {}, "uniform", {"layers": [0]})
    assert small.config.no_rope_layers == [0, 1]
    assert [layer.self_attn.use_rope for layer in small.model.layers] == [0, 1]


@pytest.mark.parametrize("step", [1, 2])
def test_experts_stay_with_their_layers(step):
    model = families.make_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0], decoder_sparse_step=step)
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    small = families.cut(model, {}, {}, "uniform", {"layers": [1, 2]})
    assert [type(layer.mlp).__name__ for layer in small.model.layers] == kinds[:1] + kinds[3:]


def test_a_rule_for_layers_that_is_not_known_is_refused_by_name():
    config = families.make_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match=r"Layer 1 would not be the same as layer 0 .* `attn\.scaling` is"):
        families.cut(model, {}, {}, "uniform", {"layers": [0]})
    families.cut(model, {}, {}, "uniform", {"layers": [2]})  # those in front stay as they were


class Layer(nn.Module):
    def __init__(self, layer_idx, window, width=2):
        super().__init__()
        self.layer_idx, self.windows, self.part = layer_idx, (window, None), nn.Linear(2, width)


@pytest.mark.parametrize(
    "layer, message",
    [(Layer(0, 4), r"`windows` is \(8, None\) and would be \(4, None\)"), (Layer(0, 8, 3), r"`part\.bias`")],
)
def test_layers_are_compared_by_attributes_and_shapes_but_not_by_number(layer, message):
    dense = [Layer(0, 4), Layer(1, 8)]
    check_layers(dense, [Layer(0, 8)], [1])
    with pytest.raises(CheckpointError, match=message):
        check_layers(dense, [layer], [1])
    with pytest.raises(CheckpointError, match="builds 2 layers, but 1 stay"):
        check_layers(dense, dense, [1])


# Published models: vocabulary, hidden size, rows of k and v, MLP width; 32 layers, no tied embeddings.
MODELS = {
    "Llama-2-7B": ("LlamaConfig", 32000, 4096, 4096, 11008, 6_738_415_616),
    "Llama-3-8B": ("LlamaConfig", 128256, 4096, 1024, 14336, 8_030_261_248),
    "Mistral-7B": ("MistralConfig", 32000, 4096, 1024, 14336, 7_241_732_096),
}
# The first six blocks of Shortened-LLM's published orders, and the block PruneMe found in Llama-3-8B.
ORDERS = {
    "Llama-2-7B": ([0, 28, 27, 25, 29, 26], [11, 8, 24, 21, 12, 7], range(22, 28), range(22, 30), range(17, 29)),
    "Llama-3-8B": ([24, 25, 26, 28, 29, 23], [8, 23, 9, 11, 10, 25], range(22, 28), range(22, 30), range(17, 29)),
    "Mistral-7B": (range(22, 28), range(22, 30), range(17, 29)),
}


def parameters(vocabulary, hidden, kv, width, layers):
    """2 V H + H + the sum over layers of (2 H q + 2 H kv + 3 H m + 2 H), with q = H."""
    return 2 * vocabulary * hidden + hidden + layers * hidden * (2 * hidden + 2 * kv + 3 * width + 2)


@pytest.fixture(scope="module")
def skeletons():
    return {}


def skeleton(name, cache):
    if name not in cache:
        config_class, vocabulary, hidden, kv, width, _ = MODELS[name]
        config = getattr(transformers, config_class)(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=kv // 128,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        cache[name] = model, ModelStructure.of(model)
    return cache[name]


@pytest.mark.parametrize("name, dropped", [(name, list(order)) for name, orders in ORDERS.items() for order in orders])
def test_published_depths_have_the_right_number_of_parameters(name, dropped, skeletons):
    model, structure = skeleton(name, skeletons)
    *_, total = MODELS[name]
    assert structure.total_parameters == parameters(*MODELS[name][1:5], 32) == total
    plan = PruningPlan.from_counts(
        structure, {}, model_type=model.config.model_type, layout="uniform", dropped={"layers": dropped}
    )
    target = target_of(model, structure, plan)
    left = parameters(*MODELS[name][1:5], 32 - len(dropped))
    assert families.count(target.skeleton()) == plan.parameters_after == left
    assert target.config.num_hidden_layers == 32 - len(dropped)


def test_pruneme_llama_3_with_eight_layers_less(skeletons):
    model, structure = skeleton("Llama-3-8B", skeletons)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model.config)
    layers = list(model.model.layers)
    plan = PruningPlan.from_counts(
        structure, {}, model_type="llama", layout="uniform", dropped={"layers": list(range(22, 30))}
    )
    target = target_of(model, structure, plan)
    drop(model, structure, plan.dropped)
    assert list(model.model.layers) == layers[:22] + layers[30:]
    small = rebuild(model, target)
    assert small.config.num_hidden_layers == len(small.model.layers) == 24
    assert families.count(small) == 6_285_365_248
    assert type(small).__name__ == "LlamaForCausalLM"
    changed = {key for key, value in small.config.to_dict().items() if value != model.config.to_dict().get(key)}
    assert changed <= {"num_hidden_layers", "architectures", "head_dim"}


def test_a_device_map_follows_the_layers():
    model = families.make_model("llama")
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2.mlp": 1}
    drop(model, ModelStructure.of(model), {"layers": [1]})
    assert model.hf_device_map == {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1.mlp": 1}


def test_layers_that_a_configuration_class_cannot_be_without_are_refused_by_its_reason():
    values = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
    types = ["linear_attention", "full_attention", "linear_attention"]
    config = transformers.OlmoHybridConfig(**values, num_hidden_layers=3, layer_types=types, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    structure = ModelStructure.of(model)
    plan = PruningPlan.from_counts(structure, {}, model_type="olmo_hybrid", layout="uniform", dropped={"layers": [1]})
    with pytest.raises(CheckpointError, match="(?s)OlmoHybridConfig is without these layers.*at least one attention"):
        target_of(model, structure, plan)
