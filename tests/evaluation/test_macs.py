import pytest
import torch
import transformers
from families import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    cut,
    make_model,
    make_tokens,
    random_units,
)
from transformers import AutoModelForCausalLM

from hf_structprune.evaluation.efficiency import count_macs, count_macs_with_attention
from hf_structprune.model.structure import ModelStructure


KV = 2 * HEAD_DIM
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV  # q, o and k, v
# Weights of one layer's linear maps.
LAYER = {
    "llama": ATTENTION + 3 * HIDDEN * WIDTH,
    "gpt2": 4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH,  # Conv1D: c_attn, c_proj, c_fc, c_proj
    "falcon": ATTENTION + 2 * HIDDEN * WIDTH,  # fused q, k, v
    "mixtral": ATTENTION + 2 * 3 * HIDDEN * WIDTH,  # two of four experts
}
# The counter also sees the router, which is no linear map but a matrix: hidden times experts.
ROUTER = {"mixtral": 4 * HIDDEN}


def products(length, heads=HEADS, batch=1):
    """Attention scores and weighted values of one layer."""
    return 2 * batch * heads * HEAD_DIM * length**2


@pytest.mark.parametrize("name", LAYER)
@pytest.mark.parametrize(("batch", "length"), [(1, 64), (3, 20)])
def test_equal_hand_counts(name, batch, length):
    model = make_model(name)
    linear = LAYERS * LAYER[name] + HIDDEN * VOCAB
    neurons = 0 if name == "mixtral" else LAYERS * WIDTH
    assert count_macs(model, batch, length) == batch * length * (linear + neurons)
    ids = make_tokens(batch, length)
    expected = batch * length * (linear + LAYERS * ROUTER.get(name, 0)) + LAYERS * products(length, batch=batch)
    assert count_macs_with_attention(model, ids) == expected


def test_a_tied_head_counts(tiny_llama):
    tied = make_model("llama", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    free = make_model("llama", tie_word_embeddings=False)
    assert count_macs(tied) == count_macs(free) == 64 * (LAYERS * (LAYER["llama"] + WIDTH) + HIDDEN * VOCAB)
    assert count_macs_with_attention(tied, make_tokens(1)) == count_macs_with_attention(free, make_tokens(1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_counts_in_every_implementation(implementation):
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    expected = 16 * (LAYERS * LAYER["llama"] + HIDDEN * VOCAB) + LAYERS * products(16)
    assert count_macs_with_attention(model, make_tokens(1)) == expected
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_count_in_every_implementation(implementation):
    config = make_model("mixtral").config
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    assert count_macs_with_attention(model, make_tokens(1)) == count_macs_with_attention(
        make_model("mixtral"), make_tokens(1)
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LAYER] + ["mixtral"])
def test_both_counts_differ_by_attention_neurons_and_routers(name):
    model = make_model(name)
    structure = ModelStructure.of(model)
    neurons = sum(group.size for group in structure.groups if group.kind == "mlp_neurons")
    routers = sum(m.weight.numel() for m in model.modules() if type(m).__name__.endswith("TopKRouter"))
    assert (routers > 0) == (name in ("mixtral", "qwen3_moe"))
    difference = count_macs_with_attention(model, make_tokens(2)) - count_macs(model, 2, 16)
    assert difference == LAYERS * products(16, batch=2) + 2 * 16 * (routers - neurons)


def test_layers_of_different_widths():
    model = make_model("llama")
    kept, counts = random_units(ModelStructure.of(model), ("kv_groups", "mlp_neurons"), uniform=False)
    model = cut(model, kept, counts, "per_layer")
    weights = neurons = attention = 0
    for layer in model.model.layers:
        heads, width = layer.self_attn.o_proj.in_features // HEAD_DIM, layer.mlp.down_proj.in_features
        weights += 3 * heads * HEAD_DIM * HIDDEN + 3 * HIDDEN * width  # q, o, and k, v of half the heads
        neurons, attention = neurons + width, attention + products(16, heads)
    assert count_macs(model, 1, 16) == 16 * (weights + HIDDEN * VOCAB + neurons)
    assert count_macs_with_attention(model, make_tokens(1)) == 16 * (weights + HIDDEN * VOCAB) + attention


def test_tinyllama():
    """TinyLlama-1.1B at 1 x 64 tokens."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(count_macs(model) / 1e9, 3) == 66.211


def test_modes_are_restored():
    model = make_model("llama").train()
    count_macs_with_attention(model, make_tokens(1))
    assert model.training and torch.is_grad_enabled()
