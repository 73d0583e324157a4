"""DeciLM checkpoints: the logits of an independent reading of them are those of the Transformers model."""

import itertools
import json

import families
import pytest
import torch
from decilm import DeciLM, width_of
from transformers import AutoTokenizer

from hf_structprune.commands.cli import main
from hf_structprune.errors import ConfigurationError, ExportError
from hf_structprune.export.common import Block
from hf_structprune.export.deci import FAMILIES, block_configs, export_deci, fit
from hf_structprune.model.loading import load_model
from hf_structprune.model.structure import ModelStructure


WIDTH = 512
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def make(name="llama", **changes):
    """A model in float64 with 4 layers, 6 query heads of 8 in 3 KV groups, and MLPs 512 wide."""
    options = dict(
        intermediate_size=WIDTH, num_hidden_layers=4, hidden_size=48, num_attention_heads=6, num_key_value_heads=3,
        rope_parameters=ROPE,
    )  # fmt: skip
    return families.make_model(name, dtype=torch.float64, **{**options, **changes})


def cut(model, counts, layout="per_layer", dropped=None):
    """The model with so many units in each layer, the first ones, and without what is dropped."""
    kept, structure = {}, ModelStructure.of(model)
    for (layer, kind), count in counts.items():
        group = structure.layers[layer].group(kind)
        blocks = range(counts.get((layer, "kv_groups"), group.blocks) if kind == "query_heads" else 1)
        size = group.size // group.blocks
        kept[layer, kind] = torch.cat([torch.arange(count) + block * size for block in blocks])
    return families.cut(model, kept, counts, layout, dropped)


def same_logits(model, folder):
    """The configuration that was read, after the logits have been compared."""
    read, tokens = DeciLM(folder), families.make_tokens(3, 11)
    expected = families.logits(model, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(read(tokens), expected, rtol=0, atol=1e-6)
    return read.config


def test_a_llama_that_only_a_mistral_can_describe(tmp_path):
    model = make(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    model = cut(model, {(layer, "kv_groups"): 3 for layer in range(4)}, "uniform")
    assert type(model).__name__ == "MistralForCausalLM"  # 6 heads do not divide 64
    export_deci(model, tmp_path / "out")
    assert same_logits(model, tmp_path / "out").num_attention_heads == 6


def test_scaled_rotary_positions_are_handed_over(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make(rope_parameters={**rope, "original_max_position_embeddings": 16})
    export_deci(model, tmp_path / "out")
    assert DeciLM(tmp_path / "out").config.rope_parameters == model.config.rope_parameters


WIDTHS = {(0, "mlp_neurons"): 256, (2, "mlp_neurons"): 37}
# The same number of query heads everywhere, 2 or 4 or 1 of a KV head; 2, 1 and 3 KV heads.
KV_HEADS = {(layer, "kv_groups"): kv for layer, kv in enumerate((1, 3, 1, 3))}
EQUAL_HEADS = {
    **{(layer, "kv_groups"): kv for layer, kv in enumerate((2, 1, 2, 1))},
    **{(layer, "query_heads"): rep for layer, rep in enumerate((1, 2, 1, 2))},
}


@pytest.mark.parametrize("name, changes", [
    ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama_bias", {}), ("qwen2", {}),
    ("mistral", {"sliding_window": None, "head_dim": 16}), ("llama", {"num_key_value_heads": 6}),
])  # fmt: skip
def test_logits_are_the_same_for_whole_models(name, changes, tmp_path):
    model = make(name, **changes)
    result = export_deci(model, tmp_path / "out")
    config = same_logits(model, tmp_path / "out")
    assert [block.ffn.ffn_mult for block in config.block_configs] == [3 * WIDTH / (2 * 48)] * 4
    assert (result.details["padding"], result.details["parameters"]) == (0, families.count(model))


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("counts, dropped", [
    (WIDTHS, None), (EQUAL_HEADS, None), ({**WIDTHS, **EQUAL_HEADS}, None),
    (WIDTHS, {"attention": [1, 2]}), (WIDTHS, {"mlp": [0, 3]}), ({}, {"attention": [3], "mlp": [1, 2], "layers": [0]}),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_logits_are_the_same_where_layers_differ(name, counts, dropped, pad, tmp_path):
    model = cut(make(name), counts, dropped=dropped)
    result = export_deci(model, tmp_path / "out", pad=pad)
    config = same_logits(model, tmp_path / "out")
    widths = widths_of(model)
    if pad:
        assert result.details["mlp_widths"] == [-(-width // 256) * 256 for width in widths]
        assert all(hasattr(block.ffn, "ffn_mult") for block in config.block_configs)
        assert result.details["padding"] == result.details["parameters"] - families.count(model)
        assert (result.details["padding"] > 0) == (37 in widths)
    else:
        assert result.details["mlp_widths"] == widths
        assert result.details["parameters"] == families.count(model)
        said = [hasattr(block.ffn, "intermediate_size") for block in config.block_configs]
        assert said == [width == 37 for width in widths]


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen2"])
@pytest.mark.parametrize("counts, dropped, heads, kv_heads", [
    (KV_HEADS, None, 6, [1, 3, 1, 3]),  # 2 or 6 query heads, two of each KV head
    ({**KV_HEADS, (1, "query_heads"): 1, (3, "query_heads"): 1}, None, 3, [1, 3, 1, 3]),
    ({(0, "kv_groups"): 2, (1, "query_heads"): 1}, None, 6, [2, 3, 3, 3]),  # 4, 3 and 6 heads
    ({}, {"attention": [0]}, 6, [1, 3, 3, 3]),
    ({(1, "kv_groups"): 1}, {"attention": [0, 2]}, 6, [1, 1, 0, 3]),
])  # fmt: skip
def test_padding_makes_fit_what_does_not(name, counts, dropped, heads, kv_heads, tmp_path):
    model = cut(make(name), counts, dropped=dropped)
    with pytest.raises(ExportError, match="`pad`"):
        export_deci(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = export_deci(model, tmp_path / "out", pad=True)
    config = same_logits(model, tmp_path / "out")
    assert (config.num_attention_heads, result.details["kv_heads"]) == (heads, kv_heads)
    assert any("Zeros were added" in note for note in result.notes)


@pytest.mark.parametrize(
    "blocks, number", [([Block(2, 2, 4), Block(1, 2, 4)], 1), ([Block(1, 1, 4), Block(3, 2, 0)], 0)]
)
def test_heads_that_differ_are_named(blocks, number):
    with pytest.raises(ExportError, match=f"^Layer {number} has {blocks[number].heads} query heads .* uniform layout"):
        fit(blocks, pad=False)


def test_padding_is_the_least_that_fits():
    """By brute force: no smaller number of query heads, and for it no fewer KV heads, holds all layers."""

    def kv_heads(block, heads):
        """All numbers of KV heads with which so many query heads hold a layer."""
        groups = [group for group in range(block.group, heads + 1) if heads % group == 0]
        return [heads // group for group in groups if heads // group >= block.kv_heads]

    sizes = [(kv, group) for kv in range(1, 5) for group in range(1, 5)]
    for one, other in itertools.product(sizes, sizes):
        blocks = [Block(*one, 0), Block(*other, 256)]
        padded = fit(blocks, pad=True)
        (heads,) = {block.heads for block in padded}
        assert not any(all(kv_heads(block, fewer) for block in blocks) for fewer in range(1, heads))
        assert [block.kv_heads for block in padded] == [min(kv_heads(block, heads)) for block in blocks]


def test_every_width_is_read_as_it_was_written():
    for hidden in (64, 576, 2048, 2560, 3072, 4096, 8192):
        for width in range(256, 28672, 256):
            (block,) = block_configs([Block(1, 1, width)], hidden)
            assert width_of(block["ffn"]["ffn_mult"], hidden) == width
    (block,) = block_configs([Block(2, 4, 255)], 64)
    assert block == {
        "attention": {"no_op": False, "n_heads_in_group": 4, "replace_with_linear": False},
        "ffn": {"no_op": False, "intermediate_size": 255, "replace_with_linear": False},
    }


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt2", "mixtral"])
def test_other_models_are_refused_with_those_that_are_not(name, tmp_path):
    with pytest.raises(ExportError, match=", ".join(FAMILIES)):
        export_deci(families.make_model(name), tmp_path / "out")
    with pytest.raises(ExportError, match="sliding window"):
        export_deci(families.make_model("mistral"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_becomes_a_folder_with_its_tokenizer(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "in")
    tiny_tokenizer.save_pretrained(tmp_path / "in")
    result = export_deci(tmp_path / "in", tmp_path / "out", pad=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer.get_vocab()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "configuration_decilm.py"} <= names
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert values["auto_map"] == {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    assert "per_layer_config" not in values and values["sliding_window"] is None
    assert result.notes[0].startswith("Run in vLLM") and result.size > 0
    with pytest.raises(ConfigurationError, match="is a file"):
        export_deci(tmp_path / "in", tmp_path / "in" / "config.json")
    with pytest.raises(ConfigurationError, match="the checkpoint itself"):
        export_deci(tmp_path / "in", tmp_path / "in")


def test_notes_say_what_sglang_does_not_read(tmp_path):
    result = export_deci(cut(make(), {**WIDTHS, **EQUAL_HEADS}), tmp_path / "out")
    assert any("layers 2 are" in note and "SGLang does not" in note for note in result.notes)
    assert any("which SGLang refuses" in note for note in result.notes)


def test_the_command_says_where_it_was_run(tmp_path, capsys):
    cut(make(), {**KV_HEADS, **WIDTHS}).save_pretrained(tmp_path / "in")
    words = ["export", str(tmp_path / "in"), "--format", "deci", "--output", str(tmp_path / "out")]
    assert main(words) == 2 and "`pad`" in capsys.readouterr().err
    assert main([*words, "--pad"]) == 0
    printed = capsys.readouterr().out
    assert "not run in SGLang" in printed and "Zeros were added: " in printed
    assert main([*words, "--overwrite", "--pad", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mlp_widths"] == [256, 512, 256, 512] and values["padding"] > 0
    assert main([*words, "--overwrite", "--pad", "--quant", "q8_0"]) == 2


@pytest.mark.slow
def test_a_real_per_layer_model(per_layer_smollm2, tmp_path):
    result = export_deci(per_layer_smollm2, tmp_path / "out", pad=True)
    model = load_model(per_layer_smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("The capital of France is Paris. Water boils at", return_tensors="pt").input_ids
    expected = families.logits(model, tokens)
    torch.testing.assert_close(DeciLM(tmp_path / "out", torch.float32)(tokens), expected, rtol=0, atol=1e-3)
    assert expected.std() > 1 and len(set(widths_of(model))) > 1
    assert result.details["mlp_widths"] == [-(-width // 256) * 256 for width in widths_of(model)]


def widths_of(model):
    mlps = [getattr(layer.mlp, "down_proj", None) for layer in model.model.layers]
    return [0 if mlp is None else mlp.in_features for mlp in mlps]
