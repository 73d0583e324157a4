"""Small configurations with the structure of large ones."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof.shrinking import EPSILON, VOCABULARY, WINDOW, _sections, shrunk_values


def shrunk(class_name, **values):
    config = getattr(transformers, class_name)(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shrunk_values(model, ModelStructure.of(model))


LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
    vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128009],
)  # fmt: skip


def test_heads_widths_and_layers_shrink_and_keep_their_relations():
    values, kept = shrunk("LlamaConfig", **LLAMA_8B, attention_bias=True, rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert kept == [0, 1, 2] and values["num_hidden_layers"] == 3
    assert (values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]) == (8, 2, 8)
    assert (values["hidden_size"], values["intermediate_size"], values["vocab_size"]) == (64, 224, VOCABULARY)
    assert values["attention_bias"] and values["tie_word_embeddings"] and values["rms_norm_eps"] == EPSILON
    assert max(values["bos_token_id"], *values["eos_token_id"]) < VOCABULARY


def test_every_kind_of_layer_is_left():
    types = [("full" if i % 6 == 5 else "sliding") + "_attention" for i in range(26)]
    values, kept = shrunk("Gemma3TextConfig", layer_types=types, num_hidden_layers=26, sliding_window=1024)
    assert kept == [0, 1, 5, 11] and values["sliding_window"] == WINDOW
    assert values["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"] * 2


def test_first_dense_layers_of_a_mixture_stay_the_first():
    values, kept = shrunk("DeepseekV3Config", num_hidden_layers=12, first_k_dense_replace=3, n_routed_experts=16)
    assert kept == [0, 1, 3, 4] and values["first_k_dense_replace"] == 2


def test_experts_stay_enough_for_their_groups():
    groups = dict(n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=24)
    values, _ = shrunk("DeepseekV3Config", num_hidden_layers=4, **groups)
    assert (values["n_routed_experts"], values["n_group"], values["topk_group"]) == (56, 8, 4)  # one to spare
    values, _ = shrunk("Qwen3MoeConfig", num_hidden_layers=2, num_experts=128)
    assert values["num_local_experts"] == 16


def test_factors_of_each_rotated_channel_shrink_with_the_heads():
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 48, long_factor=[2.0] * 48)
    values, _ = shrunk("Phi3Config", rope_parameters=rope | {"original_max_position_embeddings": 4096})
    head = values["hidden_size"] // values["num_attention_heads"]
    assert len(values["rope_parameters"]["short_factor"]) == head // 2 == 4


def test_numbers_that_follow_the_depth_do_not_keep_all_layers():
    values, kept = shrunk("MiniCPM3Config", num_hidden_layers=9)  # its residual scale follows the number of layers
    assert kept == [0, 1, 2] and values["num_hidden_layers"] == 3


def test_numbers_that_differ_in_every_layer_do_not_make_each_a_kind():
    assert shrunk("BeamConfig", num_hidden_layers=20)[1] == [0, 1, 3, 4, 5, 11]


def test_a_rule_that_cannot_name_fewer_layers_keeps_them_all():
    _, kept = shrunk("Gemma3nTextConfig", num_hidden_layers=15, num_kv_shared_layers=5)
    assert kept == list(range(15))


@pytest.mark.parametrize("heads, kv_heads, expected", [(32, 32, (2, 2)), (14, 2, (14, 2)), (64, 1, (2, 1))])
def test_numbers_of_heads_keep_their_kind(heads, kv_heads, expected):
    values, _ = shrunk(
        "Qwen2Config", hidden_size=64 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=1,
    )  # fmt: skip
    assert (values["num_attention_heads"], values["num_key_value_heads"]) == expected
    assert values["hidden_size"] == 8 * expected[0]


@pytest.mark.parametrize("sections", [[8, 12, 12], [16, 24, 24], [24, 20, 20], [11, 11, 10], [32, 0, 32], [1, 2, 29]])
def test_shares_of_frequencies_add_up_to_a_smaller_head(sections):
    for size in (1, 2, 4, 8):
        small = _sections(sections, size)
        assert sum(small) == sum(sections) // size
        assert [bool(part) for part in small] == [bool(part) for part in sections]
        assert all(abs(part / size - one) < 3 for part, one in zip(sections, small, strict=True))


def test_numbers_of_layers_make_no_kinds():
    values, kept = shrunk(
        "Llama4TextConfig", num_hidden_layers=12, moe_layers=list(range(12)), no_rope_layers=[1] * 12
    )
    assert kept == [0, 1, 2] and values["moe_layers"] == [0, 1, 2]
    assert shrunk("Llama4TextConfig", num_hidden_layers=12, moe_layers=[5, 6, 7], no_rope_layers=[1] * 12)[1] == [
        0,
        1,
        5,
        6,
    ]
