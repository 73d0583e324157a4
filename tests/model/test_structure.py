"""Coupled groups: which rows and columns belong to a unit, written out by hand."""

import copy

import families
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig
from hf_structprune.allocation.widths import Budget
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import cut_units


# Heads of 2 channels: four query heads over two KV heads, and three neurons.
HAND = dict(
    vocab_size=16, hidden_size=8, intermediate_size=3, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip


def first_layer(class_name, **values):
    config = getattr(transformers, class_name)(**values)
    return ModelStructure.of(AutoModelForCausalLM.from_config(config)).layers[0]


def parts(group):
    """`{module: [index, ...]}` below the layer: a fused module has several."""
    found = {}
    for part in group.slices:
        name = part.module.split(".", 3)[-1]
        if part.tensor.endswith("weight"):
            found.setdefault((name, "columns" if part is group.reader else "rows"), []).append(part.index.tolist())
    return found


def test_grouped_query_attention_by_hand():
    group = first_layer("LlamaConfig", **HAND).group("kv_groups")
    assert (group.size, group.blocks) == (2, 1)
    assert parts(group) == {
        ("self_attn.q_proj", "rows"): [[[0, 1, 2, 3], [4, 5, 6, 7]]],
        ("self_attn.k_proj", "rows"): [[[0, 1], [2, 3]]],
        ("self_attn.v_proj", "rows"): [[[0, 1], [2, 3]]],
        ("self_attn.o_proj", "columns"): [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    }


def test_query_heads_by_hand_belong_to_the_kv_group_they_read():
    group = first_layer("LlamaConfig", **HAND).group("query_heads")
    assert (group.size, group.blocks) == (4, 2)
    heads = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert parts(group) == {("self_attn.q_proj", "rows"): [heads], ("self_attn.o_proj", "columns"): [heads]}


def test_mlp_neurons_by_hand():
    group = first_layer("LlamaConfig", **HAND).group("mlp_neurons")
    neurons = [[0], [1], [2]]
    assert parts(group) == {
        ("mlp.gate_proj", "rows"): [neurons],
        ("mlp.up_proj", "rows"): [neurons],
        ("mlp.down_proj", "columns"): [neurons],
    }


def test_phi3_fuses_q_k_v_and_gate_up_one_after_the_other():
    layer = first_layer("Phi3Config", **HAND)
    assert parts(layer.group("kv_groups")) == {
        ("self_attn.qkv_proj", "rows"): [
            [[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9], [10, 11]], [[12, 13], [14, 15]],
        ],
        ("self_attn.o_proj", "columns"): [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    }  # fmt: skip
    assert parts(layer.group("mlp_neurons")) == {
        ("mlp.gate_up_proj", "rows"): [[[0], [1], [2]], [[3], [4], [5]]],
        ("mlp.down_proj", "columns"): [[[0], [1], [2]]],
    }


def test_falcon_fuses_each_kv_group():
    layer = first_layer(
        "FalconConfig", vocab_size=16, hidden_size=8, ffn_hidden_size=3, num_hidden_layers=2, num_attention_heads=4,
        num_kv_heads=2, new_decoder_architecture=True,
    )  # fmt: skip
    assert parts(layer.group("kv_groups")) == {
        ("self_attention.query_key_value", "rows"): [
            [[0, 1, 2, 3], [8, 9, 10, 11]], [[4, 5], [12, 13]], [[6, 7], [14, 15]],
        ],
        ("self_attention.dense", "columns"): [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    }  # fmt: skip
    assert parts(layer.group("query_heads"))["self_attention.query_key_value", "rows"] == [
        [[0, 1], [2, 3], [8, 9], [10, 11]]
    ]


def test_gpt_neox_fuses_each_head():
    values = {k: v for k, v in HAND.items() if k != "num_key_value_heads"}
    layer = first_layer("GPTNeoXConfig", **values)
    assert parts(layer.group("kv_groups")) == {
        ("attention.query_key_value", "rows"): [
            [[0, 1], [6, 7], [12, 13], [18, 19]],
            [[2, 3], [8, 9], [14, 15], [20, 21]],
            [[4, 5], [10, 11], [16, 17], [22, 23]],
        ],
        ("attention.dense", "columns"): [[[0, 1], [2, 3], [4, 5], [6, 7]]],
    }
    assert layer.group("query_heads") is None


@pytest.mark.parametrize("name", families.FAMILIES)
def test_unit_parameters_are_what_a_cut_unit_takes_along(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    assert structure.total_parameters == families.count(model)
    for kind in families.kinds_of(name):
        group = structure.layers[0].group(kind)
        small = copy.deepcopy(model)
        cut_units(small, structure.groups, {(0, kind): torch.arange(1, group.size)})
        assert families.count(model) - families.count(small) == group.cost
        biases = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        biases -= sum(p.numel() for p in small.parameters() if p.ndim == 1)
        assert group.cost - group.matrix_cost == biases


def test_tied_embeddings_count_once():
    tied = ModelStructure.of(families.make_model("llama", tie_word_embeddings=True))
    untied = ModelStructure.of(families.make_model("llama", tie_word_embeddings=False))
    assert untied.total_parameters - tied.total_parameters == families.VOCAB * families.HIDDEN
    assert untied.matrix_parameters == tied.matrix_parameters  # the LM head multiplies either way


def test_experts_are_found_whole_and_inside():
    structure = ModelStructure.of(families.make_model("mixtral"))
    assert structure.kinds() == ["kv_groups", "query_heads", "experts", "expert_neurons"] and not structure.notes


def test_dense_layers_of_a_mixture_are_found():
    structure = ModelStructure.of(families.make_model("qwen3_moe"))
    assert [layer.group("mlp_neurons") is not None for layer in structure.layers] == [True, False, False]
    assert [layer.group("expert_neurons") is not None for layer in structure.layers] == [False, True, True]


@pytest.mark.parametrize("layers", [1, 2])
def test_of_a_model_whose_layers_have_no_known_parts_whole_layers_can_go(layers):
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=layers, state_size=2)
    model = AutoModelForCausalLM.from_config(config)
    if layers > 1:
        structure = ModelStructure.of(model)
        assert len(structure.layers) == layers and not structure.groups
        return
    with pytest.raises(UnsupportedModelError, match=r"Nothing of this model can be cut.*norms of the layers \(norm\)"):
        ModelStructure.of(model)


def test_projections_are_found_by_name_where_nothing_describes_the_type():
    config = transformers.BloomConfig(vocab_size=16, hidden_size=8, n_layer=2, n_head=2)
    structure = ModelStructure.of(AutoModelForCausalLM.from_config(config))
    assert structure.kinds() == ["mlp_neurons"] and structure.layers[1].groups[0].size == 32
    assert any("self_attention: ALiBi" in note for note in structure.notes)


def _with_strangers(name, scale, **changes):
    model = families.make_model(name, **changes)
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(families.HEADS))
        layer.mlp.sinks = torch.nn.Parameter(torch.zeros(families.HEADS))
        if scale:
            layer.scale = torch.nn.Parameter(torch.ones(1))
    return model


def test_attention_with_an_unknown_parameter_is_left_alone_and_the_parameter_named():
    model = families.make_model("mistral")
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(families.HEADS))
    structure = ModelStructure.of(model)
    assert [layer.group("kv_groups") is not None for layer in structure.layers] == [True, False, True]
    assert structure.layers[1].group("mlp_neurons") is not None
    assert structure.notes == ["self_attn: parameter `self_attn.sinks` is not understood, left alone"]


def test_a_model_of_which_nothing_is_understood_is_refused_with_the_reasons():
    with pytest.raises(UnsupportedModelError, match=r"`self_attn\.sinks` is not understood"):
        ModelStructure.of(_with_strangers("mistral", scale=True, num_hidden_layers=1))


@pytest.mark.parametrize("units", ["mlp_neurons", "kv_groups"])
def test_where_no_width_is_understood_layers_can_still_go(units):
    structure = ModelStructure.of(_with_strangers("mistral", scale=False))
    assert structure.groups == [] and all(len(layer.sublayers) == 2 for layer in structure.layers)
    with pytest.raises(UnsupportedModelError, match=r"have none.*`self_attn\.sinks` is not understood"):
        Budget(structure, PruningConfig(units=units))


def test_norms_without_weights_are_read():
    structure = ModelStructure.of(AutoModelForCausalLM.from_config(transformers.NanoChatConfig(**HAND)))
    assert structure.kinds() == ["kv_groups", "query_heads", "mlp_neurons"]


def test_neurons_that_are_compared_with_each_other_are_coupled():
    with torch.device("meta"):
        values = dict(
            num_hidden_layers=5, num_kv_shared_layers=0, activation_sparsity_pattern=[0.9, 0.0, 0.9, 0.0, 0.9]
        )
        structure = ModelStructure.of(AutoModelForCausalLM.from_config(transformers.Gemma3nTextConfig(**values)))
    assert [layer.group("mlp_neurons").coupled for layer in structure.layers] == [True, False, True, False, True]


def test_what_crashes_the_reading_is_a_refusal_that_names_the_type():
    model = families.make_model("llama")
    del model.model.layers[1].self_attn.q_proj.weight
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM .model type 'llama'. cannot be read: .*weight"):
        ModelStructure.of(model)


def test_sinks_go_with_their_heads():
    config = transformers.GptOssConfig(**HAND, num_local_experts=2, num_experts_per_tok=1, head_dim=2)
    layer = ModelStructure.of(AutoModelForCausalLM.from_config(config)).layers[0]
    sinks = {
        kind: next(part.index.tolist() for part in layer.group(kind).slices if part.tensor.endswith("sinks"))
        for kind in ("kv_groups", "query_heads")
    }
    assert sinks == {"kv_groups": [[0, 1], [2, 3]], "query_heads": [[0], [1], [2], [3]]}


def test_heads_of_latent_attention_by_hand():
    sizes = dict(q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=1, v_head_dim=2)
    values = {**HAND, **sizes, "num_key_value_heads": 4}
    group = first_layer("YoutuConfig", **values).group("kv_groups")
    assert parts(group) == {
        ("self_attn.q_b_proj", "rows"): [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]],
        ("self_attn.kv_b_proj", "rows"): [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]],
        ("self_attn.o_proj", "columns"): [[[0, 1], [2, 3], [4, 5], [6, 7]]],
    }


def test_a_query_projection_that_holds_a_gate_is_cut_in_whole_heads():
    values = dict(**HAND, head_dim=2, layer_types=["full_attention"] * 2)
    found = parts(first_layer("Qwen3_5TextConfig", **values).group("query_heads"))
    assert found["self_attn.q_proj", "rows"] == [[[4 * head + i for i in range(4)] for head in range(4)]]


def test_the_projections_of_a_bert_are_found_in_their_modules():
    config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=4)
    layer = ModelStructure.of(AutoModelForCausalLM.from_config(config)).layers[0]
    assert layer.group("kv_groups").reader.module.endswith("attention.output.dense")
    assert layer.group("mlp_neurons").reader.module.endswith("layer.0.output.dense")


def test_the_keys_of_a_decoder_are_those_that_say_so():
    values = dict(d_model=8, encoder_layers=1, decoder_layers=2, decoder_ffn_dim=6, decoder_attention_heads=2)
    structure = ModelStructure.of(AutoModelForCausalLM.from_config(transformers.BartConfig(vocab_size=16, **values)))
    assert (structure.family.width_key, structure.family.layers_key) == ("decoder_ffn_dim", "decoder_layers")
    assert structure.layers[1].group("mlp_neurons").size == 6


def test_attention_with_unknown_norms_is_left_alone_with_a_note():
    structure = ModelStructure.of(families.make_model("stablelm", qk_layernorm=True))
    assert structure.kinds() == ["mlp_neurons"]
    assert any("self_attn" in note and "layernorm" in note and "left alone" in note for note in structure.notes)


def test_heads_bound_to_alibi_slopes_are_left_alone_with_a_note():
    structure = ModelStructure.of(families.make_model("falcon", alibi=True))
    assert structure.kinds() == ["mlp_neurons"]
    assert any("ALiBi" in note for note in structure.notes)


def test_structure_of_a_model_on_the_meta_device_is_that_of_a_real_one():
    real = ModelStructure.of(families.make_model("phi3"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.make_config("phi3"))
    meta = ModelStructure.of(model)
    assert [parts(g) for g in meta.groups] == [parts(g) for g in real.groups]
    assert (meta.total_parameters, meta.matrix_parameters) == (real.total_parameters, real.matrix_parameters)
